"""The rest of a row: all tokens but those that a top-k teacher names. Its sums and its gradient.

The two passes over a row, which need no test for the kept tokens: -inf was written over these, and
their exponentials are exactly 0. The second pass goes backwards to meet what the caches still hold.

Shapes: B columns of a tile, L threads (see ``common.py``). Tuples: ``span`` = (first, last), the
row's positions from its `row_start`; ``tiles``, what `row_tiles` gives; ``factors``, see
`rest_gradient`. ``c`` = log2(e) / T; logarithms are of base 2.
"""

import triton
import triton.language as tl

from dskd.kernels.common import (
    CAPPED,
    LOG2E,
    LOW,
    THREAD_COLUMNS,
    TINY,
    columns,
    edge_tile,
    online,
    slope,
    spread,
    thread_sum,
)

TAIL = tl.constexpr(0)
RENORMALISED = tl.constexpr(1)
TRUNCATED = tl.constexpr(2)
MODES = {"tail": TAIL.value, "renormalised": RENORMALISED.value, "truncated": TRUNCATED.value}

# labels: none; their softmax is q (T = 1), goes with q^2 (T = 2), or is another one
UNLABELLED = tl.constexpr(0)
SAME = tl.constexpr(1)
SQUARE = tl.constexpr(2)
OTHER = tl.constexpr(3)


@triton.jit
def rest_sums(z, top, hot, cold, c, LABELS: tl.constexpr, MODE: tl.constexpr, G: tl.constexpr):
    """Every thread's sums [L] with one more tile [B]: hot at T, cold (the label's) at 1"""
    if MODE == TRUNCATED:
        top, cold, _, _ = online(z, top, cold, LOG2E, G)
    else:
        higher, hot, e, fade = online(z, top, hot, c, G)
        if LABELS == SQUARE:
            cold = cold * (fade * fade) + thread_sum(e * e, G)
        if LABELS == OTHER:
            e = tl.exp2(z * LOG2E - spread(higher * LOG2E, z.shape[0], G))
            cold = cold * tl.exp2((top - higher) * LOG2E) + thread_sum(e, G)
        top = higher
    return top, hot, cold


@triton.jit
def rest_logs(
    student,
    span,
    tiles,
    c,
    scale,
    cap,
    LABELS: tl.constexpr,
    MODE: tl.constexpr,
    MAP: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """First pass: log2 of the rest's sum at T and at 1, 0 where not needed, and its largest logit.

    Both relative to that logit; KEEP: the row is read again
    """
    first, last = span
    head, full, count = tiles
    i = tl.arange(0, B)
    # above LOW, relative to which LOW has the exponential 0 and so has a row without a rest
    top = tl.full([B // THREAD_COLUMNS], 0.5 * LOW, tl.float32)
    hot = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    cold = hot
    for tile in tl.range(head, full):
        at = tile * B + i
        z = columns(student, at, first, last, scale, cap, MAP, False, ALIGN, KEEP, True, FAST)
        top, hot, cold = rest_sums(z, top, hot, cold, c, LABELS, MODE, G)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        z = columns(student, at, first, last, scale, cap, MAP, True, ALIGN, KEEP, True, FAST)
        top, hot, cold = rest_sums(z, top, hot, cold, c, LABELS, MODE, G)
    peak = tl.max(top, 0)
    rest = 0.0
    rest_1 = 0.0
    if MODE != TRUNCATED:
        rest = tl.log2(tl.sum(hot * tl.exp2((top - peak) * c), 0) + TINY)
    if LABELS == SQUARE or LABELS == OTHER:
        rest_1 = tl.log2(tl.sum(cold * tl.exp2((top - peak) * LOG2E), 0) + TINY)
    return rest, rest_1, peak


@triton.jit
def rest_gradient(
    z, factors, scale, cap, LABELS: tl.constexpr, MODE: tl.constexpr, MAP: tl.constexpr
):
    """d/dx of tokens that are not kept, without the label's one-hot part.

    factors: (c, rest, all_1, k_rest, k_label). With e = 2^(c z - rest), a token's share in the
    rest: k_rest e + k_label e^2 (SQUARE), or k_rest e + k_label softmax(z) (OTHER, all_1 = log2 of
    its denominator)
    """
    c, rest, all_1, k_rest, k_label = factors
    if MODE == TRUNCATED:
        g = k_label * tl.exp2(z * LOG2E - all_1)
    else:
        e = tl.exp2(z * c - rest)
        if LABELS == SQUARE:
            g = e * (k_rest + k_label * e)
        else:
            g = k_rest * e
        if LABELS == OTHER:
            g += k_label * tl.exp2(z * LOG2E - all_1)
    if MAP == CAPPED:
        g *= slope(z, scale, cap, MAP)
    return g


@triton.jit
def write_rest(
    student,
    grad,
    span,
    tiles,
    factors,
    scale,
    cap,
    LABELS: tl.constexpr,
    MODE: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    FAST: tl.constexpr,
):
    """Second pass, backwards: `rest_gradient` of a whole row to `grad`"""
    first, last = span
    head, full, count = tiles
    i = tl.arange(0, B)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        z = columns(student, at, first, last, scale, cap, MAP, True, ALIGN, False, True, FAST)
        g = rest_gradient(z, factors, scale, cap, LABELS, MODE, MAP)
        inside = (at >= first) & (at < last)
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside)
    for back in tl.range(head, full):
        at = (full + head - 1 - back) * B + i
        z = columns(student, at, first, last, scale, cap, MAP, False, ALIGN, False, True, FAST)
        g = rest_gradient(z, factors, scale, cap, LABELS, MODE, MAP)
        tl.store(grad + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
