"""Loss and gradients of hidden states and head, chunk by chunk, of `linear_kd`'s checked arguments.

Shape letters: N tokens, C of them in a chunk, V student columns, W teacher columns, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.chunking import Buffer, HeadGradients, chunk_of, chunks, operand, project
from dskd.fused.logit_loss import LossForm
from dskd.fused.mixed_logits import MIXTURE_BUFFERS, Mixture
from dskd.fused.teacher_logits import runs_ahead, teacher_logits


def visit(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    loss: LossForm,
    *,
    logits_dtype: torch.dtype,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """Total, divergence [N], label loss [N] or [0], and the gradients that are needed.

    Beside these and what it is given it takes ``C V`` times :func:`_bytes_per_logit`, V as a
    multiple of 64: C is as many tokens as the budget of a chunk holds.
    """
    count, columns = len(hidden_ND), len(weight_VD)
    hidden_ND, weight_VD = operand(hidden_ND), operand(weight_VD)
    bias_V = None if bias_V is None else operand(bias_V)
    device, in_place = hidden_ND.device, hidden_ND.dtype == logits_dtype
    each = _bytes_per_logit(loss, hidden_ND.dtype, logits_dtype, runs_ahead(device))
    size = chunk or chunk_of(count, columns, each, device)
    size = min(size, max(1, count))
    teacher = None
    if loss.form in ("linear", "mixed"):
        mixture = None
        if loss.form == "mixed":
            mixture = Mixture(*loss.mixture, temperature=loss.temperature)
        teacher = teacher_logits(loss.teacher, count, size, logits_dtype, mixture, loss.maps[4:])
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, needs)
    logits = Buffer(size, columns, logits_dtype, device)
    rounded = None
    if any(needs) and not in_place:
        rounded = Buffer(size, columns, hidden_ND.dtype, device)
    losses = {"dtype": wide(hidden_ND.dtype), "device": device}
    divergence_N = torch.empty(count, **losses)
    label_N = torch.empty(0 if loss.weights.label_N is None else count, **losses)
    for rows in chunks(count, size):
        hidden_CD = hidden_ND[rows]
        logits_CV = logits.first(len(hidden_CD))
        project(hidden_CD, weight_VD, bias_V, logits_CV)
        grad_CV = None
        if any(needs):
            grad_CV = logits_CV if rounded is None else rounded.first(len(hidden_CD))
        teacher_CW = None if teacher is None else next(teacher)
        divergence_N[rows], label_C = loss.rows(rows, logits_CV, grad_CV, teacher_CW)
        if label_C is not None:
            label_N[rows] = label_C
        if grad_CV is not None:
            gradients.add(rows, hidden_CD, grad_CV)
    return *loss.total(divergence_N, label_N), gradients


def _bytes_per_logit(loss: LossForm, hidden: torch.dtype, logits: torch.dtype, ahead: bool) -> int:
    """What a chunk takes for each of its logits: the student's, the teacher's (and the next
    chunk's), what mixing them takes, and their gradient in the type of the operands."""
    buffers = (2 + ahead) if loss.form in ("linear", "mixed") else 1
    if loss.form == "mixed":
        buffers += MIXTURE_BUFFERS
    masked = 1 if loss.maps[4:] else 0  # which of them are -inf
    return buffers * logits.itemsize + masked + (0 if hidden == logits else hidden.itemsize)
