"""What this machine computes on and in: GPU or CPU, and the number format that `auto` means."""

from __future__ import annotations

import gc
import os
from typing import Literal

import torch

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
