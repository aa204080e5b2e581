"""The model families dskd knows, and the one forward pass everything uses.

A family says what a ``model_type`` is trained on, how its head turns hidden states into logits, and
how its positions are counted. A new one is a line in ``FAMILIES`` and is then tested against
its HuggingFace class by ``tests/models/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import Batch, Rows
from dskd.errors import ConfigError

Head = Callable[[Any, Tensor], Tensor]
"""(model, hidden states [N, D]) -> logits [N, V], through modules of the model only."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is used.

    Attributes:
        objective: what it is trained on.
        head: the whole head, from the body's hidden states to the logits.
        bias: the head's own copy of its decoder's bias, as (module path, decoder's module path).
        past_padding: positions are counted from ``pad_token_id + 1`` (RoBERTa), not from 0.
    """

    objective: Literal["masked", "causal"]
    head: Head
    bias: tuple[str, str] | None = None
    past_padding: bool = False


def _distilbert_head(model: Any, hidden_ND: Tensor) -> Tensor:
    hidden_ND = model.activation(model.vocab_transform(hidden_ND))
    return model.vocab_projector(model.vocab_layer_norm(hidden_ND))


def _lm_head(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.lm_head(hidden_ND)


_BERT = Family(
    "masked",
    lambda model, hidden_ND: model.cls(hidden_ND),
    bias=("cls.predictions", "cls.predictions.decoder"),
)
_ROBERTA = Family("masked", _lm_head, bias=("lm_head", "lm_head.decoder"), past_padding=True)
_CAUSAL = Family("causal", _lm_head)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family("masked", _distilbert_head),
    "modernbert": Family("masked", lambda model, hidden_ND: model.decoder(model.head(hidden_ND))),
    "electra": Family(
        "masked",
        lambda model, hidden_ND: model.generator_lm_head(model.generator_predictions(hidden_ND)),
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


def rows_of(model: nn.Module, batch: Batch) -> Rows:
    """Run the body on a batch; the head waits in the result and sees supervised positions only.

    Under ZeRO-3 call it inside the forward of the module DeepSpeed wraps. With N = 0 every
    parameter is still in the graph (products with empty matrices), with gradients of zero.

    Args:
        model: a HuggingFace model of one of ``FAMILIES``.
        batch: B rows of T tokens, on the model's device.

    Returns:
        Rows with hidden_ND in the model's dtype.
    """
    family = FAMILIES[model.config.model_type]
    # A cache of keys and values serves generation only.
    options = {"use_cache": False} if family.objective == "causal" else {}
    body = model.base_model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **options)
    hidden_ND = body.last_hidden_state[batch.supervised_BT]
    return Rows(hidden_ND, lambda hidden_MD: family.head(model, hidden_MD), batch.labels_N)


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
        head, decoder = (model.get_submodule(path) for path in bias)
        head.bias = decoder.bias
