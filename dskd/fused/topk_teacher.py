"""A teacher's K largest log-probabilities: made from its logits, and checked to be what they claim.

A loss takes kept tokens and a tail at face value, so that raw logits, or a tail that is a mass and
no logarithm, would teach something else without a word. They can be found out: of log-probabilities
over a whole vocabulary, the masses of what is kept and of the rest are 1 together. Where the tail
is of another temperature T than the log-probabilities, the rest's mass r at theirs bounds it: with
a = 1/T, ``sum p^a`` over n tokens of the mass r lies between ``r^a`` (one has all of it) and
``n^(1-a) r^a`` (each has the same).

Shape letters: N tokens, V columns, K kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dskd.batch import ProjectedTeacher, TopKTeacher
from dskd.fused.arguments import (
    MODES,
    beside,
    matrix,
    refuse,
    refuse_kind,
    temperature_of,
    tensor,
    wide,
)
from dskd.fused.backend import on_triton
from dskd.fused.chunking import chunk_of
from dskd.fused.per_token import in_range, looks, vector
from dskd.fused.through_head import through_head
from dskd.fused.tokens import Tokens

MOST_KEPT = 4096
"""Kept tokens of a row that the kernels hold in the registers of 1024 threads."""

SLACK = 1e-3
"""By which a mass may miss 1 for other reasons than rounded log-probabilities."""


def topk_teacher(logits_NV: Tensor, k: int, temperatures: float | Sequence[float]) -> TopKTeacher:
    """The K most likely tokens of a teacher's logits, and the exact mass of all others.

    What a logit cache stores, for a loss that is fed without one: :func:`~dskd.fused.linear
    .linear_kd` takes it as its ``teacher``.

    Args:
        logits_NV: of any floating type, V exactly the real vocabulary (no padding columns); may
            hold -inf; of tokens along any axes, [B, T, V], which what is made of them has, too. No
            gradient.
        k: tokens to keep, from 1 to V.
        temperatures: one or several, at which losses will be taken.

    Returns:
        ``ids_NK`` int64 by falling probability, ``logprobs_NK`` at temperature 1 and ``tail_N`` by
        temperature, in fp32 (float64 for float64 logits).

    Raises:
        ValueError: an argument of a wrong shape, type or range, named; a row is NaN, infinite, or
            -inf throughout (looked at on a CPU, and in debug mode).
    """
    tokens = Tokens.of("logits", logits_NV)
    logits_NV = tokens.rows("logits", logits_NV)
    matrix("logits", logits_NV)
    columns = logits_NV.shape[1]
    refuse(
        isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= columns,
        lambda: f"k: must be a whole number from 1 to the {columns} columns, not {k}",
    )
    several = [*temperatures] if isinstance(temperatures, Iterable) else [temperatures]
    refuse(not several, lambda: "temperatures: there are none")
    teacher = largest(logits_NV, k, [temperature_of(each, "temperatures") for each in several])
    if looks(logits_NV):
        wrong_N = ~teacher.logprobs_NK[:, 0].isfinite()
        refuse(
            bool(wrong_N.any()),
            lambda: (
                f"logits: row {int(wrong_N.nonzero()[0, 0])} is NaN, infinite, or -inf throughout"
            ),
        )
    return tokens.back(teacher)


@torch.no_grad()
def largest(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> TopKTeacher:
    """:func:`topk_teacher` of arguments that are known to be right."""
    count, columns = logits_NV.shape
    size = chunk_of(count, columns, _bytes_per_logit(logits_NV.dtype), logits_NV.device)
    parts = [_largest(part_NV, k, temperatures) for part_NV in logits_NV.split(size)]
    return _kept([torch.cat(each) for each in zip(*parts, strict=True)], temperatures)


def largest_of(teacher: ProjectedTeacher, k: int, temperatures: Sequence[float]) -> TopKTeacher:
    """The same of a teacher's logits, which are made chunk by chunk in its head."""
    found = through_head(
        teacher.projection,
        teacher.hidden_NE,
        teacher.vocabulary,
        lambda rows, logits_CV: _largest(logits_CV, k, temperatures),
        bytes_per_logit=_bytes_per_logit(teacher.hidden_NE.dtype),
    )
    return _kept(found, temperatures)


