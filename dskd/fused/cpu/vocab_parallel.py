"""What a rank computes of its shard of the vocabulary for `vocab_parallel_kd`, in plain torch.

The same three functions as ``kernels/vocab_parallel.py``, with one meaning; the collectives
between them are in ``vocab_parallel.py``. Rows go by chunks, in fp32 (float64 for float64 logits).

The statistics of a shard are those that the kernels' file lists. A shard without any (finite) logit
has the maximum -1e30 and the sum 0, as has a row that is not weighted; 4 and 5 are 0 for kinds that
do not need them.

Shape letters: N tokens, R student columns of the shard, S teacher columns (S <= R), P ranks, C rows
of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dskd.fused.arguments import wide
from dskd.fused.cpu.chunks import LOWEST, weighted_rows

FORWARD = ("forward_kl", "mixed")
REVERSE = ("reverse_kl", "mixed")
HUGE = 1e15
"""A divergence above this is infinite: mass of a side times -LOWEST."""
_CHUNK = 1 << 19
"""Logits in a chunk of rows."""


def statistics_rows(
    student_NR: Tensor,
    teacher_NS: Tensor,
    weight_N: Tensor,
    reverse_N: Tensor | None,
    label_weight_N: Tensor | None,
    *,
    kind: str,
    temperature: float,
) -> Tensor:
    """Statistics of this shard [N, 8]; column 7 is left at -inf."""
    nothing = weight_N.new_tensor([LOWEST, 0, LOWEST, 0, 0, 0, 0, -torch.inf])
    parts_N8 = nothing.repeat(len(weight_N), 1)
    for rows, s, t in _chunks(student_NR, teacher_NS):
        part = parts_N8[rows]
        part[:, 0], part[:, 2] = _peak(s), _peak(t)
        p = torch.exp((t - part[:, 2:3]) / temperature)
        q = torch.exp((s - part[:, 0:1]) / temperature)
        part[:, 1], part[:, 3] = q.sum(1), p.sum(1)
        shared = t.shape[1]
        apart = t.clamp_min(LOWEST) - s[:, :shared].clamp_min(LOWEST)
        if kind in FORWARD:
            part[:, 4] = (p * apart).sum(1)
        if kind in REVERSE:
            part[:, 5] = -(q[:, :shared] * apart).sum(1)
        if label_weight_N is not None and temperature != 1.0:
            part[:, 6] = torch.exp(s - part[:, 0:1]).sum(1)
    weighted_N1 = weighted_rows(weight_N, reverse_N, label_weight_N)[:, None]
    return torch.where(weighted_N1, parts_N8, nothing)


def divergence_rows(
    student_NR: Tensor,
    teacher_NS: Tensor,
    parts_PN8: Tensor,
    weight_N: Tensor,
    reverse_N: Tensor | None,
    label_weight_N: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
) -> Tensor:
    """Sums over this shard [N, 2] of the kinds that are no KL of the two: divergence, ``q h``."""
    whole = _whole(parts_PN8, temperature)
    sums_N2 = weight_N.new_zeros(len(weight_N), 2)
    for rows, s, t in _chunks(student_NR, teacher_NS):
        log_q, log_p = _log_probabilities(s, t, whole, rows, temperature)
        value, slope = _value_and_slope(log_q, log_p, kind, beta)
        sums_N2[rows, 0] = value.sum(1)
        sums_N2[rows, 1] = (log_q.exp() * slope).sum(1)
    weighted_N1 = weighted_rows(weight_N, reverse_N, label_weight_N)[:, None]
    return torch.where(weighted_N1, sums_N2, 0.0)


def gradient_rows(
    student_NR: Tensor,
    teacher_NS: Tensor,
    parts_PN8: Tensor,
    sums_N2: Tensor | None,
    column_N: Tensor | None,
    weight_N: Tensor,
    reverse_N: Tensor | None,
    label_weight_N: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
    grad_NR: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] and label loss [N] of the whole vocabulary; this shard's gradient.

    With p, q the softmax of t / T, s / T and h the divergence's slope in q, the gradient in s is

        forward_kl   (q - p) / T
        reverse_kl   q (log(q/p) - KL(q||p)) / T
        others       q (h - E_q h) / T

    and ``softmax(s) - onehot`` for the label (column ``column_N`` of this shard, -1 elsewhere).
    """
    whole = _whole(parts_PN8, temperature)
    divergent_N = weighted_rows(weight_N, reverse_N)
    divergence_N = _divergence(whole, sums_N2, weight_N, reverse_N, kind).where(divergent_N, 0.0)
    label_N = None
    if label_weight_N is not None:
        label_N = whole.label_loss_N.where(label_weight_N != 0, 0.0)
    if grad_NR is None:
        return divergence_N, label_N
    defined_N = whole.defined_N & divergent_N
    for rows, s, t in _chunks(student_NR, teacher_NS):
        log_q, log_p = _log_probabilities(s, t, whole, rows, temperature)
        q = log_q.exp()
        weight_C1 = (weight_N[rows] / temperature)[:, None]
        if kind in FORWARD:
            grad = weight_C1 * (q - log_p.exp())
        elif kind == "reverse_kl":
            grad = weight_C1 * _reverse_slope(q, log_q, log_p, whole.reverse_N[rows])
        else:
            _, slope = _value_and_slope(log_q, log_p, kind, beta)
            grad = weight_C1 * q * (slope - sums_N2[rows, 1:])
        if kind == "mixed":
            reverse_C1 = (reverse_N[rows] / temperature)[:, None]
            grad += reverse_C1 * _reverse_slope(q, log_q, log_p, whole.reverse_N[rows])
        grad = grad.where(defined_N[rows, None], 0.0)
        if label_weight_N is not None:
            grad += _label_gradient(s, whole, rows, column_N[rows], label_weight_N[rows])
        grad_NR[rows] = grad
    return divergence_N, label_N


