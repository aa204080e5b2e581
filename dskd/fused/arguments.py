"""What the fused losses ask of their arguments, and the weight vectors they work with.

Every error is a ValueError that names the argument. Labels and ids are compared with the number of
columns where that costs nothing (on a CPU) and, on a GPU, only in debug mode (``DSKD_DEBUG=1``),
because the answer has to come back to the host.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dskd.losses import Divergence, TopKMode

DEBUG = os.environ.get("DSKD_DEBUG", "0") not in ("", "0")
"""Whether labels and ids on a GPU are checked too, which waits for the device."""

KINDS: tuple[str, ...] = get_args(Divergence)
MODES: tuple[str, ...] = get_args(TopKMode)
MIXING = ("jsd", "skew_forward_kl", "skew_reverse_kl")
"""Kinds with a beta."""
INFINITE = ("reverse_kl", "mixed")
"""Kinds that are infinite where the teacher lacks a column of the student's."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Weight = float | Tensor
"""A weight of every token, or fp32 [N]."""


class LogitMap(NamedTuple):
    """How a model turns its head's output x into logits.

    ``z = scale * x``, and with a ``softcap`` c > 0 (Gemma) ``z = c tanh(scale * x / c)``.
    """

    scale: float = 1.0
    softcap: float = 0.0


SAME = LogitMap()
"""Logits are what the head puts out."""


class Losses(NamedTuple):
    """What a fused loss returns.

    Attributes:
        total: sum over the tokens of ``weight * divergence + label_weight * label``, a scalar in
            fp32 (float64 for float64 logits), with a gradient.
        divergence_N: each token's divergence in nats, no weight, no T^2, no gradient (for
            ``mixed``: the weighted sum of its two directions); 0 where nothing is weighted.
        label_N: each token's cross entropy with its label, likewise; empty without labels.
    """

    total: Tensor
    divergence_N: Tensor
    label_N: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 stays, everything narrower becomes fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse(problem: bool, message: str) -> None:
    """Raise a ValueError if there is a problem."""
    if problem:
        raise ValueError(message)


def matrix(
    name: str,
    value: Tensor,
    *,
    rows: int | None = None,
    like: Tensor | None = None,
    empty: bool = False,
) -> None:
    """Check a floating-point matrix: its number of rows, and the device of another argument.

    It has columns, unless it may be ``empty``.
    """
    refuse(value.dim() != 2, f"{name}: must have two axes, not shape {tuple(value.shape)}")
    refuse(value.dtype not in FLOATING, f"{name}: must be floating-point, not {value.dtype}")
    on_gpu = value.device.type == "cuda"
    refuse(
        on_gpu and value.dtype == torch.float64,
        f"{name}: the kernels do not compute in float64; dskd.losses does",
    )
    refuse(value.shape[1] == 0 and not empty, f"{name}: has no columns")
    if rows is not None:
        refuse(len(value) != rows, f"{name}: has {len(value)} rows where there are {rows} tokens")
    if like is not None:
        refuse(
            value.device != like.device, f"{name}: is on {value.device}, the rest on {like.device}"
        )


def unit_columns(value: Tensor) -> Tensor:
    """The matrix itself if its columns are neighbours in memory, else a copy."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def gradient_room(out: Tensor, student_NV: Tensor) -> None:
    """Check a matrix that is to receive the gradient of the student's logits."""
    matrix("out", out, rows=len(student_NV), like=student_NV)
    shape = tuple(student_NV.shape)
    refuse(out.shape != shape, f"out: has shape {tuple(out.shape)}, the student's logits {shape}")
    refuse(out.stride(1) != 1 and shape[1] > 1, "out: its columns are not neighbours in memory")
    refuse(
        torch.is_grad_enabled() and student_NV.requires_grad,
        "out: the student's logits require a gradient; detach them, or leave out= to autograd",
    )


def temperature_of(temperature: float) -> float:
    """A usable temperature."""
    good = math.isfinite(temperature) and temperature > 0
    refuse(not good, f"temperature: must be positive and finite, not {temperature}")
    return float(temperature)


def map_of(name: str, value: LogitMap) -> LogitMap:
    """A usable logit map."""
    good = math.isfinite(value.scale) and value.scale > 0
    refuse(not good, f"{name}.scale: must be positive and finite, not {value.scale}")
    good = math.isfinite(value.softcap) and value.softcap >= 0
    refuse(not good, f"{name}.softcap: must be finite and at least 0, not {value.softcap}")
    return value


