"""What this machine decides: number formats, the last values of a DeepSpeed config, and whether it
has what that needs."""

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
        ConfigError: the JSON cannot be read, contradicts the settings or has no meaning here.
    """
    options = {"parameters": parameters, "where": run.deepspeed}
    ds = _fill(load_preset(run.deepspeed), run, world, hidden, **options)
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


def check_operators(ds: dict[str, Any], where: str, *, world: int) -> None:
    """Refuse a filled config, of the JSON ``where``, that needs an operator of DeepSpeed which this
    machine neither has nor can compile.

    Raises:
        ConfigError: names the settings, what is missing, and a preset that goes without.
    """
    missing = missing_ops(ds, several_nodes=world > _on_this_node(world))
    if missing:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in missing))


def _on_this_node(world: int) -> int:
    # The first is set by DeepSpeed's launcher, the second by torchrun.
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world)))


def _fill(
    ds: dict[str, Any], run: Run, world: int | None, hidden: int, **options: Any
) -> dict[str, Any]:
    world = dist.world() if world is None else world
    if options.get("precision", run.train.precision) == "fp16" and not on_gpu():
        setting = "the teacher's precision" if "precision" in options else "train.precision"
        raise ConfigError(f"{setting}: fp16 needs a GPU; use bf16 or fp32")
    machine = {"bf16": has_bf16(), "ranks_per_node": _on_this_node(world)}
    return fill_auto(ds, run, world, hidden, on_gpu(), **machine, **options)
