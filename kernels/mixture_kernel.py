"""The kernel of several teachers' mixture: one program a row, all teachers side by side.

First every row's softmax denominators are found, one row after the other; then all rows are read
once more, side by side and backwards, for the divergence and the gradient. A teacher whose weight
is 0 is not read in the first pass, and in the second the student is read in its place, which is at
hand: it costs no memory traffic.

Shapes: V student columns, n teachers of W_k columns, B columns of a tile, L threads (see
``common.py``). Logarithms are of base 2.
"""

import triton
import triton.language as tl

from dskd.kernels.common import (
    ALIGNED_COLUMNS,
    CAPPED,
    EVEN,
    HUGE,
    LN2,
    LOG2E,
    LOOSE,
    LOW,
    PLAIN,
    RAGGED,
    THREAD_COLUMNS,
    TINY,
    columns,
    edge_tile,
    log2,
    online,
    row_shift,
    row_start,
    row_tiles,
    shown,
    slope,
    thread_sum,
    zero_row,
)


@triton.jit
def row_end(shift, width, ALIGN: tl.constexpr):
    """The position behind a row's last column"""
    end = shift + width
    if ALIGN == EVEN:
        # no change, but now Triton knows the multiple and lets the edges go by 16 bytes, too
        end = end // ALIGNED_COLUMNS * ALIGNED_COLUMNS
    return end


