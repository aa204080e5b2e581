"""Checks of what a fused loss has for each token: weights, labels, a top-k teacher's kept tokens.

Labels and ids are compared with the number of columns, and other values looked at, where that
costs nothing (on a CPU) and, on a GPU, only in debug mode (``DSKD_DEBUG=1``), because the answer
has to come back to the host.

Shape letters: N tokens, V columns, K kept.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import FLOATING, MODES, TokenWeight, beside, matrix, refuse, wide
from dskd.fused.backend import on_triton

DEBUG = os.environ.get("DSKD_DEBUG", "0") not in ("", "0")
"""Whether values on a GPU are looked at too, which waits for the device."""

MOST_KEPT = 4096
"""Kept tokens of a row that the kernels hold in the registers of 1024 threads."""


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
    label_weight: TokenWeight,
) -> TokenWeights:
    """Fold scalars, vectors and ``ignore_index`` into weight vectors.

    A token labelled ``ignore_index`` counts for nothing, neither its label nor its divergence.
    """
    divergence_N = vector("weight", weight, logits_NV)
    reverse_N = None
    if reverse_weight is not None:
        reverse_N = vector("reverse_weight", reverse_weight, logits_NV)
    unlabelled = isinstance(label_weight, float | int) and label_weight == 0
    if labels_N is None:
        refuse(not unlabelled, lambda: "label_weight: is not 0, and there are no labels")
        return TokenWeights(divergence_N, reverse_N, None, None)
    _check_vector("labels", labels_N, logits_NV)
    refuse(labels_N.dtype != torch.int64, lambda: f"labels: must be int64, not {labels_N.dtype}")
    kept_N = labels_N != ignore_index
    in_range("labels", labels_N, columns, kept_N)
    divergence_N = divergence_N.where(kept_N, 0.0)
    reverse_N = None if reverse_N is None else reverse_N.where(kept_N, 0.0)
    if unlabelled:
        return TokenWeights(divergence_N, reverse_N, None, None)
    label_N = vector("label_weight", label_weight, logits_NV).where(kept_N, 0.0)
    return TokenWeights(divergence_N, reverse_N, labels_N, label_N)


def vector(name: str, value: TokenWeight, logits_NV: Tensor) -> Tensor:
    """A number or [N] as a contiguous [N] in the wide dtype."""
    dtype, count = wide(logits_NV.dtype), len(logits_NV)
    if not isinstance(value, Tensor):
        refuse(not -torch.inf < value < torch.inf, lambda: f"{name}: must be finite, not {value}")
        # not torch.full: torch.compile would write the number into its code, as one of many
        return torch.ones(count, dtype=dtype, device=logits_NV.device) * value
    _check_vector(name, value, logits_NV)
    refuse(
        value.dtype not in FLOATING, lambda: f"{name}: must be floating-point, not {value.dtype}"
    )
    return value.detach().to(dtype).contiguous()


def _check_vector(name: str, value: Tensor, logits_NV: Tensor) -> None:
    """Check [N] on the logits' device."""
    shape, count = tuple(value.shape), len(logits_NV)
    refuse(shape != (count,), lambda: f"{name}: has shape {shape} where there are {count} tokens")
    beside(name, value, logits_NV)


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


def _distinct(name: str, ids_NK: Tensor) -> None:
    """Check that no row names a token twice, where one looks."""
    if not looks(ids_NK):
        return
    sorted_NK = ids_NK.sort(1).values
    again = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if again.any():
        row, slot = again.nonzero()[0].tolist()
        raise ValueError(f"{name}: row {row} has {int(sorted_NK[row, slot])} twice")


def topk_of(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    mode: str,
    student_NV: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A usable top-k teacher: contiguous ids, log-probabilities and tail in the wide dtype."""
    refuse(mode not in MODES, lambda: f"mode: {mode!r} is not one of {', '.join(MODES)}")
    count, dtype = len(student_NV), wide(student_NV.dtype)
    kept = ids_NK.shape[1] if ids_NK.dim() == 2 else 0
    refuse(
        ids_NK.shape != (count, kept) or not 0 < kept <= columns,
        lambda: f"ids: must be [{count}, K] with K from 1 to {columns}, not {tuple(ids_NK.shape)}",
    )
    refuse(
        kept > MOST_KEPT and on_triton(student_NV),
        lambda: f"ids: the kernels take at most {MOST_KEPT} kept tokens, not {kept}",
    )
    integers = (torch.int32, torch.int64)
    refuse(ids_NK.dtype not in integers, lambda: f"ids: must be int32 or int64, not {ids_NK.dtype}")
    beside("ids", ids_NK, student_NV)
    in_range("ids", ids_NK, columns, ids_NK >= 0)
    _distinct("ids", ids_NK)
    matrix("logprobs", logprobs_NK, rows=count, like=student_NV)
    refuse(
        logprobs_NK.shape != ids_NK.shape,
        lambda: f"logprobs: has shape {tuple(logprobs_NK.shape)}, ids {tuple(ids_NK.shape)}",
    )
    refuse(
        (tail_N is None) == (mode == "tail"),
        lambda: (
            f"tail: the mode tail needs the mass of what is not kept, and only it "
            f"(mode is {mode!r})"
        ),
    )
    if tail_N is not None:
        tail_N = vector("tail", tail_N, student_NV)
    return ids_NK.contiguous(), logprobs_NK.detach().to(dtype).contiguous(), tail_N


def at_temperature(
    logprobs_NK: Tensor, tail_N: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and tail at a temperature, from those of a ``TopKTeacher``.

    Scaled to mass 1 together, or without a tail the kept tokens by themselves.
    """
    logits_NK = logprobs_NK / temperature
    if tail_N is None:
        return logits_NK.log_softmax(1), None
    buckets_NB = torch.cat((logits_NK, tail_N[:, None]), 1).log_softmax(1)
    # the kernels read a tail whose elements are neighbours in memory
    return buckets_NB[:, :-1].contiguous(), buckets_NB[:, -1].contiguous()
