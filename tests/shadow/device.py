"""A CUDA device for machines without one: its tensors say ``cuda:0`` and lie in host memory.

Every operator runs its CPU kernel, so values are real; a tensor on the wrong device is an error as
on a GPU; ``torch.cuda.max_memory_allocated`` counts bytes. There is one stream: races, time and
what a real GPU's libraries support are not shown.

To be imported before torch, as a plugin of pytest: ``launch/shadow.sh`` builds the two libraries
and says where they are in ``SHADOW_DEVICE``.
"""

import ctypes
import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "1"}


def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_FOLDER = Path(os.environ["SHADOW_DEVICE"])
_TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"
for _name in ("libc10.so", "libtorch_cpu.so"):
    _load(_TORCH / _name)
_load(_FOLDER / "libshadow_hooks.so")

import torch

from tests.shadow import nccl, waits

_device = _load(_FOLDER / "libshadow_device.so")
for _function in (_device.shadow_held, _device.shadow_most_held):
    _function.restype = ctypes.c_int64


class _Stream:
    cuda_stream = stream_id = 0

    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        waits.note("synchronize of a stream")

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *problem): ...


class _Event:
    def __init__(self, *args, **kwargs): ...

    def record(self, stream=None): ...

    def wait(self, stream=None): ...

    def query(self):
        return True

    def synchronize(self):
        waits.note("synchronize of an event")

    def elapsed_time(self, other):
        return 1.0


class _Place:
    """``torch.cuda.device(0)``."""

    def __init__(self, *args): ...

    def __enter__(self):
        return self

    def __exit__(self, *problem): ...


@contextmanager
def _on_stream(stream):
    yield


_PROPERTIES = SimpleNamespace(
    name="shadow",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    gcnArchName="",
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    max_threads_per_multi_processor=2048,
    L2_cache_size=50 << 20,
)

_ANSWERS = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
    **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "set_stream"), None),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state"), None),
    "is_current_stream_capturing": False,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "shadow",
    "get_device_capability": (9, 0),
    "get_device_properties": _PROPERTIES,
    "memory_stats": {},
    "mem_get_info": (80 << 30, 80 << 30),
}

_FUNCTIONS = {
    "synchronize": lambda *device: waits.note("torch.cuda.synchronize"),
    **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *d: _device.shadow_held()),
    **dict.fromkeys(
        ("max_memory_allocated", "max_memory_reserved"), lambda *d: _device.shadow_most_held()
    ),
    "reset_peak_memory_stats": lambda *device: _device.shadow_reset_most_held(),
    # The CPU's generator draws; its state is kept by the CPU's functions.
    "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
    **dict.fromkeys(("current_stream", "default_stream"), _Stream),
    "stream": _on_stream,
    "Stream": _Stream,
    "Event": _Event,
    "device": _Place,
    "device_of": _Place,
    "default_generators": (torch.default_generator,),
}


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor on the device as a CPU tensor, for tests and collectives."""
    return torch.ops.shadow.host(tensor.detach()) if tensor.is_cuda else tensor


def _mixed_products() -> torch.library.Library:
    """The products of 16-bit matrices with an fp32 result, which only CUDA has."""

    def mm(a, b, dtype):
        return (host(a).float() @ host(b).float()).to(dtype).to("cuda")

    def mm_out(a, b, dtype, *, out):
        host(out).copy_(host(a).float() @ host(b).float())
        return out

    def addmm(c, a, b, dtype, *, beta=1, alpha=1):
        kept = 0 if beta == 0 else beta * host(c).float()
        return (kept + alpha * (host(a).float() @ host(b).float())).to(dtype).to("cuda")

    def addmm_out(c, a, b, dtype, *, beta=1, alpha=1, out):
        kept = 0 if beta == 0 else beta * host(c).float()
        host(out).copy_(kept + alpha * (host(a).float() @ host(b).float()))
        return out

    library = torch.library.Library("aten", "IMPL")
    for function in (mm, mm_out, addmm, addmm_out):
        name, _, out = function.__name__.partition("_")
        library.impl(f"{name}.dtype{out and '_out'}", function, "CUDA")
    return library


def _interpret_in_place() -> None:
    """Let Triton's interpreter work on the device's memory. It would copy what a kernel is given
    and then back, over what the kernel wrote by addresses in a table."""
    from triton.runtime.interpreter import GridExecutor

    def same(value: object) -> object:
        return host(value) if isinstance(value, torch.Tensor) else value

    GridExecutor._init_args_hst = lambda executor, args, kwargs: (
        [same(value) for value in args],
        {name: same(value) for name, value in kwargs.items()},
    )
    GridExecutor._restore_args_dev = lambda *copied: None


def _install() -> None:
    import torch.cuda.nccl
    import torch.cuda.nvtx

    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name, function in _FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    torch.cuda.nccl.version = lambda: (2, 27, 0)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args: None)
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.tensor = waits.noting_numbers(torch.tensor)
    nccl.install(host)
    _interpret_in_place()


_install()
_LIBRARY = _mixed_products()
