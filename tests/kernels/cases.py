"""What the kernel tests share: logits of awkward shapes, and comparison with float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Relative error of storing a gradient: the interpreter truncates bf16, a GPU rounds to nearest."""
if GPU:
    ROUNDING |= {torch.float16: 2**-11, torch.bfloat16: 2**-8}


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of shapes that the interpreter would take hours for."""
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA device")(test))


def logits(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: int = 0,
    offset: int = 0,
    scale: float = 3.0,
    device: str = "cpu",
) -> Tensor:
    """Random logits [rows, columns], a row every columns + padding, from element `offset` on.

    What lies between and around the rows is NaN.
    """
    stride = columns + padding
    storage = torch.full((offset + rows * stride,), float("nan"), dtype=dtype, device=device)
    view = storage[offset:].view(rows, stride)[:, :columns]
    return view.copy_(torch.randn(rows, columns, device=device) * scale)


def far_apart(file: Path, columns: int, device: str) -> Tensor:
    """Random fp16 logits [3, columns], the last row 2^31 elements behind the first."""
    stride = (1 << 30) + 8
    size = 2 * stride + columns
    if GPU:
        memory = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        memory = torch.from_file(str(file), True, size, dtype=torch.float16)  # a sparse one
    return memory.as_strided((3, columns), (stride, 1)).copy_(logits(3, columns))


def surroundings(view: Tensor) -> Tensor:
    """The elements of a view's storage that are not in the view."""
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return whole[outside]


def close(
    name: str, found: Tensor, wanted: Tensor, relative: float = 3e-5, absolute: float = 1e-6
) -> None:
    """Assert |found - wanted| <= absolute + relative |wanted|, finite, of the same shape."""
    assert found.shape == wanted.shape, f"{name}: {tuple(found.shape)} != {tuple(wanted.shape)}"
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert found.isfinite().all(), f"{name}: not finite at {(~found.isfinite()).nonzero()[:4]}"
    excess = (found - wanted).abs() - relative * wanted.abs()
    off = ~(excess <= absolute)  # an infinity that was wanted makes it nan
    if off.any():
        where = tuple(off.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(where)}: {found[where]:.9g} instead of {wanted[where]:.9g}, "
            f"{int(off.sum())} of {off.numel()} are off"
        )
