"""Divergence from full logits and cross entropy, per token, in closed form, where no kernel is.

Closed forms, the gradient in the visit of the loss, by chunks of rows that stay in the cache
(:mod:`dskd.fused.cpu.chunks`). Arithmetic in fp32, or float64 for float64 logits. The callers have
checked the arguments.

Shape letters: N rows (tokens), C of them in a chunk, V student columns, W teacher columns (W <= V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.cpu.chunks import (
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
    unweighted,
    weighted_rows,
)
from dskd.fused.cpu.kinds import CLOSED_FORMS, Pair, mixed


def dense_rows(
    student_NV: Tensor,
    teacher_NW: Tensor,
    labels_N: Tensor | None,
    weight_N: Tensor,
    reverse_N: Tensor | None,
    label_weight_N: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_map: ScaleAndCap,
    teacher_map: ScaleAndCap,
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] of ``kind`` and label loss [N] or None, both unweighted; and the gradient.

    Arguments and results are those of ``dense_rows`` in ``dskd/kernels/dense.py``; float64 logits
    are taken too, and have weights and losses in float64.
    """
    dtype = wide(student_NV.dtype)
    student = Logits(student_NV, student_map, temperature, dtype)
    teacher = Logits(teacher_NW, teacher_map, temperature, dtype)
    divergence_N = student_NV.new_zeros(len(student_NV), dtype=dtype)
    label_N = None if labels_N is None else torch.zeros_like(divergence_N)
    labels = None if labels_N is None else Labels(labels_N, label_weight_N)
    slope_N1 = weight_N[:, None] * student.over
    buffers = scratch(5, student_NV)

    def compute(rows: ChunkRows, shifted: bool) -> Chunk:
        *own, spare_CV = filled(buffers, rows)
        pair = Pair(student, teacher, rows, shifted, own)
        if reverse_N is None:
            loss_C1, terms = CLOSED_FORMS[kind](pair, beta)
            slope_C1 = slope_N1[rows]
        else:
            loss_C1, terms = mixed(pair, weight_N[rows, None], reverse_N[rows, None])
            slope_C1 = student.over
        terms = [(matrix, column_C1 * slope_C1) for matrix, column_C1 in terms]
        if shifted:
            # without a softmax
            loss_C1.masked_fill_((pair.zs == 0) | (pair.zt == 0), torch.nan)
        if labels is not None:
            terms = unweighted(terms, loss_C1, ~divergent_N[rows, None])
        chunk = Chunk([pair.zs, pair.zt], [loss_C1], terms)
        if labels is not None:
            label_C1 = pair.s.gather(1, labels.ids_N1[rows])
            softmax = ChunkSoftmax(rows, shifted, pair.s, pair.es, pair.zs, label_C1)
            add_label(chunk, student, softmax, labels, spare_CV)
        return chunk

    divergent_N = weighted_rows(weight_N, reverse_N)
    weighted_N = weighted_rows(weight_N, reverse_N, label_weight_N)
    losses = [divergence_N] if label_N is None else [divergence_N, label_N]
    by_chunks(weighted_N, buffers.shape[1], [student, teacher], compute, losses, grad_NV)
    return divergence_N, label_N


def label_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    label_weight_N: Tensor,
    *,
    student_map: ScaleAndCap,
    grad_NV: Tensor | None,
) -> Tensor:
    """Cross entropy [N] alone; the arguments are those of :func:`dense_rows`."""
    dtype = wide(logits_NV.dtype)
    logits = Logits(logits_NV, student_map, 1.0, dtype)
    label_N = logits_NV.new_zeros(len(logits_NV), dtype=dtype)
    labels = Labels(labels_N, label_weight_N)
    buffers = scratch(1, logits_NV)

    def compute(rows: ChunkRows, shifted: bool) -> Chunk:
        (exps_CV,) = filled(buffers, rows)
        s_CV = logits.read(rows, shifted)
        total_C1 = exponentials(s_CV, logits.unit, shifted, exps_CV)
        chunk = Chunk([total_C1], [], [(exps_CV, torch.zeros_like(total_C1))])
        label_C1 = s_CV.gather(1, labels.ids_N1[rows])
        softmax = ChunkSoftmax(rows, shifted, s_CV, exps_CV, total_C1, label_C1)
        add_label(chunk, logits, softmax, labels, exps_CV)
        return chunk

    weighted_N = weighted_rows(label_weight_N)
    by_chunks(weighted_N, buffers.shape[1], [logits], compute, [label_N], grad_NV)
    return label_N
