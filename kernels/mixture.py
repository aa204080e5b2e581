"""Knowledge distillation from several teachers in one pass: KL from their per-token mixture.

With p_k = softmax(teacher_k / T), zero outside of teacher k's columns, q = softmax(z / T) of the
student's z = map(x), and W = sum_k w_k of the row's weights:

    pbar = sum_k (w_k / W) p_k,   divergence = sum pbar log(pbar / q),   d / dz = (W / T) (q - pbar)

which is the gradient of sum_k w_k KL(p_k || q), too. How it is computed is told in
``mixture_kernel.py``.

Shapes: N rows, V student columns, n teachers of W_k columns.
"""

import torch
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    ALIGNED_COLUMNS,
    EVEN,
    LOOSE,
    PLAIN,
    RAGGED,
    Configuration,
    Launch,
    alignment,
    fast,
    launch,
    map_kind,
)
from dskd.kernels.mixture_kernel import mixture_kernel


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
    dtypes = tuple(logits.dtype for logits in (student_NV, *gradients))
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
    table = torch.tensor(
        [
            [t.data_ptr() for t in teachers],
            [t.stride(0) for t in teachers],
            firsts,
            [t.shape[1] for t in teachers],
        ],
        dtype=torch.int64,
    )
    device = teachers[0].device
    if device.type == "cpu":
        return table
    # from pageable memory the host would wait for the device
    return table.pin_memory().to(device, non_blocking=True)


def launch_of(columns_V: int, ranges: bool, loose: bool, *dtypes: torch.dtype) -> Launch:
    """As of any row kernel, of fewer threads where each needs many registers.

    ranges: the teachers have columns of their own; loose: which are read one by one; dtypes:
    student's, gradient's.
    """
    usual = launch(columns_V, dtypes[0])
    warps = min(usual.num_warps, 8 if loose else 16 if ranges else 32)
    # a thread's columns lie as the narrowest tensor wants them
    group = max(launch(columns_V, dtype).group for dtype in dtypes)
    return Launch(usual.tile // usual.num_warps * warps, group, warps)


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
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtypes = (names[name] for name in (student, grad))
    tile, group, num_warps = launch_of(columns_V, ranges, False, *dtypes)
    pointers = {"student_ptr": f"*{student}", "grad_ptr": f"*{grad}"}
    constants = {
        "TEACHERS": teachers,
        "RANGES": ranges,
        "MAP": PLAIN.value,
        "GRAD": True,
        "ALIGN": align.value,
        "TEACHER_ALIGN": align.value,
        "B": tile,
        "G": group,
        "FAST": True,
    }
    return Configuration(
        name=f"n{teachers}/{student}-{grad}/V{columns_V}/align{align.value}-ranges{int(ranges)}",
        kernel=mixture_kernel,
        signature={
            **pointers,
            "table_ptr": "*i64",
            "weight_ptr": "*fp32",
            "divergence_ptr": "*fp32",
            **dict.fromkeys(("V", "student_stride", "grad_stride", "weight_stride"), "i32"),
            "lead": "i32",
            **dict.fromkeys(("inverse_t", "scale", "cap"), "fp32"),
        },
        constants=constants,
        num_warps=num_warps,
        num_stages=1,
        aligned=tuple(pointers),
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
