"""Forward KL from a teacher known by its K largest log-probabilities, cross entropy, and gradient.

With the kept tokens k and all others as the rest r, and z = map(x) of the student:

    q_k = exp(z_k / T) / Z,  q_r = R / Z,    R = sum of exp(z_j / T) over the rest,  Z = sum_k + R
    tail          sum_k p_k log(p_k / q_k) + p_r log(p_r / q_r)
    renormalised  p_k / sum p in place of p_k, and p_r = 0
    truncated     renormalised, and Z = sum_k

    d / dz_k = (1/T) (P q_k - p_k),    d / dz_j = (1/T) (P q_r - p_r) exp(z_j / T) / R,
    P = sum_k p_k + p_r

The label's cross entropy at temperature 1 rides along. At T = 1 its softmax is q; at T = 2 it is
proportional to q^2, which costs no exponential; at others it has its own.

R is summed directly (1 - sum_k q_k would lose it where the student is confident): the kept logits
are taken into registers and -inf is written over them before the row is read, so that the two
passes over the rest need no test for the kept tokens, whose exponentials are exactly 0. The second
pass goes backwards to meet what the caches still hold. The kept tokens' gradient is scattered last.
The truncated divergence reads the kept tokens only.

Shapes: N rows (one program each), V columns, K slots, KP slots with padding, B columns of a tile,
L threads (see ``common.py``). Tuples: ``span`` = (first, last), the row's positions from its
`row_start`; ``tiles``, what `row_tiles` gives; ``factors``, see `rest_gradient`. ``c`` is
log2(e) / T; logarithms are of base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    CAPPED,
    DTYPES,
    EVEN,
    HUGE,
    LN2,
    LOG2E,
    LOW,
    PLAIN,
    RAGGED,
    THREAD_COLUMNS,
    TINY,
    Configuration,
    columns,
    edge_tile,
    finite,
    launch,
    map_kind,
    mapped,
    online,
    row_configuration,
    row_end,
    row_options,
    row_shift,
    row_start,
    row_tiles,
    shown,
    slope,
    spread,
    thread_sum,
    zero_row,
)

MODES = {"tail": 0, "renormalised": 1, "truncated": 2}
TAIL, RENORMALISED, TRUNCATED = map(tl.constexpr, MODES.values())

# labels: none; their softmax is q (T = 1), goes with q^2 (T = 2), or is another one
UNLABELLED, SAME, SQUARE, OTHER = map(tl.constexpr, range(4))
LABEL_NAMES = ("unlabelled", "same", "square", "other")

SLOTS_OF_A_WARP = 128
"""Kept tokens: four a thread, at most."""


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
        # 1, or 0 of a teacher without a kept token, which has no gradient either
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
    end = row_end(shift, V, ALIGN)

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

    # without a weight the teacher is not read: 0 times what is there may be NaN
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


def topk_rows(
    student_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weight_N: Tensor,
    label_weight_N: Tensor | None,
    *,
    mode: str,
    temperature: float,
    student_map: tuple[float, float],
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``(divergence_N, label_loss_N)``, fp32, in nats, unweighted; the losses' gradient in grad_NV.

    student_NV: fp32, fp16 or bf16, any row stride, and scratch: the kept logits are overwritten.
    ids_NK: int32 or int64, negative where a slot is unused; logprobs_NK: fp32, the teacher's at the
    temperature; tail_N: fp32, log of the mass of everything else (mode ``tail``). Both rows may
    have any stride. Weights: fp32, contiguous. Arguments are checked by the caller.
    """
    rows = len(student_NV)
    slots = max(32, triton.next_power_of_2(ids_NK.shape[1]))
    divergence_N = torch.empty(rows, dtype=torch.float32, device=student_NV.device)
    label_loss_N = None if labels_N is None else torch.empty_like(divergence_N)
    if not rows:
        return divergence_N, label_loss_N
    scale, cap = student_map
    with torch.cuda.device_of(student_NV):
        topk_kernel[(rows,)](
            student_ptr=student_NV,
            ids_ptr=ids_NK,
            logprobs_ptr=logprobs_NK,
            tail_ptr=tail_N,
            labels_ptr=labels_N,
            weight_ptr=weight_N,
            label_weight_ptr=label_weight_N,
            divergence_ptr=divergence_N,
            label_loss_ptr=label_loss_N,
            V=student_NV.shape[1],
            K=ids_NK.shape[1],
            student_stride=student_NV.stride(0),
            ids_stride=ids_NK.stride(0),
            logprobs_stride=logprobs_NK.stride(0),
            inverse_t=1.0 / temperature,
            scale=scale,
            cap=cap,
            MODE=MODES[mode],
            LABELS=label_kind(mode, temperature, labels_N is not None),
            MAP=map_kind(student_map),
            KP=slots,
            **row_options(student_NV, grad_NV, least=slots // SLOTS_OF_A_WARP),
        )
    return divergence_N, label_loss_N


def label_kind(mode: str, temperature: float, labelled: bool) -> int:
    """How the label's softmax goes with the student's at the temperature."""
    if not labelled:
        return UNLABELLED.value
    if mode == "truncated":
        return OTHER.value
    return {1.0: SAME, 2.0: SQUARE}.get(temperature, OTHER).value


def configuration(
    mode: str,
    labels: tl.constexpr,
    student: str = "bf16",
    grad: str | None = "bf16",
    *,
    align: tl.constexpr = EVEN,
    logit_map: tl.constexpr = PLAIN,
    columns_V: int = 131072,
    slots: int = 64,
) -> Configuration:
    """One compiled form; the types as Triton spells them, no `grad`: evaluation."""
    dtypes = (DTYPES[name] for name in (student, grad) if name)
    labelled = labels != UNLABELLED
    pointers = {
        "student_ptr": student,
        "grad_ptr": grad,
        "ids_ptr": "i32",
        "logprobs_ptr": "fp32",
        "tail_ptr": "fp32" if mode == "tail" else None,
        "labels_ptr": "i64" if labelled else None,
        **dict.fromkeys(("weight_ptr", "divergence_ptr"), "fp32"),
        **dict.fromkeys(("label_weight_ptr", "label_loss_ptr"), "fp32" if labelled else None),
    }
    constants = {
        "MODE": MODES[mode],
        "LABELS": labels.value,
        "MAP": logit_map.value,
        "GRAD": grad is not None,
        "ALIGN": align.value,
        "KP": slots,
    }
    return row_configuration(
        f"{mode}/{LABEL_NAMES[labels.value]}/{student}-{grad}/V{columns_V}-K{slots}"
        f"/align{align.value}-map{logit_map.value}",
        topk_kernel,
        launch(columns_V, *dtypes, least=slots // SLOTS_OF_A_WARP),
        pointers,
        constants,
        aligned=("student_ptr", "grad_ptr"),
        tensors_per_column=0 if mode == "truncated" and not labelled else 1,
    )


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests: modes, label kinds, dtypes, launches."""
    return [
        *(configuration("tail", labels) for labels in (UNLABELLED, SAME, SQUARE, OTHER)),
        configuration("tail", SQUARE, "fp32", "bf16"),
        configuration("tail", SAME, "fp32", "fp32", columns_V=8192),
        configuration("tail", UNLABELLED, grad=None),
        configuration("tail", SQUARE, align=RAGGED, columns_V=32768),
        configuration("tail", OTHER, "fp32", "bf16", logit_map=CAPPED, columns_V=1024, slots=1024),
        configuration("renormalised", SQUARE, columns_V=32768),
        configuration("truncated", UNLABELLED),
        configuration("truncated", OTHER, "fp32", "bf16", columns_V=16384),
    ]
