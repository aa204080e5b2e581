"""Dense knowledge distillation: a divergence, the label's cross entropy, and their gradient.

One kernel, one program a row; the mathematics and the passes are in ``divergence.py``. A row is
read twice, or three times for jsd, the skew KLs and total variation; its gradient is written once,
over the student's logits if wanted. The label's one-hot part is one more number, stored after the
dense pass.

Shapes: N rows (tokens), V student columns, W <= V teacher columns.
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
    Configuration,
    fast,
    finite,
    launch,
    map_kind,
    mapped,
    row_configuration,
    row_options,
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
    teacher_width,
    through_map,
    tilt_sums,
    weightless,
    write_gradient,
)

MAX_REGISTERS = 64
"""What 1024 threads have each; some compilers would go for 32 and spill."""


@triton.jit
def dense_kernel(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    labels_ptr,
    weight_ptr,
    reverse_ptr,
    label_weight_ptr,
    divergence_ptr,
    label_loss_ptr,
    V,
    W,
    student_stride,
    teacher_stride,
    grad_stride,
    lead,
    inverse_t,
    beta,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row: its losses and, if GRAD, its gradient, which may overwrite the student's logits"""
    row = tl.program_id(0).to(tl.int64)
    shift = row_shift(row, student_stride, lead, ALIGN)
    weights = row_weights(row, weight_ptr, reverse_ptr, label_weight_ptr, KIND, LABELS)
    if weightless(weights):
        tl.store(divergence_ptr + row, 0.0)
        if LABELS != NO_LABELS:
            tl.store(label_loss_ptr + row, 0.0)
        if GRAD:
            zero_row(row_start(grad_ptr, row, grad_stride, shift, ALIGN), shift, shift + V, B)
        return

    c = inverse_t * LOG2E
    W = teacher_width(weights, W, LABELS)
    student = row_start(student_ptr, row, student_stride, shift, ALIGN)
    teacher = row_start(teacher_ptr, row, teacher_stride, shift, ALIGN)
    ends = (shift, shift + V, shift + W)
    maps = (student_scale, student_cap, teacher_scale, teacher_cap)
    rows = (student, teacher, ends, maps)
    tiles = row_tiles(shift, shift + V, shift + W, B, ALIGN)
    sums = row_sums(rows, tiles, c, KIND, LABELS, STUDENT_MAP, TEACHER_MAP, ALIGN, B, G, FAST)
    s_max, s_sum, t_max, t_sum, forward, reverse, hot = sums
    if LABELS != NO_LABELS:
        t_sum = tl.where(W == 0, 1.0, t_sum)
        sums = (s_max, s_sum, t_max, t_sum, forward, reverse, hot)
    # loaded again: registers are scarce in the first pass
    weights = row_weights(row, weight_ptr, reverse_ptr, label_weight_ptr, KIND, LABELS)
    logs = row_logs(sums, c)
    tilts = (0.0, 0.0)
    if KIND > MIXED:
        tilts = tilt_sums(
            rows, tiles, logs, beta, KIND, STUDENT_MAP, TEACHER_MAP, ALIGN, B, G, FAST
        )
    loss, factors = row_factors(sums, logs, tilts, weights, inverse_t, beta, KIND, LABELS)
    loss = shown(loss, (s_max < -HUGE) | (t_max < -HUGE))
    tl.store(divergence_ptr + row, tl.where(W == 0, 0.0, loss))

    _, _, label_weight = weights
    if LABELS != NO_LABELS:
        if LABELS == SAME:
            hot = s_sum
        # an ignored label may be anything: it must not index
        label = tl.where(label_weight == 0, 0, tl.load(labels_ptr + row)) + shift
        s_label = mapped(
            finite(tl.load(student + label), False), student_scale, student_cap, STUDENT_MAP, FAST
        )
        label_loss = shown((s_max - s_label) + tl.log2(hot) * LN2, s_max < -HUGE)
        tl.store(label_loss_ptr + row, tl.where(label_weight == 0, 0.0, label_loss))
    if GRAD:
        # all threads have read the label's logit before one overwrites it
        tl.debug_barrier()
        grad = row_start(grad_ptr, row, grad_stride, shift, ALIGN)
        write_gradient(
            rows, tiles, grad, factors, KIND, LABELS, STUDENT_MAP, TEACHER_MAP, ALIGN, B, FAST
        )
        if LABELS != NO_LABELS:
            tl.debug_barrier()
            if label_weight != 0:
                t_label = tl.load(teacher + label, mask=label < shift + W, other=LOW)
                t_label = mapped(
                    finite(t_label, False), teacher_scale, teacher_cap, TEACHER_MAP, FAST
                )
                g = gradient(s_label, t_label, factors, KIND, LABELS, FAST) - label_weight
                g = through_map(g, s_label, rows, STUDENT_MAP)
                tl.store(grad + label, g.to(grad_ptr.dtype.element_ty))


