"""ZeRO-3 parameters: make them sharded, see them whole. With ``engine.py`` the only DeepSpeed user.

Under ZeRO-3 every rank holds a slice of each parameter, whose own ``data`` is empty between uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import DeepSpeedTensorOverride
from deepspeed.runtime.zero.partition_parameters import (
    is_zero_param,
    restore_init_context,
    shutdown_init_context,
)
from torch import nn


def sharded_construction(ds: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """Modules built in this context give up all but this rank's slice of each parameter at once.

    Does nothing unless ``ds``, a DeepSpeed config without ``auto``, says ZeRO-3. Collective. Unless
    the config says ``memory_efficient_linear: false``, ``torch.nn.functional.linear`` is replaced
    for the rest of the process by one that keeps no gathered weight for the backward pass.
    """
    if ds is None or ds.get("zero_optimization", {}).get("stage", 0) != 3:
        return nullcontext()
    # The dtype is the caller's default: DeepSpeed's override would round every new tensor, also
    # rotary frequencies, to the training dtype.
    only_device = [DeepSpeedTensorOverride.device]
    return deepspeed.zero.Init(config_dict_or_path=ds, tensor_overrides=only_device)


@contextmanager
def whole_construction() -> Iterator[None]:
    """Modules built in this context keep their whole parameters, also within a sharded
    construction, which goes on after it. Not collective; it must not be within itself."""
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def gathered(
    parameters: Iterable[nn.Parameter], *, write: bool = False
) -> AbstractContextManager[Any]:
    """Whole parameters inside the context; collective if they are sharded, else nothing.

    Args:
        write: rank 0's values at the end become everyone's; without it nothing may be changed.
    """
    sharded = [parameter for parameter in parameters if is_zero_param(parameter)]
    if not sharded:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


def gathered_with(module: nn.Module, parameter: nn.Parameter) -> None:
    """Make a sharded parameter of another module whole in the passes of ``module``, too."""
    if is_zero_param(parameter):
        deepspeed.zero.register_external_parameter(module, parameter)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds only a slice of the parameter."""
    return is_zero_param(parameter)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its values are."""
    return torch.Size(parameter.ds_shape) if is_zero_param(parameter) else parameter.shape
