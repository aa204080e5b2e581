"""Settings -> model: checked against the tokenizer and the rows, then constructed and filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from dskd.data.tokenizers import check_same_vocabulary, first_of, vocabulary_size
from dskd.engine.zero import sharded_construction
from dskd.errors import ConfigError
from dskd.models.families import (
    ObjectiveName,
    counts_past_padding,
    head_of,
    lm_head,
    longest_row,
    refuse_unknown,
    tie_head_bias,
)
from dskd.models.initial import initialise
from dskd.models.reading import load_weights, local_folder, weight_files
from dskd.settings.model import Model
from dskd.settings.parsing import nearest
from dskd.system.files import file_hash, fingerprint

_AUTO = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}
_SPECIALS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_SET_BY_OTHERS = {
    "vocab_size": "comes from the tokenizer (and vocab_multiple)",
    **dict.fromkeys(_SPECIALS, "comes from the tokenizer"),
    **dict.fromkeys(("dtype", "torch_dtype"), "comes from the precision setting"),
}
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # read into rope_parameters


def build(
    settings: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: ObjectiveName,
    block_size: int,
    seed: int,
    ds: dict[str, Any] | None,
    dtype: torch.dtype,
    where: str,
) -> PreTrainedModel:
    """Build a random model or load one, in train mode (collective).

    Its weights are the same at every ZeRO stage and world size. Under ZeRO-3 no rank holds more
    than one module's own parameters at full size.

    Args:
        tokenizer: the data's; the model must use the same one.
        block_size: most tokens of a row.
        ds: DeepSpeed config without ``auto`` of the engine the model is for; None: no engine.
        dtype: of the weights; under ZeRO-3 the one ``ds`` says.
        where: the setting's name, for messages.

    Raises:
        ConfigError: unknown or contradicting config fields, a family that is not supported or does
            not fit the objective, too few positions or too small a vocabulary, another tokenizer
            than the data's, weights that cannot be read.
    """
    folder = _folder(settings, where)
    if folder is None:
        config = _random_config(settings, where, tokenizer)
    else:
        config = _stored_config(settings, folder, where)
        _check_tokenizer(tokenizer, folder, f"{where}.path")
    check_shape(config, objective, block_size, where)
    _check_vocabulary(config, tokenizer, where)
    model = construct(config, settings.attention, ds, dtype, where, objective)
    if folder is None:
        initialise(model, seed)
        tie_head_bias(model)
    else:
        tie_head_bias(model)
        load_weights(model, folder, f"{where}.path")
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def check_random(settings: Model, *, objective: ObjectiveName, block_size: int, where: str) -> None:
    """Refuse what is wrong with the settings of a random model, before there is a tokenizer.

    Raises:
        ConfigError: as :func:`build` does.
    """
    check_shape(_random_config(settings, where, None), objective, block_size, where)


def model_fingerprint(settings: Model, *, seed: int, where: str) -> str:
    """Fingerprint of what :func:`build` would build: the content of the stored weights and config,
    or the random model's config and seed; the folder's name does not count."""
    fields = {"config": settings.config}
    folder = _folder(settings, where)
    if folder is None:
        return fingerprint(fields | {"seed": seed, "vocab_multiple": settings.vocab_multiple})
    files = [folder / "config.json", *weight_files(folder, f"{where}.path")]
    return fingerprint(fields | {"files": [file_hash(file) for file in files]})


def construct(
    config: PreTrainedConfig,
    attention: str,
    ds: dict[str, Any] | None,
    dtype: torch.dtype,
    where: str,
    objective: ObjectiveName | None = None,
) -> PreTrainedModel:
    """The model of a config, in train mode, with its weights still to come.

    Args:
        attention: its implementation, or ``auto``.
        ds: DeepSpeed config that shards its construction, if it says ZeRO-3; None: none does.
        where: the setting's name, for messages.
        objective: what it is for; None: language modelling, as its type does it.

    Raises:
        ConfigError: HuggingFace refuses the config; the message names the setting ``where``.
    """
    auto = _AUTO[lm_head(config.model_type).objective if objective is None else objective]
    options = {} if attention == "auto" else {"attn_implementation": attention}
    with _complaints(where), no_init_weights(), sharded_construction(ds):
        model = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model.train()


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model of a config, tied ones counted once, without making it."""
    with torch.device("meta"):
        model = construct(config, "auto", None, torch.float32, "the config of the export")
    tie_head_bias(model)
    return sum(parameter.numel() for parameter in model.parameters())


def hidden_size(settings: Model, *, where: str) -> int:
    """Width of the model's hidden states, from its config alone."""
    return config_of(settings, where=where).hidden_size


def config_of(settings: Model, *, where: str) -> PreTrainedConfig:
    """The config of what :func:`build` would build, but for what a random one has of a tokenizer.

    Raises:
        ConfigError: as :func:`build` does.
    """
    folder = _folder(settings, where)
    if folder is None:
        return _random_config(settings, where, None)
    return _stored_config(settings, folder, where)


