"""The three passes of a shard of the vocabulary, each a kernel of one program a row.

Every kernel after the first combines the ranks' statistics itself, P times 8 numbers a row.

Statistics of a shard, [N, 8]; sums over its columns, relative to its maxima:

    0 max s   1 sum e^((s - max)/T)   4 sum e^((t - max)/T) (t - s)   6 sum e^(s - max), if T != 1
    2 max t   3 sum e^((t - max)/T)   5 sum e^((s - max)/T) (s - t)   7 logit of the label

7 is for the caller to fill in (-inf where the label is not in the shard). A shard without columns
or with nothing but -inf has the maximum LOW and any sums: they fade to 0 beside those of others.

Shapes: N rows (tokens), R student columns of the shard, S <= R teacher columns, P ranks.
"""

import triton
import triton.language as tl

from dskd.kernels.common import (
    LN2,
    LOG2E,
    LOW,
    PLAIN,
    finite,
    row_shift,
    row_start,
    row_tiles,
    shown,
    zero_row,
)
from dskd.kernels.divergence import (
    HALF,
    MIXED,
    NO_LABELS,
    OTHER,
    gradient,
    row_sums,
    tilt_sums,
    write_gradient,
)
from dskd.kernels.factors import (
    row_factors,
    row_logs,
    row_weights,
    speechless,
    teacher_width,
    weightless,
)

STATISTICS = tl.constexpr(8)


@triton.jit
def row_pair(
    student_ptr, teacher_ptr, row, R, S, student_stride, teacher_stride, lead, ALIGN: tl.constexpr
):
    """`rows` and shift of the passes in ``divergence.py``, without logit maps"""
    shift = row_shift(row, student_stride, lead, ALIGN)
    student = row_start(student_ptr, row, student_stride, shift, ALIGN)
    teacher = row_start(teacher_ptr, row, teacher_stride, shift, ALIGN)
    return (student, teacher, (shift, shift + R, shift + S), (1.0, 0.0, 1.0, 0.0)), shift


@triton.jit
def whole_sums(parts_ptr, row, N, ranks, c, LABELS: tl.constexpr, P: tl.constexpr):
    """`row_sums` of all columns, from every rank's; the label's logit; what softmaxes there are.

    Maxima and sums of a side that has no softmax are made harmless: 0 and 1
    """
    rank = tl.arange(0, P)
    part = parts_ptr + (rank * N + row) * STATISTICS
    some = rank < ranks
    s_top = tl.load(part, mask=some, other=LOW)
    t_top = tl.load(part + 2, mask=some, other=LOW)
    s_max = tl.max(s_top, 0)
    t_max = tl.max(t_top, 0)
    s_fade = tl.exp2((s_top - s_max) * c)
    t_fade = tl.exp2((t_top - t_max) * c)
    s_sum = tl.sum(tl.load(part + 1, mask=some, other=0.0) * s_fade, 0)
    t_sum = tl.sum(tl.load(part + 3, mask=some, other=0.0) * t_fade, 0)
    forward = tl.sum(tl.load(part + 4, mask=some, other=0.0) * t_fade, 0)
    reverse = tl.sum(tl.load(part + 5, mask=some, other=0.0) * s_fade, 0)
    hot = s_sum
    if (LABELS == HALF) | (LABELS == OTHER):
        hot_fade = tl.exp2((s_top - s_max) * LOG2E)
        hot = tl.sum(tl.load(part + 6, mask=some, other=0.0) * hot_fade, 0)
    s_label = 0.0
    if LABELS != NO_LABELS:
        s_label = tl.max(tl.load(part + 7, mask=some, other=-float("inf")), 0)
    # not `<`: a NaN has a softmax, one of NaN
    s_none = s_max <= 0.5 * LOW
    t_none = t_max <= 0.5 * LOW
    s_sum = tl.where(s_none, 1.0, s_sum)
    t_sum = tl.where(t_none, 1.0, t_sum)
    hot = tl.where(s_none, 1.0, hot)
    s_max = tl.where(s_none, 0.0, s_max)
    t_max = tl.where(t_none, 0.0, t_max)
    return (s_max, s_sum, t_max, t_sum, forward, reverse, hot), s_label, s_none, t_none


