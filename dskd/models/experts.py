"""Experts of a mixture (MoE): how folders hold their weights, and which of HuggingFace's ways they
are computed in.

Models have the experts of a layer stacked, ``experts.gate_up_proj`` [E, 2 I, H] and
``experts.down_proj`` [E, H, I]; folders, as the hub has them, each map of each expert by itself:
``mlp.experts.3.gate_proj.weight``, or of Mixtral ``block_sparse_moe.experts.3.w1.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dskd.errors import ConfigError
from dskd.models.weight_files import Stored

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_STACKS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What is stacked of the maps of each expert, one below the other, by either naming."""


def stacked(sources: Sequence[Stored], has: Callable[[str], bool], where: str) -> list[Stored]:
    """The tensors of a folder, those of single experts stacked where the model has them so.

    Args:
        has: whether the model has a parameter of this key.
        where: the setting that names the folder.

    Raises:
        ConfigError: experts, or maps of one, are missing or of unlike shapes.
    """
    of_experts: dict[str, dict[tuple[int, str], Stored]] = {}
    rest = []
    for each in sources:
        # Mixtral's older name of the part; other models have it still
        renamed = each.key.replace(".block_sparse_moe.", ".mlp.")
        match = _EXPERT.fullmatch(renamed)
        if match is not None and has(f"{match[1]}.down_proj"):
            of_experts.setdefault(match[1], {})[int(match[2]), match[3]] = each
        else:
            rest.append(each._replace(key=renamed) if has(renamed) else each)
    for path, maps in of_experts.items():
        count = len({number for number, _ in maps})
        rest += [_stack(path, name, count, maps, where) for name in _STACKS]
        rest += maps.values()  # of which the model knows nothing
    return rest


def _stack(
    path: str, name: str, count: int, maps: dict[tuple[int, str], Stored], where: str
) -> Stored:
    """One parameter of the experts of a layer, whose maps are taken out."""
    there = {kind for _, kind in maps}
    kinds = next((kinds for kinds in _STACKS[name] if there & {*kinds}), _STACKS[name][0])
    wanted = [(number, kind) for number in range(count) for kind in kinds]
    missing = [f"{path}.{n}.{kind}.weight" for n, kind in wanted if (n, kind) not in maps]
    if missing:
        raise ConfigError(f"{where}: weights of experts are missing: {', '.join(missing[:6])}")
    parts = [maps.pop(each) for each in wanted]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise ConfigError(f"{where}: {path}: its experts are not of one shape and type")
    shape = torch.Size((count, len(kinds) * parts[0].shape[0], *parts[0].shape[1:]))

    def read() -> Tensor:
        return torch.cat([part.read() for part in parts]).view(shape)

    return Stored(f"{path}.{name}", shape, parts[0].dtype, read)


def compute_without_values(model: PreTrainedModel) -> None:
    """Have the experts computed in the one way that reads no values, so that a model on ``meta``
    can run: by products with a copy of its experts for each token."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
