"""Heads whose last linear map is made of parameters of two modules.

Under ZeRO-3 a module's parameters are whole in its own forward pass only, so one lends them within
that of the other.

Shape letters: N supervised positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from dskd.batch import SAME, Use

Joint = tuple[Tensor, Tensor | None]
"""Weight [V, D] and bias [V] of a linear map."""


class _Lending:
    """Comes before a module's class: a call with ``lend`` computes nothing, but hands the module
    to it while its parameters are whole."""

    def forward(self, *args: Any, lend: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if lend is None:
            return super().forward(*args, **kwargs)
        return lend(args[0], self)


def _lending(module: nn.Module) -> nn.Module:
    """The module, made able to lend in place."""
    cls = type(module)
    if not issubclass(cls, _Lending):
        module.__class__ = type(f"Lending{cls.__name__}", (_Lending, cls), {})
    return module


class JoinedProjection:
    """A :class:`~dskd.batch.Projection` of the parameters of two modules.

    Args:
        outer: one of them, which is called first.
        inner: the other.
        join: the linear map of the two, while their parameters are whole.
    """

    map = SAME

    def __init__(
        self, outer: nn.Module, inner: nn.Module, join: Callable[[Any, Any], Joint]
    ) -> None:
        self._outer, self._inner = _lending(outer), _lending(inner)
        self._join = join

    def __call__(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits, or what ``use`` makes of (hidden states, weight, bias)."""
        use = linear if use is None else use

        def in_outer(hidden_ND: Tensor, outer: nn.Module) -> Any:
            def in_both(hidden_ND: Tensor, inner: nn.Module) -> Any:
                return use(hidden_ND, *self._join(outer, inner))

            return self._inner(hidden_ND, lend=in_both)

        return self._outer(hidden_ND, lend=in_outer)


@dataclass(frozen=True)
class Joined:
    """A head that is not one linear map of one module.

    Attributes:
        model_types: whose it is, where the model has all ``parts``.
        path: the module with a row for each token.
        parts: paths of the two modules, the outer one first.
        join: see :class:`JoinedProjection`.
        transform: (model, hidden states) -> those that the map takes.
        bias: as in :class:`~dskd.models.heads.Head`.
    """

    model_types: tuple[str, ...]
    path: str
    parts: tuple[str, str]
    join: Callable[[Any, Any], Joint]
    transform: Callable[[Any, Tensor], Tensor]
    bias: str | None = None

    def is_of(self, model: Any) -> bool:
        """Whether a model has this head."""
        names = {name for name, _ in model.named_modules()}
        return model.config.model_type in self.model_types and names.issuperset(self.parts)

    def projection(self, model: nn.Module) -> JoinedProjection:
        """The last linear map of a model that has this head."""
        outer, inner = (model.get_submodule(part) for part in self.parts)
        return JoinedProjection(outer, inner, self.join)


def _deberta_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    head = model.lm_predictions.lm_head
    return head.LayerNorm(head.transform_act_fn(head.dense(hidden_ND)))


def _esm_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    head = model.lm_head
    # As the head has it, which is not rounded as torch's own is.
    return head.layer_norm(gelu(head.dense(hidden_ND)))


def _beside(decoder: Any, dense: Any) -> Joint:
    """Columns of the embeddings, and further ones that are stored the other way round."""
    return torch.cat([decoder.weight, dense.weight.t()], 1), decoder.bias


JOINED = (
    Joined(
        ("deberta", "deberta-v2"),
        "deberta.embeddings.word_embeddings",
        ("lm_predictions.lm_head", "deberta.embeddings.word_embeddings"),
        lambda head, embeddings: (embeddings.weight, head.bias),
        _deberta_transform,
    ),
    Joined(
        ("esm",),
        "lm_head.decoder",
        ("lm_head", "lm_head.decoder"),
        lambda head, decoder: (decoder.weight, head.bias),
        _esm_transform,
    ),
    Joined(
        ("mobilebert",),
        "cls.predictions.decoder",
        ("cls.predictions.decoder", "cls.predictions.dense"),
        _beside,
        lambda model, hidden_ND: model.cls.predictions.transform(hidden_ND),
        bias="cls.predictions",
    ),
)
"""All that there are."""
