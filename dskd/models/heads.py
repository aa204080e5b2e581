"""How hidden states become logits: the head of each model type for each objective.

A new one is a line in ``HEADS`` and is then tested against its HuggingFace class by
``tests/models/test_families.py`` or ``test_class_heads.py``. A head for classification is cut in
two where HuggingFace's is one: what it does with the hidden state that it reads, and its last
linear map.

Shape letters: N supervised positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu

Transform = Callable[[Any, Tensor], Tensor]
"""(model, the body's hidden states [N, D]) -> those its last linear map takes, [N, D']."""

ObjectiveName = Literal["masked", "causal", "classification"]


@dataclass(frozen=True)
class Head:
    """How a model of one ``model_type`` and objective turns hidden states into logits.

    Attributes:
        objective: what it is trained on.
        projection: module path of the last linear map, from hidden states to logits.
        transform: what is done before it, through modules of the model only.
        bias: the head's own copy of the projection's bias, as the module path of its owner.
        reads: the hidden states that logits are made of: that of each supervised position; or, of a
            row as a whole, that of its ``first`` or ``last`` real token.
    """

    objective: ObjectiveName
    projection: str
    transform: Transform = lambda model, hidden_ND: hidden_ND
    bias: str | None = None
    reads: Literal["supervised", "first", "last"] = "supervised"


def _distilbert_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))


def _roberta_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden_ND)))


def _bert_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    # The pooler takes rows of tokens, of which it reads the first.
    return model.dropout(model.bert.pooler(hidden_ND[:, None]))


def _deberta_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.dropout(model.pooler(hidden_ND[:, None]))


def _roberta_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    head = model.classifier
    return head.dropout(torch.tanh(head.dense(head.dropout(hidden_ND))))


def _electra_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    head = model.classifier
    return head.dropout(head.activation(head.dense(head.dropout(hidden_ND))))


def _distilbert_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.dropout(torch.relu(model.pre_classifier(hidden_ND)))


def _modernbert_classes(model: Any, hidden_ND: Tensor) -> Tensor:
    return model.drop(model.head(hidden_ND))


def _first(projection: str, transform: Transform) -> Head:
    """The head of an encoder, which reads the class at a row's first token."""
    return Head("classification", projection, transform, reads="first")


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
_ROBERTA_CLASSES = _first("classifier.out_proj", _roberta_classes)
_CAUSAL_CLASSES = Head("classification", "score", reads="last")

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
    ("mixtral", "causal"): _CAUSAL,
    ("qwen2_moe", "causal"): _CAUSAL,
    ("qwen3_moe", "causal"): _CAUSAL,
    ("bert", "classification"): _first("classifier", _bert_classes),
    ("roberta", "classification"): _ROBERTA_CLASSES,
    ("xlm-roberta", "classification"): _ROBERTA_CLASSES,
    ("distilbert", "classification"): _first("classifier", _distilbert_classes),
    ("modernbert", "classification"): _first("classifier", _modernbert_classes),
    ("electra", "classification"): _first("classifier.out_proj", _electra_classes),
    ("deberta-v2", "classification"): _first("classifier", _deberta_classes),
    ("gpt2", "classification"): _CAUSAL_CLASSES,
    ("llama", "classification"): _CAUSAL_CLASSES,
    ("mistral", "classification"): _CAUSAL_CLASSES,
    ("qwen2", "classification"): _CAUSAL_CLASSES,
    ("qwen3", "classification"): _CAUSAL_CLASSES,
}
"""By model type and objective."""

MODEL_TYPES: tuple[str, ...] = tuple(dict.fromkeys(model_type for model_type, _ in HEADS))


def is_causal(model_type: str) -> bool:
    """Whether no token of a row sees those after it, in models of this type."""
    return (model_type, "causal") in HEADS


def of_objective(objective: ObjectiveName) -> list[str]:
    """The model types that have a head for an objective."""
    return [model_type for model_type, of in HEADS if of == objective]
