"""GLUE (Wang et al. 2019): the files of the official download, exactly as they are.

Tab-separated, UTF-8, never quoted: a quotation mark is text as any other. What a task's files look
like is a table; whatever does not look so is refused by file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dskd.data.text_files import Advance, text_lines
from dskd.errors import DataError

_LAST = -1


@dataclass(frozen=True)
class GlueFiles:
    """What the files of a task hold.

    Attributes:
        columns: number of cells of a row.
        names: how the first line names the columns that are read, in the order of ``places``; None:
            the first line is a row.
        places: of the text, the second text (None: there is none) and the label.
        labels: the classes; none: the label is a number from 0 to ``top``.
        dev_columns: where the files to evaluate on have another number of cells.
        drops_others: whether rows of another number of cells are left out; else they are refused.
    """

    columns: int
    names: tuple[str, ...] | None
    places: tuple[int, int | None, int]
    labels: tuple[str, ...] = ("0", "1")
    top: float = 1.0
    dev_columns: int | None = None
    drops_others: bool = False


_ENTAILED = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

GLUE = {
    "cola": GlueFiles(4, None, (3, None, 1)),
    "sst2": GlueFiles(2, ("sentence", "label"), (0, None, 1)),
    "mrpc": GlueFiles(5, ("#1 String", "#2 String", "Quality"), (3, 4, 0)),
    "qqp": GlueFiles(6, ("question1", "question2", "is_duplicate"), (3, 4, 5), drops_others=True),
    "stsb": GlueFiles(10, (*_SENTENCES, "score"), (7, 8, _LAST), labels=(), top=5.0),
    "mnli": GlueFiles(
        12,
        (*_SENTENCES, "gold_label"),
        (8, 9, _LAST),
        labels=("entailment", "neutral", "contradiction"),
        dev_columns=16,
    ),
    "qnli": GlueFiles(4, ("question", "sentence", "label"), (1, 2, _LAST), labels=_ENTAILED),
    "rte": GlueFiles(4, (*_SENTENCES, "label"), (1, 2, _LAST), labels=_ENTAILED),
    "wnli": GlueFiles(4, (*_SENTENCES, "label"), (1, 2, _LAST)),
}
"""By the names of the tasks."""


class GlueRow(NamedTuple):
    """A row: texts without space at their ends, which may be empty; the name of its class, or its
    number as a share of the largest one; file and line."""

    text: str
    pair: str | None
    label: str | float
    place: str


def glue_rows(
    path: Path, task: str, split: str, advance: Advance, dropped: Callable[[], object]
) -> Iterator[GlueRow]:
    """The rows of a file.

    Args:
        task: one of :data:`GLUE`.
        split: ``train``, or one that begins with ``dev``.
        advance: told of the bytes read.
        dropped: called for each row that is left out (of QQP those of other than 6 cells).

    Raises:
        DataError: the file is not UTF-8 or not of the task, or a row is not; names the line.
    """
    files = GLUE[task]
    columns = files.columns if split == "train" else files.dev_columns or files.columns
    lines = text_lines(path, advance)
    if files.names is not None:
        _check_names(path, next(lines, (1, ""))[1], files, columns, task)
    for number, line in lines:
        if not line.strip():
            continue
        cells, place = line.split("\t"), f"{path}:{number}"
        if len(cells) == columns:
            yield _row(cells, files, place)
        elif files.drops_others:
            dropped()
        else:
            raise DataError(f"{place}: {len(cells)} cells, but rows of {task} have {columns}")


def _check_names(path: Path, line: str, files: GlueFiles, columns: int, task: str) -> None:
    cells = line.split("\t")
    places = [place for place in files.places if place is not None]
    if len(cells) != columns or tuple(cells[place] for place in places) != files.names:
        raise DataError(
            f"{path}:1: not of GLUE's {task}, whose first line names {columns} columns, among them "
            f"{', '.join(files.names or ())}: {cells}"
        )


def _row(cells: list[str], files: GlueFiles, place: str) -> GlueRow:
    text, pair, label = files.places
    found = cells[label].strip()
    given: str | float = found
    if not files.labels:
        given = _number(found, files.top, place)
    elif found not in files.labels:
        raise DataError(f"{place}: the label {found!r} is none of {', '.join(files.labels)}")
    return GlueRow(cells[text].strip(), None if pair is None else cells[pair].strip(), given, place)


def _number(text: str, top: float, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= top:
        raise DataError(f"{place}: the score {text!r} is no number from 0 to {top:g}")
    return number / top