@triton.jit
def statistics_kernel(
    student_ptr,
    teacher_ptr,
    weight_ptr,
    reverse_ptr,
    label_weight_ptr,
    parts_ptr,
    R,
    S,
    student_stride,
    teacher_stride,
    lead,
    inverse_t,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row's statistics of this shard; a row without weight keeps those of no columns"""
    row = tl.program_id(0).to(tl.int64)
    part = parts_ptr + row * STATISTICS
    weights = row_weights(row, weight_ptr, reverse_ptr, label_weight_ptr, KIND, LABELS)
    if weightless(weights):
        return
    S = teacher_width(weights, S, LABELS)
    rows, shift = row_pair(
        student_ptr, teacher_ptr, row, R, S, student_stride, teacher_stride, lead, ALIGN
    )
    tiles = row_tiles(shift, shift + R, shift + S, B, ALIGN)
    s_max, s_sum, t_max, t_sum, forward, reverse, hot = row_sums(
        rows, tiles, inverse_t * LOG2E, KIND, LABELS, PLAIN, PLAIN, ALIGN, B, G, FAST
    )
    tl.store(part, s_max)
    tl.store(part + 1, s_sum)
    tl.store(part + 2, t_max)
    tl.store(part + 3, t_sum)
    tl.store(part + 4, forward)
    tl.store(part + 5, reverse)
    tl.store(part + 6, hot)


@triton.jit
def divergence_kernel(
    student_ptr,
    teacher_ptr,
    parts_ptr,
    weight_ptr,
    reverse_ptr,
    label_weight_ptr,
    sums_ptr,
    N,
    ranks,
    R,
    S,
    student_stride,
    teacher_stride,
    lead,
    inverse_t,
    beta,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    P: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row's `tilt_sums` of this shard"""
    row = tl.program_id(0).to(tl.int64)
    weights = row_weights(row, weight_ptr, reverse_ptr, label_weight_ptr, KIND, LABELS)
    if weightless(weights):
        tl.store(sums_ptr + row * 2, 0.0)
        tl.store(sums_ptr + row * 2 + 1, 0.0)
        return
    c = inverse_t * LOG2E
    sums, _, _, _ = whole_sums(parts_ptr, row, N, ranks, c, NO_LABELS, P)
    S = teacher_width(weights, S, LABELS)
    rows, shift = row_pair(
        student_ptr, teacher_ptr, row, R, S, student_stride, teacher_stride, lead, ALIGN
    )
    tiles = row_tiles(shift, shift + R, shift + S, B, ALIGN)
    total, mean = tilt_sums(
        rows, tiles, row_logs(sums, c), beta, KIND, PLAIN, PLAIN, ALIGN, B, G, FAST
    )
    tl.store(sums_ptr + row * 2, total)
    tl.store(sums_ptr + row * 2 + 1, mean)


@triton.jit
def gradient_kernel(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    parts_ptr,
    sums_ptr,
    column_ptr,
    weight_ptr,
    reverse_ptr,
    label_weight_ptr,
    divergence_ptr,
    label_loss_ptr,
    N,
    ranks,
    R,
    S,
    student_stride,
    teacher_stride,
    grad_stride,
    lead,
    inverse_t,
    beta,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    GRAD: tl.constexpr,
    P: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row's losses, the same on every rank, and if GRAD the gradient of this shard"""
    row = tl.program_id(0).to(tl.int64)
    weights = row_weights(row, weight_ptr, reverse_ptr, label_weight_ptr, KIND, LABELS)
    S = teacher_width(weights, S, LABELS)
    rows, shift = row_pair(
        student_ptr, teacher_ptr, row, R, S, student_stride, teacher_stride, lead, ALIGN
    )
    if weightless(weights):
        tl.store(divergence_ptr + row, 0.0)
        if LABELS != NO_LABELS:
            tl.store(label_loss_ptr + row, 0.0)
        if GRAD:
            zero_row(row_start(grad_ptr, row, grad_stride, shift, ALIGN), shift, shift + R, B)
        return

    c = inverse_t * LOG2E
    sums, s_label, s_none, t_none = whole_sums(parts_ptr, row, N, ranks, c, LABELS, P)
    # a row without a softmax has no gradient, and losses of NaN
    none = s_none | t_none
    silent = speechless(weights)
    tilts = (0.0, 0.0)
    if KIND > MIXED:
        tilts = (tl.load(sums_ptr + row * 2), tl.load(sums_ptr + row * 2 + 1))
    weight, reverse_weight, label_weight = weights
    weights = (
        tl.where(none, 0.0, weight),
        tl.where(none, 0.0, reverse_weight),
        tl.where(s_none, 0.0, label_weight),
    )
    loss, factors = row_factors(
        sums, row_logs(sums, c), tilts, weights, inverse_t, beta, KIND, LABELS
    )
    tl.store(divergence_ptr + row, tl.where(silent, 0.0, shown(loss, none)))
    if LABELS != NO_LABELS:
        s_max, _, _, _, _, _, hot = sums
        label_loss = shown((s_max - s_label) + tl.log2(hot) * LN2, s_none)
        tl.store(label_loss_ptr + row, tl.where(label_weight == 0, 0.0, label_loss))

    if GRAD:
        grad = row_start(grad_ptr, row, grad_stride, shift, ALIGN)
        tiles = row_tiles(shift, shift + R, shift + S, B, ALIGN)
        write_gradient(rows, tiles, grad, factors, KIND, LABELS, PLAIN, PLAIN, ALIGN, B, FAST)
        if LABELS != NO_LABELS:
            column = tl.load(column_ptr + row)
            here = (column >= 0) & (label_weight != 0) & (s_none == 0)
            at = shift + column
            student, teacher, _, _ = rows
            s = finite(tl.load(student + at, mask=here, other=-float("inf")), False)
            known = here & (column < S)
            t = finite(tl.load(teacher + at, mask=known, other=-float("inf")), False)
            g = gradient(s, t, factors, KIND, LABELS, FAST) - label_weight
            # the dense pass has stored there before
            tl.debug_barrier()
            tl.store(grad + at, g.to(grad_ptr.dtype.element_ty), mask=here)
