"""KL from a top-k teacher, per token, in closed form on devices without kernels.

A row is K + 1 buckets: its kept tokens, and all others together. The mass of the others is summed
directly and never is a difference to 1: it is the sum of a matrix of exponentials in which the kept
ones have been struck out. Buckets are worked on in logarithms, a [C, B] matrix. The gradient is the
matrix of exponentials times a number of the row, and the kept columns by themselves.

Shape letters: N rows (tokens), C of them in a chunk, V columns, K kept logits, B = K + 1 buckets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.cpu.chunks import (
    LOWEST,
    Chunk,
    ChunkRows,
    ChunkSoftmax,
    Labels,
    Logits,
    ScaleAndCap,
    add_label,
    by_chunks,
    exponentials,
    filled,
    scratch,
    weighted_rows,
)


def topk_rows(
    student_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weight_N: Tensor,
    label_weight_N: Tensor | None,
    *,
    mode: str,
    temperature: float,
    student_map: ScaleAndCap,
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] and label loss [N] or None, both unweighted; and the gradient.

    Arguments and results are those of ``topk_rows`` in ``dskd/kernels/topk.py``, float64 logits
    (with weights and losses in float64) taken too; these logits are not used up. A row without used
    slots has the divergence 0.
    """
    dtype = wide(student_NV.dtype)
    student = Logits(student_NV, student_map, temperature, dtype)
    divergence_N = student_NV.new_zeros(len(student_NV), dtype=dtype)
    label_N = None if labels_N is None else torch.zeros_like(divergence_N)
    labels = None if labels_N is None else Labels(labels_N, label_weight_N)
    slots = _Slots(ids_NK)
    teacher = _Teacher(slots, logprobs_NK, tail_N if mode == "tail" else None)
    slope_N1 = weight_N[:, None].masked_fill(slots.empty_N1, 0.0) * student.over
    unweighted_N1 = slope_N1 == 0
    buffers = scratch(2, student_NV)

    def compute(rows: ChunkRows, shifted: bool) -> Chunk:
        exps_CV, spare_CV = filled(buffers, rows)
        part = _split(student.read(rows, False), slots, rows, shifted)
        if mode == "truncated" and labels is None:
            total_C1, totals = exps_CV.zero_()[:, :1], []
        else:
            total_C1 = exponentials(part.others_CV, student.over, shifted, exps_CV, part.ids_CK)
            totals = [total_C1]
        buckets_CB = torch.cat((part.kept_CK * student.over, total_C1.log()), 1)
        if mode == "truncated":
            buckets_CB[:, -1] = -torch.inf
        loss_C1, grad_CB = teacher.divergence(rows, buckets_CB)
        # 0 times what is there may be NaN
        loss_C1.masked_fill_(unweighted_N1[rows], 0.0)
        grad_CB.mul_(slope_N1[rows]).masked_fill_(unweighted_N1[rows], 0.0)
        grad_CK, grad_C1 = grad_CB.split((grad_CB.shape[1] - 1, 1), 1)
        scale_C1 = (grad_C1 / total_C1).masked_fill_(total_C1 == 0, 0.0)
        chunk = Chunk(totals, [loss_C1], [(exps_CV, scale_C1)], [(part.ids_CK, grad_CK)])
        if labels is not None:
            label_C1 = part.logits_CV.gather(1, labels.ids_N1[rows])
            if shifted:
                label_C1 -= part.peak_C1
            read = (rows, shifted, part.others_CV, exps_CV, total_C1)
            softmax = ChunkSoftmax(*read, label_C1, part.ids_CK, part.kept_CK)
            add_label(chunk, student, softmax, labels, spare_CV)
        return chunk

    losses = [divergence_N] if label_N is None else [divergence_N, label_N]
    weighted_N = weighted_rows(weight_N, label_weight_N)
    by_chunks(weighted_N, buffers.shape[1], [student], compute, losses, grad_NV)
    return divergence_N, label_N


