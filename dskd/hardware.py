"""What this machine decides: number formats, and the last values of a DeepSpeed config."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from dskd import dist
from dskd.ds_config import fill_auto, load_preset
from dskd.settings import Precision, Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: Precision) -> Literal["fp32", "bf16", "fp16"]:
    """``auto`` is bf16 on a GPU that computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if _has_bf16() else "fp32"


def student_config(run: Run, hidden: int, *, world: int | None = None) -> dict[str, Any]:
    """The run's DeepSpeed config without ``auto``; ``world`` is this group's unless given."""
    return _fill(load_preset(run.deepspeed), run, world, hidden, where=run.deepspeed)


def teacher_config(
    name: str, precision: Precision, run: Run, hidden: int, *, world: int | None = None
) -> dict[str, Any]:
    """The config ``name`` (a preset or path), filled to shard a frozen model."""
    ds = load_preset(name)
    return _fill(ds, run, world, hidden, role="teacher", precision=precision, where=name)


def _fill(
    ds: dict[str, Any], run: Run, world: int | None, hidden: int, **options: Any
) -> dict[str, Any]:
    world = dist.world() if world is None else world
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world)))
    return fill_auto(
        ds,
        run,
        world,
        hidden,
        torch.cuda.is_available(),
        bf16=_has_bf16(),
        ranks_per_node=local,
        **options,
    )


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
