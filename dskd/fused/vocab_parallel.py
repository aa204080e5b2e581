"""Divergence of logits whose vocabulary is spread over ranks, and gradient: `vocab_parallel_kd`.

A rank sums up its shard, one all-gather of [N, 8] numbers tells every rank the others' sums, and
each computes the gradient of its own columns. Not a MAX and a SUM all-reduce: one latency instead
of two, and every rank combines the same numbers in the same order, so that the losses are equal to
the last bit. A rank receives 32 N bytes of each other; from about 16 ranks on two all-reduces would
move less.

================================  ============================================================
always                            one all-gather of [N, 8] fp32
jsd, skew_*, total_variation      and one SUM all-reduce of [N, 2] fp32
with labels                       and one all-gather of the shard's width, 8 bytes, which runs
                                  while the sums are computed
================================  ============================================================

(float64 logits: float64.) Nothing waits for the device. The gradient of hidden states behind the
logits is the caller's: a product with the shard of the head, summed over the group.

Shape letters: N tokens, R student columns of this rank, S teacher columns of this rank, P ranks.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dskd.fused.arguments import (
    Losses,
    TokenWeight,
    kind_of,
    matrix,
    refuse,
    temperature_of,
    unit_columns,
)
from dskd.fused.backend import row_functions
from dskd.fused.gradients import detached, refuse_second_order, room, scaled, total_of, wanted
from dskd.fused.per_token import TokenWeights, in_range, weights_of
from dskd.fused.tokens import Tokens

_SUMMED = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
"""Kinds whose slope has to be averaged over the whole vocabulary."""


def vocab_parallel_kd(
    student_NR: Tensor,
    teacher_NS: Tensor,
    labels_N: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: TokenWeight = 1.0,
    reverse_weight: TokenWeight | None = None,
    label_weight: TokenWeight | None = None,
    ignore_index: int = -100,
) -> Losses:
    """:func:`dskd.fused.dense.dense_kd` of logits whose columns are spread over a group.

    Every rank of the group calls it with the same tokens, labels and weights, and back-propagates
    the same loss: the losses are those of the whole vocabulary and equal on all ranks; the gradient
    is that of the rank's own columns. Under torch.compile it is a graph break.

    Args:
        student_NR: this rank's columns. They follow those of the ranks before it in the group; the
            widths may differ, and be 0.
        teacher_NS: the same columns of the teacher. S < R where its vocabulary ends earlier: the
            columns beyond have no probability. No gradient.
        labels_N: int64 or int32, ids in the whole vocabulary.
        group: the ranks that share the vocabulary.
        kind, beta, temperature, weight, reverse_weight, label_weight, ignore_index: see there.

    A row of nothing but -inf has no softmax: its losses are NaN, its gradient is 0. A label that no
    rank has is a ValueError on a CPU and in debug mode; on a GPU its loss is infinite.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named. If it is wrong on some
            ranks only, the others wait for them until the group's time is up.
        TypeError: one that is no tensor, or of no such numbers, named; likewise.
    """
    tokens = Tokens.of("student", student_NR)
    student_NR, teacher_NS = tokens.rows("student", student_NR), tokens.rows("teacher", teacher_NS)
    _check(student_NR, teacher_NS)
    kind_of(kind, beta, reverse_weight, teacher_NS.shape[1] < student_NR.shape[1])
    columns = sys.maxsize  # not yet known
    weights = weights_of(
        student_NR,
        tokens.each("labels", labels_N),
        ignore_index,
        columns,
        tokens.each("weight", weight),
        tokens.each("reverse_weight", reverse_weight),
        tokens.each("label_weight", label_weight),
    )
    settings = {"beta": float(beta), "temperature": temperature_of(temperature)}
    case = _Case(unit_columns(teacher_NS.detach()), weights, group, kind, settings)
    if wanted(student_NR):
        return tokens.losses(detached(_VocabParallel.apply(student_NR, case)))
    return tokens.losses(Losses(*_losses(student_NR, case, None)))


class _Case(NamedTuple):
    """All that is no student."""

    teacher_NS: Tensor
    weights: TokenWeights
    group: dist.ProcessGroup
    kind: str
    settings: dict[str, float]


class _VocabParallel(torch.autograd.Function):
    """The closed form: the gradient is computed with the loss."""

    @staticmethod
    def forward(ctx: Any, student_NR: Tensor, case: _Case) -> tuple[Tensor, Tensor, Tensor]:
        grad_NR = room(student_NR, True)
        losses = _losses(student_NR, case, grad_NR)
        ctx.save_for_backward(grad_NR)
        ctx.dtype = student_NR.dtype
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        refuse_second_order()
        (grad_NR,) = ctx.saved_tensors
        return scaled(grad_NR, upstream, ctx.dtype), None


def _losses(
    student_NR: Tensor, case: _Case, grad_NR: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence [N] and label loss [N] or [0]; this rank's gradient into ``grad_NR``."""
    teacher_NS, weights, group, kind, settings = case
    student_NR = unit_columns(student_NR)
    rows = row_functions("vocab_parallel", student_NR)
    weight_N, reverse_N, labels_N, label_weight_N = weights
    shards = (student_NR, teacher_NS)
    columns = None if labels_N is None else _Columns(student_NR, group)
    vectors = (weight_N, reverse_N, label_weight_N)
    temperature = settings["temperature"]
    parts_N8 = rows.statistics_rows(*shards, *vectors, kind=kind, temperature=temperature)
    column_N = None
    if columns is not None:
        column_N = columns.of(labels_N, label_weight_N)
        parts_N8[:, 7] = _label_logit(student_NR, column_N, parts_N8.dtype)
    parts_PN8 = _gathered(parts_N8, group)
    sums_N2 = None
    if kind in _SUMMED:
        sums_N2 = rows.divergence_rows(*shards, parts_PN8, *vectors, kind=kind, **settings)
        dist.all_reduce(sums_N2, group=group)
    divergence_N, label_N = rows.gradient_rows(
        *shards, parts_PN8, sums_N2, column_N, *vectors, kind=kind, grad_NR=grad_NR, **settings
    )
    once_N = torch.ones_like(weight_N) if kind == "mixed" else weight_N
    return total_of(divergence_N, once_N, label_N, label_weight_N)


