"""Operators that DeepSpeed would compile: refused where they cannot be, before anything starts."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension

from dskd.engine import ds_ops
from dskd.engine.ds_config import fill_auto, load_preset
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.runs import plan
from dskd.settings.recipe import read

NVCC = """#!/bin/sh
echo "Cuda compilation tools, release {version}, V{version}.0"
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """What the checks see of a machine with GPUs, nothing compiled, and every tool at hand: nvcc
    13.0 and torch of CUDA 13.0, c++, ninja, libaio."""
    monkeypatch.setattr(ds_ops, "get_accelerator", CUDA_Accelerator)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(OpBuilder, "has_function", lambda *args, **options: True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    monkeypatch.delenv("CXX", raising=False)
    tool(tmp_path / "bin" / "ninja")
    tool(tmp_path / "bin" / "c++")
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}/bin-of-nothing")
    return tmp_path


def tool(path: Path, text: str = f"#!{shutil.which('sh')}\nexit 0\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def nvcc(folder: Path, version: str) -> None:
    tool(folder / "cuda" / "bin" / "nvcc", NVCC.format(version=version))


def told(preset, cuda=True, several_nodes=False, **zero) -> list[str]:
    """What is missing for a preset, or for a JSON, filled for GPUs."""
    ds = load_preset(preset) if isinstance(preset, str) else preset
    ds.setdefault("zero_optimization", {}).update(zero)
    run = read(None, ["train.precision=fp32"]).runs["run"]
    filled = fill_auto(ds, run, world=2, hidden=64, cuda=cuda)
    return ds_ops.missing_ops(filled, several_nodes)


PRESETS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"]


@pytest.mark.parametrize("preset", [*PRESETS, "zeropp"])
def test_where_the_tools_are_there_every_preset_may_start(gpu, preset):
    assert told(preset, several_nodes=True) == []


CPU_ADAM = "zero_optimization.offload_optimizer: DeepSpeed compiles its operator cpu_adam here, "


@pytest.mark.parametrize(
    ("preset", "instead"), [("zero2_offload", "zero2"), ("zero3_offload", "zero3")]
)
def test_an_offloaded_adam_needs_a_compiler_and_no_nvcc(gpu, preset, instead):
    shutil.rmtree(gpu / "cuda")
    assert told(preset) == []
    (gpu / "bin" / "c++").unlink()
    lack = "for which the compiler c++ is missing (g++; or CXX names another)"
    assert told(preset) == [f"{CPU_ADAM}{lack}; {instead} goes without"]
    assert told(instead) == []
    (gpu / "bin" / "ninja").unlink()
    assert told(preset)[0].startswith(f"{CPU_ADAM}for which the command ninja is missing")


def test_a_compiler_of_the_users_own_is_taken(gpu, monkeypatch):
    (gpu / "bin" / "c++").unlink()
    tool(gpu / "bin" / "my-c++")
    monkeypatch.setenv("CXX", "my-c++")
    assert told("zero2_offload") == []


def test_what_is_compiled_already_needs_no_compiler(gpu, monkeypatch):
    (gpu / "bin" / "c++").unlink()
    tool(gpu / "compiled" / "cpu_adam" / "cpu_adam.so")
    assert told("zero2_offload") == []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(gpu / "elsewhere"))
    assert len(told("zero2_offload")) == 1
    (gpu / "bin" / "ninja").unlink()  # nor ninja, if it was compiled with DeepSpeed
    monkeypatch.setattr(ds_ops, "accelerator_name", "cuda")
    monkeypatch.setitem(ds_ops.installed_ops, "cpu_adam", True)
    version = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setitem(ds_ops.torch_info, "version", version)
    assert told("zero2_offload") == []
    monkeypatch.setitem(ds_ops.torch_info, "version", "1.0")
    (line,) = told("zero2_offload")
    assert "PyTorch version mismatch!" in line and line.endswith("; zero2 goes without")


