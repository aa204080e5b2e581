"""Checks of the fused losses' arguments: a wrong one is a ValueError that names it, one of a wrong
kind (no tensor, or of no such numbers) a TypeError.

Checks of what there is for each token, weights and labels, are in ``per_token.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dskd.batch import LogitMap

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "mixed",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
TopKMode = Literal["tail", "renormalised", "truncated"]
KINDS: tuple[str, ...] = get_args(Divergence)
MODES: tuple[str, ...] = get_args(TopKMode)
MIXING = ("jsd", "skew_forward_kl", "skew_reverse_kl")
"""Kinds with a beta."""
INFINITE = ("reverse_kl", "mixed")
"""Kinds that are infinite where the teacher lacks a column of the student's."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TokenWeight = float | Tensor
"""A weight of every token, or one for each, [N]: numbers, or a mask."""


class Losses(NamedTuple):
    """What a fused loss returns.

    Attributes:
        total: sum over the tokens of ``weight * divergence + label_weight * label``, a scalar in
            fp32 (float64 for float64 logits), with a gradient.
        divergence_N: each token's divergence in nats, no weight, no T^2, no gradient (for
            ``mixed``: the weighted sum of its two directions); 0 where its weight is.
        label_N: each token's cross entropy with its label, likewise; empty without labels.

    A side whose weight is 0 in a row adds nothing to its gradient, whatever its logits are. A loss
    is ``inf`` where mass lies on a masked logit of the other side (the kernels notice 1e-15 of
    it), and NaN where a logit is, or where a row of nothing but ``-inf`` has no softmax; there, the
    gradient is worth nothing.
    """

    total: Tensor
    divergence_N: Tensor
    label_N: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 stays, everything narrower becomes fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse(problem: bool, message: Callable[[], str]) -> None:
    """Raise a ValueError if there is a problem.

    The message is written then only: written beforehand, under torch.compile, it would tie the
    compiled code to the numbers in it.
    """
    if problem:
        raise ValueError(message())


def refuse_kind(problem: bool, message: Callable[[], str]) -> None:
    """Raise a TypeError if there is a problem, with a message that is written then only."""
    if problem:
        raise TypeError(message())


def tensor(name: str, value: object) -> None:
    """Check that an argument is a tensor."""
    refuse_kind(
        not isinstance(value, Tensor),
        lambda: f"{name}: must be a tensor, not {type(value).__name__}",
    )


def number(name: str, value: object) -> None:
    """Check that an argument is a number."""
    refuse_kind(
        not isinstance(value, float | int),
        lambda: f"{name}: must be a number, not {type(value).__name__}",
    )


def beside(name: str, value: Tensor, logits: Tensor) -> None:
    """Check that a tensor is on the logits' device."""
    refuse(value.device != logits.device, lambda: f"{name}: is on {value.device}, not the logits'")


def matrix(
    name: str,
    value: Tensor,
    *,
    rows: int | None = None,
    like: Tensor | None = None,
    empty: bool = False,
) -> None:
    """Check a matrix that the kernels can read: see :func:`floating_matrix`.

    It has columns, unless it may be ``empty``.
    """
    floating_matrix(name, value, rows=rows, like=like)
    on_gpu = value.device.type == "cuda"
    refuse(
        on_gpu and value.dtype == torch.float64,
        lambda: f"{name}: the kernels do not compute in float64; dskd.fused.reference does",
    )
    refuse(value.shape[1] == 0 and not empty, lambda: f"{name}: has no columns")


def floating_matrix(
    name: str, value: Tensor, *, rows: int | None = None, like: Tensor | None = None
) -> None:
    """Check a floating-point matrix: its number of rows, and the device of another argument."""
    tensor(name, value)
    refuse(value.dim() != 2, lambda: f"{name}: must have two axes, not shape {tuple(value.shape)}")
    refuse_kind(
        value.dtype not in FLOATING, lambda: f"{name}: must be floating-point, not {value.dtype}"
    )
    if rows is not None:
        refuse(
            len(value) != rows,
            lambda: f"{name}: has {len(value)} rows where there are {rows} tokens",
        )
    if like is not None:
        refuse(
            value.device != like.device,
            lambda: f"{name}: is on {value.device}, the rest on {like.device}",
        )


