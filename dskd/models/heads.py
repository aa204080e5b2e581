"""How hidden states become logits: what a head is, and those for classification.

The heads of language models are found from the models (``structure.py``). A new one for
classification is a line in ``HEADS`` and is then tested against its HuggingFace class by
``tests/models/test_class_heads.py``; it is cut in two where HuggingFace's is one: what it does with
the hidden state that it reads, and its last linear map.

Shape letters: N supervised positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dskd.batch import SAME, LogitMap
from dskd.models.joined_heads import Joined
from dskd.models.reaching import Reached

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
        map: what is done to what the projection puts out.
        rows_mask: whether the body has to be given the mask of the rows [B, T] as it is.
        joined: of a projection that is not one module; ``projection`` is then the one of its
            modules that has a row for each token.
        unused: parameters that have no part in logits (ESM's map of contacts), by the names that
            ``numberless`` gives them.
        reached: parameters that the body uses outside of their modules.
    """

    objective: ObjectiveName
    projection: str
    transform: Transform = lambda model, hidden_ND: hidden_ND
    bias: str | None = None
    reads: Literal["supervised", "first", "last"] = "supervised"
    map: LogitMap = SAME
    rows_mask: bool = False
    joined: Joined | None = None
    unused: frozenset[str] = frozenset()
    reached: frozenset[Reached] = frozenset()


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


_ROBERTA_CLASSES = _first("classifier.out_proj", _roberta_classes)
_CAUSAL_CLASSES = Head("classification", "score", reads="last")

HEADS: dict[tuple[str, ObjectiveName], Head] = {
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
"""Those for classification, by model type and objective."""

CLASSIFIERS: tuple[str, ...] = tuple(model_type for model_type, _ in HEADS)
"""The model types that have one."""