def test_where_torch_keeps_what_it_compiles(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(ds_ops, "get_default_build_root", lambda: str(tmp_path))
    for cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        folder = Path(cpp_extension._get_build_directory("quantizer", False))
        assert not ds_ops._compiled("quantizer")
        tool(folder / "quantizer.so")
        assert ds_ops._compiled("quantizer")


WEIGHTS = "zero_optimization.zero_quantized_weights: DeepSpeed compiles its operator quantizer here"


def test_quantised_weights_need_nvcc_of_torchs_cuda(gpu, monkeypatch):
    tool(gpu / "compiled" / "quantizer" / "quantizer.so")
    nvcc(gpu, "12.8")
    assert told("zeropp") == []  # compiled with whatever it was
    shutil.rmtree(gpu / "compiled")
    (line,) = told("zeropp")
    assert line == (
        f"{WEIGHTS}, for which nvcc is of CUDA 12.8, but torch of CUDA 13.0 (DS_SKIP_CUDA_CHECK=1 "
        f"tries it nevertheless); zero3 goes without"
    )
    nvcc(gpu, "13.2")
    assert told("zeropp") == []
    nvcc(gpu, "12.8")
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")
    assert told("zeropp") == []
    missing = f"{WEIGHTS}, for which nvcc of CUDA 13.0 is missing (CUDA_HOME is its folder)"
    shutil.rmtree(gpu / "cuda")
    assert told("zeropp") == [f"{missing}; zero3 goes without"]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert told("zeropp") == [f"{missing}; zero3 goes without"]
    tool(gpu / "compiled" / "quantizer" / "quantizer.so")  # DeepSpeed asks nvcc all the same
    assert told("zeropp") == [f"{missing}; zero3 goes without"]


def test_quantised_gradients_need_it_between_nodes_only(gpu):
    shutil.rmtree(gpu / "cuda")
    alone = {"zero_quantized_gradients": True}
    assert told("zero3", **alone) == []
    (line,) = told("zero3", several_nodes=True, **alone)
    assert line.startswith("zero_optimization.zero_quantized_gradients: DeepSpeed compiles its")


def test_nvme_needs_libaio(gpu, monkeypatch):
    monkeypatch.setattr(OpBuilder, "has_function", lambda *args, **options: False)
    lack = "here, for which libaio and its headers (libaio-dev) are missing"
    assert told("zero3_nvme") == [
        f"zero_optimization.{name}: DeepSpeed compiles its operator async_io {lack}; "
        "zero3_offload goes without"
        for name in ("offload_optimizer", "offload_param")
    ]
    direct = {"offload_param": {"device": "nvme"}, "stage": 3}
    (line,) = ds_ops.missing_ops({"zero_optimization": direct, "aio": {"use_gds": True}}, False)
    assert "gds here, for which libaio and libcufile are missing; zero3_offload goes" in line
    (gpu / "bin" / "c++").unlink()  # then the offloaded Adam cannot be had either
    assert all(line.endswith("; zero3 goes without") for line in told("zero3_nvme"))


@pytest.mark.parametrize(
    ("kind", "params", "operator"),
    [("AdamW", {"torch_adam": False}, "fused_adam"), ("Lion", {}, "fused_lion")],
)
def test_deepspeeds_own_optimizers_need_nvcc(gpu, kind, params, operator):
    shutil.rmtree(gpu / "cuda")
    (line,) = told({"optimizer": {"type": kind, "params": params}})
    assert line.startswith(f"optimizer: DeepSpeed compiles its operator {operator} here, for which")


def test_on_a_cpu_the_presets_need_nothing_but_nvmes_libaio(gpu, monkeypatch):
    monkeypatch.setattr(ds_ops, "get_accelerator", CPU_Accelerator)
    monkeypatch.setattr(OpBuilder, "has_function", lambda *args, **options: False)
    shutil.rmtree(gpu / "bin")
    for preset in [*PRESETS[:-1], "zeropp"]:
        assert told(preset, cuda=False) == []
    assert len(told("zero3_nvme", cuda=False)) == 4
    (line,) = told("zero3", cuda=False, zero_quantized_weights=True)
    assert line.startswith("zero_optimization.zero_quantized_weights: DeepSpeed has no Quantizer")


def test_student_and_teacher_are_refused_before_anything_starts(gpu, monkeypatch):
    monkeypatch.setattr(ds_ops, "get_accelerator", CPU_Accelerator)
    monkeypatch.setattr(OpBuilder, "has_function", lambda *args, **options: False)
    for setting, word in (("deepspeed", "optimizer"), ("teacher.deepspeed", "param")):
        recipe = read(None, ["train.precision=fp32", f"{setting}=zero3_nvme"])
        methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
        told = rf"^zero3_nvme: zero_optimization\.offload_{word}: .*libaio-dev"
        with pytest.raises(ConfigError, match=told):
            plan.check(recipe, methods, world=1)
