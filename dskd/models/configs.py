"""Settings -> config: of a random model or of a stored one, and whether rows and vocabulary fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dskd.data.foreign import raised_as
from dskd.data.tokenizers import first_of, vocabulary_size
from dskd.errors import ConfigError
from dskd.models.families import head_of, is_causal, longest_row, positions_field, refuse_unknown
from dskd.models.heads import ObjectiveName
from dskd.models.overrides import known_fields, random_config, with_own
from dskd.models.shrinking import VOCABULARY
from dskd.models.structure import padding_position
from dskd.models.weight_files import folder_at_hand, local_folder, refuse_quantised
from dskd.settings.model import Model


def hidden_size(settings: Model, *, where: str) -> int:
    """Width of the model's hidden states, from its config alone."""
    return config_of(settings, where=where).hidden_size


def config_of(
    settings: Model, *, where: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """The config of a model; without a tokenizer, but for what it has of one: a random one's
    vocabulary, and ``new_tokens``.

    Raises:
        ConfigError: a family or a quantisation that is not supported; fields that the config does
            not have, values that it refuses or does not take up.
    """
    folder = stored_folder(settings, where)
    if folder is None:
        return _random_config(settings, where, tokenizer)
    config = _stored_config(settings, folder, where)
    if settings.new_tokens and tokenizer is not None:
        config.vocab_size = max(config.vocab_size, vocabulary_size(tokenizer))
    return config


def config_at_hand(settings: Model, where: str) -> PreTrainedConfig | None:
    """:func:`config_of`, but nothing is downloaded for it: None if that is to come."""
    if settings.path is None:
        return config_of(settings, where=where)
    folder = folder_at_hand(settings.path, settings.revision, f"{where}.path")
    if folder is None:
        return None
    return config_of(settings.model_copy(update={"path": str(folder)}), where=where)


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
        padding = padding_position(config)
        beyond = 0 if padding is None else padding + 1
        why = f" ({beyond} positions are taken up by the padding id)" if beyond else ""
        raise ConfigError(
            f"{where}.config.{positions_field(config)}: {longest + beyond} are too few "
            f"for data.block_size {block_size}; {block_size + beyond} are needed{why}"
        )


def with_classes(
    config: PreTrainedConfig, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config of a model that tells these classes apart, in this order; none of them: of one
    that gives a number. HuggingFace's own class of it then finds a row's last token, too."""
    config = copy.deepcopy(config)
    names = list(classes) or ["LABEL_0"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification" if classes else "regression"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def classes_in(config: PreTrainedConfig) -> list[str]:
    """The class names that a config gives, in the order of the logits."""
    return [config.id2label[index] for index in range(config.num_labels)]


def check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuse a vocabulary that is smaller than the tokenizer's, or pads by another token where
    positions are counted from it.

    Raises:
        ConfigError: names the setting.
    """
    if config.vocab_size < vocabulary_size(tokenizer):
        raise ConfigError(
            f"{where}: its vocabulary of {config.vocab_size} is smaller than the tokenizer's "
            f"{vocabulary_size(tokenizer)}"
        )
    padding = padding_position(config)
    if padding is not None and padding != tokenizer.pad_token_id:
        raise ConfigError(
            f"{where}: its pad_token_id is {padding}, the tokenizer's {tokenizer.pad_token_id}; "
            f"{config.model_type} counts positions by it"
        )


def stored_folder(settings: Model, where: str) -> Path | None:
    """The folder of a stored model, downloaded if need be; None of a random one."""
    if settings.path is None:
        return None
    return local_folder(settings.path, settings.revision, f"{where}.path")


def _random_config(
    settings: Model, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """The config of a random model; without a tokenizer its vocabulary is HuggingFace's default,
    or small where there is none."""
    fields = dict(settings.config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(f"{where}.config.model_type: needed without {where}.path")
    refuse_unknown(model_type, f"{where}.config.model_type")
    given: dict[str, int | None] = {}
    causal, default = is_causal(model_type), AutoConfig.for_model(model_type)
    if tokenizer is None:
        if default.vocab_size is None:  # ESM has none, and asks where padding is: let them be any
            given |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
    else:
        special = _special_ids(tokenizer, causal)
        known = known_fields(type(default))
        given = {name: value for name, value in special.items() if name in known}
        multiple = settings.vocab_multiple
        given["vocab_size"] = -(-vocabulary_size(tokenizer) // multiple) * multiple
    return random_config(model_type, fields, given, f"{where}.config")


def _special_ids(tokenizer: PreTrainedTokenizerBase, causal: bool) -> dict[str, int | None]:
    """The config's ids of special tokens."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return {
        # As the embeddings' padding index a token gets no gradient: never one that text contains.
        "pad_token_id": None if causal and pad == end else pad,
        "bos_token_id": first_of(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": first_of(end, tokenizer.sep_token_id),
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }


def _stored_config(settings: Model, folder: Path, where: str) -> PreTrainedConfig:
    with raised_as(ConfigError, f"{where}.path: cannot read the config in {folder}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    refuse_unknown(config.model_type, f"{where}.path: model_type of {folder}")
    if getattr(config, "quantization_config", None) is not None:
        refuse_quantised(config.quantization_config, f"{where}.path")
        del config.quantization_config  # the weights are read as they are meant
    return with_fields(config, settings.config, where)


def with_fields(config: PreTrainedConfig, own: dict[str, Any], where: str) -> PreTrainedConfig:
    """A stored model's config, with the settings' own fields for it.

    Raises:
        ConfigError: another model type, fields that it does not have, values that it refuses or
            does not take up.
    """
    fields = dict(own)
    if fields.pop("model_type", config.model_type) != config.model_type:
        raise ConfigError(f"{where}.config.model_type: {where}.path holds a {config.model_type}")
    return with_own(config, fields, f"{where}.config") if fields else config
