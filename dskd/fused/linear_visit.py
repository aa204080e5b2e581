"""Loss and gradients of hidden states and head, chunk by chunk, of `linear_kd`'s checked arguments.

Shape letters: N tokens, C of them in a chunk, V student columns, W teacher columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.chunking import Buffer, HeadGradients, chunk_of, chunks, operand, project
from dskd.fused.logit_loss import LossForm

ChunkLoss = Callable[[slice, Tensor, Tensor | None], tuple]
"""(tokens of the chunk, their logits, room for the gradient) -> divergence [C], label loss [C]."""


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
    """Total, divergence [N], label loss [N] or [0], and the gradients that are needed."""
    count, columns = len(hidden_ND), len(weight_VD)
    hidden_ND, weight_VD = operand(hidden_ND), operand(weight_VD)
    bias_V = None if bias_V is None else operand(bias_V)
    device, in_place = hidden_ND.device, hidden_ND.dtype == logits_dtype
    bytes_per_logit = logits_dtype.itemsize * (2 if loss.form == "linear" else 1)
    bytes_per_logit += 0 if in_place else hidden_ND.dtype.itemsize
    size = chunk or chunk_of(count, columns, bytes_per_logit, device)
    size = min(size, max(1, count))
    chunk_loss = _chunk_loss(loss, size, logits_dtype)
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
        divergence_N[rows], label_C = chunk_loss(rows, logits_CV, grad_CV)
        if label_C is not None:
            label_N[rows] = label_C
        if grad_CV is not None:
            gradients.add(rows, hidden_CD, grad_CV)
    return *loss.total(divergence_N, label_N), gradients


def _chunk_loss(loss: LossForm, size: int, logits_dtype: torch.dtype) -> ChunkLoss:
    if loss.form != "linear":
        return loss.rows
    hidden_NE, weight_WE, *bias = map(operand, loss.teacher)
    buffer = Buffer(size, len(weight_WE), logits_dtype, weight_WE.device)

    def chunk_loss(rows: slice, logits_CV: Tensor, grad_CV: Tensor | None) -> tuple:
        teacher_CW = buffer.first(len(logits_CV))
        project(hidden_NE[rows], weight_WE, bias[0] if bias else None, teacher_CW)
        return loss.dense(rows, logits_CV, teacher_CW, grad_CV)

    return chunk_loss
