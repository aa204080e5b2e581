"""A row's weights, its divergence, and the factors of its gradient, from the sums of the passes.

What happens to a row once between the passes of ``divergence.py``, whether its columns are all here
(``dense.py``) or the sums come from several ranks (``vocab_parallel.py``).
"""

import triton
import triton.language as tl

from dskd.kernels.common import LN2, LOG2E
from dskd.kernels.divergence import (
    FORWARD_KL,
    HALF,
    JSD,
    MIXED,
    NO_LABELS,
    OTHER,
    REVERSE_KL,
    SAME,
    SKEW_FORWARD_KL,
    SKEW_REVERSE_KL,
)


@triton.jit
def row_weights(
    row, weight_ptr, reverse_ptr, label_weight_ptr, KIND: tl.constexpr, LABELS: tl.constexpr
):
    """Weights of the divergence, the reverse part and the label; 0 if there is none"""
    reverse_weight = 0.0
    label_weight = 0.0
    if KIND == MIXED:
        reverse_weight = tl.load(reverse_ptr + row)
    if LABELS != NO_LABELS:
        label_weight = tl.load(label_weight_ptr + row)
    return tl.load(weight_ptr + row), reverse_weight, label_weight


@triton.jit
def weightless(weights):
    """Whether a row counts for nothing"""
    weight, reverse_weight, label_weight = weights
    return (weight == 0) & (reverse_weight == 0) & (label_weight == 0)


@triton.jit
def speechless(weights):
    """Whether a row's divergence counts for nothing"""
    weight, reverse_weight, _ = weights
    return (weight == 0) & (reverse_weight == 0)


@triton.jit
def teacher_width(weights, width, LABELS: tl.constexpr):
    """The teacher's columns that are read: none where only the label counts, they may be NaN"""
    if LABELS != NO_LABELS:
        width = tl.where(speechless(weights), 0, width)
    return width


@triton.jit
def row_logs(sums, c):
    """(c, s_log, t_log): log2 of the sums of 2^(c s) and 2^(c t), from `row_sums`"""
    s_max, s_sum, t_max, t_sum, _, _, _ = sums
    return c, s_max * c + tl.log2(s_sum), t_max * c + tl.log2(t_sum)


@triton.jit
def tilt_factors(tilts, weight, inverse_t, beta, KIND: tl.constexpr):
    """Divergence (nats) and k_h of the kinds of three passes, from `tilt_sums`"""
    total, mean = tilts
    loss = total * LN2
    k_h = weight * inverse_t
    if KIND == JSD:
        loss = (beta * total + (1 - beta) * mean) * LN2
        k_h *= (1 - beta) * LN2
    elif KIND == SKEW_FORWARD_KL:
        k_h *= -(1 - beta)
    elif KIND == SKEW_REVERSE_KL:
        k_h *= LN2
    else:
        loss = total * 0.5
        k_h *= 0.5
    return loss, k_h


@triton.jit
def row_factors(
    sums, logs, tilts, weights, inverse_t, beta, KIND: tl.constexpr, LABELS: tl.constexpr
):
    """Divergence (nats) and the factors of `gradient`, from `row_sums`, `row_logs`, `tilt_sums`"""
    s_max, s_sum, t_max, t_sum, forward, reverse, hot = sums
    weight, reverse_weight, label_weight = weights
    c, s_log, t_log = logs
    # the difference of the maxima is taken by itself: that of the log-sums would cancel
    log_ratio = (tl.log2(s_sum) - tl.log2(t_sum)) * LN2
    loss = 0.0
    k_p = weight * inverse_t
    k_q = 0.0
    k_h = 0.0
    if KIND == FORWARD_KL or KIND == MIXED:
        loss = inverse_t * (forward / t_sum - (t_max - s_max)) + log_ratio
        k_q = k_p
    if KIND == REVERSE_KL or KIND == MIXED:
        mean = reverse / s_sum
        backward = inverse_t * (mean - (s_max - t_max)) - log_ratio
        if KIND == MIXED:
            loss = weight * loss + reverse_weight * backward
            k_h = reverse_weight * inverse_t * inverse_t
        else:
            loss = backward
            k_h = k_p * inverse_t
        k_q -= k_h * mean
    if KIND > MIXED:
        loss, k_h = tilt_factors(tilts, weight, inverse_t, beta, KIND)
        _, mean = tilts
        k_q = -k_h * mean

    hot_log = 0.0
    k_hot = 0.0
    if LABELS == SAME:
        k_q += label_weight
    if LABELS == HALF:
        k_hot = label_weight * (s_sum * s_sum / hot)
    if LABELS == OTHER:
        hot_log = s_max * LOG2E + tl.log2(hot)
        k_hot = label_weight
    return loss, (c, s_log, t_log, hot_log, beta, k_q, k_p, k_h, k_hot)
