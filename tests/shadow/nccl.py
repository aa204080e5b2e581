"""NCCL by gloo on the shadow device's memory: it takes tensors of the device and no others."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

COLLECTIVES = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "gather", "scatter", "all_to_all"),
    *("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce_scatter"),
    *("_all_gather_base", "_reduce_scatter_base", "send", "recv", "isend", "irecv"),
    *("all_gather_single", "reduce_scatter_single"),
)

calls: Counter[str] = Counter()
"""How often each collective was called on NCCL's tensors."""

_plain_groups: set[Any] = set()
"""The groups that were asked to be gloo's."""
_inside: list[str] = []
"""The collective that is at work: one of torch's functions may call another."""


def install(host: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace torch's collectives; ``host`` gives the memory of a device tensor."""
    for name in COLLECTIVES:
        inner = getattr(c10d, name, None)
        if inner is not None:
            _put(name, _of_device_tensors(name, inner, host))
    _put("init_process_group", _initialised(dist.init_process_group))
    _put("new_group", _made(dist.new_group))
    backend = c10d.get_backend
    _put("get_backend", lambda group=None: "nccl" if _is_nccl(group) else backend(group))
    _put("is_nccl_available", lambda: True)
    device, objects = c10d._get_pg_default_device, c10d._get_object_coll_device
    c10d._get_pg_default_device = lambda group=None: (
        torch.device("cuda") if _is_nccl(group) else device(group)
    )
    c10d._get_object_coll_device = lambda group=None: "cuda" if _is_nccl(group) else objects(group)


def _put(name: str, function: Callable) -> None:
    setattr(c10d, name, function)
    setattr(dist, name, function)


def _is_nccl(group: Any) -> bool:
    return (group or c10d.GroupMember.WORLD) not in _plain_groups


def _initialised(inner: Callable) -> Callable:
    def init_process_group(backend=None, *args, device_id=None, **options):
        wants_gloo = backend == "gloo"
        inner("gloo", *args, **options)
        if wants_gloo:
            _plain_groups.add(c10d.GroupMember.WORLD)

    return init_process_group


def _made(inner: Callable) -> Callable:
    def new_group(ranks=None, timeout=None, backend=None, **options):
        wants_gloo = backend == "gloo" or (backend is None and not _is_nccl(None))
        options.pop("device_id", None)
        group = inner(ranks, timeout, "gloo", **options)
        if wants_gloo:
            _plain_groups.add(group)
        return group

    return new_group


def _of_device_tensors(name: str, inner: Callable, host: Callable) -> Callable:
    def converted(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cuda":
                raise RuntimeError(
                    f"{name} of a CPU tensor {list(value.shape)}: No backend type associated with "
                    f"device type cpu"
                )
            return host(value)
        if isinstance(value, (list, tuple)):
            return [converted(each) for each in value]
        return value

    def collective(*args, **kwargs):
        groups = [x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup)]
        if _inside or not _is_nccl(groups[0] if groups else None):
            return inner(*args, **kwargs)
        calls[name] += 1
        given = [converted(x) for x in args], {key: converted(x) for key, x in kwargs.items()}
        _inside.append(name)
        try:
            return inner(*given[0], **given[1])
        finally:
            _inside.pop()

    collective.__name__ = name
    return collective
