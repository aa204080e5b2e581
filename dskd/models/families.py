"""Which head a model has, what it takes of its config, and the one forward pass that everything
uses."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from dskd.batch import Batch, Positions, Use
from dskd.errors import ConfigError
from dskd.models.attention_masks import attention_arguments
from dskd.models.heads import HEADS, MODEL_TYPES, Head, ObjectiveName, is_causal, of_objective
from dskd.settings.parsing import nearest, show


class LinearProjection(nn.Linear):
    """A :class:`~dskd.batch.Projection`; a model's own ``nn.Linear`` becomes one in place."""

    def forward(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits, or what ``use`` makes of (hidden states, weight, bias)."""
        if use is None:
            return super().forward(hidden_ND)
        return use(hidden_ND, self.weight, self.bias)


COMPANION = "companion"
"""Name of the submodule of a student that a method trains beside it."""

_CLASSES = {
    "masked": MODEL_FOR_MASKED_LM_MAPPING,
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
"""HuggingFace's model class by config class, for each objective."""

_PAST_PADDING = frozenset({"roberta", "xlm-roberta"})
"""Types that count positions from ``pad_token_id + 1``, not from 0."""


def refuse_unknown(model_type: Any, where: str) -> None:
    """Refuse a ``model_type`` that has no head here.

    Raises:
        ConfigError: the message names the setting ``where`` and the nearest type.
    """
    if model_type not in MODEL_TYPES:
        near = nearest(str(model_type), MODEL_TYPES)
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(f"{where}: {show(model_type)} is not one of {known}{near}")


def head_of(config: PreTrainedConfig, objective: ObjectiveName, where: str) -> Head:
    """The head by which a model of this config serves an objective.

    Raises:
        ConfigError: its type has none for that; the message names the setting ``where``.
    """
    model_type = config.model_type
    if (model_type, objective) not in HEADS:
        has = [of for name, of in HEADS if name == model_type and of != "classification"]
        what = f"is a {has[0]} LM" if has else "is for classification only, here"
        raise ConfigError(
            f"{where}: a {model_type} {what}, data.objective is {objective}; {objective} ones are "
            f"{', '.join(of_objective(objective))}"
        )
    # ModernBERT's alone has it; a mean is of all hidden states of a row, and not of one.
    pooling = getattr(config, "classifier_pooling", "cls")
    if objective == "classification" and pooling != "cls":
        raise ConfigError(
            f"{where}.config.classifier_pooling: {show(pooling)}, but a class is read at one token "
            "here; set it to cls"
        )
    return HEADS[model_type, objective]


def lm_head(model_type: str) -> Head:
    """The head by which a type models language, masked or causal: none has both."""
    return HEADS[model_type, "causal" if is_causal(model_type) else "masked"]


def head_in(model: PreTrainedModel) -> Head:
    """The head of a model that was built: that of the objective its class is for."""
    return _head_of_class(type(model), type(model.config))


@functools.cache  # looked up in every forward pass
def _head_of_class(model: type[PreTrainedModel], config: type[PreTrainedConfig]) -> Head:
    for (model_type, objective), head in HEADS.items():
        if model_type == config.model_type and issubclass(model, _CLASSES[objective][config]):
            return head
    raise TypeError(f"a {model.__name__} is of no objective that has a head here")


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
    arguments = attention_arguments(model, batch, causal=causal)
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
    return getattr(config, "type_vocab_size", 0) > 1


def projection_of(model: nn.Module) -> LinearProjection:
    """The model's last linear map, made able to run a fused loss in its forward."""
    linear = model.get_submodule(head_in(model).projection)
    if type(linear) is nn.Linear:
        linear.__class__ = LinearProjection
    assert isinstance(linear, LinearProjection), f"logits come from a {type(linear).__name__}"
    return linear


def counts_past_padding(config: PreTrainedConfig) -> bool:
    """Whether positions are counted from ``pad_token_id + 1`` (RoBERTa), not from 0."""
    return config.model_type in _PAST_PADDING


def longest_row(config: PreTrainedConfig) -> int:
    """Most tokens of a row that the model's positions allow."""
    longest = config.max_position_embeddings
    if counts_past_padding(config):
        longest -= config.pad_token_id + 1
    return longest


def tie_head_bias(model: PreTrainedModel) -> None:
    """Make the head's own bias the decoder's, as it was before transformers 5.

    BERT and RoBERTa heads have both, and transformers 5 leaves the former out of the forward pass
    of an untied model: a parameter without gradient that weight decay would shrink.
    """
    bias = head_in(model).bias
    if bias is not None:
        model.get_submodule(bias).bias = projection_of(model).bias
