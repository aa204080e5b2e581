"""What this machine computes on and in: GPU or CPU, and the number format that `auto` means."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dskd.settings.teachers import Precision

Values = TypeVar("Values")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def on_gpu() -> bool:
    """Whether the ranks compute on GPUs; ``DS_ACCELERATOR=cpu`` keeps them off those there are."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def resolve(precision: Precision) -> Literal["fp32", "bf16", "fp16"]:
    """``auto`` is bf16 on a GPU that computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16() else "fp32"


def has_bf16() -> bool:
    """Whether the ranks compute on GPUs that have bf16."""
    return on_gpu() and torch.cuda.is_bf16_supported()


def free_memory() -> None:
    """Give back what models of a stage that is over still hold in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Fetched(Generic[Values]):
    """Values on their way from the device to the host, which goes on meanwhile.

    Args:
        values: a tensor, or a tuple, mapping or dataclass of tensors, which may still have to be
            computed.
    """

    def __init__(self, values: Values) -> None:
        self._arrived: torch.cuda.Event | None = None
        # A copy of now: one that is asked for later stands behind all that is queued by then.
        self._values = _mapped(values, self._copied)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Values:
        """The values, on the CPU; waits until the device has computed them, and for nothing that
        it was given to do after that."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values

    def _copied(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        self._arrived = self._arrived or torch.cuda.Event()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
            tensor, non_blocking=True
        )


def _mapped(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The values with ``function`` of each tensor."""
    if is_dataclass(values):
        parts = {f.name: _mapped(getattr(values, f.name), function) for f in fields(values)}
        return replace(values, **parts)
    return tree_map(function, values)
