"""The passes over a row pair, student and teacher, that every dense divergence is made of.

``p`` is the teacher's softmax at the temperature T, ``q`` the student's, both over z = map(x).
For a divergence D(p, q), with h = dD/dq, the gradient is (1/T) q (h - E_q[h]):

    forward_kl          sum p log(p/q)            (1/T) (q - p), the same without h
    reverse_kl          sum q log(q/p)            h = log(q/p)
    mixed               weight forward_kl + reverse reverse_kl
    jsd                 b sum p log(p/m) + (1-b) sum q log(q/m),  m = b p + (1-b) q:
                                                  h = (1-b) log(q/m)
    skew_forward_kl     sum p log(p/m)            h = -(1-b) p/m
    skew_reverse_kl     sum q log(q/m),  m = (1-b) p + b q:  h = log(q/m) - b q/m
    total_variation     sum |p-q| / 2             h = sign(q-p) / 2

1. `row_sums`: everything the first three need; 2. `tilt_sums`: E_q[h] of the others; 3.
`write_gradient`. The walk turns round after each pass and so meets what the caches still hold.
Before the last pass `row_factors` makes the divergence and the factors of the gradient from the
sums, whether a row's columns are all here (``dense.py``) or the sums come from several ranks
(``vocab_parallel.py``).

The label's cross entropy (at temperature 1) rides along. At T = 1 its softmax is q; at T = 2 it
goes with q^2, which costs no exponential; at others it has exponentials of its own.

Shapes: B columns of a tile, L threads. Tuples: ``rows`` = (student, teacher, (first, last,
teacher_last), (student_scale, student_cap, teacher_scale, teacher_cap)), the starts and the ranges
of ``common.columns``; ``tiles``, what ``common.row_tiles`` gives. ``c`` = log2(e) / T.
"""

import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    LN2,
    LOG2E,
    LOW,
    PLAIN,
    THREAD_COLUMNS,
    TINY,
    columns,
    edge_tile,
    log2,
    online,
    reciprocal,
    slope,
    spread,
    thread_sum,
)

KINDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "mixed": 2,
    "jsd": 3,
    "skew_forward_kl": 4,
    "skew_reverse_kl": 5,
    "total_variation": 6,
}
FORWARD_KL, REVERSE_KL, MIXED, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION = map(
    tl.constexpr, KINDS.values()
)

# labels: none; at the same temperature T = 1; at half of T = 2; at another one
NO_LABELS, SAME, HALF, OTHER = map(tl.constexpr, range(4))
LABEL_NAMES = ("unlabelled", "same", "half", "other")


@triton.jit
def tile_pair(
    rows,
    at,
    STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
    EDGE: tl.constexpr,
    ALIGN: tl.constexpr,
    KEEP: tl.constexpr,
    RAW: tl.constexpr,
    FAST: tl.constexpr,
):
    """Student and teacher logits [B] at positions in their rows"""
    student, teacher, ends, maps = rows
    first, last, teacher_last = ends
    s_scale, s_cap, t_scale, t_cap = maps
    s = columns(student, at, first, last, s_scale, s_cap, STUDENT_MAP, EDGE, ALIGN, KEEP, RAW, FAST)
    t = columns(
        teacher, at, first, teacher_last, t_scale, t_cap, TEACHER_MAP, EDGE, ALIGN, KEEP, RAW, FAST
    )
    return s, t


