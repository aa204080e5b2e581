"""Divergence and cross entropy from hidden states and the head's weight, by chunks: `linear_kd`.

The logits of no more than a chunk of tokens exist at a time. Loss and gradient come in one visit:
three products with the student's head and one with the teacher's (a recomputing backward pass would
take four and two).

Shape letters: N tokens, C of them in a chunk, V student columns, W teacher columns, D and E hidden
sizes of student and teacher, K kept logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskd.batch import SAME, LinearTeachers
from dskd.fused.arguments import (
    LogitMap,
    Losses,
    TokenWeight,
    kind_of,
    map_of,
    refuse,
    temperature_of,
    wide,
)
from dskd.fused.gradients import detached, refuse_second_order, scaled, wanted
from dskd.fused.linear_teacher import (
    LogitTeacher,
    autocast,
    check_form,
    check_head,
    check_masses_of,
    form_of,
)
from dskd.fused.linear_visit import visit
from dskd.fused.logit_loss import LossForm
from dskd.fused.per_token import TokenWeights, weights_of
from dskd.fused.tokens import Tokens


def linear_kd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    teacher: LogitTeacher,
    labels_N: Tensor | None = None,
    kind: str = "forward_kl",
    mode: str = "tail",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: TokenWeight = 1.0,
    reverse_weight: TokenWeight | None = None,
    label_weight: TokenWeight | None = None,
    ignore_index: int = -100,
    student_map: LogitMap = SAME,
    teacher_map: LogitMap = SAME,
    vocabulary: int | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Losses:
    """Divergence from a teacher, and cross entropy, of the logits ``hidden weight^T + bias``.

    The gradient reaches hidden states, weight and bias (a tied weight adds it to its other use's).
    Under ZeRO-3 call it inside the forward of the module that owns the weight.

    Args:
        hidden_ND: fp32, bf16, fp16 or float64; inside autocast it is cast as a linear layer's. Of
            tokens along several axes, [B, T, D], the teacher's are [B, T, ...], too (of those with
            a share of the tokens each: [M, E], and places count through all axes).
        weight_VD: of the same type.
        bias_V: likewise.
        teacher: whose divergence (classes of ``dskd/batch.py``); several linear ones have a share
            of the tokens each, all the same columns, and ``hidden_ND`` is copied in the order of
            their rows; those of a mixture have all tokens; None: cross entropy alone.
        kind, beta, teacher_map, vocabulary: of dense and linear teachers, see
            :func:`~dskd.fused.dense.dense_kd`; a top-k teacher's is the forward KL; those of
            a mixture have maps of their own.
        mode: of top-k teachers alone, see :func:`~dskd.fused.topk.topk_kd`.
        logits_dtype: what the logits of 16-bit operands are kept in; fp32 by default and, with a
            mixture, always. bf16
            logits save memory and cost precision: their rounding hides small differences of the
            softmaxes. Measured error of the gradient (bf16 operands, hidden states of student and
            teacher apart by 0.5, 0.1, 0.03, 0.01): 2, 6, 18, 66 %; with fp32 0.2 % throughout.
        label_weight: by default 1 without a teacher.
        chunk: tokens per chunk; by default what a fixed budget of memory holds.

    The other arguments are those of :func:`~dskd.fused.dense.dense_kd`.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named.
        TypeError: one that is no tensor, or of no such numbers, named.
    """
    tokens = Tokens.of("hidden", hidden_ND)
    hidden_ND, teacher = tokens.rows("hidden", hidden_ND), tokens.teacher(teacher)
    hidden_ND, weight_VD, bias_V = autocast("", hidden_ND, weight_VD, bias_V)
    check_head("", hidden_ND, weight_VD, bias_V)
    columns, dtype = len(weight_VD), logits_dtype or wide(hidden_ND.dtype)
    dtypes = dict.fromkeys((hidden_ND.dtype, wide(hidden_ND.dtype)))
    refuse(
        dtype not in dtypes,
        lambda: f"logits_dtype: must be {' or '.join(map(str, dtypes))}, not {dtype}",
    )
    refuse(chunk is not None and chunk < 1, lambda: f"chunk: must be at least 1, not {chunk}")
    # as the row functions will see them
    logits_NV = hidden_ND.new_empty(0, dtype=dtype).expand(len(hidden_ND), 0)
    temperature = temperature_of(temperature)
    found = form_of(teacher, logits_NV, columns, vocabulary, mode, temperature)
    kind_of(kind, beta, reverse_weight, found.narrower)
    check_form(found.form, kind, mode, vocabulary, teacher_map)
    several = isinstance(teacher, LinearTeachers) and teacher.maps is not None
    refuse(several and teacher_map != SAME, lambda: "teacher_map: each of several has its own")
    refuse(
        found.form == "mixed" and dtype != wide(dtype),
        lambda: f"logits_dtype: a mixture is made in fp32, not in {dtype}",
    )
    if teacher is None:
        weight = 0.0
        label_weight = 1.0 if label_weight is None and labels_N is not None else label_weight
    weights = weights_of(
        logits_NV,
        tokens.each("labels", labels_N),
        ignore_index,
        columns,
        tokens.each("weight", weight),
        tokens.each("reverse_weight", reverse_weight),
        tokens.each("label_weight", label_weight),
    )
    refuse(
        teacher is None and weights.label_N is None, lambda: "teacher: neither a teacher nor labels"
    )
    check_masses_of(teacher, mode, temperature, weights.divergence_N, columns)
    places_N = found.places_N
    if places_N is not None:  # the rows of one teacher together, for products of many rows
        hidden_ND = hidden_ND.index_select(0, places_N)
        weights = _in_order(weights, places_N)
    inputs = (hidden_ND, weight_VD, bias_V)
    needs = [x is not None and wanted(x) for x in inputs]
    of_all = found.map if several else map_of("teacher_map", teacher_map)
    maps = [*map_of("student_map", student_map), *of_all, *found.maps]
    kind = kind if found.form in ("dense", "linear", "mixed") else mode
    how = (found.form, kind, float(beta), temperature, maps, found.mixture)
    loss = (found.tensors, *weights, *how)
    losses = detached(_linear(*inputs, *loss, dtype, chunk or 0, needs))
    return tokens.losses(losses if places_N is None else _out_of_order(losses, places_N))


def _in_order(values: TokenWeights, places_N: Tensor) -> TokenWeights:
    return TokenWeights(*(x if x is None else x.index_select(0, places_N) for x in values))


def _out_of_order(losses: Losses, places_N: Tensor) -> Losses:
    def put(value_N: Tensor) -> Tensor:
        return torch.empty_like(value_N).index_copy_(0, places_N, value_N)

    label_N = put(losses.label_N) if losses.label_N.shape == places_N.shape else losses.label_N
    return Losses(losses.total, put(losses.divergence_N), label_N)


@torch.library.custom_op(
    "dskd::linear_kd",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] teacher, Tensor token_weight, "
    "Tensor? reverse, Tensor? labels, Tensor? label_weight, str form, str kind, float beta, "
    "float temperature, float[] maps, float[]? mixture, ScalarType logits_dtype, int chunk, "
    "bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher: list[Tensor],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    weights, (form, *how), (dtype, chunk, needs) = arguments[:4], arguments[4:10], arguments[10:]
    loss = LossForm(form, teacher, TokenWeights(*weights), *how)
    *losses, gradients = visit(
        hidden_ND, weight_VD, bias_V, loss, logits_dtype=dtype, chunk=chunk, needs=needs
    )
    return *losses, gradients.hidden_ND, gradients.weight_VD, gradients.bias_V


@_linear.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher: list[Tensor],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    divergence_N, labels_N, needs = arguments[0], arguments[2], arguments[-1]
    need_hidden, need_weight, need_bias = needs
    return (
        divergence_N.new_empty(()),
        torch.empty_like(divergence_N),
        divergence_N.new_empty(0 if labels_N is None else hidden_ND.shape[0]),
        divergence_N.new_empty(hidden_ND.shape if need_hidden else (0, 0)),
        divergence_N.new_empty(weight_VD.shape if need_weight else (0, 0)),
        divergence_N.new_empty(weight_VD.shape[0] if need_bias else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # zeros as large as the head, for outputs without a gradient
    ctx.save_for_backward(*output[3:])
    ctx.dtype, ctx.needs, ctx.teachers = inputs[0].dtype, inputs[-1], len(inputs[3])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    found = [
        scaled(gradient, upstream, ctx.dtype) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *found, [None] * ctx.teachers, *[None] * 13


_linear.register_autograd(_backward, setup_context=_setup)