@triton.jit
def log_denominator(
    row,
    shift,
    width,
    c,
    scale,
    cap,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """log2 of the sum of 2^(c z) over the columns [shift, shift + width) from `row`"""
    end = row_end(shift, width, ALIGN)
    head, full, count = row_tiles(shift, end, end, B, ALIGN)
    i = tl.arange(0, B)
    # above LOW, relative to which LOW has the exponential 0
    top = tl.full([B // THREAD_COLUMNS], 0.5 * LOW, tl.float32)
    total = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    for tile in tl.range(head, full):
        z = columns(row, tile * B + i, shift, end, scale, cap, MAP, False, ALIGN, True, True, FAST)
        top, total, _, _ = online(z, top, total, c, G)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        z = columns(row, at, shift, end, scale, cap, MAP, True, ALIGN, True, True, FAST)
        top, total, _, _ = online(z, top, total, c, G)
    peak = tl.max(top, 0)
    total = tl.sum(total * tl.exp2((top - peak) * c), 0)
    return shown(peak * c + tl.log2(total + TINY), peak < -HUGE)


@triton.jit
def range_columns(start, at, first, last, ALIGN: tl.constexpr):
    """A teacher's logits at the student's positions, LOW outside of [first, last)"""
    if ALIGN == LOOSE:
        wanted = (at >= first) & (at < last)
    else:
        # whole aligned groups: what lies in 32 bytes with a wanted element can be read
        group = first // ALIGNED_COLUMNS * ALIGNED_COLUMNS
        group_end = (last + ALIGNED_COLUMNS - 1) // ALIGNED_COLUMNS * ALIGNED_COLUMNS
        wanted = (at >= group) & (at < group_end)
    x = tl.load(start + at, mask=wanted, other=0.0, eviction_policy="evict_first")
    return tl.where((at >= first) & (at < last), x.to(tl.float32), LOW)


@triton.jit
def mixed_tile(
    student,
    grad,
    teachers,
    firsts,
    lasts,
    logs,
    at,
    shift,
    end,
    c,
    s_log,
    weight,
    scale,
    cap,
    divergence,
    TEACHERS: tl.constexpr,
    EDGE: tl.constexpr,
    RANGES: tl.constexpr,
    MAP: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """Every thread's divergence [L] with one more tile, and (GRAD) the tile's gradient stored.

    logs: log2 of a teacher's denominator over its share, so that 2^(c t - log) = share * p
    """
    z = columns(student, at, shift, end, scale, cap, MAP, EDGE, ALIGN, False, False, FAST)
    p = tl.zeros([at.shape[0]], tl.float32)
    for k in tl.static_range(TEACHERS):
        if RANGES:
            t = range_columns(teachers[k], at, firsts[k], lasts[k], TEACHER_ALIGN)
        else:
            t = columns(
                teachers[k], at, shift, end, 1.0, 0.0, PLAIN, EDGE, TEACHER_ALIGN, False, True, FAST
            )
        p += tl.exp2(t * c - logs[k])
    log_q = z * c - s_log
    divergence += thread_sum(p * (log2(p + TINY, FAST) - log_q), G)
    if GRAD:
        g = weight * (tl.exp2(log_q) - p)
        if MAP == CAPPED:
            g *= slope(z, scale, cap, MAP)
        g = g.to(grad.dtype.element_ty)
        if EDGE:
            tl.store(grad + at, g, mask=(at >= shift) & (at < end))
        else:
            tl.store(grad + at, g, eviction_policy="evict_first")
    return divergence


@triton.jit
def mixture_kernel(
    student_ptr,
    grad_ptr,
    table_ptr,
    weight_ptr,
    divergence_ptr,
    V,
    student_stride,
    grad_stride,
    weight_stride,
    lead,
    inverse_t,
    scale,
    cap,
    TEACHERS: tl.constexpr,
    RANGES: tl.constexpr,
    MAP: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row: divergence and (GRAD) the gradient, which may overwrite the student.

    table: int64 [4, n], addresses, row strides, first columns and widths of the teachers, whose
    type is the student's. RANGES: some do not cover all V columns, or lie differently.
    """
    row = tl.program_id(0).to(tl.int64)
    shift = row_shift(row, student_stride, lead, ALIGN)
    student = row_start(student_ptr, row, student_stride, shift, ALIGN)
    grad = student
    if GRAD:
        grad = row_start(grad_ptr, row, grad_stride, shift, ALIGN)
    end = row_end(shift, V, ALIGN)

    weight = 0.0
    for k in tl.static_range(TEACHERS):
        weight += tl.load(weight_ptr + row * weight_stride + k)
    if weight == 0:
        tl.store(divergence_ptr + row, 0.0)
        if GRAD:
            zero_row(grad, shift, end, B)
        return

    c = inverse_t * LOG2E
    teachers = ()
    firsts = ()
    lasts = ()
    logs = ()
    for k in tl.static_range(TEACHERS):
        address = tl.load(table_ptr + k).to(tl.pointer_type(student_ptr.dtype.element_ty))
        stride = tl.load(table_ptr + (TEACHERS + k))
        first = 0
        width = V
        if RANGES:
            first = tl.load(table_ptr + (2 * TEACHERS + k)).to(tl.int32)
            width = tl.load(table_ptr + (3 * TEACHERS + k)).to(tl.int32)
        share = tl.load(weight_ptr + row * weight_stride + k) / weight
        # where tile 0 of the student's positions lies in terms of this teacher
        start = row_start(address, row, stride, shift + first, TEACHER_ALIGN)
        log = -LOW
        if share == 0:
            start = student
        else:
            own_shift = 0
            if TEACHER_ALIGN == RAGGED:
                own_shift = shift
            own = row_start(address, row, stride, own_shift, TEACHER_ALIGN)
            log = log_denominator(
                own, own_shift, width, c, 1.0, 0.0, PLAIN, TEACHER_ALIGN, B, G, FAST
            ) - tl.log2(share)
        if TEACHER_ALIGN != LOOSE:
            start = tl.multiple_of(start, 16)
        teachers = teachers + (start,)
        firsts = firsts + (shift + first,)
        lasts = lasts + (shift + first + width,)
        logs = logs + (log,)
    s_log = log_denominator(student, shift, V, c, scale, cap, MAP, ALIGN, B, G, FAST)

    weight *= inverse_t
    if MAP != CAPPED:
        weight *= scale
    head, full, count = row_tiles(shift, end, end, B, ALIGN)
    i = tl.arange(0, B)
    divergence = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        divergence = mixed_tile(
            student, grad, teachers, firsts, lasts, logs, at, shift, end, c, s_log, weight, scale,
            cap, divergence, TEACHERS, True, RANGES, MAP, GRAD, ALIGN, TEACHER_ALIGN, G, FAST,
        )  # fmt: skip
    for back in tl.range(head, full):
        at = (full + head - 1 - back) * B + i
        divergence = mixed_tile(
            student, grad, teachers, firsts, lasts, logs, at, shift, end, c, s_log, weight, scale,
            cap, divergence, TEACHERS, False, RANGES, MAP, GRAD, ALIGN, TEACHER_ALIGN, G, FAST,
        )  # fmt: skip
    tl.store(divergence_ptr + row, shown(tl.sum(divergence, 0) * LN2, False))
