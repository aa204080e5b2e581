"""Rows of earlier tasks that are looked at again before each step.

Which ones is a function of (seed, task, step), whatever the number of ranks, so nothing of them is
kept in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dskd.batch import IGNORE, Batch
from dskd.data.counter import mix
from dskd.data.loader import make_batch
from dskd.data.prepared import RowBatch, RowSet
from dskd.data.views import Reader, Shown, View
from dskd.system import dist

_MEMORY = 12  # stream of random numbers, apart from those of masks, orders and draws


def drawn_rows(total: int, count: int, *coordinates: int) -> NDArray[np.int64]:
    """``count`` different rows out of ``total``, sorted, by the random numbers of ``coordinates``.

    The original draws with replacement, so a row may count twice there.

    Raises:
        ValueError: there are not so many.
    """
    if count > total:
        raise ValueError(f"{count} rows of {total}")
    keys_R = mix(_MEMORY, *coordinates, np.arange(total))
    return np.sort(np.argsort(keys_R, kind="stable")[:count])


@dataclass(frozen=True, kw_only=True)
class RowMemory:
    """What is remembered of one earlier task.

    Attributes:
        rows_M: ids of the rows.
        rowset: holds them.
        view: what the student sees of them.
        readers: of the columns that the loss reads.
        per_step: how many of the rows are taken before a step, each time others; None: all.
        micro_batch: rows of a forward pass on a rank.
        seed: of the run.
        task: number of the task in the sequence.
    """

    rows_M: NDArray[np.int64]
    rowset: RowSet
    view: View
    readers: Sequence[Reader] = ()
    per_step: int | None = None
    micro_batch: int
    seed: int
    task: int

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches before ``step``, as many on every rank.

        Rows that are about equally long are together. A rank that has no row left gets one in which
        nothing is supervised, so that it takes part in the pass and adds nothing.
        """
        rows_M = self.rows_M
        if self.per_step is not None:
            chosen = drawn_rows(len(rows_M), self.per_step, self.seed, self.task, step)
            rows_M = rows_M[chosen]
        rows_M = rows_M[np.lexsort((rows_M, self.rowset.lengths_B(rows_M)))]
        return [self._batch(mine, rows_M[:1]) for mine in self._own(rows_M)]

    def _own(self, rows_M: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """This rank's rows of each micro-batch; the last ones are dealt out evenly."""
        per_round = self.micro_batch * dist.world()
        for begin in range(0, len(rows_M), per_round):
            yield np.array_split(rows_M[begin : begin + per_round], dist.world())[dist.rank()]

    def _batch(self, rows_B: NDArray[np.int64], idle: NDArray[np.int64]) -> Batch:
        view = self.view if len(rows_B) else _Unsupervised(self.view)
        ids_B = rows_B if len(rows_B) else idle
        return make_batch(self.rowset, view, ids_B, np.zeros_like(ids_B), self.readers)


class _Unsupervised:
    """Another view's inputs without any label."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.draws = view.draws
        self.fingerprint = view.fingerprint

    def __call__(self, rows: RowBatch) -> Shown:
        inputs_BT, labels_BT = self._view(rows)
        return Shown(inputs_BT, np.full_like(labels_BT, IGNORE))
