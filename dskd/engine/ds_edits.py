"""What of a DeepSpeed JSON edits around a step cannot go with, refused by name.

Hooks that edit weights, gradients or moments (``shards.py``) need them where this process can reach
them; and what works through Adam's arithmetic needs the plain one. Everything is decided from the
JSON as it is written, before a model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dskd.engine.ds_config import load_preset, optimizer_device
from dskd.errors import ConfigError
from dskd.settings.run import Run
from dskd.system.device import resolve

_ADAM = ("adam", "adamw")
_FP32 = ("fp32", "float32", "float", "torch.float32")


def check_edits(run: Run, who: str, *, gradients: bool = True) -> None:
    """Refuse a JSON under which weights, and gradients before the step, cannot be edited.

    Args:
        who: edits them, for the message: ``method wid``.
        gradients: whether gradients, too.

    Raises:
        ConfigError: names the JSON and the setting in it, or ``train.clip``.
    """
    ds, device = load_preset(run.deepspeed), optimizer_device(run.deepspeed)
    if device == "nvme":
        raise ConfigError(f"deepspeed: {run.deepspeed}: {who} cannot edit an optimizer on NVMe")
    _refuse(run, [*_placing(ds, who), *_wrapping(ds, _precision(run, ds), who)])
    if gradients and device == "cpu" and run.train.clip:
        raise ConfigError(
            f"train.clip: {run.train.clip}: an offloaded optimizer ({run.deepspeed}) measures "
            f"gradients before {who} edits them; set it to 0"
        )


def check_adam(run: Run, who: str) -> None:
    """Refuse an optimiser that is not the Adam whose arithmetic ``who`` knows.

    Raises:
        ConfigError: names the JSON and the setting in it.
    """
    _refuse(run, _arithmetic(load_preset(run.deepspeed), who))


def check_unscaled(run: Run, who: str) -> None:
    """Refuse fp16, in which gradients are multiplied by a loss scale that ``who`` does not know.

    Raises:
        ConfigError: names ``train.precision``, or the JSON and the setting in it.
    """
    if run.train.precision == "fp16":
        raise ConfigError(f"train.precision: {who} knows no loss scale; not fp16")
    if _precision(run, load_preset(run.deepspeed)) == "fp16":
        _refuse(run, [("fp16.enabled", f"true, but {who} knows no loss scale")])


def is_adam(run: Run) -> bool:
    """Whether the optimiser is Adam or AdamW, whose whole memory is two moments by name."""
    return _optimizer(load_preset(run.deepspeed)).lower() in _ADAM


def _refuse(run: Run, problems: Iterable[tuple[str, str]]) -> None:
    for setting, why in problems:
        raise ConfigError(f"deepspeed: {run.deepspeed}: {setting}: {why}")


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


def _placing(ds: dict[str, Any], who: str) -> Iterator[tuple[str, str]]:
    """Places and ways of offloading that no test has edited weights in."""
    zero = ds.get("zero_optimization") or {}
    optimizer, parameters = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    untested = f"is not tested with {who}; leave it out"
    if parameters.get("device") == "nvme":
        yield "zero_optimization.offload_param.device", f"nvme {untested}"
    ratio = optimizer.get("ratio", 1.0)
    if ratio < 1:
        yield "zero_optimization.offload_optimizer.ratio", f"{ratio} {untested}"
    if optimizer.get("super_offload"):
        yield "zero_optimization.offload_optimizer.super_offload", f"it {untested}"
    if zero.get("zenflow"):
        yield "zero_optimization.zenflow", f"it {untested}"


def _wrapping(ds: dict[str, Any], precision: str, who: str) -> Iterator[tuple[str, str]]:
    """An optimiser of DeepSpeed that ``shards.py`` does not know: ZeRO-1's for bf16 and fp32."""
    zero = ds.get("zero_optimization") or {}
    sums = (ds.get("data_types") or {}).get("grad_accum_dtype")
    if zero.get("stage") == 1 and precision == "bf16" and str(sums).lower() in _FP32:
        why = f"with ZeRO-1 and bf16, {who} cannot edit gradients; use ZeRO-2 or leave it out"
        yield "data_types.grad_accum_dtype", f"{sums} {why}"


def _arithmetic(ds: dict[str, Any], who: str) -> Iterator[tuple[str, str]]:
    """What is not the Adam whose bias correction can be undone from outside."""
    kind = _optimizer(ds)
    parameters = (ds.get("optimizer") or {}).get("params") or {}
    if kind.lower() not in _ADAM:
        yield "optimizer.type", f"{kind}, but {who} needs AdamW"
    if parameters.get("bias_correction") is False:
        why = f"false, but {who} cancels the bias correction itself; leave it out"
        yield "optimizer.params.bias_correction", why
    if parameters.get("amsgrad"):
        yield "optimizer.params.amsgrad", f"true, but {who} needs plain AdamW; leave it out"
