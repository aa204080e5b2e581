"""Random weights that do not depend on how the model is held.

The numbers of a module are drawn by the model's own ``_init_weights`` from a seed made of the
run's seed and the module's name, in fp32 on the CPU. So they are the same at every ZeRO stage,
world size, device and dtype (up to its rounding), and a rank never holds more than one module's own
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dskd.engine.zero import gathered, is_sharded
from dskd.errors import ConfigError
from dskd.system import dist
from dskd.system.files import fingerprint


def initialise(
    model: PreTrainedModel, seed: int, only: Callable[[str], bool] = lambda name: True
) -> None:
    """Fill every parameter, or those whose names are ``only``'s, with the model's own kind of
    random numbers (collective if sharded).

    Raises:
        ConfigError: the model's class leaves a parameter without any; not on every rank.
    """
    with torch.device("meta"):
        shadow = type(model)(copy.deepcopy(model.config))  # the same model without memory
    tied = set(model.all_tied_weights_keys)
    for path, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if _join(path, name) not in tied and only(_join(path, name))
        }
        mine = dist.rank() == 0 or not any(is_sharded(p) for p in own.values())
        with gathered(own.values(), write=True), torch.no_grad():
            if own and mine:
                drawn = _draw(shadow, path, seed)
                for name, parameter in own.items():
                    parameter.copy_(drawn[name])


def _draw(shadow: PreTrainedModel, path: str, seed: int) -> dict[str, Tensor]:
    """The fp32 initial values of the parameters the module at ``path`` itself owns.

    The modules around it are called, too, inside out as in ``initialize_weights``, because they may
    have the last word (GPT-2 scales its residual projections from the attention module). What else
    they set, and a tied twin of these parameters, is without memory here.
    """
    chain = [shadow.get_submodule(outer) for outer in _outwards(path)]
    module = chain[0]
    empty = dict(module.named_parameters(recurse=False))
    drawn = {name: torch.full(p.shape, torch.nan) for name, p in empty.items()}
    for name, values in drawn.items():
        setattr(module, name, nn.Parameter(values, requires_grad=False))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int(fingerprint([seed, path]), 16) % 2**63)
        for level, outer in enumerate(chain):
            owner = next(m for m in chain[level:] if isinstance(m, PreTrainedModel))
            owner._init_weights(outer)
    for name, parameter in empty.items():
        setattr(module, name, parameter)
        if not drawn[name].isfinite().all():
            kind = shadow.config.model_type
            raise ConfigError(
                f"random weights: the class of a {kind} draws none for {_join(path, name)}; only a "
                f"stored {kind} can be used (path)"
            )
    return drawn


def _outwards(path: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``a.b``, ``a`` and the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
