"""A divergence between dense logits, of which every rank has a shard of the vocabulary's columns.

The passes of ``divergence.py``, each a kernel of one program a row, because the ranks exchange
sums in between: `statistics_rows`, an all-gather; for the kinds of three passes `divergence_rows`,
a sum over the ranks; `gradient_rows`. Every kernel after the first combines the ranks' statistics
itself, P times 8 numbers a row.

Statistics of a shard, [N, 8]; sums over its columns, relative to its maxima:

    0 max s   1 sum e^((s - max)/T)   4 sum e^((t - max)/T) (t - s)   6 sum e^(s - max), if T != 1
    2 max t   3 sum e^((t - max)/T)   5 sum e^((s - max)/T) (s - t)   7 logit of the label

7 is for the caller to fill in (-inf where the label is not in the shard). A shard without columns
or with nothing but -inf has the maximum LOW and any sums: they fade to 0 beside those of others.

Shapes: N rows (tokens), R student columns of the shard, S <= R teacher columns, P ranks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    DTYPES,
    EVEN,
    LN2,
    LOG2E,
    LOW,
    PLAIN,
    RAGGED,
    Configuration,
    alignment,
    fast,
    finite,
    launch,
    row_configuration,
    row_shift,
    row_start,
    row_tiles,
    shown,
    zero_row,
)
from dskd.kernels.divergence import (
    HALF,
    KINDS,
    LABEL_NAMES,
    MIXED,
    NO_LABELS,
    OTHER,
    SAME,
    gradient,
    label_mode,
    row_factors,
    row_logs,
    row_sums,
    row_weights,
    speechless,
    teacher_width,
    tilt_sums,
    weightless,
    write_gradient,
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
    """Statistics of this shard [N, 8], fp32; the label's logit is left at -inf.

    A row whose weights are all 0 is not read, and has those of no columns. The numbers are those at
    the head of the file.

    Args:
        student_NR, teacher_NS: logits, fp32, fp16 or bf16, of unit column stride and any row
            stride; S <= R, and either may be 0.
        weight_N, reverse_N, label_weight_N: fp32, of the divergence, the reverse part of "mixed"
            (None otherwise), and the label (None without labels).
        kind: a key of ``divergence.KINDS``.
    """
    parts_N8 = torch.zeros(len(weight_N), 8, device=student_NR.device)
    parts_N8[:, 0:3:2] = LOW.value
    parts_N8[:, 7] = -torch.inf
    if student_NR.numel():
        shard = _Shard(student_NR, teacher_NS, None)
        shard.launch(
            statistics_kernel,
            (weight_N, reverse_N, label_weight_N),
            kind,
            temperature,
            parts_ptr=parts_N8,
            G=shard.group,
        )
    return parts_N8


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
    """`tilt_sums` of this shard [N, 2], fp32, given the statistics of all ranks [P, N, 8]."""
    sums_N2 = torch.zeros(len(weight_N), 2, device=student_NR.device)
    if student_NR.numel():
        shard = _Shard(student_NR, teacher_NS, None)
        shard.launch(
            divergence_kernel,
            (weight_N, reverse_N, label_weight_N),
            kind,
            temperature,
            **_gathered(parts_PN8),
            sums_ptr=sums_N2,
            beta=beta,
            G=shard.group,
        )
    return sums_N2


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
    """Divergence [N] and label loss [N] (None without labels) of the whole vocabulary, fp32.

    As ``dense_rows`` has them; NaN in a row of nothing but -inf, whose gradient is 0.

    Args:
        parts_PN8: statistics of all ranks, the label's logits filled in.
        sums_N2: sum over the ranks of what `divergence_rows` gave; None for kinds without.
        column_N: int64, the label's column in this shard, or -1; None without labels.
        grad_NR: gets this shard's gradient, in its own dtype; not the logits themselves. Or None.
    """
    divergence_N = torch.empty(len(weight_N), dtype=torch.float32, device=student_NR.device)
    label_loss_N = None if label_weight_N is None else torch.empty_like(divergence_N)
    if len(weight_N):
        if not student_NR.shape[1]:
            grad_NR = None
        _Shard(student_NR, teacher_NS, grad_NR).launch(
            gradient_kernel,
            (weight_N, reverse_N, label_weight_N),
            kind,
            temperature,
            **_gathered(parts_PN8),
            grad_ptr=grad_NR,
            grad_stride=0 if grad_NR is None else grad_NR.stride(0),
            GRAD=grad_NR is not None,
            sums_ptr=sums_N2,
            column_ptr=column_N,
            divergence_ptr=divergence_N,
            label_loss_ptr=label_loss_N,
            beta=beta,
        )
    return divergence_N, label_loss_N


def _gathered(parts_PN8: Tensor) -> dict[str, Any]:
    ranks, rows, _ = parts_PN8.shape
    return {"parts_ptr": parts_PN8, "N": rows, "ranks": ranks, "P": triton.next_power_of_2(ranks)}


class _Shard:
    """Where a shard lies in memory; launches a kernel on it."""

    def __init__(self, student_NR: Tensor, teacher_NS: Tensor, grad_NR: Tensor | None) -> None:
        width, shared = student_NR.shape[1], teacher_NS.shape[1]
        if not shared:
            # a tensor of no columns has no address, and nothing of the teacher counts
            teacher_NS = student_NR
        tensors = [student_NR, teacher_NS] + ([] if grad_NR is None else [grad_NR])
        align, lead = alignment(*tensors, widths=(width, shared))
        tile, self.group, warps = launch(width, student_NR.dtype)
        self._arguments = {
            "student_ptr": student_NR,
            "teacher_ptr": teacher_NS,
            "R": width,
            "S": shared,
            "student_stride": student_NR.stride(0),
            "teacher_stride": teacher_NS.stride(0),
            "lead": lead,
            "ALIGN": align,
            "B": tile,
            "FAST": fast(),
            "num_warps": warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }

    def launch(
        self,
        kernel: Any,
        weights: tuple[Tensor, Tensor | None, Tensor | None],
        kind: str,
        temperature: float,
        **own: Any,
    ) -> None:
        """A program for every row."""
        weight_N, reverse_N, label_weight_N = weights
        with torch.cuda.device_of(weight_N):
            kernel[(len(weight_N),)](
                weight_ptr=weight_N,
                reverse_ptr=reverse_N,
                label_weight_ptr=label_weight_N,
                inverse_t=1.0 / temperature,
                KIND=KINDS[kind],
                LABELS=label_mode(label_weight_N, temperature),
                **self._arguments,
                **own,
            )


def configuration(
    kernel: Any,
    kind: str,
    labels: tl.constexpr = NO_LABELS,
    dtype: str = "bf16",
    align: tl.constexpr = EVEN,
) -> Configuration:
    """One compiled form: 8 ranks, of 16384 columns each."""
    labelled = labels != NO_LABELS
    pointers = {
        **dict.fromkeys(("student_ptr", "teacher_ptr", "grad_ptr"), dtype),
        **dict.fromkeys(("parts_ptr", "weight_ptr", "divergence_ptr"), "fp32"),
        "sums_ptr": "fp32" if KINDS[kind] > MIXED.value else None,
        "reverse_ptr": "fp32" if kind == "mixed" else None,
        "column_ptr": "i64" if labelled else None,
        **dict.fromkeys(("label_weight_ptr", "label_loss_ptr"), "fp32" if labelled else None),
    }
    constants = {
        "KIND": KINDS[kind],
        "LABELS": labels.value,
        "GRAD": True,
        "P": 8,
        "ALIGN": align.value,
    }
    aligned = ["student_ptr", "teacher_ptr", "grad_ptr", "parts_ptr", "weight_ptr"]
    if align == EVEN:
        aligned += ["R", "S", "student_stride", "teacher_stride", "grad_stride"]
    return row_configuration(
        f"{kernel.__name__}/{kind}/{LABEL_NAMES[labels.value]}/{dtype}/align{align.value}",
        kernel,
        launch(16384, DTYPES[dtype]),
        pointers,
        constants,
        aligned=aligned,
        tensors_per_column=2,
    )


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests; the loops are those of the dense kernel."""
    return [
        configuration(statistics_kernel, "forward_kl"),
        configuration(statistics_kernel, "mixed", HALF),
        configuration(statistics_kernel, "jsd", dtype="fp32"),
        configuration(statistics_kernel, "forward_kl", align=RAGGED),
        configuration(divergence_kernel, "jsd", dtype="fp32"),
        configuration(divergence_kernel, "skew_forward_kl"),
        configuration(divergence_kernel, "skew_reverse_kl"),
        configuration(divergence_kernel, "total_variation"),
        configuration(gradient_kernel, "forward_kl", OTHER),
        configuration(gradient_kernel, "mixed", SAME),
        configuration(gradient_kernel, "jsd", dtype="fp32"),
        configuration(gradient_kernel, "reverse_kl", align=RAGGED),
    ]
