"""Which class an exported classifier takes for which: counted on the validation rows, kept in
``confusion.json``, and shown as a heat map with the recall of each class.

Shape letters: N supervised positions of a batch, P those of all rows, C classes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dskd.batch import UNLABELLED, Batch, Positions
from dskd.errors import CheckpointError
from dskd.methods.metrics import ValueMetric
from dskd.settings.folders import RunFolder
from dskd.system.files import read_record, write_manifest
from dskd.system.markup import html_table

_SIDE = 440  # pixels of a heat map
_CELLS = (4, 28)  # smallest and largest, pixels
_NAMED = 24  # most classes whose names stand beside the map; of more they are shown on hovering
_OPEN = 4  # most maps that are not folded up
_LETTER = 6.5  # pixels, about


class Counts(BaseModel):
    """How many labelled rows of a class were taken for another, or for itself.

    Attributes:
        classes: all names, in the order of the logits.
        rows: by the label, then by the predicted class; those above 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    classes: list[str]
    rows: dict[str, dict[str, Annotated[int, Field(ge=1)]]]

    def labelled(self, label: str) -> int:
        """How many rows have this label."""
        return sum(self.rows.get(label, {}).values())

    def recall(self, label: str) -> float | None:
        """Share of its rows that were taken for it; None without any."""
        rows = self.labelled(label)
        return self.rows[label].get(label, 0) / rows if rows else None

    @property
    def right(self) -> int:
        """How many rows were taken for what they are."""
        return sum(said.get(label, 0) for label, said in self.rows.items())


class Confusion:
    """Counts while a classifier is evaluated; on every rank those of all rows.

    Args:
        classes: names, in the order of the logits.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = list(classes)
        self.counts: Counts | None = None
        """None until the evaluation is over."""
        self.metric = ValueMetric(_pairs, self._count)

    def write(self, path: Path) -> None:
        """Write what was counted.

        Raises:
            DiskError: it cannot be written.
        """
        assert self.counts is not None, "nothing was evaluated"
        write_manifest(path, self.counts.model_dump(), "the confusion of classes")

    def _count(self, pairs_P2: NDArray[np.float64]) -> dict[str, float]:
        """No result that a log could show."""
        known_P2 = pairs_P2[pairs_P2[:, 0] != UNLABELLED].astype(np.int64)
        found, counts = np.unique(known_P2, axis=0, return_counts=True)
        rows: dict[str, dict[str, int]] = {}
        for (label, said), count in zip(found.tolist(), counts.tolist(), strict=True):
            rows.setdefault(self._classes[label], {})[self._classes[said]] = count
        self.counts = Counts(classes=self._classes, rows=rows)
        return {}


def _pairs(positions: Positions, batch: Batch) -> Tensor:
    """Label and predicted class of each row, float64 [N, 2]."""
    del batch
    said_N = positions.logits_NV.argmax(1)
    return torch.stack([positions.labels_N, said_N], dim=1).double()


def read_counts(path: Path) -> Counts:
    """What :meth:`Confusion.write` left.

    Raises:
        CheckpointError: it is missing, damaged, or not as it writes it.
    """
    counts = read_record(path, Counts, CheckpointError)
    named = {*counts.rows, *(said for row in counts.rows.values() for said in row)}
    if unknown := named - {*counts.classes}:
        raise CheckpointError(f"{path}: damaged, {min(unknown)!r} is none of its classes")
    return counts


def confusion_section(runs: Mapping[str, RunFolder]) -> str:
    """HTML of the runs that exported a classifier: maps, and the recall of each class; empty where
    none did, or no row had a label."""
    found = {n: read_counts(run.confusion) for n, run in runs.items() if run.confusion.exists()}
    found = {name: counts for name, counts in found.items() if counts.rows}
    if not found:
        return ""
    opened = " open" if len(found) <= _OPEN else ""
    parts = ["<h2>Classes and what they are taken for</h2>"]
    for name, counts in found.items():
        rows = sum(map(counts.labelled, counts.classes))
        told = f"{html.escape(name)}: {counts.right:,} of {rows:,} rows right"
        parts.append(f"<details{opened}><summary>{told}</summary>{_map(counts)}</details>")
    for names in _of_one_kind(found):
        parts.append(_recalls({name: found[name] for name in names}))
    return "\n".join(parts)


def _of_one_kind(found: Mapping[str, Counts]) -> list[list[str]]:
    """Names of the runs, those together that have the same classes and rows of each."""
    kinds: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, counts in found.items():
        kind = tuple((label, counts.labelled(label)) for label in counts.classes)
        kinds.setdefault(kind, []).append(name)
    return list(kinds.values())


def _recalls(found: Mapping[str, Counts]) -> str:
    first = next(iter(found.values()))
    rows = []
    for label in first.classes:
        shares = [counts.recall(label) for counts in found.values()]
        texts = ["-" if share is None else f"{share:.2%}" for share in shares]
        rows.append([label, f"{first.labelled(label):,}", *texts])
    opened = " open" if len(rows) <= _NAMED else ""
    table = html_table(["class", "rows", *found], rows)
    return f"<details{opened}><summary>Recall of each class</summary>{table}</details>"


def _map(counts: Counts) -> str:
    """A square for each pair that occurs, a line for each label: the more of the label's rows, the
    darker, blue where they are right and red where they are wrong."""
    classes = counts.classes
    cell = min(max(_SIDE // len(classes), _CELLS[0]), _CELLS[1])
    side, room, names = cell * len(classes), 18, ""
    if len(classes) <= _NAMED:
        room = 18 + math.ceil(_LETTER * max(map(len, classes)))
        names = "".join(_name(label, place, cell) for place, label in enumerate(classes))
    places = {label: place for place, label in enumerate(classes)}
    squares = "".join(
        _square(counts, label, said, cell * places[said], cell * places[label], cell)
        for label, row in counts.rows.items()
        for said in row
    )
    return (
        f'<svg width="{side + room + 2}" style="max-width: 100%; height: auto" font-size="11" '
        f'viewBox="{-room} {-room} {side + room + 2} {side + room + 2}">'
        f'<text x="0" y="{10 - room}">taken for</text>'
        f'<text x="{2 - room}" y="0" transform="rotate(90 {2 - room} 0)">class</text>'
        f'<rect width="{side}" height="{side}" fill="none" stroke="#bbb"/>{names}{squares}</svg>'
    )


def _name(label: str, place: int, cell: int) -> str:
    """A class beside its line, and above its column."""
    middle, text = cell * place + cell / 2 + 4, html.escape(label)
    return (
        f'<text x="-4" y="{middle:g}" text-anchor="end">{text}</text>'
        f'<text x="{middle:g}" y="-4" transform="rotate(-90 {middle:g} -4)">{text}</text>'
    )


def _square(counts: Counts, label: str, said: str, x: int, y: int, cell: int) -> str:
    rows = counts.rows[label][said]
    share = rows / counts.labelled(label)
    colour = "var(--right)" if said == label else "var(--wrong)"
    told = html.escape(f"{label}: {rows:,} taken for {said} ({share:.1%})")
    return (
        f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{colour}" '
        f'fill-opacity="{0.15 + 0.85 * share:.2f}"><title>{told}</title></rect>'
    )
