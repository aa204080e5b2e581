"""A trained model as a HuggingFace folder: weights, config, tokenizer, model card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dskd.engine.zero import full_shape, gathered
from dskd.errors import DiskError
from dskd.models.families import has_types, longest_row
from dskd.system import dist
from dskd.system.disk import writing
from dskd.system.files import sync_to_disk

SHARD_BYTES = 4_000_000_000
"""Most bytes of a file of weights (a single larger parameter gets a file of its own)."""


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    card: Mapping[str, Any],
    masters: Callable[[str], Tensor] | None = None,
) -> None:
    """Write ``folder`` so that ``from_pretrained`` gives the same logits (collective).

    Sharded parameters are gathered one by one; rank 0 holds at most one file's worth of them. An
    interrupted export never leaves a part: ``folder`` is absent or whole.

    Args:
        model: the HuggingFace model, in the dtype it is to be stored in, unless there are
            ``masters``.
        tokenizer: the data's; None: there is none to lie beside the weights.
        folder: replaced if it exists.
        card: what the model card tells, value by heading; ``title`` is its first line.
        masters: the fp32 values of a trained parameter, in its shape, by its name (collective),
            which are stored instead of the model's own.

    Raises:
        DiskError: the folder cannot be written; on every rank.
    """
    temporary = _temporary(folder)
    _on_rank0(folder, lambda: _make_empty(temporary))
    stored = _Stored(model, masters)
    files = _files(model, stored)
    for name, tensors in files.items():
        values = {key: stored.whole(tensor) for key, tensor in tensors.items()}  # collective
        _on_rank0(folder, lambda name=name, values=values: _save(values, temporary / name))
    _on_rank0(folder, lambda: _describe(model, tokenizer, files, stored, card, temporary))
    _on_rank0(folder, lambda: _replace(temporary, folder))


def remove_half_written(folder: Path) -> None:
    """Remove what an export to ``folder`` left when it was killed; an earlier export that it was
    about to replace gets its name back."""
    shutil.rmtree(_temporary(folder), ignore_errors=True)
    earlier = _earlier(folder)
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _on_rank0(folder: Path, work: Callable[[], None]) -> None:
    """Do something on rank 0; every rank raises if it failed there, so that none waits for ever."""
    with dist.agreed():
        if dist.rank() == 0:
            try:
                with writing("the exported model", folder):
                    work()
            except DiskError:
                remove_half_written(folder)
                raise


class _Stored:
    """What is stored of a model's parameters and buffers; for the arguments see :func:`export`."""

    def __init__(self, model: PreTrainedModel, masters: Callable[[str], Tensor] | None) -> None:
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._names = {} if masters is None else trained
        self._masters = masters

    def dtype(self, tensor: Tensor) -> torch.dtype:
        """In which a tensor is stored."""
        return torch.float32 if id(tensor) in self._names else tensor.dtype

    def bytes(self, tensor: Tensor) -> int:
        """Of the whole tensor."""
        return full_shape(tensor).numel() * self.dtype(tensor).itemsize

    def whole(self, tensor: Tensor) -> Tensor | None:
        """Its values on rank 0's CPU, None elsewhere (collective)."""
        # A copy: tensors that share memory (an untied head's bias has two names) cannot be stored.
        if self._masters is not None and id(tensor) in self._names:
            values = self._masters(self._names[id(tensor)])
            return values.detach().cpu().clone().contiguous() if dist.rank() == 0 else None
        parameters = [tensor] if isinstance(tensor, nn.Parameter) else []
        with gathered(parameters):
            return tensor.detach().cpu().clone().contiguous() if dist.rank() == 0 else None


def _files(model: PreTrainedModel, stored: _Stored) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, still sharded; a tied one once, under its source's name.

    The one value that is stored twice is the bias of an untied BERT or RoBERTa head: transformers
    has a parameter for each of its names, of which the forward pass reads one, and reports as
    missing whichever is not in the file.
    """
    tied = set(model.all_tied_weights_keys)
    state = model.state_dict(keep_vars=True)
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in state.items():
        if key in tied:
            continue
        size = stored.bytes(tensor)
        if parts[-1] and filled + size > SHARD_BYTES:
            parts.append({})
            filled = 0
        parts[-1][key] = tensor
        filled += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _save(values: dict[str, Tensor], path: Path) -> None:
    save_file(values, path, metadata={"format": "pt"})


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    files: Mapping[str, Mapping[str, Tensor]],
    stored: _Stored,
    card: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write everything beside the weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = stored.dtype(next(model.parameters()))
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, model.config, folder)
    (folder / "README.md").write_text(_card(card), encoding="utf-8")
    if len(files) > 1:
        tensors = [tensor for part in files.values() for tensor in part.values()]
        total = sum(stored.bytes(tensor) for tensor in tensors)
        places = {key: name for name, part in files.items() for key in part}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path
) -> None:
    """Write a tokenizer that hands the model what it takes, and cuts where its positions end."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = longest_row(config)
    names = tokenizer.model_input_names
    if "token_type_ids" in names and not has_types(config):
        # Its forward pass may not even take them, and no training gave it any.
        names = [name for name in names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.save_pretrained(folder)


def _card(card: Mapping[str, Any]) -> str:
    """The model card: a heading for each entry, groups of settings as YAML."""
    title = card.get("title", "A language model trained with dskd")
    parts = [f"---\nlibrary_name: transformers\ntags:\n- dskd\n---\n\n# {title}\n"]
    for heading, value in card.items():
        if heading == "title":
            continue
        body = str(value)
        if isinstance(value, dict | list):
            body = f"```yaml\n{yaml.safe_dump(value, sort_keys=False)}```"
        parts.append(f"## {heading}\n\n{body}\n")
    return "\n".join(parts)


def _replace(temporary: Path, folder: Path) -> None:
    """Flush the temporary folder to disk and give it its name."""
    for path in [*temporary.iterdir(), temporary]:
        sync_to_disk(path)
    earlier = _earlier(folder)
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    temporary.rename(folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)