def _folder(settings: Model, where: str) -> Path | None:
    if settings.path is None:
        return None
    return local_folder(settings.path, settings.revision, f"{where}.path")


def _random_config(
    settings: Model, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """The config of a random model; without a tokenizer its vocabulary is HuggingFace's default."""
    fields = dict(settings.config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(f"{where}.config.model_type: needed without {where}.path")
    refuse_unknown(model_type, f"{where}.config.model_type")
    cls = type(AutoConfig.for_model(model_type))
    _check_fields(fields, cls, f"{where}.config")
    given: dict[str, int | None] = {}
    if tokenizer is not None:
        special = _special_ids(tokenizer, lm_head(model_type).objective)
        given = {name: value for name, value in special.items() if name in _fields(cls)}
        multiple = settings.vocab_multiple
        given["vocab_size"] = -(-vocabulary_size(tokenizer) // multiple) * multiple
    with _complaints(f"{where}.config"):
        return AutoConfig.for_model(model_type, **fields, **given)


def _special_ids(tokenizer: PreTrainedTokenizerBase, objective: str) -> dict[str, int | None]:
    """The config's ids of special tokens."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return {
        # As the embeddings' padding index a token gets no gradient: never one that text contains.
        "pad_token_id": None if objective == "causal" and pad == end else pad,
        "bos_token_id": first_of(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": first_of(end, tokenizer.sep_token_id),
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }


def _stored_config(settings: Model, folder: Path, where: str) -> PreTrainedConfig:
    with _complaints(f"{where}.path: cannot read the config in {folder}"):
        config = AutoConfig.from_pretrained(folder)
    refuse_unknown(config.model_type, f"{where}.path: model_type of {folder}")
    return with_fields(config, settings.config, where)


def with_fields(config: PreTrainedConfig, own: dict[str, Any], where: str) -> PreTrainedConfig:
    """A stored model's config, with the settings' own fields for it.

    Raises:
        ConfigError: another model type, fields that it does not have, values that it refuses.
    """
    fields = dict(own)
    if fields.pop("model_type", config.model_type) != config.model_type:
        raise ConfigError(f"{where}.config.model_type: {where}.path holds a {config.model_type}")
    _check_fields(fields, type(config), f"{where}.config")
    named = {config.attribute_map.get(name, name): value for name, value in fields.items()}
    with _complaints(f"{where}.config"):
        return type(config).from_dict({**config.to_dict(), **named})


def _check_fields(fields: dict[str, Any], cls: type[PreTrainedConfig], where: str) -> None:
    """HuggingFace configs take any name in silence; only those the model knows are let through."""
    known = _fields(cls) | set(cls.attribute_map)
    if "rope_parameters" in known:
        known |= set(_ROPE)
    problems = []
    for name in fields:
        if name in _SET_BY_OTHERS:
            problems.append(f"{where}.{name}: {_SET_BY_OTHERS[name]}")
        elif name not in known:
            near = nearest(name, known)
            problems.append(f"{where}.{name}: a {cls.model_type} config has no such field{near}")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> None:
    try:
        other = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as problem:
        raise ConfigError(
            f"{where}: {folder} has no tokenizer that could be compared with the data's ({problem})"
        ) from problem
    check_same_vocabulary(tokenizer, other, "the data's tokenizer", f"{where} ({folder})")


def check_shape(
    config: PreTrainedConfig, objective: ObjectiveName, block_size: int, where: str
) -> None:
    """Refuse a family that does not fit the objective, and too few positions for the rows.

    Raises:
        ConfigError: names the setting.
    """
    head_of(config, objective, where)
    longest = longest_row(config)
    if longest < block_size:
        beyond = config.max_position_embeddings - longest
        why = f" ({beyond} positions are taken up by the padding id)" if beyond else ""
        raise ConfigError(
            f"{where}.config.max_position_embeddings: {config.max_position_embeddings} are too few "
            f"for data.block_size {block_size}; {block_size + beyond} are needed{why}"
        )


def _check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    if config.vocab_size < vocabulary_size(tokenizer):
        raise ConfigError(
            f"{where}: its vocabulary of {config.vocab_size} is smaller than the tokenizer's "
            f"{vocabulary_size(tokenizer)}"
        )
    if counts_past_padding(config) and config.pad_token_id != tokenizer.pad_token_id:
        raise ConfigError(
            f"{where}: its pad_token_id is {config.pad_token_id}, the tokenizer's "
            f"{tokenizer.pad_token_id}; {config.model_type} counts positions by it"
        )


@contextmanager
def _complaints(where: str) -> Iterator[None]:
    """What HuggingFace raises about a config in this context becomes a ConfigError."""
    try:
        yield
    except (StrictDataclassError, ValueError, KeyError, OSError, ImportError) as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def _fields(cls: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
