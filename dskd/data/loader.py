"""The loader: which rows every rank sees at every step, a pure function of (seed, step).

An epoch's order sorts the row ids by counter-based keys of (seed, epoch, row). The epochs follow
each other without a gap, and optimiser step s takes the ``batch`` rows from position ``s * batch``
on, so a batch may span two epochs. Micro-batch m of rank r is a fixed slice of it: all geometries
see the same rows in the same step, and the number of steps taken is all there is to checkpoint.

Shape letters: B rows, T tokens, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch
from dskd.data.counter import mix
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.errors import ConfigError

_ORDER = 5  # stream of random numbers, apart from those of the masks


class Attachment(NamedTuple):
    """What a stored teacher brings: the masks that its logits belong to, and the logits."""

    inputs_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]
    extra: dict[str, np.ndarray]


Attach = Callable[
    [NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    Attachment,
]
"""``attach(row_ids_B, domains_B, epochs_B, ids_BT, lengths_B)``."""


class Loader:
    """One rank's endless stream of optimiser steps; the next one is made in a thread meanwhile.

    Args:
        rows: the training rows.
        view: masks them.
        batch: rows of an optimiser step over all ranks.
        micro_batch: rows of a forward pass on a rank.
        rank: this rank.
        world: number of ranks.
        seed: of the order.
        attach: replaces the view where a store holds the masks.
        ready: whether the batch of a position can be made yet; None: always. It is made when it is
            asked for, not before, if it could not be by then.
        position: optimiser steps already taken.
        pin: put the tensors into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ConfigError: ``batch`` is no multiple of ``micro_batch * world``.
    """

    def __init__(
        self,
        rows: RowSet,
        view: View,
        *,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        attach: Attach | None = None,
        ready: Callable[[int], bool] | None = None,
        position: int = 0,
        pin: bool = False,
    ) -> None:
        if batch % (micro_batch * world):
            raise ConfigError(
                f"train.batch: {batch} is no multiple of train.micro_batch ({micro_batch}) times "
                f"the number of ranks ({world})"
            )
        self.position = position
        self._rows = rows
        self._view = view
        self._batch = batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world = world
        self._attach = attach
        self._ready = ready
        self._pin = pin
        self._order = _Order(len(rows), seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dskd-loader")
        self._next = self._ahead()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step, on the CPU."""
        batches = self._make(self.position) if self._next is None else self._next.result()
        self.position += 1
        self._next = self._ahead()
        return batches

    def close(self) -> None:
        """Stop the thread (after the step it is working on)."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _ahead(self) -> Future[list[Batch]] | None:
        """The next step, begun in the thread, if it can be."""
        if self._ready is not None and not self._ready(self.position):
            return None
        return self._thread.submit(self._make, self.position)

    def _make(self, step: int) -> list[Batch]:
        per_round = self._micro_batch * self._world
        batches = []
        for begin in range(0, self._batch, per_round):
            first = step * self._batch + begin + self._rank * self._micro_batch
            row_ids_B, epochs_B = self._order.take(first, self._micro_batch)
            batch = make_batch(self._rows, self._view, row_ids_B, epochs_B, self._attach)
            batches.append(_pinned(batch) if self._pin else batch)
        self._order.forget(before=(step + 1) * self._batch)
        return batches


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


def sequential(
    rows: RowSet, view: View, *, begin: int, end: int, micro_batch: int, epoch: int
) -> Iterator[Batch]:
    """Rows ``begin`` to ``end - 1`` in order, as in ``epoch``; the last batch may be short."""
    for first in range(begin, end, micro_batch):
        row_ids_B = np.arange(first, min(first + micro_batch, end), dtype=np.int64)
        yield make_batch(rows, view, row_ids_B, np.full_like(row_ids_B, epoch), None)


def make_batch(
    rows: RowSet,
    view: View,
    row_ids_B: NDArray[np.int64],
    epochs_B: NDArray[np.int64],
    attach: Attach | None,
) -> Batch:
    """The batch of the given rows as the given epochs show them."""
    ids_BT, lengths_B = rows.read(row_ids_B)
    domains_B = rows.domains_B(row_ids_B)
    if attach is None:
        seen = Attachment(*view(row_ids_B, epochs_B, ids_BT, lengths_B), extra={})
    else:
        seen = attach(row_ids_B, domains_B, epochs_B, ids_BT, lengths_B)
    mask_BT = np.arange(ids_BT.shape[1]) < lengths_B[:, None]
    return Batch(
        row_ids_B=torch.from_numpy(row_ids_B),
        domains_B=torch.from_numpy(domains_B),
        ids_BT=torch.from_numpy(seen.inputs_BT),
        mask_BT=torch.from_numpy(mask_BT.astype(np.int64)),
        labels_BT=torch.from_numpy(seen.labels_BT),
        extra={name: torch.from_numpy(array) for name, array in seen.extra.items()},
    )


def _pinned(batch: Batch) -> Batch:
    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    return Batch(
        row_ids_B=pin(batch.row_ids_B),
        domains_B=pin(batch.domains_B),
        ids_BT=pin(batch.ids_BT),
        mask_BT=pin(batch.mask_BT),
        labels_BT=pin(batch.labels_BT),
        extra={name: pin(tensor) for name, tensor in batch.extra.items()},
    )
