"""What this machine computes on and in: GPU or CPU, and the number format that `auto` means."""

from __future__ import annotations

import gc
import os
from typing import Literal

import torch
from torch import Tensor

from dskd.settings.teachers import Precision

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


class Fetched:
    """Numbers on their way from the device to the host, which goes on meanwhile.

    Args:
        values: on their device, where they may still have to be computed.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            # A copy of now: one that is asked for later stands behind all that is queued by then.
            self._values = torch.empty_like(values, device="cpu").pin_memory()
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until the device has computed them, and for nothing after that."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
