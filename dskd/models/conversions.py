"""Tensors of a folder by the names and in the shapes that a model's class has for them now.

Transformers has changed some since folders were written: the experts of a layer are one parameter,
Pythia's last linear map is ``lm_head``. It knows how, and is asked for each such tensor; what a
model has by its stored name is left as it is.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dskd.data.foreign import raised_as
from dskd.errors import ConfigError
from dskd.models.weight_files import Stored


def as_now(model: PreTrainedModel, sources: list[Stored], where: str) -> list[Stored]:
    """The tensors as the model's class has them; those that several are made of are read when the
    one that they make is, and nothing is read before.

    Raises:
        ConfigError: a part of what is made of several is missing; names the setting ``where``.
    """
    here = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    foreign = [s for s in sources if s.is_value and not {s.key, prefix + s.key} & here]
    rules = get_model_conversion_mapping(model, add_legacy=False) if foreign else []
    if not rules:
        return sources
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    changed = {source.key for source in foreign}
    found = [source for source in sources if source.key not in changed]
    parts: dict[str, list[tuple[str, Stored]]] = {}
    for source in sorted(foreign, key=lambda each: dot_natural_key(each.key)):
        name, pattern = rename_source_key(source.key, renamings, converters)
        if pattern is None:
            found.append(source._replace(key=name))
        else:
            parts.setdefault(name, []).append((pattern, source))
    for name, some in parts.items():
        keys = ", ".join(part.key for _, part in some[:2])
        with raised_as(ConfigError, f"{where}: {keys} ... do not make {name}"):
            found += _made(model, by_pattern[some[0][0]], name, some)
    return found


def _made(
    model: PreTrainedModel, converter: WeightConverter, name: str, parts: list[tuple[str, Stored]]
) -> list[Stored]:
    """What is made of some tensors, which are read as it is."""
    shapes = [torch.empty(part.shape, dtype=part.dtype, device="meta") for _, part in parts]
    results = _converted(model, converter, name, parts, shapes)

    def read(key: str) -> Tensor:
        tensors = [part.read() for _, part in parts]
        return _converted(model, converter, name, parts, tensors)[key]

    return [Stored(key, x.shape, x.dtype, partial(read, key)) for key, x in results.items()]


def _converted(
    model: PreTrainedModel,
    converter: WeightConverter,
    name: str,
    parts: list[tuple[str, Stored]],
    tensors: list[Tensor],
) -> dict[str, Tensor]:
    rule = copy.deepcopy(converter)  # it collects what it is given
    for (pattern, part), tensor in zip(parts, tensors, strict=True):
        rule.add_tensor(name, part.key, pattern, tensor)
    made: dict[str, Any] = rule.convert(name, model=model, config=model.config)
    return {key: x[0] if isinstance(x, list) else x for key, x in made.items()}
