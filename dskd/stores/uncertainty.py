"""The uncertainty store: what a classifier says of each row, and how sure it is of that.

Columns of a row (float32; C classes)::

    logits [C]     4 C   by a pass without dropout
    mean [C]       4 C   mean of the distributions of the passes with dropout, at temperature 1
    entropy        4     of that mean, in nats
    mean_entropy   4     mean of the entropies of the passes

With one pass only there is no dropout, and the last three are of that pass. One store a teacher;
training reads several side by side, by row id.

Shape letters: B rows, N supervised positions (one a row), n teachers, C classes of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import IGNORE, Batch, Panel
from dskd.data.prepared import RowBatch
from dskd.data.views import Shown
from dskd.errors import StoreError
from dskd.stores.manifest import MANIFEST, is_count
from dskd.stores.shard import Column, StoreSpec
from dskd.stores.store import Store
from dskd.stores.sweep import refuse_non_finite

KIND = "uncertainty"

# Columns of a batch, at its N supervised positions; see dskd.batch.Panel.
PANEL_CONFIDENCE = "panel_confidence"
"""float32 [N, n], how sure each teacher is."""
PANEL_PRESENT = "panel_present"
"""bool [N, n], which teachers are heard about the row; without it all of them are."""

_ROUNDING = 1e-5  # by which a confidence may be outside of 0 to 1

Values = TypeVar("Values", Tensor, NDArray[np.float32])


def panel_logits(index: int) -> str:
    """Name of the column of the logits of one teacher of a panel, float32 [N, C]."""
    return f"panel_logits_{index}"


def confidence(entropy: Values, classes: int) -> Values:
    """``1 - H / ln C``: 1 for a teacher that is sure, 0 for one that knows nothing, comparable
    between teachers of different numbers of classes (at least 2)."""
    return 1.0 - entropy / math.log(classes)


@dataclass(frozen=True)
class UncertaintyLayout:
    """What a store holds, and how it was found; kept in its manifest.

    Attributes:
        labels: names of the classes, in the order of the logits.
        passes: with dropout; 1: a single one without.
        dropout: the probability that was set for them; None: the model's own.
        seed: of the masks; None where there are none.
        micro_batch: rows that were scored together, where values depend on it; else None.
        at_once: most passes of one forward pass, as ``micro_batch``.
    """

    labels: tuple[str, ...]
    passes: int
    dropout: float | None = None
    seed: int | None = None
    micro_batch: int | None = None
    at_once: int | None = None

    def columns(self) -> dict[str, Column]:
        """The store's columns."""
        vector, scalar = Column("float32", (len(self.labels),)), Column("float32")
        return {"logits": vector, "mean": vector, "entropy": scalar, "mean_entropy": scalar}

    def spec(self, *, rows: int, rows_per_shard: int, fingerprints: Mapping[str, str]) -> StoreSpec:
        """What the store is; ``fingerprints`` are of all that its values depend on besides."""
        return StoreSpec(
            kind=KIND,
            columns=self.columns(),
            rows=rows,
            draws=1,
            rows_per_shard=rows_per_shard,
            fingerprints=fingerprints,
            settings={**asdict(self), "labels": list(self.labels)},
        )

    def encode(self, batch: Batch, **values: Tensor) -> dict[str, np.ndarray]:
        """The columns of the rows of a batch.

        Args:
            batch: on the CPU, with one supervised position a row.
            values: the columns by name, on the CPU.

        Raises:
            NonFiniteError: a row's are no numbers; the message names it.
        """
        assert (batch.counts_B == 1).all(), "a classified row has one supervised position"
        bad_N = torch.zeros(len(batch.counts_B), dtype=torch.bool)
        for each in values.values():
            bad_N |= ~each.reshape(len(bad_N), -1).isfinite().all(1)
        refuse_non_finite(batch, bad_N, "a teacher's")
        return {name: each.float().numpy() for name, each in values.items()}


class Uncertainty:
    """A complete store of one teacher, verified and open for reading; safe in threads.

    Args:
        layout: what it must hold; None: anything. The other arguments are those of
            :class:`~dskd.stores.store.Store`.

    Raises:
        StoreError: it is missing, incomplete, damaged, or made of something else.
    """

    def __init__(
        self,
        folder: Path,
        expect: Mapping[str, str],
        share: tuple[int, int] = (0, 1),
        layout: UncertaintyLayout | None = None,
    ) -> None:
        self._store = Store(folder, kind=KIND, expect=expect, share=share)
        self.layout = _layout(folder, self._store.spec)
        if layout is None:
            return
        for field in fields(UncertaintyLayout):
            there, here = getattr(self.layout, field.name), getattr(layout, field.name)
            if there != here:
                raise StoreError(f"{folder}: {field.name} is {there} there and {here} here")

    def read(self, row_ids_B: NDArray[np.int64], *columns: str) -> dict[str, np.ndarray]:
        """Columns of some rows.

        Raises:
            StoreError: a row is not of the data, or was not scored.
        """
        counts_B, found = self._store.read(row_ids_B, np.zeros_like(row_ids_B), columns)
        assert (counts_B == 1).all(), "a classified row has one supervised position"
        return found


