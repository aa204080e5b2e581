"""Continue a checkpoint at another world size or ZeRO stage.

DeepSpeed's universal checkpoint holds fp32 weights and Adam moments by parameter name. DeepSpeed
converts ZeRO 1-3 checkpoints to it and loads it into ZeRO 1-3 engines, but only of the same family
(stage 3, or 1 and 2), and knows nothing of stage 0; the rest of the way is here.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from dskd.engine.checkpoints import Saved
from dskd.engine.engine import Engine
from dskd.engine.loading import check_pickles, only_weights
from dskd.errors import CheckpointError, DskdError
from dskd.system import dist
from dskd.system.disk import writing

_MODEL = "mp_rank_00_model_states.pt"
_MODEL_ZERO3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_native(saved: Saved, world: int, stage: int, precision: str) -> bool:
    """Whether DeepSpeed can load the checkpoint as it is."""
    if (saved.stage, saved.precision) != (stage, precision):
        return False
    return saved.world == world or (stage == 0 and precision == "fp32")


def check_files(saved: Saved) -> None:
    """Refuse a manifest whose ``stage`` or ``world`` is not that of the files beside it, and files
    with other content; each rank looks at its share of them, and all must agree.

    Raises:
        CheckpointError: names the checkpoint or the file.
    """
    parts = len(list(saved.folder.glob("*zero_pp_rank_*_optim_states.pt")))
    model = _MODEL_ZERO3 if saved.stage == 3 else _MODEL
    wanted = saved.world if saved.stage else 0
    if not (saved.folder / model).is_file() or (parts != wanted and _is_known(saved)):
        raise CheckpointError(
            f"{saved.folder}: its files are not those of ZeRO-{saved.stage} with {saved.world} "
            "ranks, as its manifest says"
        )
    check_pickles(saved.folder)


def _is_known(saved: Saved) -> bool:
    """Whether there is one way to lay out such a checkpoint; in 16 bits ZeRO-0 has several."""
    return saved.stage > 0 or saved.precision == "fp32"


def check_reshard(saved: Saved, stage: int, precision: str) -> None:
    """Refuse what cannot be converted.

    Raises:
        CheckpointError: the precision changed, or a 16-bit ZeRO-0 checkpoint changed its shape.
    """
    if saved.precision != precision:
        raise CheckpointError(
            f"{saved.folder}: saved with train.precision {saved.precision}, cannot go on in "
            f"{precision}"
        )
    if precision != "fp32" and 0 in (saved.stage, stage):
        raise CheckpointError(
            f"{saved.folder}: saved at ZeRO-{saved.stage} with {saved.world} ranks; in {precision} "
            f"a ZeRO-0 run cannot change its stage or world size"
        )


def convert(saved: Saved) -> Path:
    """Write the universal form beside the checkpoint, under a temporary name; collective.

    Raises:
        DiskError: it cannot be written; on every rank.
    """
    folder = saved.folder.parent / f".universal-{saved.folder.name}"
    dist.on_rank0(lambda: _written(saved, folder))
    return folder


def _written(saved: Saved, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing("the checkpoint in another form", folder), only_weights(saved.folder):
            _convert(saved, folder)
    except DskdError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _convert(saved: Saved, folder: Path) -> None:
    if saved.stage == 0:
        _from_plain(saved.folder, folder)
    else:
        _from_shards(saved.folder, folder)
    for name in (_MODEL, _MODEL_ZERO3):
        if not (folder / name).exists():
            shutil.copyfile(next(folder.glob("*model_states.pt")), folder / name)
    if not any((folder / "zero").glob("*/fp32.pt")):
        raise CheckpointError(f"{saved.folder}: DeepSpeed's conversion made no parameters")


def discard(folder: Path) -> None:
    """Remove the universal form once it is loaded; it can be made again (collective)."""
    dist.barrier()
    if dist.rank() == 0:
        shutil.rmtree(folder)


def load_into_plain(engine: Engine, folder: Path) -> None:
    """Read the universal form into an fp32 ZeRO-0 engine."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    step = torch.tensor(float(_load(folder / "zero" / "optimizer_state.pt")["dskd_step"]))
    for name, _ in engine.module.named_parameters():
        part = folder / "zero" / name
        weights[name] = _load(part / "fp32.pt")["param"]
        moments[name] = {key: _load(part / f"{key}.pt")["param"] for key in _MOMENTS}
        moments[name]["step"] = step.clone()
    engine.load_plain(weights, moments)


def _from_shards(source: Path, folder: Path) -> None:
    """ZeRO 1-3, by DeepSpeed's own converter, without its prints."""
    options = Namespace(
        input_folder=source.name,
        output_folder=folder.name,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # It takes paths for patterns, so it gets names without special characters.
    with _working_in(source.parent), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        ds_to_universal.main(options)
    (folder.parent / "latest_universal").unlink()
    state = _load(folder / "zero" / "optimizer_state.pt")
    shards = sorted(source.glob("*zero_pp_rank_*_optim_states.pt"))
    inner = _load(shards[0])["optimizer_state_dict"]
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
    step = float(next(iter(base["state"].values()))["step"])
    _finish(folder, step, state)


def _from_plain(source: Path, folder: Path) -> None:
    """fp32 ZeRO-0: the whole state is in one file."""
    checkpoint = _load(source / _MODEL)
    optimizer = checkpoint["optimizer"]
    names = [name for group in checkpoint["dskd_groups"] for name in group]
    (folder / "zero").mkdir(parents=True)
    for index, name in enumerate(names):
        part = folder / "zero" / name
        part.mkdir()
        state = optimizer["state"][index]
        torch.save({"param": checkpoint["module"][name]}, part / "fp32.pt")
        for key in _MOMENTS:
            torch.save({"param": state[key]}, part / f"{key}.pt")
    shutil.copyfile(source / _MODEL, folder / _MODEL)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer["param_groups"]]
    common = {"param_groups": groups, "ds_version": checkpoint["ds_version"]}
    _finish(folder, float(optimizer["state"][0]["step"]), common)


def _finish(folder: Path, step: float, state: dict[str, Any]) -> None:
    """Bring the files to the one form in which stages 0 to 3 all find their keys."""
    zero = folder / "zero"
    for part in [path for path in zero.iterdir() if path.is_dir()]:
        for path in {*part.glob("*.pt")} - {part / "step.pt"}:  # a tied name has no moments
            value = _load(path)
            if isinstance(value, Tensor):  # from stage 3: flat, and not in a dictionary
                torch.save({"param": value}, path)
        torch.save(torch.tensor(step), part / "step.pt")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    inner = {"state": {0: {"step": torch.tensor(step)}}, "param_groups": groups}
    state = {"ds_version": deepspeed.__version__, **state, "param_groups": groups}
    state |= {"optimizer_state_dict": inner, "dskd_step": step}
    torch.save(state, zero / "optimizer_state.pt")


def _load(path: Path) -> Any:
    with only_weights(path):
        return torch.load(path, map_location="cpu")


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` the working directory meanwhile (no other thread is at work here)."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
