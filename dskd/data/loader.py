"""The loader: which rows every rank sees at every step, a pure function of (seed, step).

An epoch's order sorts the row ids by counter-based keys of (seed, epoch, row). The epochs follow
each other without a gap, and optimiser step s takes the ``batch`` rows from position ``s * batch``
on, so a batch may span two epochs. Micro-batch m of rank r is a fixed slice of it: all geometries
see the same rows in the same step, and the number of steps taken is all there is to checkpoint.

Labelled rows and questions are as long as their texts: those of a step are sorted by length before
they are cut into micro-batches, so that rows that are padded together are about equally long.

Shape letters: B rows, T tokens, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import TARGETS, Batch
from dskd.data.counter import mix
from dskd.data.prefetch import Sent, send
from dskd.data.prepared import RowBatch, RowSet
from dskd.data.views import Reader, View
from dskd.settings.length import ends_epoch

CPU = torch.device("cpu")

_ORDER = 5  # stream of random numbers, apart from those of the masks


class Loader:
    """One rank's endless stream of optimiser steps; the next one is made in a thread meanwhile.

    Args:
        rowset: the training rows.
        view: makes inputs and labels of them.
        batch: rows of an optimiser step over all ranks, a multiple of ``micro_batch * world``.
        micro_batch: rows of a forward pass on a rank.
        seed: of the order.
        readers: add columns to the batches.
        ready: whether the batch of a position can be made yet; None: always. If it cannot, it is
            made when it is needed, and not by the thread.
        position: optimiser steps already taken.
        device: where the batches are sent.
    """

    def __init__(
        self,
        rowset: RowSet,
        view: View,
        *,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        readers: Sequence[Reader] = (),
        ready: Callable[[int], bool] | None = None,
        position: int = 0,
        device: torch.device = CPU,
    ) -> None:
        assert batch % (micro_batch * world) == 0, (batch, micro_batch, world)
        self.position = position
        self._rowset = rowset
        self._view = view
        self._batch = batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world = world
        self._readers = readers
        self._ready = ready
        self._device = device
        self._order = _Order(len(rowset), seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dskd-loader")
        self._next = self._ahead()

    def next_step(self) -> list[Sent]:
        """This rank's micro-batches of the next optimiser step, on their way to the device."""
        batches = self._make(self.position) if self._next is None else self._next.result()
        self.position += 1
        self._next = self._ahead()
        return batches

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch of the rows ends in optimiser step ``step``, counted from 1."""
        return ends_epoch(step, self._batch, len(self._rowset))

    def close(self) -> None:
        """Stop the thread (after the step it is working on)."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _ahead(self) -> Future[list[Sent]] | None:
        """The next step, begun in the thread, if it can be."""
        if self._ready is not None and not self._ready(self.position):
            return None
        return self._thread.submit(self._make, self.position)

    def _make(self, step: int) -> list[Sent]:
        per_round = self._micro_batch * self._world
        ids, epochs = self._order.take(step * self._batch, self._batch)
        if self._rowset.by_length:
            by_length = np.lexsort((ids, self._rowset.lengths_B(ids)))
            ids, epochs = ids[by_length], epochs[by_length]
        batches = []
        for begin in range(0, self._batch, per_round):
            first = begin + self._rank * self._micro_batch
            mine = slice(first, first + self._micro_batch)
            batch = make_batch(self._rowset, self._view, ids[mine], epochs[mine], self._readers)
            batches.append(send(batch, self._device))
        self._order.forget(before=(step + 1) * self._batch)
        return batches


def rows_taken(rows: int, seed: int, count: int, draws: int) -> NDArray[np.bool_]:
    """Which of some rows are read in which draw, bool [draws, rows], by the first ``count`` places
    of the stream of this seed; epoch e has draw ``e % draws``."""
    order, taken_DR = _Order(rows, seed), np.zeros((draws, rows), bool)
    whole, rest = divmod(count, rows)
    taken_DR[: min(whole, draws)] = True
    if whole < draws:
        taken_DR[whole, order.take(whole * rows, rest)[0]] = True
    return taken_DR


class _Order:
    """The concatenated permutations of all epochs; those in use are kept."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def take(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row ids and epochs of ``count`` positions of the stream from ``first`` on."""
        epochs_B, places_B = np.divmod(np.arange(first, first + count, dtype=np.int64), self._rows)
        row_ids_B = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs_B).tolist():
            here_B = epochs_B == epoch
            row_ids_B[here_B] = self._epoch(epoch)[places_B[here_B]]
        return row_ids_B, epochs_B

    def forget(self, *, before: int) -> None:
        """Drop the epochs that end before position ``before`` of the stream."""
        for epoch in [e for e in self._epochs if (e + 1) * self._rows <= before]:
            del self._epochs[epoch]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            keys = mix(self._seed, _ORDER, epoch, np.arange(self._rows))
            self._epochs[epoch] = np.argsort(keys, kind="stable")
        return self._epochs[epoch]


def evenly_spaced(rows: int, limit: int | None) -> NDArray[np.int64]:
    """Ids of ``limit`` of some rows (None: of all): spread, because the rows lie source by source
    and one domain must not stand for all."""
    count = rows if limit is None else min(limit, rows)
    return np.arange(count, dtype=np.int64) * rows // count


def make_batch(
    rowset: RowSet,
    view: View,
    row_ids_B: NDArray[np.int64],
    epochs_B: NDArray[np.int64],
    readers: Sequence[Reader] = (),
) -> Batch:
    """The batch, on the CPU, of some rows, each as ``view`` shows it in its epoch; the readers add
    columns, each its own."""
    rows = rowset.rows(row_ids_B, epochs_B)
    shown = view(rows)
    if (count := len(shown.inputs_BT) // len(row_ids_B)) > 1:
        rows = rows.repeated(count)
    columns: dict[str, Tensor] = {}
    if rows.targets_B is not None:
        columns[TARGETS] = torch.from_numpy(rows.targets_B)
    for reader in readers:
        for name, array in reader(rows, shown).items():
            assert name not in columns, f"two readers make the column {name!r}"
            columns[name] = torch.from_numpy(array)
    return Batch.of(
        row_ids_B=torch.from_numpy(rows.ids_B),
        domains_B=torch.from_numpy(rows.domains_B),
        ids_BT=torch.from_numpy(shown.inputs_BT),
        mask_BT=torch.from_numpy(rows.real_BT.astype(np.int64)),
        labels_BT=torch.from_numpy(shown.labels_BT),
        types_BT=_types_BT(rows),
        columns=columns,
    )


def _types_BT(rows: RowBatch) -> Tensor | None:
    """Types of tokens; None where no row has a second text that its tokenizer marks."""
    if rows.seconds_B is None or (rows.seconds_B == rows.lengths_B).all():
        return None
    places_T = np.arange(rows.tokens_BT.shape[1])
    types_BT = (places_T >= rows.seconds_B[:, None]) & rows.real_BT
    return torch.from_numpy(types_BT.astype(np.int64))
