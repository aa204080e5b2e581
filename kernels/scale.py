"""A tensor times a scalar that stays on the device, rounded once.

``torch.mul`` would round the scalar to the tensor's 16-bit type first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import Configuration

BLOCK = 4096
WARPS = 8


@triton.jit
def scale_kernel(x_ptr, by_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = x * by, element by element of contiguous tensors"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(by_ptr).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
    tl.store(out_ptr + at, (x * by).to(out_ptr.dtype.element_ty), mask=at < count)


def scale(x: Tensor, by: Tensor, out: Tensor) -> None:
    """``out = x * by`` in fp32; x and out contiguous and of one shape, by a scalar tensor."""
    assert x.is_contiguous() and out.is_contiguous(), "memory is scaled element by element"
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        with torch.cuda.device_of(x):
            scale_kernel[grid](x, by, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS, num_stages=1)


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests, see ``common.py``."""
    found = Configuration(
        name="fp32-bf16",
        kernel=scale_kernel,
        signature={"x_ptr": "*fp32", "by_ptr": "*fp32", "out_ptr": "*bf16", "count": "i64"},
        constants={"BLOCK": BLOCK},
        num_warps=WARPS,
        num_stages=1,
        aligned=("x_ptr", "out_ptr", "count"),
        tensors_per_column=0,
    )
    return [found]
