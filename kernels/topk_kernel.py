"""The kernel of a top-k teacher's row: the kept tokens, and around them the passes over the rest.

R is summed directly (1 - sum_k q_k would lose it where the student is confident): the kept logits
are taken into registers and -inf is written over them before the row is read, so that the passes
of ``topk_rest.py`` need no test for the kept tokens. The kept tokens' gradient is scattered last.
The truncated divergence reads the kept tokens only.

Names as in ``topk.py``. Shapes: V columns, K slots, KP slots with padding, B columns of a tile.
Logarithms are of base 2.
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
    LOW,
    PLAIN,
    TINY,
    finite,
    mapped,
    row_shift,
    row_start,
    row_tiles,
    shown,
    slope,
    zero_row,
)
from dskd.kernels.topk_rest import (
    OTHER,
    SAME,
    SQUARE,
    TAIL,
    TRUNCATED,
    UNLABELLED,
    rest_gradient,
    rest_logs,
    write_rest,
)


@triton.jit
def log_add(a, b):
    """log2(2^a + 2^b), both finite"""
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def log_total(z, top, used, c):
    """log2 of the sum of 2^(c (z - top)) over the used slots, very low without any"""
    return tl.log2(tl.sum(tl.where(used, tl.exp2((z - top) * c), 0.0), 0) + TINY)


@triton.jit
def at_most_0(x):
    """A logarithm of LOW is so large that rounding could make it positive; NaN stays"""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def teacher_row(log_p, some, row, weight, tail_ptr, MODE: tl.constexpr):
    """The teacher's log2 p and p of the slots, the same of the rest, and the sum of all p"""
    log_p = tl.where(some, log_p * LOG2E, LOW)
    log_p_rest = 0.0
    p_rest = 0.0
    if MODE == TAIL:
        p = tl.exp2(log_p)
        log_p_rest = tl.load(tail_ptr + row, mask=weight != 0, other=-float("inf")) * LOG2E
        p_rest = tl.exp2(log_p_rest)
        mass = tl.sum(p, 0) + p_rest
    else:
        p_peak = tl.max(log_p, 0)
        log_p -= p_peak + log_total(log_p, p_peak, some, 1.0)
        p = tl.where(some, tl.exp2(log_p), 0.0)
        # 1, or 0 of a teacher that says nothing, which has no gradient either
        mass = tl.sum(p, 0)
    return log_p, p, log_p_rest, p_rest, mass


