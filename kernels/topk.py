"""Knowledge distillation from a teacher known by K log-probabilities a row: loss and gradient.

With the kept tokens k and all others as the rest r, and z = map(x) of the student:

    q_k = exp(z_k / T) / Z,  q_r = R / Z,    R = sum of exp(z_j / T) over the rest,  Z = sum_k + R
    tail          sum_k p_k log(p_k / q_k) + p_r log(p_r / q_r)
    renormalised  p_k / sum p in place of p_k, and p_r = 0
    truncated     renormalised, and Z = sum_k

    d / dz_k = (1/T) (P q_k - p_k),    d / dz_j = (1/T) (P q_r - p_r) exp(z_j / T) / R,
    P = sum_k p_k + p_r

The label's cross entropy at temperature 1 rides along. At T = 1 its softmax is q; at T = 2 it is
proportional to q^2, which costs no exponential; at others it has its own.

The kernel is in ``topk_kernel.py``, its passes over a row in ``topk_rest.py``.

Shapes: N rows (one program each), V columns, K slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    CAPPED,
    EVEN,
    PLAIN,
    RAGGED,
    Configuration,
    Launch,
    alignment,
    fast,
    launch,
    map_kind,
)
from dskd.kernels.topk_kernel import topk_kernel
from dskd.kernels.topk_rest import MODES, OTHER, SAME, SQUARE, UNLABELLED


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
    rows, columns_V = student_NV.shape
    slots = max(32, triton.next_power_of_2(ids_NK.shape[1]))
    divergence_N = torch.empty(rows, dtype=torch.float32, device=student_NV.device)
    label_loss_N = None if labels_N is None else torch.empty_like(divergence_N)
    if not rows:
        return divergence_N, label_loss_N
    gradients = () if grad_NV is None else (grad_NV,)
    align, lead = alignment(student_NV, *gradients, widths=(columns_V,))
    dtypes = tuple(logits.dtype for logits in (student_NV, *gradients))
    tile, group, num_warps = launch_of(columns_V, slots, *dtypes)
    scale, cap = student_map
    with torch.cuda.device_of(student_NV):
        topk_kernel[(rows,)](
            student_NV,
            grad_NV,
            ids_NK,
            logprobs_NK,
            tail_N,
            labels_N,
            weight_N,
            label_weight_N,
            divergence_N,
            label_loss_N,
            columns_V,
            ids_NK.shape[1],
            student_NV.stride(0),
            0 if grad_NV is None else grad_NV.stride(0),
            ids_NK.stride(0),
            logprobs_NK.stride(0),
            lead,
            1.0 / temperature,
            scale,
            cap,
            MODE=MODES[mode],
            LABELS=label_kind(mode, temperature, labels_N is not None),
            MAP=map_kind(student_map),
            GRAD=grad_NV is not None,
            ALIGN=align,
            KP=slots,
            B=tile,
            G=group,
            FAST=fast(),
            num_warps=num_warps,
        )
    return divergence_N, label_loss_N


def launch_of(columns_V: int, slots: int, *dtypes: torch.dtype) -> Launch:
    """As of any row kernel, with 4 kept tokens a thread at most; dtypes: student's, gradient's."""
    usual = launch(columns_V, dtypes[0])
    warps = max(usual.num_warps, slots // 128)
    # a thread's columns lie as the narrowest tensor wants them
    group = max(launch(columns_V, dtype).group for dtype in dtypes)
    return Launch(usual.tile // usual.num_warps * warps, group, warps)


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
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtypes = (names[name] for name in (student, grad) if name)
    tile, group, num_warps = launch_of(columns_V, slots, *dtypes)
    signature = {
        "student_ptr": f"*{student}",
        "grad_ptr": f"*{grad}",
        "ids_ptr": "*i32",
        "logprobs_ptr": "*fp32",
        "tail_ptr": "*fp32",
        "labels_ptr": "*i64",
        "weight_ptr": "*fp32",
        "label_weight_ptr": "*fp32",
        "divergence_ptr": "*fp32",
        "label_loss_ptr": "*fp32",
        **dict.fromkeys(("V", "K", "student_stride", "grad_stride"), "i32"),
        **dict.fromkeys(("ids_stride", "logprobs_stride", "lead"), "i32"),
        **dict.fromkeys(("inverse_t", "scale", "cap"), "fp32"),
    }
    absent = [] if mode == "tail" else ["tail_ptr"]
    if labels == UNLABELLED:
        absent += ["labels_ptr", "label_weight_ptr", "label_loss_ptr"]
    if grad is None:
        absent += ["grad_ptr"]
    constants = {
        "MODE": MODES[mode],
        "LABELS": labels.value,
        "MAP": logit_map.value,
        "GRAD": grad is not None,
        "ALIGN": align.value,
        "KP": slots,
        "B": tile,
        "G": group,
        "FAST": True,
        **dict.fromkeys(absent),
    }
    label_name = ("unlabelled", "same", "square", "other")[labels.value]
    return Configuration(
        name=f"{mode}/{label_name}/{student}-{grad}/V{columns_V}-K{slots}"
        f"/align{align.value}-map{logit_map.value}",
        kernel=topk_kernel,
        signature={name: kind for name, kind in signature.items() if name not in absent},
        constants=constants,
        num_warps=num_warps,
        num_stages=1,
        aligned=tuple(n for n in ("student_ptr", "grad_ptr") if n not in absent),
        tensors_per_column=0 if mode == "truncated" and labels == UNLABELLED else 1,
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
