"""Which head a model has, what it takes of its config, and the one forward pass that everything
uses."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from dskd.batch import SAME, Batch, Positions, Projection, Use
from dskd.engine.zero import gathered_with
from dskd.errors import ConfigError
from dskd.models.attention_masks import attention_arguments
from dskd.models.heads import CLASSIFIERS, HEADS, Head, ObjectiveName
from dskd.models.reaching import numberless
from dskd.models.structure import (
    language_head,
    language_objective,
    language_types,
    padding_position,
)
from dskd.settings.parsing import nearest, show


class LinearProjection(nn.Linear):
    """A :class:`~dskd.batch.Projection`; a model's own ``nn.Linear`` becomes one in place."""

    map = SAME

    def forward(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits, or what ``use`` makes of (hidden states, weight, bias)."""
        if use is None:
            return super().forward(hidden_ND)
        return use(hidden_ND, self.weight, self.bias)


COMPANION = "companion"
"""Name of the submodule of a student that a method trains beside it."""


def refuse_unknown(model_type: Any, where: str) -> None:
    """Refuse a ``model_type`` that HuggingFace has no class of here.

    Raises:
        ConfigError: the message names the setting ``where`` and the nearest type.
    """
    known = sorted({*CLASSIFIERS, *language_types()})
    if model_type not in known:
        raise ConfigError(
            f"{where}: transformers {transformers.__version__} has no masked or causal LM of "
            f"type {show(model_type)}{nearest(str(model_type), known)}"
        )


def head_of(config: PreTrainedConfig, objective: ObjectiveName, where: str) -> Head:
    """The head by which a model of this config serves an objective.

    Raises:
        ConfigError: its type has none for that; the message names the setting ``where``.
    """
    model_type = config.model_type
    if objective != "classification":
        known_for = language_objective(model_type)
        if known_for not in (objective, None):
            raise ConfigError(
                f"{where}: a {model_type} is a {known_for} LM, data.objective is {objective}"
            )
        return language_head(config, where)
    if (model_type, objective) not in HEADS:
        known_for = language_objective(model_type)
        raise ConfigError(
            f"{where}: a {model_type} is a {known_for} LM, data.objective is {objective}; "
            f"{objective} ones are {', '.join(CLASSIFIERS)}"
        )
    # ModernBERT's alone has it; a mean is of all hidden states of a row, and not of one.
    pooling = getattr(config, "classifier_pooling", "cls")
    if pooling != "cls":
        raise ConfigError(
            f"{where}.config.classifier_pooling: {show(pooling)}, but a class is read at one token "
            "here; set it to cls"
        )
    return HEADS[model_type, objective]


def is_causal(model_type: str) -> bool:
    """Whether no token of a row sees those after it, in models of this type."""
    return language_objective(model_type) == "causal"


def lm_head(model_type: str) -> Head:
    """The head by which a type models language, with the config that it has by default."""
    return language_head(AutoConfig.for_model(model_type), "model")


def head_in(model: PreTrainedModel) -> Head:
    """The head of a model that was built: that of the objective its class is for."""
    if model not in _HEADS_IN:
        _HEADS_IN[model] = _head_in(model)
    return _HEADS_IN[model]


_HEADS_IN: MutableMapping[PreTrainedModel, Head] = WeakKeyDictionary()
"""Looked up in every forward pass."""


def _head_in(model: PreTrainedModel) -> Head:
    config = model.config
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    named = (config.model_type, "classification")
    if named in HEADS and isinstance(model, classes[type(config)]):
        return HEADS[named]
    return language_head(config, "model")


def positions_of(
    model: nn.Module, batch: Batch, *, states: bool = False, routers: bool = False
) -> Positions:
    """Run the body on a batch and its head up to the last linear map, on supervised positions only.

    A head that reads a row as a whole does so where its type reads it, wherever in the row the
    supervised position is: the same batch serves models that read it at other places.

    Under ZeRO-3 call it inside the forward of the module DeepSpeed wraps. With N = 0 every
    parameter is still in the graph (products with empty matrices), with gradients of zero.

    The batch is on the model's device, and ``hidden_ND`` of the result in the model's dtype.

    Args:
        states: whether the hidden states of all tokens are kept, as they are in training for a
            :data:`COMPANION`.
        routers: whether the logits of a mixture's routers are kept.
    """
    head = head_in(model)
    companion = getattr(model, COMPANION, None)
    causal = is_causal(model.config.model_type)
    arguments = attention_arguments(model, batch, causal=causal, rows_mask=head.rows_mask)
    if batch.types_BT is not None and has_types(model.config):
        arguments["token_type_ids"] = batch.types_BT
    if states or (companion is not None and model.training):
        arguments["output_hidden_states"] = True
    if routers:
        arguments["output_router_logits"] = True
    body = model.base_model(input_ids=batch.ids_BT, **arguments)
    # By their indices: indexing by the mask itself would wait for a GPU to count its trues.
    places_N = batch.positions_N if head.reads == "supervised" else _places_read(batch, head)
    hidden_ND = body.last_hidden_state.flatten(0, 1).index_select(0, places_N)
    hidden_ND = head.transform(model, hidden_ND)
    kept = body.hidden_states if "output_hidden_states" in arguments else None
    logits = getattr(body, "router_logits", None) if routers else None
    return Positions(hidden_ND, projection_of(model), batch.labels_N, kept, companion, logits)


def _places_read(batch: Batch, head: Head) -> Tensor:
    """Where in the flattened [B * T] a head reads the rows of the supervised positions."""
    width = batch.ids_BT.shape[1]
    rows_N = batch.positions_N.div(width, rounding_mode="floor")
    if head.reads == "first":
        return rows_N * width
    # Of the mask, which is on the device; the lengths are on the host.
    lengths_B = batch.mask_BT.sum(1)
    return rows_N * width + lengths_B.index_select(0, rows_N) - 1


def has_types(config: PreTrainedConfig) -> bool:
    """Whether a model tells the two texts of a row apart by types of tokens."""
    if getattr(config, "type_vocab_size", 0) <= 1:
        return False
    return "token_type_ids" in inspect.signature(MODEL_MAPPING[type(config)].forward).parameters


def projection_of(model: nn.Module) -> Projection:
    """The model's last linear map, made able to run a fused loss in its forward."""
    head = head_in(model)
    if head.joined is not None:
        return head.joined.projection(model)
    linear = model.get_submodule(head.projection)
    if type(linear) is nn.Linear:
        linear.__class__ = LinearProjection
    assert isinstance(linear, LinearProjection), f"logits come from a {type(linear).__name__}"
    linear.map = head.map
    return linear


def positions_field(config: PreTrainedConfig) -> str | None:
    """The field of a config that says how many positions there are; None: there are any."""
    names = ("max_position_embeddings", "max_seq_len")
    return next((name for name in names if getattr(config, name, None)), None)


def longest_row(config: PreTrainedConfig) -> int:
    """Most tokens of a row that the model's positions allow; where they allow any, the number that
    HuggingFace has for it."""
    field = positions_field(config)
    if field is None:
        return VERY_LARGE_INTEGER
    padding = padding_position(config)  # RoBERTa counts positions from the one after it
    return getattr(config, field) - (0 if padding is None else padding + 1)


def freeze_unused(model: PreTrainedModel) -> None:
    """Leave what has no part in logits out of training: without a gradient, it would shrink by
    weight decay."""
    unused = head_in(model).unused
    for name, parameter in model.named_parameters() if unused else ():
        if numberless(name) in unused:
            parameter.requires_grad_(False)


def gather_reached(model: PreTrainedModel) -> None:
    """Tell ZeRO-3 which parameters a body uses outside of their own modules, and in which."""
    body = model.base_model
    for name, parameter in body.named_parameters():
        for reached, parts in language_head(model.config, "model").reached:
            if numberless(name) == reached:
                gathered_with(body.get_submodule(".".join(name.split(".")[:parts])), parameter)


def tie_head_bias(model: PreTrainedModel) -> None:
    """Make the head's own bias the decoder's, as it was before transformers 5.

    BERT and RoBERTa heads have both, and transformers 5 leaves the former out of the forward pass
    of an untied model: a parameter without gradient that weight decay would shrink.
    """
    head = head_in(model)
    if head.bias is not None:
        model.get_submodule(head.bias).bias = model.get_submodule(head.projection).bias
