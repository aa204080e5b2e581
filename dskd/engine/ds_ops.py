"""Operators that DeepSpeed compiles on the user's machine when an engine first needs them.

Which settings of a filled JSON need one, and whether it could be had here, asked before anything
starts (DeepSpeed 0.19.8). Nothing is compiled for that but DeepSpeed's own probe for libaio.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops, torch_info
from deepspeed.ops.op_builder.builder import (
    CUDAOpBuilder,
    MissingCUDAException,
    OpBuilder,
    installed_cuda_version,
)
from torch.utils.cpp_extension import get_default_build_root, is_ninja_available

_OFFLOAD = ("offload_optimizer", "offload_param")
_OPTIMIZERS: dict[str, tuple[str | None, str | None]] = {
    "adam": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "adamw": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "muon": ("FusedAdamBuilder", "CPUAdamBuilder"),  # for what it leaves to Adam
    "lion": ("FusedLionBuilder", "CPULionBuilder"),
    "lamb": ("FusedLambBuilder", "FusedLambBuilder"),
    "adagrad": (None, "CPUAdagradBuilder"),
}
"""Builders of an optimizer that is kept with the model, and of one that is offloaded."""
_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
_SWAPPING = ("AsyncIOBuilder", "GDSBuilder", "PinMemoryBuilder")
_LIBRARIES = {"async_io": "libaio and its headers (libaio-dev)", "gds": "libaio and libcufile"}


def missing_ops(ds: dict[str, Any], several_nodes: bool) -> list[str]:
    """What of a filled config needs an operator that cannot be had here, ``setting: problem`` each,
    with the shipped preset that goes without it."""
    needs = dict.fromkeys(_needs(ds, several_nodes))
    lacking = {need: lack for need in needs if (lack := _lack(need[1])) is not None}
    zero = ds.get("zero_optimization", {})
    stage, swaps = zero.get("stage", 0), all(builder in _SWAPPING for _, builder in lacking)
    instead = f"zero{max(stage, 2)}_offload" if swaps else f"zero{stage}"
    return [f"{setting}: {lack}; {instead} goes without" for (setting, _), lack in lacking.items()]


def _needs(ds: dict[str, Any], several_nodes: bool) -> Iterator[tuple[str, str]]:
    """The settings that make DeepSpeed load an operator, and its builder."""
    zero = ds.get("zero_optimization", {})
    places = {name: (zero.get(name) or {}).get("device", "none") for name in _OFFLOAD}
    optimizer = ds.get("optimizer", {})
    kind, params = optimizer.get("type", "").lower(), optimizer.get("params", {})
    if kind in _OPTIMIZERS and not params.get("torch_adam", False):
        offloaded = places["offload_optimizer"] != "none"
        builder = _OPTIMIZERS[kind][offloaded]
        if builder is not None:
            yield "zero_optimization.offload_optimizer" if offloaded else "optimizer", builder
    for name in _QUANTISED:
        if zero.get(name):
            yield f"zero_optimization.{name}", "QuantizerBuilder"
    if zero.get("zero_quantized_gradients") and several_nodes:  # within one they stay as they are
        yield "zero_optimization.zero_quantized_gradients", "QuantizerBuilder"
    for name in _OFFLOAD:
        if places[name] == "nvme":
            direct = name == "offload_param" and ds.get("aio", {}).get("use_gds")
            for builder in ("PinMemoryBuilder", "GDSBuilder" if direct else "AsyncIOBuilder"):
                yield f"zero_optimization.{name}", builder


def _lack(name: str) -> str | None:
    """What an operator lacks on this machine, None: nothing, or it is compiled already."""
    builder: OpBuilder = get_accelerator().create_op_builder(name)
    device = get_accelerator().device_name()
    if builder.name == "deepspeed_not_implemented":
        return f"DeepSpeed has no {name.removesuffix('Builder')} for a {device.upper()}"
    if installed_ops.get(builder.name, False) and accelerator_name == device:
        return _outdated(builder)
    lack = next(_tools_missing(builder), None)
    if lack is None:
        return None
    return f"DeepSpeed compiles its operator {builder.name} here, for which {lack}"


def _outdated(builder: OpBuilder) -> str | None:
    """Why an operator that was compiled when DeepSpeed was installed is of no use."""
    try:
        builder.validate_torch_version(torch_info)
        if isinstance(builder, CUDAOpBuilder):
            builder.validate_torch_op_version(torch_info)
    except RuntimeError as problem:
        return str(problem)
    return None


def _tools_missing(builder: OpBuilder) -> Iterator[str]:
    """What the compilation of an operator lacks, the first first."""
    # These two are needed even where the result of an earlier compilation is there: torch asks
    # ninja whether it is up to date, and DeepSpeed nvcc for its version.
    if not is_ninja_available():
        yield "the command ninja is missing (pip install ninja)"
    nvidia = isinstance(builder, CUDAOpBuilder) and not builder.is_rocm_pytorch()
    major = minor = None
    if nvidia:
        try:
            major, minor = installed_cuda_version(builder.name)
        except (MissingCUDAException, OSError):
            yield f"nvcc of CUDA {torch.version.cuda} is missing (CUDA_HOME is its folder)"
    if _compiled(builder.name):
        return
    # DeepSpeed looks at the version only where it compiles beforehand. Of another major version the
    # operator would be linked to a second CUDA runtime beside torch's.
    skipped = os.environ.get("DS_SKIP_CUDA_CHECK", "0") == "1"
    if nvidia and not skipped and str(major) != str(torch.version.cuda).split(".")[0]:
        found = f"nvcc is of CUDA {major}.{minor}, but torch of CUDA {torch.version.cuda}"
        yield f"{found} (DS_SKIP_CUDA_CHECK=1 tries it nevertheless)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        yield f"the compiler {compiler} is missing (g++; or CXX names another)"
    if not builder.is_compatible(verbose=False):
        yield f"{_LIBRARIES.get(builder.name, builder.error_log)} are missing"


def _compiled(name: str) -> bool:
    """Whether an earlier run has compiled the operator; where torch keeps what it compiles."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        cuda = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
        root = f"{get_default_build_root()}/{python}_{cuda}"
    return (Path(root) / name / f"{name}.so").is_file()