def dense_rows(
    student_NV: Tensor,
    teacher_NW: Tensor,
    labels_N: Tensor | None,
    weight_N: Tensor,
    reverse_N: Tensor | None,
    label_weight_N: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_map: tuple[float, float],
    teacher_map: tuple[float, float],
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] and label loss [N] (None without labels) of every row, fp32, in nats.

    Both are unweighted, but for the kind "mixed", which is weight * KL(p || q) + reverse *
    KL(q || p); each is 0 where its weight is. Where the divergence's is, the teacher's logits are
    not read; where the label's is, too, nothing is.

    Args:
        student_NV, teacher_NW: logits, fp32, fp16 or bf16, of unit column stride and any row
            stride; W <= V.
        labels_N: int64, below V; not looked at where their weight is 0.
        weight_N, reverse_N, label_weight_N: fp32, of the divergence, the reverse part of "mixed",
            and the label's cross entropy at temperature 1.
        kind: a key of ``divergence.KINDS``.
        student_map, teacher_map: (scale, softcap); no softcap is 0.
        grad_NV: gets the gradient of the weighted sum of everything with respect to the student's
            logits, in its own dtype; ``student_NV`` itself, another tensor, or None.
    """
    count = len(student_NV)
    divergence_N = torch.empty(count, dtype=torch.float32, device=student_NV.device)
    label_loss_N = None if labels_N is None else torch.empty_like(divergence_N)
    if not count:
        return divergence_N, label_loss_N
    student_scale, student_cap = student_map
    teacher_scale, teacher_cap = teacher_map
    # only NVIDIA knows the option
    limits = {"maxnreg": MAX_REGISTERS} if fast() else {}
    with torch.cuda.device_of(student_NV):
        dense_kernel[(count,)](
            student_ptr=student_NV,
            teacher_ptr=teacher_NW,
            labels_ptr=labels_N,
            weight_ptr=weight_N,
            reverse_ptr=reverse_N,
            label_weight_ptr=label_weight_N,
            divergence_ptr=divergence_N,
            label_loss_ptr=label_loss_N,
            V=student_NV.shape[1],
            W=teacher_NW.shape[1],
            student_stride=student_NV.stride(0),
            teacher_stride=teacher_NW.stride(0),
            inverse_t=1.0 / temperature,
            beta=beta,
            student_scale=student_scale,
            student_cap=student_cap,
            teacher_scale=teacher_scale,
            teacher_cap=teacher_cap,
            KIND=KINDS[kind],
            LABELS=label_mode(labels_N, temperature),
            STUDENT_MAP=map_kind(student_map),
            TEACHER_MAP=map_kind(teacher_map),
            **row_options(student_NV, grad_NV, teacher_NW),
            num_stages=1,
            enable_fp_fusion=True,
            **limits,
        )
    return divergence_N, label_loss_N


def configuration(
    kind: str,
    labels: tl.constexpr,
    logits: str = "bf16",
    grad: str | None = "bf16",
    *,
    align: tl.constexpr = EVEN,
    logit_map: tl.constexpr = PLAIN,
    columns_V: int = 131072,
) -> Configuration:
    """One compiled form; types as Triton spells them, no `grad`: evaluation."""
    how = launch(columns_V, *(DTYPES[name] for name in (logits, grad) if name))
    labelled = labels != NO_LABELS
    pointers = {
        **dict.fromkeys(("student_ptr", "teacher_ptr"), logits),
        "grad_ptr": grad,
        "labels_ptr": "i64" if labelled else None,
        **dict.fromkeys(("weight_ptr", "divergence_ptr"), "fp32"),
        "reverse_ptr": "fp32" if kind == "mixed" else None,
        **dict.fromkeys(("label_weight_ptr", "label_loss_ptr"), "fp32" if labelled else None),
    }
    constants = {
        "KIND": KINDS[kind],
        "LABELS": labels.value,
        "STUDENT_MAP": logit_map.value,
        "TEACHER_MAP": logit_map.value,
        "GRAD": grad is not None,
        "ALIGN": align.value,
    }
    label_name = LABEL_NAMES[labels.value]
    aligned = [*pointers]
    if align == EVEN:
        aligned += ["V", "W", "student_stride", "teacher_stride"] + ["grad_stride"] * bool(grad)
    found = row_configuration(
        f"{kind}/{label_name}/{logits}-{grad}/V{columns_V}/map{logit_map.value}",
        dense_kernel,
        how,
        pointers,
        constants,
        aligned=aligned,
        tensors_per_column=2,
    )
    found["maxnreg"] = MAX_REGISTERS
    return found


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests, see ``common.py``."""
    return [
        *(configuration(kind, NO_LABELS) for kind in KINDS),
        *(configuration(kind, HALF, "fp32", "bf16") for kind in KINDS),
        *(configuration("forward_kl", labels) for labels in (SAME, HALF, OTHER)),
        configuration("forward_kl", NO_LABELS, "fp32", "fp32"),
        configuration("forward_kl", NO_LABELS, columns_V=32768),
        configuration("forward_kl", SAME, align=RAGGED, columns_V=50257),
        configuration("forward_kl", SAME, logit_map=CAPPED),
        configuration("forward_kl", SAME, grad=None),
    ]