def _bytes_per_logit(dtype: torch.dtype) -> int:
    """What :func:`_largest` takes beside the logits: log-probabilities, those at a temperature, and
    their exponentials."""
    return 3 * wide(dtype).itemsize


def _largest(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> list[Tensor]:
    """Ids, log-probabilities, and the tail at each temperature."""
    logprobs_NV = logits_NV.to(wide(logits_NV.dtype)).log_softmax(1)
    logprobs_NK, ids_NK = logprobs_NV.topk(k, dim=1)
    # from the others themselves: 1 - sum has no digits left where k tokens hold nearly everything
    rest_NV = logprobs_NV.scatter_(1, ids_NK, -math.inf)
    return [ids_NK, logprobs_NK, *((rest_NV / heat).logsumexp(1) for heat in temperatures)]


def _kept(found: Sequence[Tensor], temperatures: Sequence[float]) -> TopKTeacher:
    ids_NK, logprobs_NK, *tails = found
    return TopKTeacher(ids_NK, logprobs_NK, dict(zip(temperatures, tails, strict=True)))


def topk_of(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    mode: str,
    student_NV: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A usable top-k teacher: contiguous ids, log-probabilities and tail in the wide dtype.

    What the numbers are is left to :func:`check_masses`, which needs to know what counts.
    """
    tensor("ids", ids_NK)
    tensor("logprobs", logprobs_NK)
    refuse(mode not in MODES, lambda: f"mode: {mode!r} is not one of {', '.join(MODES)}")
    count, dtype = len(student_NV), wide(student_NV.dtype)
    kept = ids_NK.shape[1] if ids_NK.dim() == 2 else 0
    refuse(
        ids_NK.shape != (count, kept) or not 0 < kept <= columns,
        lambda: f"ids: must be [{count}, K] with K from 1 to {columns}, not {tuple(ids_NK.shape)}",
    )
    refuse_many(ids_NK, student_NV)
    integers = (torch.int32, torch.int64)
    refuse_kind(
        ids_NK.dtype not in integers, lambda: f"ids: must be int32 or int64, not {ids_NK.dtype}"
    )
    beside("ids", ids_NK, student_NV)
    check_ids(ids_NK, columns)
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


def refuse_many(ids_NK: Tensor, student_NV: Tensor) -> None:
    """Check that the kernels, where they are used, can take as many kept tokens of a row."""
    kept = ids_NK.shape[1]
    refuse(
        kept > MOST_KEPT and on_triton(student_NV),
        lambda: f"ids: the kernels take at most {MOST_KEPT} kept tokens, not {kept}",
    )


def check_ids(ids_NK: Tensor, columns: int) -> None:
    """Check that ids name columns, and none twice in a row, where one looks."""
    in_range("ids", ids_NK, columns, ids_NK >= 0)
    if not looks(ids_NK):
        return
    sorted_NK = ids_NK.sort(1).values
    again = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if again.any():
        row, slot = again.nonzero()[0].tolist()
        raise ValueError(f"ids: row {row} has {int(sorted_NK[row, slot])} twice")


def check_masses(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    counted_N: Tensor,
    *,
    temperature: float,
    columns: int,
) -> None:
    """Check that kept tokens and tail can be of one distribution, where one looks.

    Args:
        logprobs_NK: log-probabilities over the whole vocabulary, -inf on unused slots.
        tail_N: ``logsumexp(logprob / temperature)`` over the tokens that are not kept, or None.
        counted_N: rows that are not looked at have 0 here: nothing is read of their teacher.
        temperature: of the tail, relative to that of the log-probabilities.
        columns: as many tokens as there are, or more.

    Raises:
        ValueError: they cannot; the message names the argument and the first index.
    """
    if not looks(logprobs_NK):
        return
    used_NK = ids_NK >= 0
    counted_N = (counted_N != 0) & used_NK.any(1)  # a row without a token has no divergence
    _check_logprobs(logprobs_NK, used_NK, counted_N)
    log_p_NK, others_N = logprobs_NK.double(), (columns - used_NK.sum(1)).double()
    rest_N = 1.0 - log_p_NK.exp().sum(1)
    spare_N = SLACK + _rounding(logprobs_NK) * _spread(log_p_NK, rest_N, others_N)
    row = _first(counted_N & (rest_N < -spare_N))
    refuse(
        row is not None,
        lambda: f"logprobs: at [{row}] have the mass {1.0 - rest_N[row].item():.4g}, more than 1",
    )
    if tail_N is None:
        return
    low_N, high_N = _bounds(rest_N, spare_N, others_N, temperature)
    size_N = tail_N.abs().where(tail_N.isfinite(), 0.0) + others_N.clamp_min(1.0).log()
    nats_N = SLACK + _rounding(tail_N) * size_N
    within_N = (tail_N >= low_N - nats_N) & (tail_N <= high_N + nats_N)
    row = _first(counted_N & ~within_N)  # NaN is nowhere
    refuse(
        row is not None,
        lambda: (
            f"tail: {tail_N[row].item():.4g} at [{row}] must be from {low_N[row].item():.4g} to "
            f"{high_N[row].item():.4g}: the kept tokens leave {rest_N[row].item():.4g} of the mass"
        ),
    )


def _check_logprobs(logprobs_NK: Tensor, used_NK: Tensor, counted_N: Tensor) -> None:
    counted_N1 = counted_N[:, None]
    for wrong_NK, problem in (
        (logprobs_NK.isnan(), "is no number"),
        (used_NK & (logprobs_NK > SLACK), "is above 0, which no log-probability is"),
        (~used_NK & (logprobs_NK != -math.inf), "must be -inf, its slot has no token"),
    ):
        if (wrong_NK & counted_N1).any():
            index = (wrong_NK & counted_N1).nonzero()[0].tolist()
            raise ValueError(
                f"logprobs: {logprobs_NK[tuple(index)].item():.4g} at {index} {problem}"
            )


def _rounding(values: Tensor) -> float:
    """Largest relative error of numbers of this type; in fp32 may be what a cache keeps in fp16."""
    return 2.0**-8 if values.dtype == torch.bfloat16 else 2.0**-11


def _spread(log_p_NK: Tensor, rest_N: Tensor, others_N: Tensor) -> Tensor:
    """``sum p |log p|`` [N], at most: what a relative error of the logarithms does to the mass."""
    kept_N = (log_p_NK.exp() * log_p_NK.abs()).nan_to_num(0.0).sum(1)
    return kept_N + rest_N.clamp_min(0.0) * others_N.clamp_min(1.0).log() + 1.0


def _bounds(
    rest_N: Tensor, spare_N: Tensor, others_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of ``logsumexp(log p / T)`` over so many others whose mass is the rest, more or less."""
    even_N = (1.0 - 1.0 / temperature) * others_N.clamp_min(1.0).log()
    low_N = (rest_N - spare_N).clamp_min(0.0).log() / temperature + even_N.clamp_max(0.0)
    high_N = (rest_N + spare_N).log() / temperature + even_N.clamp_min(0.0)
    return tuple(bound_N.masked_fill(others_N == 0, -math.inf) for bound_N in (low_N, high_N))


def _first(wrong_N: Tensor) -> int | None:
    """The first row of those that are wrong."""
    return int(wrong_N.nonzero()[0, 0]) if wrong_N.any() else None


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