class _Whole(NamedTuple):
    """Statistics of the whole vocabulary: maxima and, apart from them, logarithms of the sums.

    Their sum would round the logarithm away next to a large maximum. ``some_s_N``: whether the
    student has a softmax; ``defined_N``: whether both have.
    """

    max_s_N: Tensor
    log_s_N: Tensor
    max_t_N: Tensor
    log_t_N: Tensor
    log_label_N: Tensor
    forward_N: Tensor
    reverse_N: Tensor
    label_loss_N: Tensor
    some_s_N: Tensor
    defined_N: Tensor


def _whole(parts_PN8: Tensor, temperature: float) -> _Whole:
    """Combine the shards' statistics, in float64: the same numbers on every rank."""
    max_s, sum_s, max_t, sum_t, forward, reverse, sum_label, label = parts_PN8.double().unbind(2)
    max_s_N, max_t_N = max_s.amax(0), max_t.amax(0)
    scale_s = torch.exp((max_s - max_s_N) / temperature)
    scale_t = torch.exp((max_t - max_t_N) / temperature)
    sum_s_N, sum_t_N = (scale_s * sum_s).sum(0), (scale_t * sum_t).sum(0)
    log_s_N, log_t_N = _log(sum_s_N), _log(sum_t_N)
    log_label_N = log_s_N
    if temperature != 1.0:
        log_label_N = _log((torch.exp(max_s - max_s_N) * sum_label).sum(0))
    # log(p/q) = (t - s)/T - (lse_t - lse_s)
    apart_N = (max_t_N - max_s_N) / temperature + log_t_N - log_s_N
    some_s_N = sum_s_N != 0  # a NaN is something
    forward_N = (scale_t * forward).sum(0) / sum_t_N / temperature - apart_N
    reverse_N = (scale_s * reverse).sum(0) / sum_s_N / temperature + apart_N
    label_loss_N = (max_s_N - label.amax(0) + log_label_N).where(some_s_N, torch.nan)
    numbers = (max_s_N, log_s_N, max_t_N, log_t_N, log_label_N, forward_N, reverse_N, label_loss_N)
    return _Whole(
        *(number.to(parts_PN8.dtype) for number in numbers), some_s_N, some_s_N & (sum_t_N != 0)
    )


