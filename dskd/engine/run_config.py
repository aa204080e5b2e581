"""What this machine decides: number formats, the last values of a DeepSpeed config, and whether it
can compile what DeepSpeed would."""

from __future__ import annotations

import os
from typing import Any

from dskd.engine.ds_config import SLOW_STEP, fill_auto, load_preset, precision_of
from dskd.engine.ds_ops import missing_ops
from dskd.errors import ConfigError
from dskd.settings.run import Run
from dskd.settings.teachers import Precision
from dskd.system import dist
from dskd.system.device import has_bf16, on_gpu


def student_config(
    run: Run, hidden: int, *, parameters: int | None = None, world: int | None = None
) -> dict[str, Any]:
    """The run's DeepSpeed config without ``auto``, for a student of that hidden size.

    Args:
        parameters: the student's, which bound its buckets; None: many.
        world: ranks, None: those of this group.

    Raises:
        ConfigError: the JSON cannot be read, contradicts the settings, has no meaning here, or
            needs an operator of DeepSpeed that this machine can neither find nor compile.
    """
    ds = load_preset(run.deepspeed)
    ds = _fill(ds, run, world, hidden, parameters=parameters, where=run.deepspeed)
    for name in ("tensorboard", "csv_monitor"):
        if name in ds:  # else the runs of a recipe would write into one folder
            place = {"output_path": str(run.out / "train" / name), "job_name": run.out.name}
            ds[name] = place | ds[name]
    return ds


def slow_step(ds: dict[str, Any]) -> str | None:
    """What to warn of that a filled config makes slow, though it is right; None: nothing."""
    if not ds["zero_optimization"].get("stage", 0) and precision_of(ds) == "bf16" and on_gpu():
        return f"zero_optimization.stage: {SLOW_STEP}"
    return None


def teacher_config(
    name: str, precision: Precision, run: Run, hidden: int, *, world: int | None = None
) -> dict[str, Any]:
    """The config ``name`` (a preset or path), filled to shard a frozen model of that ``precision``;
    else as :func:`student_config`."""
    ds = load_preset(name)
    return _fill(ds, run, world, hidden, role="teacher", precision=precision, where=name)


def _fill(
    ds: dict[str, Any], run: Run, world: int | None, hidden: int, *, where: str, **options: Any
) -> dict[str, Any]:
    world = dist.world() if world is None else world
    if options.get("precision", run.train.precision) == "fp16" and not on_gpu():
        setting = "the teacher's precision" if "precision" in options else "train.precision"
        raise ConfigError(f"{setting}: fp16 needs a GPU; use bf16 or fp32")
    # The first is set by DeepSpeed's launcher, the second by torchrun.
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world)))
    machine = {"bf16": has_bf16(), "ranks_per_node": local}
    filled = fill_auto(ds, run, world, hidden, on_gpu(), where=where, **machine, **options)
    missing = missing_ops(filled, several_nodes=world > local)
    if missing:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in missing))
    return filled
