"""Settings -> model: checked against the tokenizer and the rows, then constructed and filled."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from dskd.data.foreign import raised_as
from dskd.data.tokenizers import check_same_vocabulary, further_ids
from dskd.engine.zero import is_sharded, sharded_construction
from dskd.errors import ConfigError
from dskd.models.balance import balance_of
from dskd.models.configs import (
    check_shape,
    check_vocabulary,
    config_of,
    stored_folder,
    with_classes,
)
from dskd.models.experts import compute_without_values
from dskd.models.families import freeze_unused, gather_reached, projection_of, tie_head_bias
from dskd.models.heads import ObjectiveName
from dskd.models.initial import initialise
from dskd.models.reading import in_class_head, load_weights, rows_of_tokens
from dskd.models.structure import language_objective, reads_values
from dskd.models.weight_files import weight_files
from dskd.settings.model import Model
from dskd.system.files import file_hash, fingerprint
from dskd.system.log import say

_AUTO = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}


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
    device: torch.device | None = None,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """Build a random model or load one, in train mode (collective).

    Its weights are the same at every ZeRO stage and world size, and on every device. Under ZeRO-3
    no rank holds more than one module's own parameters at full size; with a ``device`` no rank's
    CPU does, unless the weights are quantised.

    Args:
        tokenizer: the data's; the model must use the same one.
        block_size: most tokens of a row.
        ds: DeepSpeed config without ``auto`` of the engine the model is for; None: no engine.
        dtype: of the weights; under ZeRO-3 the one ``ds`` says.
        where: the setting's name, for messages.
        device: where whole parameters lie, None: on the CPU; buffers lie there in either case.
        classes: of a model for classification: the names of its classes, none of them if it gives
            a number; None: as many as its config says.
        new_head: whether such a model may be loaded from a folder without a head for classes, and
            then gets a random one of ``seed``.

    Raises:
        ConfigError: unknown or contradicting config fields, a family that is not supported or does
            not fit the objective, too few positions or too small a vocabulary, another tokenizer
            than the data's, weights that cannot be read, a head for other classes.
    """
    stored = config = config_of(settings, where=where, tokenizer=tokenizer)
    if classes is not None:
        config = with_classes(config, classes, tokenizer)
    folder = stored_folder(settings, where)
    new: list[int] = []
    if folder is not None:
        new = check_tokenizer(tokenizer, folder, settings, f"{where}.path")
    check_shape(config, objective, block_size, where)
    check_vocabulary(config, tokenizer, where)
    attention, trust = settings.attention, settings.trust_remote_code
    with _parameters_on(device):
        model = construct(config, attention, ds, dtype, where, objective, trust)
    freeze_unused(model)
    if folder is None:
        initialise(model, seed)
        tie_head_bias(model)
    else:
        tie_head_bias(model)
        if new_head:
            initialise(model, seed, partial(in_class_head, model))
        if new:
            initialise(model, seed, rows_of_tokens(model).__contains__)
            said = ", ".join(tokenizer.convert_ids_to_tokens(new))
            say(f"{where}.path: random embeddings for the new tokens {said}")
        load_weights(
            model, folder, f"{where}.path", new_head=new_head, trained_for=stored, new_ids=new
        )
        if model.can_generate() and (folder / "generation_config.json").is_file():
            with raised_as(ConfigError, f"{where}.path: generation_config.json of {folder}"):
                model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def check_model(
    config: PreTrainedConfig,
    settings: Model,
    *,
    objective: ObjectiveName,
    block_size: int,
    where: str,
    trained: bool = False,
) -> None:
    """Refuse a config that makes no model, without making one: it runs without memory.

    Args:
        config: of :func:`~dskd.models.configs.config_of`.
        settings: the settings that it is of.
        objective, block_size, where: see :func:`build`.
        trained: whether it is a student, which must have the balance loss that its config asks for.

    Raises:
        ConfigError: as :func:`build` does; whatever else HuggingFace raises about the config.
    """
    check_shape(config, objective, block_size, where)
    if config.num_hidden_layers < 1:
        raise ConfigError(f"{where}: its config says {config.num_hidden_layers} layers")
    balance = balance_of(config) if trained else None
    problem = f"{where}: its config makes no model"
    with raised_as(ConfigError, problem), torch.device("meta"):
        attention, trust = settings.attention, settings.trust_remote_code
        own = copy.deepcopy(config)  # a model writes into it how it computes
        model = construct(own, attention, None, torch.float32, problem, objective, trust)
        projection_of(model)
        compute_without_values(model)
        # Else what is wrong with its sizes shows as it is made, or never.
        if reads_values(config):
            return
        ids_BT = torch.zeros(1, 2, dtype=torch.long)
        model(ids_BT)
        if balance is not None:
            out = model.base_model(input_ids=ids_BT, output_router_logits=True)
            balance.check(getattr(out, "router_logits", None))


def check_random(settings: Model, *, objective: ObjectiveName, block_size: int, where: str) -> None:
    """Refuse what is wrong with the settings of a random model, before there is a tokenizer.

    Raises:
        ConfigError: as :func:`check_model` does.
    """
    data = {"objective": objective, "block_size": block_size}
    check_model(config_of(settings, where=where), settings, **data, where=where)


def model_fingerprint(settings: Model, *, seed: int, where: str) -> str:
    """Fingerprint of what :func:`build` would build: the content of the stored weights and config,
    or the random model's config and seed; the folder's name does not count."""
    fields: dict[str, Any] = {"config": settings.config}
    folder = stored_folder(settings, where)
    if folder is None:
        return fingerprint(fields | {"seed": seed, "vocab_multiple": settings.vocab_multiple})
    if settings.new_tokens:
        fields["seed"] = seed
    files = [folder / "config.json", *weight_files(folder, f"{where}.path")]
    return fingerprint(fields | {"files": [file_hash(file) for file in files]})


def construct(
    config: PreTrainedConfig,
    attention: str,
    ds: dict[str, Any] | None,
    dtype: torch.dtype,
    where: str,
    objective: ObjectiveName | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a config, in train mode, with its weights still to come.

    Args:
        attention: its implementation, or ``auto``.
        ds: DeepSpeed config that shards its construction, if it says ZeRO-3; None: none does.
        where: the setting's name, for messages.
        objective: what it is for; None: language modelling, as its type does it.
        trust_remote_code: whether code of its folder makes it, if the config says so.

    Raises:
        ConfigError: HuggingFace refuses the config; the message names the setting ``where``.
    """
    auto = _AUTO[objective or language_objective(config.model_type)]
    options = {} if attention == "auto" else {"attn_implementation": attention}
    options["trust_remote_code"] = trust_remote_code
    refused = f"{where}: HuggingFace refuses its config"
    with raised_as(ConfigError, refused), no_init_weights(), sharded_construction(ds):
        model = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    if any(map(is_sharded, model.parameters())):
        gather_reached(model)
    return model.train()


