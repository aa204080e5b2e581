"""The model families dskd knows, and the one forward pass everything uses.

A family says what a ``model_type`` is trained on, how its head turns hidden states into logits
and how its positions are counted. A new one is a line in ``FAMILIES`` and is then tested against
its HuggingFace class by ``tests/models/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import Batch, Positions, Use
from dskd.errors import ConfigError

Transform = Callable[[Any, Tensor], Tensor]
"""(model, the body's hidden states [N, D]) -> those its last linear map takes, [N, D']."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is used.

    Attributes:
        objective: what it is trained on.
        projection: module path of the last linear map, from hidden states to logits.
        transform: what its head does before, through modules of the model only.
        bias: the head's own copy of the projection's bias, as the module path of its owner.
        past_padding: positions are counted from ``pad_token_id + 1`` (RoBERTa), not from 0.
    """

    objective: Literal["masked", "causal"]
    projection: str
    transform: Transform = lambda model, hidden_ND: hidden_ND
    bias: str | None = None
    past_padding: bool = False


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


_BERT = Family(
    "masked",
    "cls.predictions.decoder",
    lambda model, hidden_ND: model.cls.predictions.transform(hidden_ND),
    bias="cls.predictions",
)
_ROBERTA = Family(
    "masked", "lm_head.decoder", _roberta_transform, bias="lm_head", past_padding=True
)
_CAUSAL = Family("causal", "lm_head")

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family("masked", "vocab_projector", _distilbert_transform),
    "modernbert": Family("masked", "decoder", lambda model, hidden_ND: model.head(hidden_ND)),
    "electra": Family(
        "masked",
        "generator_lm_head",
        lambda model, hidden_ND: model.generator_predictions(hidden_ND),
    ),
    "gpt2": _CAUSAL,
    "llama": _CAUSAL,
    "mistral": _CAUSAL,
    "qwen2": _CAUSAL,
    "qwen3": _CAUSAL,
}


def family_of(model_type: str, where: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        ConfigError: it is not one of ``FAMILIES``; the message names the setting ``where``.
    """
    if model_type not in FAMILIES:
        close = get_close_matches(model_type, FAMILIES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{where}: '{model_type}' is not one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[model_type]


def positions_of(model: nn.Module, batch: Batch) -> Positions:
    """Run the body on a batch and its head up to the last linear map, on supervised positions only.

    Under ZeRO-3 call it inside the forward of the module DeepSpeed wraps. With N = 0 every
    parameter is still in the graph (products with empty matrices), with gradients of zero.

    Args:
        model: a HuggingFace model of one of ``FAMILIES``.
        batch: B rows of T tokens, on the model's device.

    Returns:
        Positions with hidden_ND in the model's dtype.
    """
    family = FAMILIES[model.config.model_type]
    # A cache of keys and values serves generation only.
    options = {"use_cache": False} if family.objective == "causal" else {}
    body = model.base_model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **options)
    # By their indices: indexing by the mask itself would wait for a GPU to count its trues.
    hidden_ND = body.last_hidden_state.flatten(0, 1).index_select(0, batch.positions_N)
    hidden_ND = family.transform(model, hidden_ND)
    return Positions(hidden_ND, projection_of(model), batch.labels_N)


def projection_of(model: nn.Module) -> LinearProjection:
    """The model's last linear map, made able to run a fused loss in its forward."""
    linear = model.get_submodule(FAMILIES[model.config.model_type].projection)
    if type(linear) is nn.Linear:
        linear.__class__ = LinearProjection
    assert isinstance(linear, LinearProjection), f"logits come from a {type(linear).__name__}"
    return linear


def longest_row(config: PreTrainedConfig) -> int:
    """Most tokens of a row that the model's positions allow."""
    longest = config.max_position_embeddings
    if FAMILIES[config.model_type].past_padding:
        longest -= config.pad_token_id + 1
    return longest


def tie_head_bias(model: PreTrainedModel) -> None:
    """Make the head's own bias the decoder's, as it was before transformers 5.

    BERT and RoBERTa heads have both, and transformers 5 leaves the former out of the forward pass
    of an untied model: a parameter without gradient that weight decay would shrink.
    """
    bias = FAMILIES[model.config.model_type].bias
    if bias is not None:
        model.get_submodule(bias).bias = projection_of(model).bias
