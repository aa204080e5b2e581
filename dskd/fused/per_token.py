"""Checks of what a fused loss has for each token: weights and labels.

Labels and ids are compared with the number of columns, and other values looked at, where that
costs nothing (on a CPU) and, on a GPU, only in debug mode (``DSKD_DEBUG=1``), because the answer
has to come back to the host. A training loop, which reads the loss anyway, can have the weights
kept until then: :func:`weights_kept`.

Shape letters: N tokens, V columns, n teachers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import (
    FLOATING,
    TokenWeight,
    beside,
    refuse,
    refuse_kind,
    tensor,
    wide,
)

DEBUG = os.environ.get("DSKD_DEBUG", "0") not in ("", "0")
"""Whether values on a GPU are looked at too, which waits for the device."""

Named = tuple[str, Tensor]
"""An argument's name, and the weights that it gives each token."""

_WHOLE = (torch.int32, torch.int64)
_MASKS = (torch.bool, torch.uint8, *_WHOLE)
"""What a mask is kept in, of bools or, as an attention mask, of numbers."""

_KEPT: ContextVar[list[Named] | None] = ContextVar("kept_weights", default=None)


class TokenWeights(NamedTuple):
    """Weight vectors [N] of the divergence, its reverse part and the label; ignored tokens at 0."""

    divergence_N: Tensor
    reverse_N: Tensor | None
    labels_N: Tensor | None
    label_N: Tensor | None


def weights_of(
    logits_NV: Tensor,
    labels_N: Tensor | None,
    ignore_index: int,
    columns: int,
    weight: TokenWeight,
    reverse_weight: TokenWeight | None,
    label_weight: TokenWeight | None,
) -> TokenWeights:
    """Fold scalars, vectors and ``ignore_index`` into weight vectors.

    A token labelled ``ignore_index`` counts for nothing, neither its label nor its divergence, and
    its weights may be anything. A ``label_weight`` of None is 0 without labels, and else refused.
    """
    labels_N = None if labels_N is None else labels_of(labels_N, logits_NV)
    counted_N = None if labels_N is None else labels_N != ignore_index
    divergence_N = _weight("weight", weight, logits_NV, counted_N)
    reverse_N = None
    if reverse_weight is not None:
        reverse_N = _weight("reverse_weight", reverse_weight, logits_NV, counted_N)
    unlabelled = label_weight is None or _is_zero(label_weight)
    if labels_N is None:
        refuse(not unlabelled, lambda: "label_weight: is not 0, and there are no labels")
        return TokenWeights(divergence_N, reverse_N, None, None)
    in_range("labels", labels_N, columns, counted_N)
    refuse(
        label_weight is None,
        lambda: (
            "label_weight: missing; how much do the labels count beside the teacher? (0: they only "
            "say which tokens are ignored)"
        ),
    )
    if unlabelled:
        return TokenWeights(divergence_N, reverse_N, None, None)
    label_N = _weight("label_weight", label_weight, logits_NV, counted_N)
    return TokenWeights(divergence_N, reverse_N, labels_N, label_N)


def _is_zero(weight: TokenWeight) -> bool:
    return isinstance(weight, float | int) and weight == 0


def _weight(name: str, value: TokenWeight, logits_NV: Tensor, counted_N: Tensor | None) -> Tensor:
    """A weight of every token [N], 0 for those that do not count."""
    if isinstance(value, Tensor) and value.dtype in _MASKS:
        value = value.to(wide(logits_NV.dtype))
    weight_N = vector(name, value, logits_NV)
    if counted_N is not None:
        weight_N = weight_N.where(counted_N, 0.0)
    if isinstance(value, Tensor):  # a number has been looked at
        finite_weights(name, weight_N)
    return weight_N


def mixture_weights(weights_Nn: Tensor, student_NV: Tensor, teachers: int) -> None:
    """Check the weights of a mixture of so many teachers."""
    tensor("weights", weights_Nn)
    refuse_kind(
        weights_Nn.dtype not in (*FLOATING, *_MASKS),
        lambda: f"weights: must be floating-point, or a mask, not {weights_Nn.dtype}",
    )
    shape, wanted_shape = tuple(weights_Nn.shape), (student_NV.shape[0], teachers)
    refuse(shape != wanted_shape, lambda: f"weights: must be {list(wanted_shape)}, not {shape}")
    beside("weights", weights_Nn, student_NV)
    finite_weights("weights", weights_Nn.detach())
    if looks(weights_Nn):
        refuse(bool((weights_Nn < 0).any()), lambda: "weights: a mixture has none below 0")