def _log(sum_N: Tensor) -> Tensor:
    """Logarithm; 0 of an empty sum, whose probabilities are 0 by their logits."""
    return torch.where(sum_N == 0, 1.0, sum_N).log()


def _divergence(
    whole: _Whole, sums_N2: Tensor | None, weight_N: Tensor, reverse_N: Tensor | None, kind: str
) -> Tensor:
    """Divergence [N]; NaN where a row of nothing but -inf has no softmax."""
    if kind == "forward_kl":
        divergence_N = whole.forward_N
    elif kind == "reverse_kl":
        divergence_N = whole.reverse_N
    elif kind == "mixed":
        divergence_N = weight_N * whole.forward_N + reverse_N * whole.reverse_N
    else:
        divergence_N = sums_N2[:, 0]
    divergence_N = divergence_N.masked_fill(divergence_N > HUGE, torch.inf)
    return divergence_N.where(whole.defined_N, torch.nan)


def _reverse_slope(q: Tensor, log_q: Tensor, log_p: Tensor, reverse_N: Tensor) -> Tensor:
    return q * (log_q.clamp_min(LOWEST) - log_p.clamp_min(LOWEST) - reverse_N[:, None])


def _value_and_slope(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """A column's part of the divergence and its derivative h in q, up to a constant."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "total_variation":
        return (q - p).abs() / 2, (q - p).sign() / 2
    log_q, log_p = log_q.clamp_min(LOWEST), log_p.clamp_min(LOWEST)
    tiny = torch.finfo(q.dtype).tiny
    if kind == "skew_reverse_kl":
        mean = torch.lerp(p, q, beta).clamp_min(tiny)
        ratio = log_q - mean.log()
        return q * ratio, ratio - beta * q / mean
    mean = torch.lerp(q, p, beta).clamp_min(tiny)
    log_mean = mean.log()
    if kind == "skew_forward_kl":
        return p * (log_p - log_mean), -(1 - beta) * p / mean
    ratio = log_q - log_mean
    return beta * p * (log_p - log_mean) + (1 - beta) * q * ratio, (1 - beta) * ratio


def _label_gradient(
    s: Tensor, whole: _Whole, rows: slice, column_C: Tensor, label_weight_C: Tensor
) -> Tensor:
    """``label_weight (softmax(s) - onehot)`` at temperature 1; 0 in a row without a softmax."""
    grad = torch.exp(s - whole.max_s_N[rows, None] - whole.log_label_N[rows, None])
    here_C1 = (column_C >= 0).to(grad.dtype)[:, None]
    grad.scatter_add_(1, column_C.clamp_min(0)[:, None], -here_C1)
    counted_C1 = (whole.some_s_N[rows] & (label_weight_C != 0))[:, None]
    return (grad * label_weight_C[:, None]).where(counted_C1, 0.0)


def _log_probabilities(
    s: Tensor, t: Tensor, whole: _Whole, rows: slice, temperature: float
) -> tuple[Tensor, Tensor]:
    """log q and log p over the student's columns, at the temperature."""
    log_q = (s - whole.max_s_N[rows, None]) / temperature - whole.log_s_N[rows, None]
    log_p = (t - whole.max_t_N[rows, None]) / temperature - whole.log_t_N[rows, None]
    return log_q, F.pad(log_p, (0, s.shape[1] - t.shape[1]), value=-torch.inf)


def _peak(logits: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return logits.new_full((len(logits),), LOWEST)
    return logits.amax(1).clamp_min(LOWEST)


def _chunks(student_NR: Tensor, teacher_NS: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A chunk's rows and logits of both sides, widened; nothing of a shard without columns."""
    if student_NR.shape[1] == 0:
        return
    dtype = wide(student_NR.dtype)
    step = max(1, _CHUNK // student_NR.shape[1])
    for first in range(0, len(student_NR), step):
        rows = slice(first, first + step)
        yield rows, student_NR[rows].to(dtype), teacher_NS[rows].to(dtype)