@contextmanager
def _parameters_on(device: torch.device | None) -> Iterator[None]:
    """Parameters of modules that are made inside get their memory on the device, one by one.

    Only they: what a module computes for its buffers is computed on the CPU, since functions of a
    GPU may differ in the last bit.
    """

    def moved(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.device.type == device.type:  # a tied one, made before
            return None
        return nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)

    if device is None:
        yield
        return
    hook = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def parameter_count(
    config: PreTrainedConfig, where: str, objective: ObjectiveName | None = None
) -> int:
    """Parameters of the model of a config, tied ones counted once, without making it; ``objective``
    as of :func:`construct`.

    Raises:
        ConfigError: it makes no model; the message names ``where``.
    """
    with torch.device("meta"):
        model = construct(config, "auto", None, torch.float32, where, objective)
    tie_head_bias(model)
    return sum(parameter.numel() for parameter in model.parameters())


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Model, where: str
) -> list[int]:
    """Refuse a stored model that was not trained on the data's tokenizer.

    Returns:
        The ids of the special tokens that the model is yet to get (``new_tokens``).

    Raises:
        ConfigError: its folder has no tokenizer, or one of another vocabulary; names ``where``.
    """
    none = f"{where}: {folder} has no tokenizer that could be compared with the data's"
    with raised_as(ConfigError, none):
        other = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    new = further_ids(tokenizer, other)
    name = f"{where} ({folder})"
    check_same_vocabulary(tokenizer, other, "the data's tokenizer", name, but=new)
    if new and not settings.new_tokens:
        lacking = ", ".join(tokenizer.convert_ids_to_tokens(new))
        raise ConfigError(
            f"{name} lacks special tokens of the data's tokenizer: {lacking}; a student gets "
            "embeddings for them by model.new_tokens: true"
        )
    return new
