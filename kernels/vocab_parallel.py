"""Dense knowledge distillation of one rank's shard of the vocabulary's columns.

The passes of ``divergence.py``, each a kernel of ``vocab_parallel_kernels.py``, because the ranks
talk in between: `statistics_rows`, an all-gather; for the kinds of three passes `divergence_rows`,
a sum over the ranks; `gradient_rows`.

Shapes: N rows (tokens), R student columns of the shard, S <= R teacher columns, P ranks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import EVEN, LOW, RAGGED, Configuration, alignment, fast, launch
from dskd.kernels.divergence import HALF, KINDS, MIXED, NO_LABELS, OTHER, SAME, label_mode
from dskd.kernels.vocab_parallel_kernels import (
    divergence_kernel,
    gradient_kernel,
    statistics_kernel,
)


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
    """Statistics of this shard [N, 8], fp32, see the kernels; the label's logit is left at -inf.

    A row whose weights are all 0 is not read, and has those of no columns.

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
    itemsize = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    tile, group, num_warps = launch(16384, itemsize[dtype])
    signature = {
        **dict.fromkeys(("student_ptr", "teacher_ptr", "grad_ptr"), f"*{dtype}"),
        **dict.fromkeys(("parts_ptr", "sums_ptr", "weight_ptr", "reverse_ptr"), "*fp32"),
        **dict.fromkeys(("label_weight_ptr", "divergence_ptr", "label_loss_ptr"), "*fp32"),
        "column_ptr": "*i64",
        **dict.fromkeys(("N", "ranks", "R", "S", "lead"), "i32"),
        **dict.fromkeys(("student_stride", "teacher_stride", "grad_stride"), "i32"),
        **dict.fromkeys(("inverse_t", "beta"), "fp32"),
    }
    constants = {
        "KIND": KINDS[kind],
        "LABELS": labels.value,
        "GRAD": True,
        "P": 8,
        "ALIGN": align.value,
        "B": tile,
        "G": group,
        "FAST": True,
    }
    if kind != "mixed":
        constants["reverse_ptr"] = None
    if KINDS[kind] <= MIXED.value:
        constants["sums_ptr"] = None
    if labels == NO_LABELS:
        constants |= dict.fromkeys(("column_ptr", "label_weight_ptr", "label_loss_ptr"))
    aligned = ["student_ptr", "teacher_ptr", "grad_ptr", "parts_ptr", "weight_ptr"]
    if align == EVEN:
        aligned += ["R", "S", "student_stride", "teacher_stride", "grad_stride"]
    takes = kernel.arg_names
    label_name = ("unlabelled", "same", "half", "other")[labels.value]
    return Configuration(
        name=f"{kernel.__name__}/{kind}/{label_name}/{dtype}/align{align.value}",
        kernel=kernel,
        signature={n: t for n, t in signature.items() if n in takes and n not in constants},
        constants={name: value for name, value in constants.items() if name in takes},
        num_warps=num_warps,
        num_stages=1,
        aligned=tuple(name for name in aligned if name in takes),
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
