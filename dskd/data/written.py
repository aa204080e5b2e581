"""Rows of earlier tasks that a model wrote, or any engine, from JSON lines.

As by ``questions.py``, nothing is left out, and whatever makes no row is refused by file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dskd.data.json_files import checked_text, json_rows, json_type
from dskd.data.questions import Question, question_of_row
from dskd.data.sources import files, limited
from dskd.data.text_files import Advance
from dskd.errors import DataError
from dskd.settings.examples import ReplayedSource


class Written(NamedTuple):
    """One row as it was written behind its task's token.

    Attributes:
        ids: its tokens; None: it is given as text.
        text: its text, with the names of its special tokens; None: it is given as tokens.
        place: file and line, for messages.
    """

    ids: list[int] | None
    text: str | None
    place: str


def written_rows(source: ReplayedSource, advance: Advance = int) -> Iterator[Question | Written]:
    """The rows of a source, in its order.

    Raises:
        DataError: a path is missing or matches nothing; a file is not UTF-8, or a line no JSON, or
            of no row; there is no row at all. It names file and line.
    """
    found = (row for path in files(source) for row in _of_lines(path, advance))
    yield from limited(found, source, "row")


def _of_lines(path: Path, advance: Advance) -> Iterator[Question | Written]:
    for place, row in json_rows(path, advance, int):
        given = [key for key in ("ids", "text", "question") if isinstance(row, dict) and key in row]
        if len(given) != 1:
            what = json_type(row) if not isinstance(row, dict) else f"{given or 'none of them'}"
            raise DataError(f"{place}: one of the keys 'ids', 'text' and 'question', not {what}")
        if given == ["question"]:
            yield question_of_row(row, place)
        elif given == ["text"]:
            yield Written(None, checked_text(row["text"], place, "under the key 'text'"), place)
        else:
            yield Written(_checked_ids(row["ids"], place), None, place)


def _checked_ids(value: Any, place: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(f"{place}: no list of tokens under the key 'ids' but {json_type(value)}")
    for token in value:
        if type(token) is not int:  # a bool is an int, too
            raise DataError(f"{place}: 'ids' holds {json_type(token)}, and no token")
    return value
