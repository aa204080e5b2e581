"""What of a DeepSpeed JSON Weight-Inherited Distillation cannot go with, refused by name.

It edits weights, gradients and moments around every step (``shards.py``), so they must be where
this process can reach them; and rule ``original`` works through Adam's arithmetic, which must be
the plain one. Everything is decided from the JSON as it is written, before a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dskd.engine.ds_config import load_preset
from dskd.errors import ConfigError
from dskd.narrowing.widths import RuleName
from dskd.settings.run import Run
from dskd.system.device import resolve

_ADAM = ("adam", "adamw")
_FP32 = ("fp32", "float32", "float", "torch.float32")


def check_preset(run: Run, rule: RuleName) -> None:
    """Refuse what the run's JSON sets and a rule cannot go with.

    Raises:
        ConfigError: names the JSON and the setting in it, or ``train.precision``.
    """
    ds = load_preset(run.deepspeed)
    precision = _precision(run, ds)
    problems = [*_placing(ds), *_wrapping(ds, precision)]
    if rule == "original":
        if run.train.precision == "fp16":
            raise ConfigError("train.precision: rule original knows no loss scale; not fp16")
        problems += _arithmetic(ds, precision)
    for setting, why in problems:
        raise ConfigError(f"deepspeed: {run.deepspeed}: {setting}: {why}")


def is_adam(run: Run) -> bool:
    """Whether the optimiser is Adam or AdamW, whose whole memory is two moments by name."""
    return _optimizer(load_preset(run.deepspeed)).lower() in _ADAM


def _optimizer(ds: dict[str, Any]) -> str:
    return str((ds.get("optimizer") or {}).get("type", "AdamW"))


def _precision(run: Run, ds: dict[str, Any]) -> str:
    """What the run computes in, as ``ds_config.fill_auto`` settles it."""
    if run.train.precision != "auto":
        return run.train.precision
    given = {name: (ds.get(name) or {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    fixed = [name for name, value in given.items() if value is True]
    free = resolve("auto") if given["bf16"] == "auto" else "fp32"
    return fixed[0] if fixed else free


def _placing(ds: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Places and ways of offloading that no test has edited weights in."""
    zero = ds.get("zero_optimization") or {}
    optimizer, parameters = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    untested = "is not tested with method wid; leave it out"
    if parameters.get("device") == "nvme":
        yield "zero_optimization.offload_param.device", f"nvme {untested}"
    ratio = optimizer.get("ratio", 1.0)
    if ratio < 1:
        yield "zero_optimization.offload_optimizer.ratio", f"{ratio} {untested}"
    if optimizer.get("super_offload"):
        yield "zero_optimization.offload_optimizer.super_offload", f"it {untested}"
    if zero.get("zenflow"):
        yield "zero_optimization.zenflow", f"it {untested}"


def _wrapping(ds: dict[str, Any], precision: str) -> Iterator[tuple[str, str]]:
    """An optimiser of DeepSpeed that ``shards.py`` does not know: ZeRO-1's for bf16 and fp32."""
    zero = ds.get("zero_optimization") or {}
    sums = (ds.get("data_types") or {}).get("grad_accum_dtype")
    if zero.get("stage") == 1 and precision == "bf16" and str(sums).lower() in _FP32:
        why = "with ZeRO-1 and bf16, method wid cannot edit gradients; use ZeRO-2 or leave it out"
        yield "data_types.grad_accum_dtype", f"{sums} {why}"


def _arithmetic(ds: dict[str, Any], precision: str) -> Iterator[tuple[str, str]]:
    """What is not the Adam that rule ``original`` undoes the bias correction of."""
    kind = _optimizer(ds)
    parameters = (ds.get("optimizer") or {}).get("params") or {}
    if kind.lower() not in _ADAM:
        yield "optimizer.type", f"{kind}, but rule original needs AdamW"
    if parameters.get("bias_correction") is False:
        why = "false, but rule original cancels the bias correction itself; leave it out"
        yield "optimizer.params.bias_correction", why
    if parameters.get("amsgrad"):
        yield "optimizer.params.amsgrad", "true, but rule original needs plain AdamW; leave it out"
    if precision == "fp16":
        yield "fp16.enabled", "true, but rule original knows no loss scale"
