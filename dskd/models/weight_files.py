"""The files of a HuggingFace folder: where it is, which of them hold weights, and their tensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dskd.data.foreign import raised_as
from dskd.errors import ConfigError
from dskd.settings.parsing import show

_NAMES = (  # in order of preference: an index of several files, or one file
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_VALUES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Number formats of weights; any other holds codes of them, or is no weight."""
_FORMATS = {"F64": _VALUES[0], "F32": _VALUES[1], "F16": _VALUES[2], "BF16": _VALUES[3]}
_DEQUANTISED = ("fp8", "mxfp8", "mxfp4")
"""Quantisations that transformers undoes as it loads, on any machine."""


def local_folder(path: str, revision: str | None, where: str) -> Path:
    """The folder ``path`` names, or the local copy of the hub repository of that name.

    Raises:
        ConfigError: neither exists; the message names the setting ``where``.
    """
    if Path(path).is_dir():
        return Path(path)
    _refuse_missing(path, where)
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        folder = _download(path, revision, wanted)
        if not any(folder.glob("*.safetensors")):
            folder = _download(path, revision, ["*.bin", "*.bin.index.json"])
    except (OSError, HFValidationError, HfHubHTTPError) as problem:
        raise ConfigError(f"{where}: no folder and not on the hub: {path} ({problem})") from problem
    return folder


def folder_at_hand(path: str, revision: str | None, where: str) -> Path | None:
    """The folder ``path`` names, or of the hub repository of that name what has been downloaded,
    if its config has; else None.

    Raises:
        ConfigError: ``path`` can only be that of a folder, and there is none; ``where`` names it.
    """
    if Path(path).is_dir():
        return Path(path)
    _refuse_missing(path, where)
    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _refuse_missing(path: str, where: str) -> None:
    if path.startswith((".", "/", "~")):
        raise ConfigError(f"{where}: no such folder: {path}")


def weight_files(folder: Path, where: str) -> list[Path]:
    """The files that hold the weights in a HuggingFace folder, sorted.

    Raises:
        ConfigError: there are none, or an index is damaged, or names one that is missing or lies
            elsewhere.
    """
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"{where}: no {' or '.join(_NAMES[1::2])} in {folder}")
    if found.suffix != ".json":
        return [found]
    names = _indexed(found, where)
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{where}: {found} names {name!r}, which is outside of its folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{where}: {found.name} names {name}, which is not in {folder}")
    return [folder / name for name in names]


def _indexed(index: Path, where: str) -> list[str]:
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{where}: {index} is damaged: not JSON ({problem})") from problem
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(names, dict) and names and all(isinstance(n, str) for n in names.values())):
        raise ConfigError(f"{where}: {index} is damaged: no weight_map of tensors to files")
    return sorted(set(names.values()))


class Stored(NamedTuple):
    """A tensor in an open file; ``read`` gives it.

    ``dtype`` is torch's; of what is no weight it may be the file's own name for it.
    """

    key: str
    shape: torch.Size
    dtype: Any
    read: Callable[[], Tensor]

    @property
    def is_value(self) -> bool:
        """Whether it holds numbers as they are meant, not codes for them."""
        return self.dtype in _VALUES


def open_weights(model: PreTrainedModel, folder: Path, where: str) -> list[Stored]:
    """The tensors of a folder, of a quantised model as they are meant.

    Args:
        model: whose class reads a quantised folder; that one is held in memory whole.
        folder: holds ``config.json`` and weights.
        where: the setting, for messages.

    Raises:
        ConfigError: a file is damaged or holds something else.
    """
    quantised = PreTrainedConfig.get_config_dict(folder)[0].get("quantization_config")
    if quantised is not None:
        return _dequantised(model, folder, quantised, where)
    found = []
    for path in weight_files(folder, where):
        found += _tensors(path, where)
    return found


def refuse_quantised(how: Any, where: str) -> None:
    """Refuse a quantisation that cannot be undone here.

    Raises:
        ConfigError: names the method.
    """
    method = how.get("quant_method") if isinstance(how, dict) else how
    if method not in _DEQUANTISED:
        raise ConfigError(
            f"{where}: its weights are quantised ({show(method)}); dskd trains and teaches with "
            f"weights as they are. Of these it reads {', '.join(_DEQUANTISED)}; dequantise any "
            f"other with transformers and save it"
        )


def _tensors(path: Path, where: str) -> list[Stored]:
    with raised_as(ConfigError, f"{where}: {path} is damaged"):
        return list(_safetensors(path) if path.suffix == ".safetensors" else _pickled(path))


def _safetensors(path: Path) -> Iterator[Stored]:
    file: Any = safe_open(path, framework="pt")
    keys = file.keys()
    for key in keys:
        part = file.get_slice(key)
        dtype = _FORMATS.get(part.get_dtype(), part.get_dtype())
        yield Stored(key, torch.Size(part.get_shape()), dtype, partial(file.get_tensor, key))


def _pickled(path: Path) -> Iterator[Stored]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not tensors by name")
    for key, value in content.items():
        if isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values()):
            raise ValueError(f"its tensors lie under {key!r}; save that part alone")
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} is a {type(value).__name__}, not a tensor")
        if not isinstance(key, str):
            raise ValueError(f"a tensor is named {key!r}, which is no text")
        yield _at_hand(key, value)


def _at_hand(key: str, value: Tensor) -> Stored:
    return Stored(key, value.shape, value.dtype, lambda: value)


def _dequantised(
    model: PreTrainedModel, folder: Path, quantised: dict[str, Any], where: str
) -> list[Stored]:
    refuse_quantised(quantised, where)
    cls = AUTO_QUANTIZATION_CONFIG_MAPPING[quantised["quant_method"]]
    # transformers undoes it as a whole model is loaded, on the CPU of every rank that reads.
    known = set(inspect.signature(cls.__init__).parameters)
    how = cls(**{k: v for k, v in quantised.items() if k in known} | {"dequantize": True})
    try:
        whole = type(model).from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    except (ImportError, OSError, ValueError, RuntimeError) as problem:
        raise ConfigError(f"{where}: cannot dequantise {folder}: {problem}") from problem
    return [_at_hand(key, p.data) for key, p in whole.named_parameters(remove_duplicate=False)]


def _download(path: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
    )
