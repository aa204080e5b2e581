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

from dskd.batch import DenseTeacher, LinearTeacher, TopKTeacher
from dskd.fused.arguments import (
    SAME,
    LogitMap,
    Losses,
    TokenWeight,
    kind_of,
    map_of,
    matrix,
    refuse,
    teacher_columns,
    temperature_of,
    unit_columns,
    wide,
)
from dskd.fused.gradients import detached, refuse_second_order, scaled, wanted
from dskd.fused.linear_visit import visit
from dskd.fused.logit_loss import LossForm
from dskd.fused.per_token import TokenWeights, weights_of
from dskd.fused.topk_teacher import at_temperature, check_masses, topk_of

LogitTeacher = LinearTeacher | DenseTeacher | TopKTeacher | None
"""Whose divergence is taken; None: nobody's, cross entropy alone."""


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
    label_weight: TokenWeight = 0.0,
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
        hidden_ND: fp32, bf16, fp16 or float64; inside autocast it is cast as a linear layer's.
        weight_VD: of the same type.
        bias_V: likewise.
        teacher: whose divergence (classes of ``dskd/batch.py``); None: cross entropy alone.
        kind, beta, teacher_map, vocabulary: of dense and linear teachers, see
            :func:`~dskd.fused.dense.dense_kd`; a top-k teacher's is the forward KL.
        mode: of a top-k teacher alone, see :func:`~dskd.fused.topk.topk_kd`.
        logits_dtype: what the logits of 16-bit operands are kept in; fp32 by default. bf16
            logits save memory and cost precision: their rounding hides small differences of the
            softmaxes. Measured error of the gradient (bf16 operands, hidden states of student and
            teacher apart by 0.5, 0.1, 0.03, 0.01): 2, 6, 18, 66 %; with fp32 0.2 % throughout.
        chunk: tokens per chunk; by default what a fixed budget of memory holds.

    The other arguments are those of :func:`~dskd.fused.dense.dense_kd`.

    Raises:
        ValueError: an argument of a wrong shape, type, device or range, named.
    """
    hidden_ND, weight_VD, bias_V = _autocast(hidden_ND, weight_VD, bias_V)
    _check_head("", hidden_ND, weight_VD, bias_V)
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
    form, tensors, narrower = _teacher(teacher, logits_NV, columns, vocabulary, mode, temperature)
    kind_of(kind, beta, reverse_weight, narrower)
    _check_form(form, kind, mode, vocabulary, teacher_map)
    weight = 0.0 if teacher is None else weight
    weights = weights_of(
        logits_NV, labels_N, ignore_index, columns, weight, reverse_weight, label_weight
    )
    refuse(
        teacher is None and weights.label_N is None, lambda: "teacher: neither a teacher nor labels"
    )
    if isinstance(teacher, TopKTeacher):
        parts = (teacher.ids_NK, teacher.logprobs_NK, _tail(teacher, mode, temperature))
        check_masses(*parts, weights.divergence_N, temperature=temperature, columns=columns)
    inputs = (hidden_ND, weight_VD, bias_V)
    needs = [x is not None and wanted(x) for x in inputs]
    maps = [*map_of("student_map", student_map), *map_of("teacher_map", teacher_map)]
    kind = kind if form in ("dense", "linear") else mode
    loss = (tensors, *weights, form, kind, float(beta), temperature, maps)
    return detached(_linear(*inputs, *loss, dtype, chunk or 0, needs))


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The operands of a linear layer as autocast would cast them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _check_head(owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    matrix(f"{owner}hidden", hidden)
    matrix(f"{owner}weight", weight, like=hidden)
    refuse(
        weight.shape[1] != hidden.shape[1],
        lambda: (
            f"{owner}weight: has {weight.shape[1]} columns, the hidden states {hidden.shape[1]}"
        ),
    )
    refuse(
        weight.dtype != hidden.dtype,
        lambda: f"{owner}weight: is {weight.dtype}, the hidden states are {hidden.dtype}",
    )
    if bias is not None:
        refuse(
            bias.shape != weight.shape[:1] or bias.dtype != weight.dtype,
            lambda: (
                f"{owner}bias: must be {weight.dtype} [{len(weight)}], not {bias.dtype} "
                f"{list(bias.shape)}"
            ),
        )
        refuse(
            bias.device != weight.device,
            lambda: f"{owner}bias: is on {bias.device}, not the weight's",
        )


def _check_form(
    form: str, kind: str, mode: str, vocabulary: int | None, teacher_map: LogitMap
) -> None:
    """Refuse what this form of a teacher would leave aside."""
    if form != "topk":
        refuse(mode != "tail", lambda: f"mode: {mode!r} is of a top-k teacher, which this is not")
    if form in ("topk", "label"):
        less = "the teacher's logits are not all there"
        refuse(kind != "forward_kl", lambda: f"kind: {kind} cannot be computed, {less}")
        refuse(vocabulary is not None, lambda: f"vocabulary: nothing to cut, {less}")
        refuse(teacher_map != SAME, lambda: f"teacher_map: nothing to map, {less}")


def _teacher(
    teacher: LogitTeacher,
    logits_NV: Tensor,
    columns: int,
    vocabulary: int | None,
    mode: str,
    temperature: float,
) -> tuple[str, list[Tensor], bool]:
    """Its form, its tensors, and whether it has fewer columns than the student.

    ``columns``: of the student; ``vocabulary``: how many of them are real tokens.
    """
    count = len(logits_NV)
    if teacher is None:
        return "label", [], False
    if isinstance(teacher, TopKTeacher):
        return "topk", _topk(teacher, logits_NV, columns, mode, temperature), False
    if isinstance(teacher, DenseTeacher):
        matrix("teacher", teacher.logits_NV, rows=count, like=logits_NV)
        shared = teacher_columns(teacher.logits_NV.shape[1], columns, vocabulary)
        return "dense", [unit_columns(teacher.logits_NV.detach()[:, :shared])], shared < columns
    refuse(
        not isinstance(teacher, LinearTeacher),
        lambda: (
            f"teacher: must be a DenseTeacher, LinearTeacher, TopKTeacher or None, "
            f"not {type(teacher).__name__}"
        ),
    )
    hidden_NE, weight_WE, bias_W = _autocast(teacher.hidden_NE, teacher.weight_VE, teacher.bias_V)
    _check_head("teacher's ", hidden_NE, weight_WE, bias_W)
    matrix("teacher's hidden", hidden_NE, rows=count, like=logits_NV)
    shared = teacher_columns(len(weight_WE), columns, vocabulary)
    tensors = [hidden_NE, weight_WE[:shared]] + ([] if bias_W is None else [bias_W[:shared]])
    return "linear", [x.detach() for x in tensors], shared < columns


def _topk(
    teacher: TopKTeacher, logits_NV: Tensor, columns: int, mode: str, temperature: float
) -> list[Tensor]:
    """Ids, log-probabilities at the temperature, and the tail in mode ``tail``."""
    tail_N = _tail(teacher, mode, temperature)
    ids_NK, *kept = topk_of(teacher.ids_NK, teacher.logprobs_NK, tail_N, mode, logits_NV, columns)
    found = (ids_NK, *at_temperature(*kept, temperature))
    return [x for x in found if x is not None]


def _tail(teacher: TopKTeacher, mode: str, temperature: float) -> Tensor | None:
    if mode != "tail":
        return None
    stored = teacher.tail_N
    refuse(
        temperature not in stored,
        lambda: (
            f"teacher: has no tail mass at temperature {temperature}, but at "
            f"{', '.join(map(str, stored))}"
        ),
    )
    return stored[temperature]


@torch.library.custom_op(
    "dskd::linear_kd",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] teacher, Tensor token_weight, "
    "Tensor? reverse, Tensor? labels, Tensor? label_weight, str form, str kind, float beta, "
    "float temperature, float[] maps, ScalarType logits_dtype, int chunk, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher: list[Tensor],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    weights, (form, *kind), (dtype, chunk, needs) = arguments[:4], arguments[4:9], arguments[9:]
    loss = LossForm(form, teacher, TokenWeights(*weights), *kind)
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
    return *found, [None] * ctx.teachers, *[None] * 12


_linear.register_autograd(_backward, setup_context=_setup)