@triton.jit
def with_tile(sums, s, t, c, KIND: tl.constexpr, LABELS: tl.constexpr, G: tl.constexpr):
    """Every thread's sums [L], one more tile of logits [B] taken in.

    s_sum, t_sum: sum 2^(c (s - s_top)), the same of t; forward: sum p (t - s) and reverse:
    sum q (s - t), scaled like t_sum and s_sum; hot: sum exp(s - s_top), for the label
    """
    old_top, s_sum, t_top, t_sum, forward, reverse, hot = sums
    s_top, s_sum, q, s_fade = online(s, old_top, s_sum, c, G)
    if LABELS == HALF:
        hot = hot * (s_fade * s_fade) + thread_sum(q * q, G)
    if LABELS == OTHER:
        e = tl.exp2(s * LOG2E - spread(s_top * LOG2E, s.shape[0], G))
        hot = hot * tl.exp2((old_top - s_top) * LOG2E) + thread_sum(e, G)
    if KIND == REVERSE_KL or KIND == MIXED:
        reverse = reverse * s_fade + thread_sum(q * (s - t), G)
    t_top, t_sum, p, t_fade = online(t, t_top, t_sum, c, G)
    if KIND == FORWARD_KL or KIND == MIXED:
        forward = forward * t_fade + thread_sum(p * (t - s), G)
    return s_top, s_sum, t_top, t_sum, forward, reverse, hot


@triton.jit
def row_sums(
    rows,
    tiles,
    c,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """First pass, forwards: `with_tile`'s sums of a whole row, scalars"""
    head, full, count = tiles
    i = tl.arange(0, B)
    # not LOW: fma(LOW, c, -LOW c) is what LOW c was rounded by, whose exponential is infinite
    low = tl.full([B // THREAD_COLUMNS], 0.5 * LOW, tl.float32)
    zero = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    sums = (low, zero, low, zero, zero, zero, zero)
    for tile in tl.range(head, full):
        at = tile * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, False, ALIGN, True, False, FAST)
        sums = with_tile(sums, s, t, c, KIND, LABELS, G)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, True, ALIGN, True, False, FAST)
        sums = with_tile(sums, s, t, c, KIND, LABELS, G)
    s_top, s_sum, t_top, t_sum, forward, reverse, hot = sums
    s_max = tl.max(s_top, 0)
    t_max = tl.max(t_top, 0)
    s_fade = tl.exp2((s_top - s_max) * c)
    t_fade = tl.exp2((t_top - t_max) * c)
    if LABELS == HALF:
        hot *= s_fade * s_fade
    if LABELS == OTHER:
        hot *= tl.exp2((s_top - s_max) * LOG2E)
    return (
        s_max,
        tl.sum(s_sum * s_fade, 0),
        t_max,
        tl.sum(t_sum * t_fade, 0),
        tl.sum(forward * t_fade, 0),
        tl.sum(reverse * s_fade, 0),
        tl.sum(hot, 0),
    )


@triton.jit
def tilt(s, t, a, b, q, p, beta, KIND: tl.constexpr, FAST: tl.constexpr):
    """h up to a factor and a constant, and terms whose sum gives the divergence.

    a, b: log2 of q and p. What of jsd's sum is E_q[h] is left out of its terms
    """
    h = s - t
    term = h
    if KIND == JSD:
        log_m = log2(beta * p + ((1 - beta) * q + TINY), FAST)
        h = a - log_m
        term = p * (b - log_m)
    if KIND == SKEW_FORWARD_KL:
        m = beta * p + ((1 - beta) * q + TINY)
        h = p * reciprocal(m, FAST)
        term = p * (b - log2(m, FAST))
    if KIND == SKEW_REVERSE_KL:
        m = (1 - beta) * p + (beta * q + TINY)
        ratio = a - log2(m, FAST)
        h = ratio - (beta * LOG2E) * (q * reciprocal(m, FAST))
        term = q * ratio
    if KIND == TOTAL_VARIATION:
        gap = q - p
        h = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, gap))
        term = tl.abs(gap)
    return h, term


@triton.jit
def with_tilt(sums, s, t, logs, beta, KIND: tl.constexpr, G: tl.constexpr, FAST: tl.constexpr):
    """Every thread's sums [L] of `tilt`'s terms and of q h, one more tile taken in"""
    total, mean = sums
    c, s_log, t_log = logs
    a = s * c - s_log
    b = t * c - t_log
    q = tl.exp2(a)
    h, term = tilt(s, t, a, b, q, tl.exp2(b), beta, KIND, FAST)
    return total + thread_sum(term, G), mean + thread_sum(q * h, G)