class _Slots:
    """Slots of kept tokens.

    Attributes:
        ids_NK: int64; an unused slot repeats an id of its row.
        unused_NK: bool, slots that name no token; None if there are none.
        empty_N1: bool, rows without any used slot. Their first slot holds column 0.
    """

    def __init__(self, ids_NK: Tensor) -> None:
        unused_NK = ids_NK < 0
        self.ids_NK, self.unused_NK = ids_NK.long(), None
        self.empty_N1 = unused_NK.all(1, keepdim=True)
        if unused_NK.any():
            largest_N1 = self.ids_NK.amax(1, keepdim=True).clamp_(min=0)
            self.ids_NK = torch.where(unused_NK, largest_N1, self.ids_NK)
            self.unused_NK = unused_NK


class _Teacher:
    """The teacher's view of the buckets: with its tail, or scaled to mass 1 without."""

    def __init__(self, slots: _Slots, logprobs_NK: Tensor, tail_N: Tensor | None) -> None:
        if slots.unused_NK is not None:
            logprobs_NK = logprobs_NK.masked_fill(slots.unused_NK, -torch.inf)
        if tail_N is None:
            total_N1 = logprobs_NK.logsumexp(1, keepdim=True)
            logprobs_NK = logprobs_NK - total_N1.masked_fill_(total_N1 == -torch.inf, 0.0)
            self._log_p_NB = F.pad(logprobs_NK, (0, 1), value=-torch.inf)
        else:
            self._log_p_NB = torch.cat((logprobs_NK, tail_N[:, None]), 1)
        self._p_NB = self._log_p_NB.exp()
        self._mass_N1 = self._p_NB.sum(1, keepdim=True)
        self._none_NB = (self._p_NB == 0) | slots.empty_N1

    def divergence(self, rows: ChunkRows, buckets_CB: Tensor) -> tuple[Tensor, Tensor]:
        """``sum p log(p / q)`` [C, 1], q the softmax of the buckets, and its gradient by them."""
        p_CB, log_q_CB = self._p_NB[rows], buckets_CB.log_softmax(1)
        terms_CB = (self._log_p_NB[rows] - log_q_CB).mul_(p_CB)
        loss_C1 = terms_CB.masked_fill_(self._none_NB[rows], 0.0).sum(1, keepdim=True)
        return loss_C1, log_q_CB.exp_().mul_(self._mass_N1[rows]).sub_(p_CB)


class _Part(NamedTuple):
    """A chunk of the student's logits taken apart into kept tokens and others.

    Attributes:
        ids_CK: as in :class:`_Slots`.
        kept_CK: logits of the kept tokens, ``-inf`` on unused slots.
        logits_CV: the chunk as read.
        others_CV: it, or, shifted, a copy of it less ``peak``, the kept ones at ``-inf``.
        peak_C1: the largest of the others, which shifted ``kept_CK`` is relative to.
    """

    ids_CK: Tensor
    kept_CK: Tensor
    logits_CV: Tensor
    others_CV: Tensor
    peak_C1: Tensor | None


def _split(logits_CV: Tensor, slots: _Slots, rows: ChunkRows, shifted: bool) -> _Part:
    ids_CK = slots.ids_NK[rows]
    kept_CK = logits_CV.gather(1, ids_CK)
    if slots.unused_NK is not None:
        first_C1 = kept_CK[:, :1].clone()
        kept_CK.masked_fill_(slots.unused_NK[rows], -torch.inf)
        kept_CK[:, :1] = torch.where(slots.empty_N1[rows], first_C1, kept_CK[:, :1])
    if not shifted:
        return _Part(ids_CK, kept_CK, logits_CV, logits_CV, None)
    others_CV = logits_CV.scatter(1, ids_CK, -torch.inf)
    peak_C1 = others_CV.amax(1, keepdim=True)
    # without others, the kept ones must not lose their digits to LOWEST
    peak_C1 = torch.where(peak_C1 == -torch.inf, kept_CK.amax(1, keepdim=True), peak_C1)
    peak_C1.clamp_(min=LOWEST)
    return _Part(ids_CK, kept_CK.sub_(peak_C1), logits_CV, others_CV.sub_(peak_C1), peak_C1)