class PanelPresence:
    """The :class:`~dskd.data.views.Reader` that says which teachers are heard about a row: those of
    its domain.

    Args:
        heard_Dn: bool, of each domain which teachers are; one at least.
    """

    def __init__(self, heard_Dn: NDArray[np.bool_]) -> None:
        assert heard_Dn.any(1).all(), "a domain of no teacher"
        self._heard_Dn = heard_Dn

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """The column :data:`PANEL_PRESENT`."""
        del shown
        return {PANEL_PRESENT: self._heard_Dn[rows.domains_B]}


class StoredPanel:
    """The :class:`~dskd.data.views.Reader` of several teachers' stores.

    Args:
        stores: in the order of the panel.
        confident: whether confidences are those of the stores; else they are found from the logits
            in training, at its temperature.
        heard_Dn: as of :class:`PanelPresence`, which says it to the loss; None: all are heard.
    """

    def __init__(
        self,
        stores: Sequence[Uncertainty],
        *,
        confident: bool,
        heard_Dn: NDArray[np.bool_] | None = None,
    ) -> None:
        self._stores = stores
        self._confident = confident
        self._heard_Dn = heard_Dn

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """The columns :func:`panel_logits` of each and, where confidences are the stores',
        :data:`PANEL_CONFIDENCE`; of a teacher that is not heard about a row they are 0."""
        assert ((shown.labels_BT != IGNORE).sum(1) == 1).all(), "one supervised position a row"
        columns: dict[str, np.ndarray] = {}
        confidences = []
        for index, store in enumerate(self._stores):
            classes = len(store.layout.labels)
            logits_NC = np.zeros((len(rows.ids_B), classes), np.float32)
            confidence_N = np.zeros(len(rows.ids_B), np.float32)
            here = slice(None)
            if self._heard_Dn is not None:
                here = np.flatnonzero(self._heard_Dn[rows.domains_B, index])
            read = store.read(rows.ids_B[here], "logits", "entropy")
            logits_NC[here] = read["logits"]
            confidence_N[here] = confidence(read["entropy"], classes)
            columns[panel_logits(index)] = logits_NC
            confidences.append(confidence_N)
        if self._confident:
            columns[PANEL_CONFIDENCE] = np.stack(confidences, 1)
        return columns


def stored_panel(batch: Batch, maps: Sequence[Tensor]) -> Panel:
    """The teachers as the columns of a batch say them.

    Args:
        batch: with the columns of :class:`StoredPanel` and, where some are not heard, those of
            :class:`PanelPresence`.
        maps: of each teacher int64 [C], on the batch's device; see :class:`~dskd.batch.Panel`.
    """
    columns = batch.columns
    logits = [columns[panel_logits(index)] for index in range(len(maps))]
    return Panel(logits, maps, columns.get(PANEL_CONFIDENCE), columns.get(PANEL_PRESENT))


class ConfidenceFile:
    """Confidences that something else has found: a ``.npy`` [rows, teachers], row r about row r of
    the training rows, column i about teacher i; itself a :class:`~dskd.data.views.Reader`.

    Args:
        path: the file, floating point, values from 0 to 1.
        rows: number of training rows.
        teachers: number of teachers.

    Raises:
        StoreError: the file cannot be read, is of another shape, or a value is no confidence; the
            message names the file and the row.
    """

    def __init__(self, path: Path, rows: int, teachers: int) -> None:
        try:
            values_Rn = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as problem:
            raise StoreError(f"{path}: cannot be read as a .npy file ({problem})") from problem
        if not isinstance(values_Rn, np.ndarray) or values_Rn.dtype.kind != "f":
            raise StoreError(f"{path}: holds no array of floating point numbers")
        if values_Rn.shape != (rows, teachers):
            raise StoreError(
                f"{path}: is {list(values_Rn.shape)}, but there are {rows} training rows and "
                f"{teachers} teachers"
            )
        right_Rn = (values_Rn >= -_ROUNDING) & (values_Rn <= 1.0 + _ROUNDING)
        if not right_Rn.all():
            row, teacher = np.argwhere(~right_Rn)[0].tolist()
            raise StoreError(
                f"{path}: row {row} has {values_Rn[row, teacher]} for teacher {teacher}; a "
                f"confidence is from 0 to 1"
            )
        self._values_Rn = values_Rn.astype(np.float32)

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """The column :data:`PANEL_CONFIDENCE`."""
        del shown
        return {PANEL_CONFIDENCE: self._values_Rn[rows.ids_B]}


def _layout(folder: Path, spec: StoreSpec) -> UncertaintyLayout:
    """What the manifest says, if :meth:`UncertaintyLayout.spec` may have written it."""
    settings = spec.settings
    right = (
        settings.keys() == {field.name for field in fields(UncertaintyLayout)}
        and spec.draws == 1
        and _are_labels(settings["labels"])
        and is_count(settings["passes"])
        and all(settings[n] is None or is_count(settings[n]) for n in ("micro_batch", "at_once"))
        and (settings["seed"] is None or type(settings["seed"]) is int)
        and (settings["dropout"] is None or _is_probability(settings["dropout"]))
    )
    labels = tuple(settings["labels"]) if right else ()
    layout = UncertaintyLayout(**{**settings, "labels": labels}) if right else None
    if layout is None or layout.columns() != spec.columns:
        raise StoreError(
            f"{folder / MANIFEST}: damaged, no uncertainty store has these settings and columns"
        )
    return layout


def _is_probability(value: Any) -> bool:
    return type(value) is float and 0.0 < value < 1.0


def _are_labels(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(isinstance(label, str) for label in value)
        and len(set(value)) == len(value)
    )
