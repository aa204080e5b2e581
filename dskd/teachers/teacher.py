"""Teachers: what gives a signal for the supervised positions of a batch.

A live teacher is a frozen model run on the batch; the signal of a cached one is in columns that the
loader added to it; routed ones run each row's domain teacher; a student may be its own, as it is at
that step.
All return a Signal in the order of the batch, so that a loss cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dskd.batch import (
    IGNORE,
    Batch,
    ProjectedTeacher,
    ProjectedTeachers,
    Signal,
    TopKTeacher,
)
from dskd.data.prepared import RowBatch
from dskd.data.views import Shown
from dskd.models.families import positions_of
from dskd.models.frozen import evaluating
from dskd.stores.logits import TOPK_IDS, TOPK_LOGPROBS, TOPK_TAIL

Teacher = Callable[[Batch], Signal]
"""Maps a batch to the signal of its N supervised positions, in the order of the batch; no gradient
flows into it."""


class FrozenTeacher:
    """A frozen model, replicated or ZeRO-3-sharded.

    Args:
        model: a HuggingFace LM; put into eval mode, gradients off.
        vocabulary: number of real tokens; padding columns beyond are dropped.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._vocabulary = vocabulary

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ProjectedTeacher:
        """Run the model on the batch, up to its last linear map."""
        positions = positions_of(self._model, batch)
        return ProjectedTeacher(positions.hidden_ND, positions.projection, self._vocabulary)


class StudentAsTeacher:
    """The student itself, as it is: in eval mode and without gradient.

    It runs inside the forward of the module DeepSpeed wraps, before the student's own pass (ZeRO-3
    then gathers every weight for two passes of one order). It draws no random numbers, and every
    module's mode is put back, so that the student's pass is what it would be without.
    """

    def __init__(self, student: nn.Module, vocabulary: int) -> None:
        self._student = student
        self._vocabulary = vocabulary

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ProjectedTeacher:
        """Run the student on the batch, up to its last linear map."""
        with evaluating(self._student):
            positions = positions_of(self._student, batch)
        return ProjectedTeacher(positions.hidden_ND, positions.projection, self._vocabulary)


class ShownUnmasked:
    """Shows a teacher the rows as they are: at every supervised position the label is the input.

    For masked LMs, whose labels are what the mask hides; causal ones see their rows whole.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def __call__(self, batch: Batch) -> Signal:
        """The teacher's signal on the unmasked batch."""
        ids_BT = torch.where(batch.supervised_BT, batch.labels_BT, batch.ids_BT)
        return self._teacher(replace(batch, ids_BT=ids_BT))


class StoredTeacher:
    """A teacher whose signal was stored: it is in the batch's columns, by the loader's
    :class:`~dskd.stores.logits.CachedLogits`.

    Args:
        temperature: the temperature that the loader's tail masses belong to.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, batch: Batch) -> TopKTeacher:
        """The cache's values at the positions of the batch."""
        columns = batch.columns
        tail_N = {self._temperature: columns[TOPK_TAIL]}
        return TopKTeacher(columns[TOPK_IDS], columns[TOPK_LOGPROBS], tail_N)


class RoutedTeachers:
    """Live teachers by domain; each row is taught by its domain's.

    Every rank runs every teacher once per batch, on a row without supervision where it has none for
    it, because a ZeRO-3 teacher called on one rank only would hang the others.

    The batch has the columns of :func:`group_by_domain`: where a domain has its rows is found on
    the CPU beforehand, so that nothing waits for a GPU to count.
    """

    def __init__(self, by_domain: dict[int, FrozenTeacher]) -> None:
        self._by_domain = dict(sorted(by_domain.items()))  # as the columns go

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ProjectedTeachers:
        """Run each teacher on its rows, up to its last linear map."""
        parts = []
        row = position = 0
        for domain, teacher in self._by_domain.items():
            here_B = batch.domains_B == domain
            rows, positions = int(here_B.sum()), int(batch.counts_B[here_B].sum())
            if rows:
                here = slice(position, position + positions)
                part = _part(
                    batch,
                    here_B,
                    batch.columns[GROUPED_ROWS][row : row + rows],
                    batch.columns[GROUPED_POSITIONS][here],
                    batch.columns[GROUPED_PLACES][here],
                )
            else:
                part = _first_row(batch)
            parts.append(teacher(part))
            row, position = row + rows, position + positions
        return ProjectedTeachers(parts, batch.columns[GROUPED_PLACES])


GROUPED_ROWS = "grouped_rows"
"""Column of a batch, int64 [B]: its rows' indices, domain by domain."""
GROUPED_PLACES = "grouped_places"
"""Column of a batch, int64 [N]: which of the supervised positions, domain by domain."""
GROUPED_POSITIONS = "grouped_positions"
"""Column of a batch, int64 [N]: where these are in the flattened rows of their domain alone."""


def group_by_domain(rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
    """The :class:`~dskd.data.views.Reader` of the columns that :class:`RoutedTeachers` need."""
    rows_B = np.argsort(rows.domains_B, kind="stable")
    domains_B = rows.domains_B[rows_B]
    # Of each row the number that it has among those of its domain.
    rank_B = np.empty_like(rows_B)
    rank_B[rows_B] = np.arange(len(rows_B)) - np.searchsorted(domains_B, domains_B)
    row_N, place_N = np.nonzero(shown.labels_BT != IGNORE)
    places_N = np.argsort(rows.domains_B[row_N], kind="stable")
    position_N = rank_B[row_N] * shown.labels_BT.shape[1] + place_N
    return {GROUPED_ROWS: rows_B, GROUPED_PLACES: places_N, GROUPED_POSITIONS: position_N[places_N]}


def _part(
    batch: Batch, here_B: Tensor, rows_S: Tensor, positions_M: Tensor, places_M: Tensor
) -> Batch:
    """The rows ``here_B`` (bool, on the CPU) of a batch, and their positions, on its device."""
    return Batch(
        row_ids_B=batch.row_ids_B[here_B],
        domains_B=batch.domains_B[here_B],
        lengths_B=batch.lengths_B[here_B],
        counts_B=batch.counts_B[here_B],
        ids_BT=batch.ids_BT.index_select(0, rows_S),
        mask_BT=batch.mask_BT.index_select(0, rows_S),
        labels_BT=batch.labels_BT.index_select(0, rows_S),
        positions_N=positions_M,
        labels_N=batch.labels_N.index_select(0, places_M),
        types_BT=None if batch.types_BT is None else batch.types_BT.index_select(0, rows_S),
    )


def _first_row(batch: Batch) -> Batch:
    """The batch's first row with no supervised position."""
    return Batch(
        row_ids_B=batch.row_ids_B[:1],
        domains_B=batch.domains_B[:1],
        lengths_B=batch.lengths_B[:1],
        counts_B=torch.zeros_like(batch.counts_B[:1]),
        ids_BT=batch.ids_BT[:1],
        mask_BT=batch.mask_BT[:1],
        labels_BT=torch.full_like(batch.labels_BT[:1], IGNORE),
        positions_N=batch.positions_N[:0],
        labels_N=batch.labels_N[:0],
        types_BT=None if batch.types_BT is None else batch.types_BT[:1],
    )