class _Columns:
    """Which column of this rank a label is; the ranks' widths are under way meanwhile."""

    def __init__(self, student_NR: Tensor, group: dist.ProcessGroup) -> None:
        self._width, self._rank = student_NR.shape[1], dist.get_rank(group)
        # not torch.tensor, which copies from the host and waits
        mine = torch.full((1,), self._width, dtype=torch.int64, device=student_NR.device)
        self._widths_P = mine.new_empty(dist.get_world_size(group))
        self._work = dist.all_gather_into_tensor(self._widths_P, mine, group, async_op=True)

    def of(self, labels_N: Tensor, label_weight_N: Tensor) -> Tensor:
        """Columns [N] within this shard; -1 where the label is elsewhere or does not count."""
        self._work.wait()
        counted_N = label_weight_N != 0
        in_range("labels", labels_N, self._widths_P.sum(), counted_N)
        column_N = labels_N - self._widths_P[: self._rank].sum()
        here_N = counted_N & (column_N >= 0) & (column_N < self._width)
        return column_N.where(here_N, -1)


def _label_logit(student_NR: Tensor, column_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The label's logit [N], -inf where this rank does not have it."""
    if student_NR.shape[1] == 0:
        return student_NR.new_full((len(student_NR),), -torch.inf, dtype=dtype)
    logit_N = student_NR.gather(1, column_N.clamp_min(0)[:, None])[:, 0].to(dtype)
    return logit_N.where(column_N >= 0, -torch.inf)


def _gathered(parts_N8: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P, N, 8]"""
    ranks, (rows, numbers) = dist.get_world_size(group), parts_N8.shape
    gathered = parts_N8.new_empty(ranks * rows, numbers)
    dist.all_gather_into_tensor(gathered, parts_N8, group)
    return gathered.view(ranks, rows, numbers)


def _check(student_NR: Tensor, teacher_NS: Tensor) -> None:
    """Like other logits, but a shard may be without columns."""
    matrix("student", student_NR, empty=True)
    matrix("teacher", teacher_NS, rows=len(student_NR), like=student_NR, empty=True)
    width, teacher_width = student_NR.shape[1], teacher_NS.shape[1]
    refuse(
        teacher_width > width,
        lambda: (
            f"teacher: has {teacher_width} columns on this rank, the student {width}; both must be "
            f"spread alike"
        ),
    )
