"""Weights from a HuggingFace folder into a model, parameter by parameter.

One way for whole and sharded models: a sharded one is filled by rank 0, which holds one parameter
at a time (``from_pretrained`` would read everything on every rank). Equal to ``from_pretrained``,
bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dskd.engine.zero import full_shape, gathered, is_sharded
from dskd.errors import ConfigError
from dskd.models.families import head_in
from dskd.system import dist
from dskd.system.log import say

_NAMES = (  # in order of preference: an index of several files, or one file
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_SHOWN = 6


def local_folder(path: str, revision: str | None, where: str) -> Path:
    """The folder ``path`` names, or the local copy of the hub repository of that name.

    Raises:
        ConfigError: neither exists; the message names the setting ``where``.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")):
        raise ConfigError(f"{where}: no such folder: {path}")
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        folder = _download(path, revision, wanted)
        if not any(folder.glob("*.safetensors")):
            folder = _download(path, revision, ["*.bin", "*.bin.index.json"])
    except (OSError, HFValidationError, HfHubHTTPError) as problem:
        raise ConfigError(f"{where}: no folder and not on the hub: {path} ({problem})") from problem
    return folder


def folder_at_hand(path: str, revision: str | None) -> Path | None:
    """The folder ``path`` names, or of the hub repository of that name what has been downloaded,
    if its config has; else None."""
    if Path(path).is_dir():
        return Path(path)
    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_files(folder: Path, where: str) -> list[Path]:
    """The files that hold the weights in a HuggingFace folder, sorted.

    Raises:
        ConfigError: there are none, or an index names one that is missing.
    """
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"{where}: no {' or '.join(_NAMES[1::2])} in {folder}")
    if found.suffix != ".json":
        return [found]
    files = sorted({folder / name for name in json.loads(found.read_text())["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{where}: {found.name} names {file.name}, which is not in {folder}")
    return files


def load_weights(model: PreTrainedModel, folder: Path, where: str) -> None:
    """Fill every parameter from ``folder``, rounded to the parameter's dtype (collective).

    Old names are understood, weights the model has no use for are named and left out.

    Raises:
        ConfigError: weights are missing, of another shape, damaged, or stored apart where the
            config ties them; on every rank.
    """
    mine = dist.rank() == 0 or not any(is_sharded(p) for p in model.parameters())
    with dist.agreed():
        plan = _plan(model, _open(folder, where), where) if mine else {}
    for name, parameter in model.named_parameters():
        with gathered([parameter], write=True), torch.no_grad():
            if mine:
                parameter.copy_(plan[name].read())


class _Source(NamedTuple):
    """One parameter's values in an open file; ``read`` gives them."""

    key: str
    shape: torch.Size
    read: Callable[[], Tensor]


def _open(folder: Path, where: str) -> list[_Source]:
    sources = []
    for path in weight_files(folder, where):
        try:
            sources += _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        except (SafetensorError, RuntimeError, OSError, ValueError) as problem:
            raise ConfigError(f"{where}: {path} is damaged ({problem})") from problem
    return sources


def _safetensors(path: Path) -> Iterator[_Source]:
    file: Any = safe_open(path, framework="pt")
    keys = file.keys()
    for key in keys:
        shape = torch.Size(file.get_slice(key).get_shape())
        yield _Source(key, shape, partial(file.get_tensor, key))


def _pickled(path: Path) -> Iterator[_Source]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for key, tensor in content.items():
        yield _Source(key, tensor.shape, lambda tensor=tensor: tensor)


def _plan(model: PreTrainedModel, sources: list[_Source], where: str) -> dict[str, _Source]:
    """The source of each parameter, by the first of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    known = {name for aliases in names.values() for name in aliases}
    stored = {_name_in(model, known, source.key): source for source in sources}
    plan, missing, wrong = {}, [], []
    for name, parameter in model.named_parameters():
        found = [alias for alias in names[id(parameter)] if alias in stored]
        if not found:
            missing.append(name)
            continue
        plan[name] = stored[_the_one(model, found, stored, where)]
        if plan[name].shape != full_shape(parameter):
            here, there = tuple(full_shape(parameter)), tuple(plan[name].shape)
            wrong.append(f"{name} is {there}, the config says {here}")
    if missing:
        raise ConfigError(f"{where}: weights are missing: {_some(missing)}")
    if wrong:
        raise ConfigError(f"{where}: weights do not fit: {_some(wrong)}")
    if unused := sorted(stored.keys() - known):
        say(f"{where}: weights without use here are left out: {_some(unused)}")
    return plan


def _the_one(
    model: PreTrainedModel, found: list[str], stored: Mapping[str, _Source], where: str
) -> str:
    """The name to read a parameter under, of those it is stored under."""
    head = head_in(model)
    if head.bias is not None and f"{head.projection}.bias" in found:
        return f"{head.projection}.bias"  # the head's own copy is not in the forward pass
    first, *others = found
    for other in others:
        if not torch.equal(stored[first].read(), stored[other].read()):
            raise ConfigError(
                f"{where}: the config ties {first} and {other}, but they are stored with different "
                "values; set tie_word_embeddings: false in the model's config settings"
            )
    return first


def _name_in(model: PreTrainedModel, known: set[str], key: str) -> str:
    """The model's name for a stored key: old spellings, and bodies saved without their prefix."""
    for old, new in _RENAMED:
        key = key.replace(old, new)
    prefixed = f"{model.base_model_prefix}.{key}"
    return prefixed if key not in known and prefixed in known else key


def _download(path: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
    )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