@triton.jit
def tilt_sums(
    rows,
    tiles,
    logs,
    beta,
    KIND: tl.constexpr,
    STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """Second of three passes, backwards: sum of `tilt`'s terms, and E_q[h].

    logs: (c, s_log, t_log), the latter log2 of the sums of 2^(c s) and 2^(c t)
    """
    head, full, count = tiles
    i = tl.arange(0, B)
    zero = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    sums = (zero, zero)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, True, ALIGN, True, False, FAST)
        sums = with_tilt(sums, s, t, logs, beta, KIND, G, FAST)
    for done in tl.range(head, full):
        at = (full + head - 1 - done) * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, False, ALIGN, True, False, FAST)
        sums = with_tilt(sums, s, t, logs, beta, KIND, G, FAST)
    total, mean = sums
    return tl.sum(total, 0), tl.sum(mean, 0)


@triton.jit
def gradient(s, t, factors, KIND: tl.constexpr, LABELS: tl.constexpr, FAST: tl.constexpr):
    """d/dz without the label's own part: q (k_h h + k_q) - k_p p + k_hot softmax(s).

    With LABELS == HALF, k_hot q^2 in place of the softmax
    """
    c, s_log, t_log, hot_log, beta, k_q, k_p, k_h, k_hot = factors
    a = s * c - s_log
    b = t * c - t_log
    q = tl.exp2(a)
    p = tl.exp2(b)
    of_q = k_q
    if KIND != FORWARD_KL:
        h, _ = tilt(s, t, a, b, q, p, beta, KIND, FAST)
        of_q = k_h * h + k_q
    if LABELS == HALF:
        of_q += k_hot * q
    g = q * of_q
    if KIND == FORWARD_KL or KIND == MIXED:
        g -= k_p * p
    if LABELS == OTHER:
        g += k_hot * tl.exp2(s * LOG2E - hot_log)
    return g


@triton.jit
def through_map(g, s, rows, STUDENT_MAP: tl.constexpr):
    """d/dx from d/dz"""
    if STUDENT_MAP != PLAIN:
        _, _, _, maps = rows
        scale, cap, _, _ = maps
        g *= slope(s, scale, cap, STUDENT_MAP)
    return g


@triton.jit
def write_gradient(
    rows,
    tiles,
    grad,
    factors,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    FAST: tl.constexpr,
):
    """Last pass: `gradient` of a whole row to `grad`; backwards if the second, else forwards"""
    RAW: tl.constexpr = KIND == FORWARD_KL
    head, full, count = tiles
    _, _, ends, _ = rows
    first, last, _ = ends
    i = tl.arange(0, B)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, True, ALIGN, False, RAW, FAST)
        g = through_map(gradient(s, t, factors, KIND, LABELS, FAST), s, rows, STUDENT_MAP)
        inside = (at >= first) & (at < last)
        tl.store(grad + at, g.to(grad.dtype.element_ty), inside, eviction_policy="evict_first")
    for done in tl.range(head, full):
        tile = done
        if KIND <= MIXED:
            tile = full + head - 1 - done
        at = tile * B + i
        s, t = tile_pair(rows, at, STUDENT_MAP, TEACHER_MAP, False, ALIGN, False, RAW, FAST)
        g = through_map(gradient(s, t, factors, KIND, LABELS, FAST), s, rows, STUDENT_MAP)
        tl.store(grad + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")


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


def label_mode(labels_N: Tensor | None, temperature: float) -> int:
    """How the label's softmax at temperature 1 follows from the student's at `temperature`."""
    if labels_N is None:
        return NO_LABELS.value
    return {1.0: SAME.value, 2.0: HALF.value}.get(temperature, OTHER.value)
