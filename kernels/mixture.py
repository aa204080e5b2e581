"""Forward KL from each token's own mixture of several teachers, and its gradient, in one launch.

With p_k = softmax(teacher_k / T), zero outside of teacher k's columns, q = softmax(z / T) of the
student's z = map(x), and W = sum_k w_k of the row's weights:

    pbar = sum_k (w_k / W) p_k,   divergence = sum pbar log(pbar / q),   d / dz = (W / T) (q - pbar)

which is the gradient of sum_k w_k KL(p_k || q), too.

One program computes a row, all teachers side by side. First every row's softmax denominators are
found, one row after the other; then all rows are read once more, side by side and backwards, for
the divergence and the gradient. A teacher whose weight is 0 is not read in the first pass, and in
the second the student is read in its place, which is at hand: it costs no memory traffic.

Shapes: N rows, V student columns, n teachers of W_k columns, B columns of a tile, L threads (see
``common.py``). Logarithms are of base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    ALIGNED_COLUMNS,
    CAPPED,
    DTYPES,
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
    Configuration,
    Launch,
    alignment,
    columns,
    edge_tile,
    fast,
    launch,
    log2,
    map_kind,
    online,
    row_configuration,
    row_end,
    row_shift,
    row_start,
    row_tiles,
    shown,
    slope,
    table_on,
    thread_sum,
    zero_row,
)


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


def mixture_rows(
    student_NV: Tensor,
    teachers: list[Tensor],
    firsts: list[int],
    weight_Nn: Tensor,
    *,
    temperature: float,
    student_map: tuple[float, float],
    grad_NV: Tensor | None,
) -> Tensor:
    """``divergence_N``, fp32, in nats, unweighted; its gradient times the row's weight in grad_NV.

    student_NV: fp32, fp16 or bf16; teachers: [N, W_k] of the same dtype, teacher k's columns being
    the student's from ``firsts[k]`` on; all of any row stride. weight_Nn: fp32 [N, n], unit column
    stride. 16-byte loads need teachers whose rows lie as the student's do (address and stride in
    elements, modulo 8) and firsts that are multiples of 8; all else works, more slowly. Arguments
    are checked by the caller.
    """
    rows, columns_V = student_NV.shape
    divergence_N = torch.empty(rows, dtype=torch.float32, device=student_NV.device)
    if not rows:
        return divergence_N
    gradients = () if grad_NV is None else (grad_NV,)
    align, lead = alignment(student_NV, *gradients, widths=(columns_V,))
    widths = tuple(t.shape[1] for t in teachers)
    teacher_align, _ = alignment(student_NV, *teachers, widths=(columns_V, *widths))
    if align == LOOSE.value or any(first % ALIGNED_COLUMNS.value for first in firsts):
        teacher_align = LOOSE.value
    # teachers that do not lie as the student does have a first column of their own, too
    ranges = teacher_align != align or any(width != columns_V for width in widths)
    dtypes = (logits.dtype for logits in (student_NV, *gradients))
    tile, group, num_warps = launch_of(columns_V, ranges, teacher_align == LOOSE.value, *dtypes)
    scale, cap = student_map
    with torch.cuda.device_of(student_NV):
        mixture_kernel[(rows,)](
            student_NV,
            grad_NV,
            teacher_table(teachers, firsts),
            weight_Nn,
            divergence_N,
            columns_V,
            student_NV.stride(0),
            0 if grad_NV is None else grad_NV.stride(0),
            weight_Nn.stride(0),
            lead,
            1.0 / temperature,
            scale,
            cap,
            TEACHERS=len(teachers),
            RANGES=ranges,
            MAP=map_kind(student_map),
            GRAD=grad_NV is not None,
            ALIGN=align,
            TEACHER_ALIGN=teacher_align,
            B=tile,
            G=group,
            FAST=fast(),
            num_warps=num_warps,
        )
    return divergence_N


def teacher_table(teachers: list[Tensor], firsts: list[int]) -> Tensor:
    """int64 [4, n] on the teachers' device: addresses, row strides, first columns, widths."""
    return table_on(
        teachers[0].device,
        [
            [t.data_ptr() for t in teachers],
            [t.stride(0) for t in teachers],
            firsts,
            [t.shape[1] for t in teachers],
        ],
    )


def launch_of(columns_V: int, ranges: bool, loose: bool, *dtypes: torch.dtype) -> Launch:
    """As of any row kernel, of fewer threads where each needs many registers.

    ranges: the teachers have columns of their own; loose: which are read one by one; dtypes:
    student's, gradient's.
    """
    return launch(columns_V, *dtypes, most=8 if loose else 16 if ranges else 32)


def configuration(
    student: str = "bf16",
    grad: str = "bf16",
    *,
    teachers: int = 3,
    ranges: bool = False,
    align: tl.constexpr = EVEN,
    columns_V: int = 131072,
) -> Configuration:
    """One compiled form, with a gradient; the types as Triton spells them."""
    pointers = {
        "student_ptr": student,
        "grad_ptr": grad,
        "table_ptr": "i64",
        **dict.fromkeys(("weight_ptr", "divergence_ptr"), "fp32"),
    }
    constants = {
        "TEACHERS": teachers,
        "RANGES": ranges,
        "MAP": PLAIN.value,
        "GRAD": True,
        "ALIGN": align.value,
        "TEACHER_ALIGN": align.value,
    }
    return row_configuration(
        f"n{teachers}/{student}-{grad}/V{columns_V}/align{align.value}-ranges{int(ranges)}",
        mixture_kernel,
        launch_of(columns_V, ranges, False, DTYPES[student], DTYPES[grad]),
        pointers,
        constants,
        aligned=("student_ptr", "grad_ptr"),
        # loads of a range are guarded, and not counted
        tensors_per_column=1 if ranges else (*[1] * (1 + teachers), 1 + teachers),
    )


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests: dtypes, rows of odd width, ranges."""
    return [
        configuration(),
        configuration("fp32", "bf16", teachers=2),
        configuration(align=RAGGED, columns_V=32768),
        configuration(ranges=True, columns_V=8192),
    ]
