"""The values of a filled DeepSpeed JSON, checked before anything is trained or captured.

DeepSpeed looks at most of them when an engine is made, and at some in the first step that needs
them. Here they are read by DeepSpeed's own config classes, and where it has none, by the types that
its documentation gives (DeepSpeed 0.19.8).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import get_monitor_config
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from dskd.settings.parsing import nearest, show
from dskd.system import dist

Number = Literal["fp32", "fp16", "bf16"]


class _Typed(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Aio(_Typed):
    block_size: PositiveInt = 1
    queue_depth: PositiveInt = 1
    intra_op_parallelism: PositiveInt = 1
    single_submit: bool = False
    overlap_events: bool = False
    use_gds: bool = False


class _FlopsProfiler(_Typed):
    enabled: bool = False
    recompute_fwd_factor: NonNegativeFloat = 0.0
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class _DataTypes(_Typed):
    grad_accum_dtype: Number | None = None
    param_dtype: Number | None = None
    buffer_dtype: Number | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class _Zero(_Typed):
    sub_group_size: int = Field(1, ge=1, strict=False)  # JSON's 1e9 is a float


class _Unchecked(_Typed):
    """What DeepSpeed takes as it comes."""

    gradient_clipping: NonNegativeFloat = 0.0
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: Number | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: NonNegativeFloat = 1.0
    zero_optimization: _Zero = _Zero()
    aio: _Aio = _Aio()
    steps_per_print: PositiveInt | None = None
    log_level: str | None = None
    dump_state: bool = False
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    disable_python_gc: bool = False
    data_types: _DataTypes = _DataTypes()
    flops_profiler: _FlopsProfiler = _FlopsProfiler()


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "": _Unchecked.model_validate,
    "zero_optimization": lambda ds: DeepSpeedZeroConfig(**ds.get("zero_optimization", {})),
    "fp16": get_float16_config,
    "bf16": get_bfloat16_config,
    "monitor": get_monitor_config,
    "comms_logger": lambda ds: CommsLoggerConfig(**ds.get("comms_logger", {})),
}
_IN_PLACE = ("", "monitor")
"""Readers whose errors name the whole path."""

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""What a monitor needs installed."""

_ZERO3_ONLY = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
_ZERO3_ONLY += ("zero_quantized_gradients", "memory_efficient_linear")


def problems_of(ds: dict[str, Any]) -> list[str]:
    """What is wrong with the values of a filled config, ``name: problem`` each."""
    found = [problem for part, read in _READERS.items() for problem in _read(part, read, ds)]
    if found:  # what has the wrong type would be stumbled over
        return found
    found = [*_monitors(ds), *_without_effect(ds.get("zero_optimization", {}))]
    if "optimizer" in ds:
        found += _optimizer(ds)
    return found or _whole(ds)


def _read(part: str, read: Callable[[dict[str, Any]], Any], ds: dict[str, Any]) -> Iterator[str]:
    try:
        read(ds)
    except ValidationError as problem:
        for error in problem.errors(include_url=False):
            place = [str(step) for step in error["loc"]]
            name = ".".join(place if part in _IN_PLACE else [part, *place])
            yield f"{name}: {show(error['input'])}: {error['msg'].removeprefix('Value error, ')}"


def _monitors(ds: dict[str, Any]) -> Iterator[str]:
    for name, package in _PACKAGES.items():
        if ds.get(name, {}).get("enabled") is True and importlib.util.find_spec(package) is None:
            yield f"{name}.enabled: needs the package {package}, which is not installed"


def _without_effect(zero: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed drops in silence at the stage at hand."""
    stage = zero.get("stage", 0)
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device", "none")
        if device != "none" and stage < least:
            yield f"zero_optimization.{name}: has no effect at stage {stage}, only from {least} on"
    for name in _ZERO3_ONLY:
        if zero.get(name) and stage < 3:
            yield f"zero_optimization.{name}: has no effect at stage {stage}, only at 3"
    if zero.get("zero_hpz_partition_size", 1) != 1 and stage < 3:
        name = "zero_optimization.zero_hpz_partition_size"
        yield f"{name}: has no effect at stage {stage}, only at 3"


def _optimizer(ds: dict[str, Any]) -> Iterator[str]:
    """Whether there is such an optimizer, and takes what it is given."""
    kind, params = ds["optimizer"]["type"], dict(ds["optimizer"].get("params", {}))
    known = [*DEEPSPEED_OPTIMIZERS, *_torch_optimizers()]
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in known:
        yield f"optimizer.type: there is no {show(kind)}{nearest(kind, known)}"
        return
    if kind.lower() in ("adam", "adamw"):
        kind, allowed = _adam(ds, params)
    elif kind in known and kind not in DEEPSPEED_OPTIMIZERS:
        allowed = getattr(torch.optim, kind)
    else:
        return  # of an extension that is compiled at its first use
    names = list(inspect.signature(allowed).parameters)[1:]
    wrong = [name for name in params if name not in names]
    for name in wrong:
        yield f"optimizer.params.{name}: {kind} has no such parameter{nearest(name, names)}"
    if not wrong and allowed.__module__.startswith("torch.optim"):
        try:
            allowed([torch.zeros(1)], **params)
        except (TypeError, ValueError, RuntimeError) as problem:
            yield f"optimizer.params: {problem}"


def _torch_optimizers() -> list[str]:
    return [
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    ]


def _adam(ds: dict[str, Any], params: dict[str, Any]) -> tuple[str, type]:
    """The class behind Adam and AdamW; the words that choose it are taken out of ``params``."""
    params.pop("adam_w_mode", None)
    params.pop("fp32_optimizer_states", None)
    if params.pop("torch_adam", False):
        params.pop("fused", None)  # a right of the device, not of the name
        return "torch.optim.AdamW", torch.optim.AdamW
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    offload = ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    found = FusedAdam if offload.get("device", "none") == "none" else DeepSpeedCPUAdam
    return found.__name__, found


def _whole(ds: dict[str, Any]) -> list[str]:
    """What DeepSpeed itself refuses when it reads everything together."""
    own = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
    try:
        # It divides by the ranks that there are when it is called.
        DeepSpeedConfig({**ds, "train_batch_size": own * dist.world()})
    except Exception as problem:
        return [f"DeepSpeed refuses it: {type(problem).__name__}: {problem}"]
    return []
