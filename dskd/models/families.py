"""The heads of the model types that dskd knows, and the one forward pass that everything uses.

A head belongs to a ``model_type`` and an objective: it says how hidden states become logits. A new
one is a line in ``HEADS`` and is then tested against its HuggingFace class by
``tests/models/test_families.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from dskd.batch import Batch, Positions, Use
from dskd.errors import ConfigError
from dskd.models.attention_masks import attention_arguments
from dskd.settings.parsing import nearest, show

Transform = Callable[[Any, Tensor], Tensor]
"""(model, the body's hidden states [N, D]) -> those its last linear map takes, [N, D']."""


ObjectiveName = Literal["masked", "causal"]


@dataclass(frozen=True)
class Head:
    """How a model of one ``model_type`` and objective turns hidden states into logits.

    Attributes:
        objective: what it is trained on.
        projection: module path of the last linear map, from hidden states to logits.
        transform: what is done before it, through modules of the model only.
        bias: the head's own copy of the projection's bias, as the module path of its owner.
    """

    objective: ObjectiveName
    projection: str
    transform: Transform = lambda model, hidden_ND: hidden_ND
    bias: str | None = None


class LinearProjection(nn.Linear):
    """A :class:`~dskd.batch.Projection`; a model's own ``nn.Linear`` becomes one in place."""

    def forward(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits, or what ``use`` makes of (hidden states, weight, bias)."""
        if use is None:
            return super().forward(hidden_ND)
        return use(hidden_ND, self.weight, self.bias)


def _distilbert_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))


def _roberta_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden_ND)))


_BERT = Head(
    "masked",
    "cls.predictions.decoder",
    lambda model, hidden_ND: model.cls.predictions.transform(hidden_ND),
    bias="cls.predictions",
)
_ROBERTA = Head("masked", "lm_head.decoder", _roberta_transform, bias="lm_head")
_DISTILBERT = Head("masked", "vocab_projector", _distilbert_transform)
_MODERNBERT = Head("masked", "decoder", lambda model, hidden_ND: model.head(hidden_ND))
_ELECTRA = Head(
    "masked", "generator_lm_head", lambda model, hidden_ND: model.generator_predictions(hidden_ND)
)
_CAUSAL = Head("causal", "lm_head")

HEADS: dict[tuple[str, ObjectiveName], Head] = {
    ("bert", "masked"): _BERT,
    ("roberta", "masked"): _ROBERTA,
    ("xlm-roberta", "masked"): _ROBERTA,
    ("distilbert", "masked"): _DISTILBERT,
    ("modernbert", "masked"): _MODERNBERT,
    ("electra", "masked"): _ELECTRA,
    ("gpt2", "causal"): _CAUSAL,
    ("llama", "causal"): _CAUSAL,
    ("mistral", "causal"): _CAUSAL,
    ("qwen2", "causal"): _CAUSAL,
    ("qwen3", "causal"): _CAUSAL,
}
"""By model type and objective."""

MODEL_TYPES: tuple[str, ...] = tuple(dict.fromkeys(model_type for model_type, _ in HEADS))

_CLASSES = {"masked": MODEL_FOR_MASKED_LM_MAPPING, "causal": MODEL_FOR_CAUSAL_LM_MAPPING}
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
        fitting = ", ".join(name for name, of in HEADS if of == objective)
        raise ConfigError(
            f"{where}: a {model_type} is a {lm_head(model_type).objective} LM, data.objective is "
            f"{objective}; {objective} ones are {fitting}"
        )
    return HEADS[model_type, objective]


def lm_head(model_type: str) -> Head:
    """The head by which a type models language, masked or causal: every type has one of the two."""
    return next(head for (name, _), head in HEADS.items() if name == model_type)


def head_in(model: PreTrainedModel) -> Head:
    """The head of a model that was built: that of the objective its class is for."""
    return _head_of_class(type(model), type(model.config))


@functools.cache  # looked up in every forward pass
def _head_of_class(model: type[PreTrainedModel], config: type[PreTrainedConfig]) -> Head:
    for (model_type, objective), head in HEADS.items():
        if model_type == config.model_type and issubclass(model, _CLASSES[objective][config]):
            return head
    raise TypeError(f"a {model.__name__} is of no objective that has a head here")


def positions_of(model: nn.Module, batch: Batch) -> Positions:
    """Run the body on a batch and its head up to the last linear map, on supervised positions only.

    Under ZeRO-3 call it inside the forward of the module DeepSpeed wraps. With N = 0 every
    parameter is still in the graph (products with empty matrices), with gradients of zero.

    The batch is on the model's device, and ``hidden_ND`` of the result in the model's dtype.
    """
    head = head_in(model)
    attention = attention_arguments(model, batch, causal=head.objective == "causal")
    body = model.base_model(input_ids=batch.ids_BT, **attention)
    # By their indices: indexing by the mask itself would wait for a GPU to count its trues.
    hidden_ND = body.last_hidden_state.flatten(0, 1).index_select(0, batch.positions_N)
    hidden_ND = head.transform(model, hidden_ND)
    return Positions(hidden_ND, projection_of(model), batch.labels_N)


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