def unit_columns(value: Tensor) -> Tensor:
    """The matrix itself if its columns are neighbours in memory, else a copy."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def gradient_room(out: Tensor, student_NV: Tensor) -> None:
    """Check a matrix that is to receive the gradient of the student's logits."""
    matrix("out", out, rows=len(student_NV), like=student_NV)
    shape = tuple(student_NV.shape)
    refuse(
        out.shape != shape,
        lambda: f"out: has shape {tuple(out.shape)}, the student's logits {shape}",
    )
    refuse(
        out.stride(1) != 1 and shape[1] > 1, lambda: "out: its columns are not neighbours in memory"
    )
    refuse(
        out.stride(0) < shape[1] and shape[0] > 1, lambda: "out: its rows share memory (expanded?)"
    )
    refuse(
        torch.is_grad_enabled() and student_NV.requires_grad,
        lambda: (
            "out: the student's logits require a gradient; detach them, or leave out= to autograd"
        ),
    )


def temperature_of(temperature: float, name: str = "temperature") -> float:
    """The temperature as a float; refused unless it is a positive, finite number."""
    number(name, temperature)
    # not math.isfinite, which torch.compile cannot trace for a number that changes
    good = 0 < temperature < torch.inf
    refuse(not good, lambda: f"{name}: must be positive and finite, not {temperature}")
    return float(temperature)


def map_of(name: str, value: LogitMap) -> LogitMap:
    """The logit map as a tuple of floats; refused unless scale and cap are usable numbers."""
    refuse_kind(
        not isinstance(value, LogitMap),
        lambda: f"{name}: must be a LogitMap, not {type(value).__name__}",
    )
    good = 0 < value.scale < torch.inf
    refuse(not good, lambda: f"{name}.scale: must be positive and finite, not {value.scale}")
    good = 0 <= value.softcap < torch.inf
    refuse(not good, lambda: f"{name}.softcap: must be finite and at least 0, not {value.softcap}")
    return value


def kind_of(kind: str, beta: float, reverse: TokenWeight | None, narrower: bool) -> None:
    """Check a divergence; ``narrower``: the teacher has fewer columns than the student."""
    refuse(kind not in KINDS, lambda: f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    beta_of(kind, beta)
    refuse(
        (reverse is None) == (kind == "mixed"),
        lambda: (
            f"reverse_weight: the mixed divergence has one, and only it does (kind is {kind!r})"
        ),
    )
    refuse(
        narrower and kind in INFINITE,
        lambda: (
            f"kind: {kind} is infinite where the student has columns that the teacher lacks; pass "
            f"the student's logits (or its head's rows) of the shared vocabulary only"
        ),
    )


def beta_of(kind: str, beta: float) -> None:
    """Check the beta of a kind that has one."""
    number("beta", beta)
    ends = "0 and 1 are not limits of it: use forward_kl or reverse_kl"
    refuse(
        kind in MIXING and not 0 < beta < 1,
        lambda: f"beta: must lie between 0 and 1 for {kind}, not {beta} ({ends})",
    )


def columns_within(name: str, first: int, width: int, columns: int) -> None:
    """Check that a teacher's columns, from the student's column ``first`` on, are among its."""
    last = first + width
    refuse(
        not 0 <= first < last <= columns,
        lambda: f"{name}: columns {first} to {last} are not within the student's {columns}",
    )


def teacher_columns(columns: int, student: int, vocabulary: int | None) -> int:
    """How many of the teacher's columns count: ``vocabulary``, or all of them."""
    if vocabulary is None:
        refuse(
            columns > student,
            lambda: (
                f"teacher: has {columns} columns, the student {student}; if those beyond are "
                f"padding, say how many are real tokens (vocabulary=)"
            ),
        )
        return columns
    least = min(columns, student)
    refuse(
        not 0 < vocabulary <= least,
        lambda: f"vocabulary: {vocabulary} is not within the {least} columns that both have",
    )
    return vocabulary
