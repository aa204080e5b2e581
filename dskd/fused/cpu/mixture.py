"""KL from a mixture of teachers, per token, in closed form on devices without kernels.

With ``et_k = exp(t_k / T)`` of sum ``zt_k``, the teachers' weighted probabilities are gathered in
one matrix, ``x = sum_k w_k / zt_k et_k``; with ``w = sum_k w_k`` their mean is pbar = x / w. The
gradient of ``w KL(pbar || q)`` by the student's logits over T is ``w q - x``.

Shape letters: N rows (tokens), C of them in a chunk, V student columns, n teachers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.cpu.chunks import (
    MASKED,
    Chunk,
    ChunkRows,
    Logits,
    ScaleAndCap,
    by_chunks,
    exponentials,
    filled,
    scratch,
    weighted_rows,
)


def mixture_rows(
    student_NV: Tensor,
    teachers: list[Tensor],
    firsts: list[int],
    weight_Nn: Tensor,
    *,
    temperature: float,
    student_map: ScaleAndCap,
    grad_NV: Tensor | None,
) -> Tensor:
    """KL(pbar || q) [N], unweighted; and the gradient of its sum weighted by ``sum_k w_nk``.

    Arguments and results are those of ``mixture_rows`` in ``dskd/kernels/mixture.py``, float64
    logits (with weights and losses in float64) taken too. A teacher is not looked at in a row where
    its weight is 0.
    """
    dtype = wide(student_NV.dtype)
    student = Logits(student_NV, student_map, temperature, dtype)
    several = [Logits(teacher, (1.0, 0.0), temperature, dtype) for teacher in teachers]
    divergence_N = student_NV.new_zeros(len(student_NV), dtype=dtype)
    total_N = weight_Nn.sum(1)
    buffers = scratch(3, student_NV)

    def compute(rows: ChunkRows, shifted: bool) -> Chunk:
        es_CV, x_CV, spare_CV = filled(buffers, rows)
        s_CV, total_C1 = student.read(rows, shifted), total_N[rows, None]
        zs_C1 = exponentials(s_CV, student.over, shifted, es_CV)
        totals = [zs_C1]
        x_CV.zero_()
        for teacher, first, weight_N in zip(several, firsts, weight_Nn.unbind(1), strict=True):
            zt_C1 = _gather(teacher, rows, weight_N[rows, None], shifted, x_CV[:, first:], spare_CV)
            totals.append(zt_C1)
        # log pbar, but for the row's numbers, from x, and log q from the logits
        log_CV = torch.clamp(x_CV, min=torch.finfo(dtype).tiny, out=spare_CV).log_()
        log_CV.add_(s_CV, alpha=-student.over).mul_(x_CV)
        loss_C1 = log_CV.sum(1, keepdim=True) / total_C1 + (zs_C1 / total_C1).log()
        if shifted:
            lost_C1 = ((x_CV > 0) & (s_CV < MASKED)).any(1, keepdim=True)
            loss_C1.masked_fill_(lost_C1, torch.inf).masked_fill_(zs_C1 == 0, torch.nan)
        scale_C1 = total_C1 * student.over / zs_C1
        terms = [(es_CV, scale_C1), (x_CV, torch.full_like(scale_C1, -student.over))]
        return Chunk(totals, [loss_C1], terms)

    read, step = [student, *several], buffers.shape[1]
    by_chunks(weighted_rows(total_N), step, read, compute, [divergence_N], grad_NV)
    return divergence_N


def _gather(
    teacher: Logits,
    rows: ChunkRows,
    weight_C1: Tensor,
    shifted: bool,
    into: Tensor,
    spare_CV: Tensor,
) -> Tensor:
    """Add a teacher's weighted probabilities to its columns; returns its sums of exponentials."""
    exps = spare_CV[:, : teacher.columns]
    total_C1 = exponentials(teacher.read(rows, shifted), teacher.over, shifted, exps)
    unused_C1 = weight_C1 == 0
    if unused_C1.any():
        exps.masked_fill_(unused_C1, 0.0)
        total_C1.masked_fill_(unused_C1, 1.0)
    into[:, : teacher.columns].addcmul_(exps, weight_C1 / total_C1)
    return total_C1
