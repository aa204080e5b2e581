"""Kernels with one fault each, and a good one, which the ahead-of-time check must tell apart."""

import triton
import triton.language as tl

SIGNATURE = {"x_ptr": "*bf16", "y_ptr": "*fp32", "columns": "i32", "stride": "i32"}


@triton.jit
def row_kernel(x_ptr, y_ptr, columns, stride, KIND: tl.constexpr, B: tl.constexpr):
    """Write a row's sum of exponentials, taken in by full tiles"""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, B)
    if KIND == "typo":
        at = at + tl.no_such_function(B)
    total = tl.zeros([B], tl.float32)
    block_total = 0.0
    for first in tl.range(0, columns // B * B, B):
        e = tl.exp2(tl.load(x_ptr + row * stride + first + at).to(tl.float32))
        if KIND == "barrier":
            block_total += tl.sum(e, 0)
        else:
            total += e
        if KIND == "dear":
            for _ in tl.static_range(10):
                total = tl.exp2(total)
    if KIND == "spill":
        # far more numbers at once than there are registers
        kept = tl.load(x_ptr + row * stride + tl.arange(0, 16 * B)).to(tl.float32)
        total += tl.sum(tl.reshape(kept * tl.max(kept, 0), [16, B]), 0)
    tl.store(y_ptr + row, tl.sum(total, 0) + block_total)


@triton.jit
def square_kernel(x_ptr, y_ptr, columns, stride, B: tl.constexpr):
    """x^T x of B columns: a matrix product, whose loop has barriers and 16-byte loads"""
    at = tl.arange(0, B)
    total = tl.zeros([B, B], tl.float32)
    for first in tl.range(0, columns, B):
        x = tl.load(x_ptr + (first + at)[:, None] * stride + at[None, :])
        total = tl.dot(tl.trans(x), x, total)
    tl.store(y_ptr + at[:, None] * B + at[None, :], total)


def configurations():
    """One for every fault; the scalar loads are those of a row that starts anywhere."""
    yield {
        "name": "product",
        "kernel": square_kernel,
        "signature": SIGNATURE,
        "constants": {"B": 64},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ("x_ptr", "columns", "stride"),
        "tensors_per_column": 0,
    }
    for kind in ("good", "typo", "spill", "scalar", "barrier", "dear"):
        yield {
            "name": kind,
            "kernel": row_kernel,
            "signature": SIGNATURE,
            "constants": {"KIND": kind, "B": 2048},
            "num_warps": 4,
            "num_stages": 1,
            "aligned": () if kind == "scalar" else ("x_ptr", "columns", "stride"),
            "tensors_per_column": 1,
        }
