"""The number formats a model is held and computed in."""

from __future__ import annotations

from typing import Literal

import torch

from dskd.settings import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: Precision) -> Literal["fp32", "bf16", "fp16"]:
    """``auto`` is bf16 on a GPU that computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
