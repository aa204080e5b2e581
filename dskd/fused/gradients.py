"""PyTorch operators of losses that compute their gradient themselves, together with the loss.

The backward pass multiplies it by the upstream gradient, a scalar that stays on the device, and
leaves what was saved as it was, so that it may run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dskd.fused.arguments import Losses, gradient_room, unit_columns, wide
from dskd.fused.backend import on_triton, row_functions

_PART = 1 << 20
"""Elements of a gradient that are scaled at once on a CPU."""


def wanted(value: Tensor) -> bool:
    """Whether the backward pass may need this argument's gradient."""
    return torch.is_grad_enabled() and value.requires_grad


def total_of(
    divergence_N: Tensor, weight_N: Tensor, label_N: Tensor | None, label_weight_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum, and the losses it is made of; where a weight is 0, so is its loss."""
    total = (divergence_N * weight_N).sum()
    if label_N is None:
        return total, divergence_N, divergence_N.new_empty(0)
    return total + (label_N * label_weight_N).sum(), divergence_N, label_N


def detached(outputs: Sequence[Tensor]) -> Losses:
    """An operator's first three outputs; the gradient flows into the total alone."""
    total, divergence_N, label_N = outputs[:3]
    return Losses(total, divergence_N.detach(), label_N.detach())


def room(student_NV: Tensor, gradient: bool) -> Tensor:
    """Where the gradient of logits waits for the upstream one; empty if there is none.

    In fp32 for 16-bit logits: it is rounded once, when both have been multiplied. Before the loss
    scale, which is upstream, has been multiplied in, fp16 would have no room for it at all.
    """
    shape = student_NV.shape if gradient else (0, 0)
    return torch.empty(shape, dtype=wide(student_NV.dtype), device=student_NV.device)


def operator(name: str, rest: str, rows: Callable[..., tuple]) -> Callable[..., Losses]:
    """Register a loss of logits [N, V] as a PyTorch operator, for autograd and torch.compile.

    Args:
        name: below ``dskd::``.
        rest: schema of the arguments after ``student, weight, label_weight``.
        rows: ``(student_NV, weight, label_weight_N, *rest, grad_NV)`` -> total, divergence [N],
            label loss [N] or [0]; ``weight`` has N rows, ``grad_NV`` may be None.

    Returns:
        The loss: takes the logits, the tuple of the arguments after them, and the ``out`` of
        :func:`~dskd.fused.dense.dense_kd`: a matrix for the gradient, or None, for autograd.
    """
    schema = (
        f"(Tensor student, Tensor weight, Tensor? label_weight, {rest}, bool gradient) "
        f"-> (Tensor, Tensor, Tensor, Tensor)"
    )

    def compute(student_NV: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *arguments, gradient = arguments
        grad_NV = room(student_NV, gradient)
        student_NV = unit_columns(student_NV)
        return *rows(student_NV, *arguments, grad_NV if gradient else None), grad_NV

    def shapes(student_NV: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        weight, label_weight_N, gradient = *arguments[:2], arguments[-1]
        count = student_NV.shape[0]
        label_N = weight.new_empty(0 if label_weight_N is None else count)
        losses = (weight.new_empty(()), weight.new_empty(count), label_N)
        return *losses, room(student_NV, gradient)

    def keep(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)  # a matrix of zeros, for an output without a gradient
        ctx.save_for_backward(output[3])
        ctx.dtype = inputs[0].dtype
        # a list of tensors has a list of gradients
        ctx.others = [[None] * len(x) if _is_tensors(x) else None for x in inputs[1:]]

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        refuse_second_order()
        (grad_NV,) = ctx.saved_tensors
        return scaled(grad_NV, upstream, ctx.dtype), *ctx.others

    registered = torch.library.custom_op(f"dskd::{name}", compute, mutates_args=(), schema=schema)
    registered.register_fake(shapes)
    registered.register_autograd(backward, setup_context=keep)

    def loss(student_NV: Tensor, arguments: tuple[Any, ...], out: Tensor | None) -> Losses:
        if out is None:
            return detached(registered(student_NV, *arguments, wanted(student_NV)))
        gradient_room(out, student_NV)
        return Losses(*rows(unit_columns(student_NV), *arguments, out))

    return loss


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, Tensor) for x in value)


def refuse_second_order() -> None:
    """Raise under ``create_graph=True``: the gradient is a number here, without a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError("a fused loss cannot be differentiated with create_graph=True")


def scaled(gradient: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``gradient * upstream``, multiplied in fp32 and rounded once, to ``dtype``.

    None where nothing comes from upstream.
    """
    if upstream is None:
        return None
    if gradient.dtype == dtype:
        return gradient * upstream.to(dtype)
    return _scaled(gradient, upstream, dtype)


@torch.library.custom_op(
    "dskd::scaled", mutates_args=(), schema="(Tensor x, Tensor by, ScalarType dtype) -> Tensor"
)
def _scaled(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if on_triton(x):
        row_functions("scale", x).scale(x, by, out)
        return out
    # by parts: what is multiplied stands in fp32 before it is rounded
    for part, into in zip(x.view(-1).split(_PART), out.view(-1).split(_PART), strict=True):
        torch.mul(part, by, out=into)
    return out


@_scaled.register_fake
def _(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