def kind_of(kind: str, beta: float, reverse: Weight | None, narrower: bool) -> None:
    """Check a divergence; ``narrower``: the teacher has fewer columns than the student."""
    refuse(kind not in KINDS, f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if kind in MIXING:
        ends = "0 and 1 are not limits of it: use forward_kl or reverse_kl"
        refuse(not 0 < beta < 1, f"beta: must lie between 0 and 1 for {kind}, not {beta} ({ends})")
    refuse(
        (reverse is None) == (kind == "mixed"),
        f"reverse_weight: the mixed divergence has one, and only it does (kind is {kind!r})",
    )
    refuse(
        narrower and kind in INFINITE,
        f"kind: {kind} is infinite where the student has columns that the teacher lacks; pass the "
        f"student's logits (or its head's rows) of the shared vocabulary only",
    )


def teacher_columns(columns: int, student: int, vocabulary: int | None) -> int:
    """How many of the teacher's columns count: ``vocabulary``, or all of them."""
    if vocabulary is None:
        refuse(
            columns > student,
            f"teacher: has {columns} columns, the student {student}; if those beyond are padding, "
            f"say how many are real tokens (vocabulary=)",
        )
        return columns
    least = min(columns, student)
    refuse(
        not 0 < vocabulary <= least,
        f"vocabulary: {vocabulary} is not within the {least} columns that both have",
    )
    return vocabulary


def topk_of(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    mode: str,
    student_NV: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A usable top-k teacher: contiguous ids, log-probabilities and tail in the wide dtype."""
    refuse(mode not in MODES, f"mode: {mode!r} is not one of {', '.join(MODES)}")
    count, dtype = len(student_NV), wide(student_NV.dtype)
    kept = ids_NK.shape[1] if ids_NK.dim() == 2 else 0
    refuse(
        ids_NK.shape != (count, kept) or not 0 < kept <= columns,
        f"ids: must be [{count}, K] with K from 1 to {columns}, not {tuple(ids_NK.shape)}",
    )
    integers = (torch.int32, torch.int64)
    refuse(ids_NK.dtype not in integers, f"ids: must be int32 or int64, not {ids_NK.dtype}")
    refuse(ids_NK.device != student_NV.device, f"ids: is on {ids_NK.device}, not the logits'")
    in_range("ids", ids_NK, columns, ids_NK >= 0)
    matrix("logprobs", logprobs_NK, rows=count, like=student_NV)
    refuse(
        logprobs_NK.shape != ids_NK.shape,
        f"logprobs: has shape {tuple(logprobs_NK.shape)}, ids {tuple(ids_NK.shape)}",
    )
    refuse(
        (tail_N is None) == (mode == "tail"),
        f"tail: the mode tail needs the mass of what is not kept, and only it (mode is {mode!r})",
    )
    if tail_N is not None:
        tail_N = _vector("tail", tail_N, student_NV)
    return ids_NK.contiguous(), logprobs_NK.detach().to(dtype).contiguous(), tail_N


class Weights(NamedTuple):
    """Weight vectors [N] of the divergence, its reverse part and the label; ignored tokens at 0."""

    divergence_N: Tensor
    reverse_N: Tensor | None
    labels_N: Tensor | None
    label_N: Tensor | None


def weights_of(
    logits_NV: Tensor,
    labels_N: Tensor | None,
    *,
    weight: Weight,
    reverse_weight: Weight | None,
    label_weight: Weight,
    ignore_index: int,
    columns: int,
) -> Weights:
    """Fold scalars, vectors and ``ignore_index`` into weight vectors.

    A token labelled ``ignore_index`` counts for nothing, neither its label nor its divergence.
    """
    divergence_N = _vector("weight", weight, logits_NV)
    reverse_N = None
    if reverse_weight is not None:
        reverse_N = _vector("reverse_weight", reverse_weight, logits_NV)
    unlabelled = isinstance(label_weight, float | int) and label_weight == 0
    if labels_N is None:
        refuse(not unlabelled, "label_weight: is not 0, and there are no labels")
        return Weights(divergence_N, reverse_N, None, None)
    index_vector("labels", labels_N, logits_NV)
    kept_N = labels_N != ignore_index
    in_range("labels", labels_N, columns, kept_N)
    divergence_N = divergence_N.where(kept_N, 0.0)
    reverse_N = None if reverse_N is None else reverse_N.where(kept_N, 0.0)
    if unlabelled:
        return Weights(divergence_N, reverse_N, None, None)
    label_N = _vector("label_weight", label_weight, logits_NV).where(kept_N, 0.0)
    return Weights(divergence_N, reverse_N, labels_N, label_N)


def _vector(name: str, value: Weight, logits_NV: Tensor) -> Tensor:
    dtype, count = wide(logits_NV.dtype), len(logits_NV)
    if not isinstance(value, Tensor):
        refuse(not math.isfinite(value), f"{name}: must be finite, not {value}")
        return torch.full((count,), float(value), dtype=dtype, device=logits_NV.device)
    shape = tuple(value.shape)
    refuse(shape != (count,), f"{name}: has shape {shape} where there are {count} tokens")
    refuse(value.dtype not in FLOATING, f"{name}: must be floating-point, not {value.dtype}")
    refuse(value.device != logits_NV.device, f"{name}: is on {value.device}, not the logits'")
    return value.detach().to(dtype).contiguous()


def index_vector(name: str, value: Tensor, logits_NV: Tensor) -> None:
    """Check int64 [N] on the logits' device."""
    shape, count = tuple(value.shape), len(logits_NV)
    refuse(shape != (count,), f"{name}: has shape {shape} where there are {count} tokens")
    refuse(value.dtype != torch.int64, f"{name}: must be int64, not {value.dtype}")
    refuse(value.device != logits_NV.device, f"{name}: is on {value.device}, not the logits'")


def in_range(name: str, ids: Tensor, columns: int | Tensor, counted: Tensor) -> None:
    """Check that the counted ids name columns, where looking is free or asked for."""
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or DEBUG):
        return
    wrong = counted & ((ids < 0) | (ids >= columns))
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: {int(ids[tuple(first)])} at {first} is not one of the {columns} columns"
        )