@triton.jit
def topk_kernel(
    student_ptr,
    grad_ptr,
    ids_ptr,
    logprobs_ptr,
    tail_ptr,
    labels_ptr,
    weight_ptr,
    label_weight_ptr,
    divergence_ptr,
    label_loss_ptr,
    V,
    K,
    student_stride,
    grad_stride,
    ids_stride,
    logprobs_stride,
    lead,
    inverse_t,
    scale,
    cap,
    MODE: tl.constexpr,
    LABELS: tl.constexpr,
    MAP: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row: divergence, label loss, and (GRAD) the gradient, which may overwrite the student"""
    SWEEP: tl.constexpr = MODE != TRUNCATED or LABELS != UNLABELLED
    row = tl.program_id(0).to(tl.int64)
    shift = row_shift(row, student_stride, lead, ALIGN)
    student = row_start(student_ptr, row, student_stride, shift, ALIGN)
    end = shift + V
    if ALIGN == EVEN:
        # no change, but now Triton knows the multiple and lets the edges go by 16 bytes, too
        end = end // ALIGNED_COLUMNS * ALIGNED_COLUMNS

    weight = tl.load(weight_ptr + row)
    label_weight = 0.0
    if LABELS != UNLABELLED:
        label_weight = tl.load(label_weight_ptr + row)
    if (weight == 0) & (label_weight == 0):
        tl.store(divergence_ptr + row, 0.0)
        if LABELS != UNLABELLED:
            tl.store(label_loss_ptr + row, 0.0)
        if GRAD:
            zero_row(row_start(grad_ptr, row, grad_stride, shift, ALIGN), shift, end, B)
        return

    # the kept tokens [KP] and the label
    slot = tl.arange(0, KP)
    ids = tl.load(ids_ptr + row * ids_stride + slot, mask=slot < K, other=-1).to(tl.int32)
    used = ids >= 0
    x = tl.load(student + (shift + ids), mask=used, other=-float("inf"))
    z = mapped(finite(x, False), scale, cap, MAP, FAST)
    label = 0
    z_label = 0.0
    if LABELS != UNLABELLED:
        # an ignored label may be anything: it must not index
        label = tl.where(label_weight == 0, 0, tl.load(labels_ptr + row)).to(tl.int32)
        z_label = mapped(finite(tl.load(student + (shift + label)), False), scale, cap, MAP, FAST)
    # every thread has read these logits before another one overwrites them
    tl.debug_barrier()

    span = (shift, end)
    tiles = row_tiles(shift, end, end, B, ALIGN)
    c = inverse_t * LOG2E
    rest = 0.0
    rest_1 = 0.0
    rest_peak = 0.5 * LOW
    if SWEEP:
        masked = tl.full([KP], -float("inf"), tl.float32).to(student_ptr.dtype.element_ty)
        tl.store(student + (shift + ids), masked, mask=used)
        # all threads read the row without its kept tokens from here on
        tl.debug_barrier()
        rest, rest_1, rest_peak = rest_logs(
            student, span, tiles, c, scale, cap, LABELS, MODE, MAP, GRAD, ALIGN, B, G, FAST
        )

    # read again: what waits in registers while the row is read gets in the way of that
    ids = tl.load(ids_ptr + row * ids_stride + slot, mask=slot < K, other=-1).to(tl.int32)
    used = ids >= 0
    weight = tl.load(weight_ptr + row)
    if LABELS != UNLABELLED:
        label_weight = tl.load(label_weight_ptr + row)
        label = tl.where(label_weight == 0, 0, tl.load(labels_ptr + row)).to(tl.int32)

    # log2 of the student's denominator Z, all logits taken relative to the row's peak
    kept_peak = tl.max(z, 0)
    peak = tl.maximum(kept_peak, rest_peak)
    rest += (rest_peak - peak) * c
    rest_1 += (rest_peak - peak) * LOG2E
    total = (kept_peak - peak) * c + log_total(z, kept_peak, used, c)
    if MODE != TRUNCATED:
        total = log_add(total, rest)
    log_q = at_most_0((z - peak) * c - total)

    # without a weight the teacher says nothing: 0 times what is there may be NaN
    heard = used & (slot < tl.where(weight == 0, 0, K))
    log_p = tl.load(logprobs_ptr + row * logprobs_stride + slot, mask=heard, other=-float("inf"))
    some = log_p != -float("inf")
    log_p, p, log_p_rest, p_rest, mass = teacher_row(log_p, some, row, weight, tail_ptr, MODE)
    divergence = 0.0
    if MODE == TAIL:
        divergence = tl.where(p_rest != 0, p_rest * (log_p_rest - (rest - total)), 0.0)
    q_rest = 0.0
    if MODE != TRUNCATED:
        q_rest = tl.exp2(rest - total)
    divergence += tl.sum(tl.where(some, p * (log_p - log_q), 0.0), 0)
    # no softmax of the kept tokens, or of all
    none = peak < -HUGE
    if MODE == TRUNCATED:
        none = kept_peak < -HUGE
    none = none & (mass != 0)
    tl.store(divergence_ptr + row, shown(divergence * LN2, none))

    total_1 = total
    if LABELS == SQUARE or LABELS == OTHER:
        total_1 = log_add(log_total(z, peak, used, LOG2E), rest_1)
    if LABELS != UNLABELLED:
        loss = shown((total_1 - (z_label - peak) * LOG2E) * LN2, peak < -HUGE)
        tl.store(label_loss_ptr + row, tl.where(label_weight == 0, 0.0, loss))

    if GRAD:
        weight *= inverse_t
        if MAP != CAPPED:
            weight *= scale
            label_weight *= scale
        k_rest = weight * (mass * q_rest - p_rest)
        k_label = label_weight
        g = weight * (mass * tl.exp2(log_q) - p)
        if LABELS == SAME:
            k_rest += label_weight * q_rest
            g += label_weight * tl.exp2(log_q)
        if LABELS == SQUARE:
            k_label *= tl.exp2(2.0 * rest - total_1)
        if LABELS == SQUARE or LABELS == OTHER:
            g += label_weight * tl.exp2(at_most_0((z - peak) * LOG2E - total_1))
        rest += peak * c
        total_1 += peak * LOG2E
        factors = (c, rest, total_1, k_rest, k_label)
        g_label = 0.0
        kept_label = 0
        if LABELS != UNLABELLED:
            hit = used & (ids == label)
            kept_label = tl.sum(hit.to(tl.int32), 0)
            g -= tl.where(hit, label_weight, 0.0)
            g_label = rest_gradient(z_label, factors, 1.0, cap, LABELS, MODE, PLAIN) - label_weight
            if MAP == CAPPED:
                g_label *= slope(z_label, scale, cap, MAP)
        if MAP == CAPPED:
            g *= slope(z, scale, cap, MAP)

        grad = row_start(grad_ptr, row, grad_stride, shift, ALIGN)
        if SWEEP:
            write_rest(
                student, grad, span, tiles, factors, scale, cap, LABELS, MODE, MAP, ALIGN, B, FAST
            )
        else:
            zero_row(grad, shift, end, B)
        # the row's stores, whichever thread made them, come before these
        tl.debug_barrier()
        tl.store(grad + (shift + ids), g.to(grad_ptr.dtype.element_ty), mask=used)
        if LABELS != UNLABELLED:
            if (label_weight != 0) & (kept_label == 0):
                tl.store(grad + (shift + label), g_label.to(grad_ptr.dtype.element_ty))
