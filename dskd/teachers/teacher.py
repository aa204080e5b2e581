"""Teachers: what gives a signal for the supervised positions of a batch.

A live teacher is a frozen model run on the batch; a cached one reads what the loader attached to
it; a routed one asks each row's domain teacher; a student may be its own, as it is at that step.
All return a Signal in Rows order, so that a loss cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dskd.batch import IGNORE, Batch, DenseTeacher, ProjectedTeacher, Signal, TopKTeacher
from dskd.models.families import rows_of
from dskd.models.frozen import evaluating


class Teacher(Protocol):
    """Maps a batch to the signal of its N supervised positions."""

    def __call__(self, batch: Batch) -> Signal:
        """The signal in Rows order; no gradient flows into it."""
        ...


class Live:
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
        rows = rows_of(self._model, batch)
        return ProjectedTeacher(rows.hidden_ND, rows.projection, self._vocabulary)


class Own:
    """The student itself, as it is: in eval mode and without gradient.

    It runs inside the forward of the module DeepSpeed wraps, before the student's own pass (ZeRO-3
    then gathers every weight for two passes of one order). It draws no random numbers, and every
    module's mode is put back, so that the student's pass is what it would be without.

    Args:
        student: the model under training.
        vocabulary: number of real tokens; padding columns beyond are dropped.
    """

    def __init__(self, student: nn.Module, vocabulary: int) -> None:
        self._student = student
        self._vocabulary = vocabulary

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ProjectedTeacher:
        """Run the student on the batch, up to its last linear map."""
        with evaluating(self._student):
            rows = rows_of(self._student, batch)
        return ProjectedTeacher(rows.hidden_ND, rows.projection, self._vocabulary)


class Unmasked:
    """Shows a teacher the rows as they are: at every supervised position the label is the input.

    For masked LMs, whose labels are what the mask hides; causal ones see their rows whole.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def __call__(self, batch: Batch) -> Signal:
        """The teacher's signal on the unmasked batch."""
        ids_BT = torch.where(batch.supervised_BT, batch.labels_BT, batch.ids_BT)
        return self._teacher(replace(batch, ids_BT=ids_BT))


class Cached:
    """Reads ``topk_ids``, ``topk_logprobs`` and ``tail`` from the batch's extra tensors.

    Args:
        temperature: the temperature the loader's tail masses belong to.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, batch: Batch) -> TopKTeacher:
        """The attached rows of the cache."""
        extra = batch.extra
        return TopKTeacher(
            extra["topk_ids"], extra["topk_logprobs"], {self._temperature: extra["tail"]}
        )


class Routed:
    """Live teachers by domain; each row is taught by its domain's.

    Every rank runs every teacher once per batch, on a row without supervision where it has none for
    it, because a ZeRO-3 teacher called on one rank only would hang the others.
    """

    def __init__(self, by_domain: dict[int, Live]) -> None:
        self._by_domain = by_domain

    @torch.no_grad()
    def __call__(self, batch: Batch) -> DenseTeacher:
        """Run each teacher on its rows and put the logits in Rows order."""
        per_row_B = batch.supervised_BT.sum(1)
        domain_N = batch.domains_B.repeat_interleave(per_row_B)
        whole_NV: Tensor | None = None
        for domain, teacher in self._by_domain.items():
            rows_S = (batch.domains_B == domain).nonzero().squeeze(1)
            part_NV = teacher(batch.select(rows_S) if len(rows_S) else _unsupervised_row(batch))
            logits_MV = part_NV.logits_NV
            if whole_NV is None:
                shape = (len(domain_N), logits_MV.shape[1])
                whole_NV = torch.zeros(shape, device=logits_MV.device)  # fp32 holds any teacher's
            if len(rows_S):
                whole_NV[domain_N == domain] = logits_MV.float()
        assert whole_NV is not None
        return DenseTeacher(whole_NV)


def _unsupervised_row(batch: Batch) -> Batch:
    """The batch's first row with no supervised position."""
    row = batch.select(torch.zeros(1, dtype=torch.int64, device=batch.ids_BT.device))
    return Batch(
        row_ids_B=row.row_ids_B,
        domains_B=row.domains_B,
        ids_BT=row.ids_BT,
        mask_BT=row.mask_BT,
        labels_BT=torch.full_like(row.labels_BT, IGNORE),
    )
