"""The row function of top-k teachers on a CPU, and on any device that has no kernels.

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
from dskd.fused.cpu_chunks import (
    LOWEST,
    Chunk,
    Hot,
    Logits,
    Map,
    Rows,
    add_label,
    chunked,
    exponentials,
    labels_of,
    live,
    rows_of,
    scratch,
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
    student_map: Map,
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] and label loss [N] or None, both unweighted; and the gradient.

    Args:
        student_NV: fp32, fp16, bf16 or float64, unit column stride. (The kernels use it up.)
        ids_NK: int32 or int64, negative on unused slots.
        logprobs_NK: the teacher's at ``temperature``, over its whole vocabulary.
        tail_N: mode ``tail`` only: log of the mass of what is not kept.
        mode, temperature: see :func:`dskd.losses.topk_divergence`; no factor T^2.

    The other arguments are those of :func:`dskd.fused.cpu.dense_rows`. A row without used slots has
    the divergence 0.
    """
    dtype = wide(student_NV.dtype)
    student = Logits(student_NV, student_map, temperature, dtype)
    divergence_N = student_NV.new_zeros(len(student_NV), dtype=dtype)
    label_N = None if labels_N is None else torch.zeros_like(divergence_N)
    buffers = scratch(2, student_NV)

    def compute(rows: Rows, shifted: bool) -> Chunk:
        exps_CV, spare_CV = rows_of(buffers, rows)
        part = _split(student, rows, ids_NK[rows], shifted)
        if mode == "truncated" and labels_N is None:
            total_C1, totals = exps_CV.zero_()[:, :1], []
        else:
            total_C1 = exponentials(part.others_CV, student.over, shifted, exps_CV, part.ids_CK)
            totals = [total_C1]
        tail_C1 = tail_N[rows, None] if mode == "tail" else None
        log_p_CB = _teacher(part.used_CK, logprobs_NK[rows], tail_C1)
        buckets_CB = _buckets(part.kept_CK * student.over, total_C1)
        if mode == "truncated":
            buckets_CB[:, -1] = -torch.inf
        loss_C1, grad_CB = _divergence(log_p_CB, buckets_CB)
        grad_CB *= torch.where(part.empty_C1, 0.0, weight_N[rows, None] * student.over)
        grad_CK, grad_C1 = grad_CB[:, :-1], grad_CB[:, -1:]
        scale_C1 = torch.where(total_C1 > 0, grad_C1 / total_C1, 0.0)
        loss_C1 = torch.where(part.empty_C1, 0.0, loss_C1)
        chunk = Chunk(totals, [loss_C1], [(exps_CV, scale_C1)], [(part.ids_CK, grad_CK)])
        if labels_N is not None:
            hot = Hot(
                part.others_CV, exps_CV, total_C1, shifted, ids_CK=part.ids_CK, kept_CK=part.kept_CK
            )
            labels = labels_of(part.logits_CV, labels_N, label_weight_N, rows)
            labels = labels._replace(logits_C1=labels.logits_C1 - part.peak_C1)
            add_label(chunk, student, hot, labels, spare_CV)
        return chunk

    for rows, chunk in chunked(live(weight_N, label_weight_N), [student], compute, grad_NV):
        divergence_N[rows] = chunk.losses[0][:, 0]
        if label_N is not None:
            label_N[rows] = chunk.losses[1][:, 0]
    return divergence_N, label_N


class _Part(NamedTuple):
    """A chunk of the student's logits taken apart into kept tokens and others.

    Attributes:
        ids_CK: int64; an unused slot repeats an id of its row.
        used_CK: bool, slots that name a token.
        empty_C1: bool, rows without any; their first slot holds column 0.
        kept_CK: logits of the kept tokens, ``-inf`` on unused slots.
        logits_CV: the chunk as read.
        others_CV: it, or, shifted, a copy of it less ``peak``, the kept ones at ``-inf``.
        peak_C1: the largest of the others if shifted, which ``kept_CK`` is relative to; or 0.
    """

    ids_CK: Tensor
    used_CK: Tensor
    empty_C1: Tensor
    kept_CK: Tensor
    logits_CV: Tensor
    others_CV: Tensor
    peak_C1: Tensor


def _split(student: Logits, rows: Rows, ids_CK: Tensor, shifted: bool) -> _Part:
    logits_CV = student.read(rows, False)
    used_CK = ids_CK >= 0
    largest_C1 = ids_CK.amax(1, keepdim=True)
    empty_C1 = largest_C1 < 0
    ids_CK = torch.where(used_CK, ids_CK, largest_C1.clamp(min=0)).long()
    held_CK = used_CK.clone()
    held_CK[:, :1] |= empty_C1
    kept_CK = logits_CV.gather(1, ids_CK).masked_fill_(~held_CK, -torch.inf)
    peak_C1, others_CV = logits_CV.new_zeros(()), logits_CV
    if shifted:
        others_CV = logits_CV.scatter(1, ids_CK, -torch.inf)
        peak_C1 = others_CV.amax(1, keepdim=True)
        # without others, the kept ones must not lose their digits to LOWEST
        peak_C1 = torch.where(peak_C1 == -torch.inf, kept_CK.amax(1, keepdim=True), peak_C1)
        peak_C1.clamp_(min=LOWEST)
        others_CV.sub_(peak_C1)
        kept_CK.sub_(peak_C1)
    return _Part(ids_CK, used_CK, empty_C1, kept_CK, logits_CV, others_CV, peak_C1)


def _teacher(used_CK: Tensor, logprobs_CK: Tensor, tail_C1: Tensor | None) -> Tensor:
    """The log-probabilities of its buckets: with the tail, or scaled to mass 1 without it."""
    logprobs_CK = torch.where(used_CK, logprobs_CK, -torch.inf)
    if tail_C1 is not None:
        return torch.cat((logprobs_CK, tail_C1), 1)
    total_C1 = logprobs_CK.logsumexp(1, keepdim=True)
    logprobs_CK -= torch.where(total_C1 == -torch.inf, 0.0, total_C1)
    return F.pad(logprobs_CK, (0, 1), value=-torch.inf)


def _buckets(kept_CK: Tensor, total_C1: Tensor) -> Tensor:
    return torch.cat((kept_CK, total_C1.log()), 1)


def _divergence(log_p_CB: Tensor, buckets_CB: Tensor) -> tuple[Tensor, Tensor]:
    """``sum p log(p / q)`` [C, 1] with q the softmax of the buckets, and its gradient by them."""
    log_q_CB = buckets_CB.log_softmax(1)
    p_CB = log_p_CB.exp()
    loss_C1 = torch.where(p_CB == 0, 0.0, p_CB * (log_p_CB - log_q_CB)).sum(1, keepdim=True)
    return loss_C1, log_q_CB.exp_().mul_(p_CB.sum(1, keepdim=True)).sub_(p_CB)