def vector(name: str, value: TokenWeight, logits_NV: Tensor) -> Tensor:
    """A number or [N] as a contiguous [N] in the wide dtype."""
    dtype, count = wide(logits_NV.dtype), len(logits_NV)
    if not isinstance(value, Tensor):
        refuse_kind(
            not isinstance(value, float | int),
            lambda: f"{name}: must be a number, or a tensor, not {type(value).__name__}",
        )
        refuse(not -torch.inf < value < torch.inf, lambda: f"{name}: must be finite, not {value}")
        # not torch.full: torch.compile would write the number into its code, as one of many
        return torch.ones(count, dtype=dtype, device=logits_NV.device) * value
    each_token(name, value, logits_NV)
    return value.detach().to(dtype).contiguous()


def each_token(name: str, value: Tensor, logits_NV: Tensor) -> None:
    """Check floating-point numbers [N] on the logits' device."""
    tensor(name, value)
    _check_vector(name, value, logits_NV)
    refuse_kind(
        value.dtype not in FLOATING, lambda: f"{name}: must be floating-point, not {value.dtype}"
    )


def labels_of(labels_N: Tensor, logits_NV: Tensor) -> Tensor:
    """The labels in int64, of the right shape."""
    tensor("labels", labels_N)
    _check_vector("labels", labels_N, logits_NV)
    refuse_kind(
        labels_N.dtype not in _WHOLE,
        lambda: f"labels: must be int64 or int32, not {labels_N.dtype}",
    )
    return labels_N.long()


def places_of(places_N: Tensor, logits_NV: Tensor) -> Tensor:
    """Places of the right shape and type; where one looks, of every token once."""
    tensor("places", places_N)
    _check_vector("places", places_N, logits_NV)
    refuse_kind(
        places_N.dtype != torch.int64, lambda: f"places: must be int64, not {places_N.dtype}"
    )
    if looks(places_N):
        count = len(places_N)
        once = torch.equal(places_N.sort().values, torch.arange(count, device=places_N.device))
        refuse(not once, lambda: f"places: are not each of the {count} tokens once")
    return places_N


def _check_vector(name: str, value: Tensor, logits_NV: Tensor) -> None:
    """Check [N] on the logits' device."""
    shape, count = tuple(value.shape), len(logits_NV)
    refuse(shape != (count,), lambda: f"{name}: has shape {shape} where there are {count} tokens")
    beside(name, value, logits_NV)


@contextmanager
def weights_kept() -> Iterator[list[Named]]:
    """Keep the weights of all losses inside, for :func:`first_non_finite`, in the place of a look
    at each: whether they are finite is then asked once the loss is known not to be."""
    kept: list[Named] = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def finite_weights(name: str, weights: Tensor) -> None:
    """Check that weights are finite, where one looks, or keep them for the caller of the loss."""
    if torch.compiler.is_compiling():
        return
    kept = _KEPT.get()
    if kept is not None:
        kept.append((name, weights))
    elif looks(weights):
        wrong = first_non_finite([(name, weights)])
        refuse(wrong is not None, lambda: f"{wrong} must be finite")


def first_non_finite(weights: Iterable[Named]) -> str | None:
    """Name, value and index of the first weight that is NaN or infinite (reads the device)."""
    for name, values in weights:
        wrong = ~values.isfinite()
        if wrong.any():
            index = wrong.nonzero()[0].tolist()
            return f"{name}: {values[tuple(index)].item()} at {index}"
    return None


def looks(values: Tensor) -> bool:
    """Whether to look at values: where that is free (a CPU) or in debug mode."""
    return not torch.compiler.is_compiling() and (values.device.type == "cpu" or DEBUG)


def in_range(name: str, ids: Tensor, columns: int | Tensor, counted: Tensor) -> None:
    """Check that the counted ids name columns, where one looks."""
    if not looks(ids):
        return
    wrong = counted & ((ids < 0) | (ids >= columns))
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: {int(ids[tuple(first)])} at {first} is not one of the {columns} columns"
        )
