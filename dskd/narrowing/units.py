"""Which units of a group go next: how many by a step, ranked by what, without ties.

A compactor is stored as its difference D from the identity, C = I + D. A *left* one stands before
its linear map, and a unit of the group is so many of its columns; a *right* one stands after, and a
unit is so many of its rows. Letters: U units, K entries on a compactor's side (a multiple of U:
``K / U`` consecutive ones make a unit, the head_dim entries of a head for instance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dskd.narrowing.widths import Cut

Side = Literal["left", "right"]
Ranking = Literal["group", "original"]
Whole = Callable[[str], Tensor]
"""The whole fp32 values of a parameter by its name, the same on every rank; collective."""


@dataclass(frozen=True)
class Member:
    """A compactor's parameter D [K, K], or several stacked [parts, K, K], and its group's side."""

    name: str
    side: Side


@dataclass(frozen=True)
class Vector:
    """A norm's or bias's parameter [parts * K]: several of K entries one after the other."""

    name: str
    parts: int = 1


@dataclass(frozen=True)
class Units:
    """A group of units that go together, with everything that has to follow.

    Attributes:
        cut: how many there are and how many go.
        members: the compactors that share the mask.
        ranking: the left one among them that alone ranks the units in the original.
        part: which of ``ranking``'s stacked parts.
        vectors: norms' weights and biases and linear maps' biases that the original also masks.
    """

    cut: Cut
    members: tuple[Member, ...]
    ranking: str
    part: int = 0
    vectors: tuple[Vector, ...] = ()


def original_count(cut: Cut, step: int, every: int) -> int:
    """Units removed after the recomputation at step ``step``, from 1, in the original code.

    ``sixteenths``: all gone after 16 recomputations; ``eighths``: a whole number for each of about
    8 recomputations; ``heads``: one more at every second.
    """
    times = step // every
    if cut.pace == "heads":
        return min(times // 2, cut.remove)
    if cut.pace == "sixteenths":
        return min(times * cut.remove // 16, cut.remove)
    each = cut.remove // cut.chunks
    removed = times * (each // 8)
    return cut.chunks * (each if removed * cut.chunks > cut.remove else removed)


def original_end(cut: Cut, every: int) -> int:
    """The step of the recomputation at which the last of a group's units goes (0: none does)."""
    if cut.remove == 0:
        return 0
    if cut.pace == "heads":
        return 2 * every * cut.remove
    if cut.pace == "sixteenths":
        return 16 * every
    each = cut.remove // cut.chunks
    return every * -(-each // (each // 8))


def ramp_count(cut: Cut, step: int, every: int, ramp: int) -> int:
    """Units removed at step ``step`` by the default rule: ``k / ramp`` of them, k = step div every.

    Rounded to the nearest whole number of each chunk, halves up.
    """
    each = cut.remove // cut.chunks
    times = min(step // every, ramp)
    return cut.chunks * ((2 * times * each + ramp) // (2 * ramp))


def ramp_end(cut: Cut, every: int, ramp: int) -> int:
    """The step at which :func:`ramp_count` reaches its last value (0: it is 0 throughout)."""
    each = cut.remove // cut.chunks
    return every * -(-ramp * (2 * each - 1) // (2 * each)) if each else 0


def lowest(
    scores_U: Tensor, count: int, chunks: int = 1, removed_U: Tensor | None = None
) -> Tensor:
    """The ``count`` units to remove: of each chunk as many, the lowest first.

    Units of the same score go by their index, so that exactly ``count`` go (the original removes
    every unit tied with the last, and may remove all).

    Args:
        scores_U: a number for each unit.
        count: how many, a multiple of ``chunks``.
        chunks: so many equal runs of consecutive units.
        removed_U: units already removed, which come before all others.

    Returns:
        bool [U], True where removed.
    """
    if removed_U is not None:
        scores_U = scores_U.masked_fill(removed_U, -torch.inf)
    order = scores_U.view(chunks, -1).argsort(dim=1, stable=True)
    removed = torch.zeros_like(order, dtype=torch.bool)
    return removed.scatter_(1, order[:, : count // chunks], True).view(-1)


def scores(units: Units, whole: Whole, ranking: Ranking) -> Tensor:
    """What the units are ranked by, the lowest to go first: float64 [U]; collective as ``whole``.

    ``original``: column norms of the one ranking compactor, summed over a unit's entries.
    ``group``: squared column norms of the left members plus squared row norms of the right ones,
    summed over a unit's entries: everything that would be lost.
    """
    if ranking == "original":
        compactor_PKK = _compactor(whole(units.ranking))
        return fold(norms(compactor_PKK[units.part], "left"), units.cut.size)
    return lost(units, whole)[0]


def lost(units: Units, whole: Whole) -> tuple[Tensor, int]:
    """Squared norms of each unit's columns (left members) and rows (right ones), summed: float64
    [U]; and how many columns and rows of a unit there are. Collective as ``whole``."""
    total_U, count = 0.0, 0
    for member in units.members:
        for compactor_KK in _compactor(whole(member.name)):
            norms_K = norms(compactor_KK, member.side)
            total_U = total_U + fold(norms_K.square(), units.cut.size)
            count += len(norms_K) // units.cut.size
    return total_U, count


def norms(compactor_KK: Tensor, side: Side) -> Tensor:
    """Euclidean norms of a compactor's columns (left) or rows (right): [K]."""
    return torch.linalg.vector_norm(compactor_KK, dim=0 if side == "left" else 1)


def fold(values_K: Tensor, size: int) -> Tensor:
    """Sum over the entries of each of ``size`` units."""
    return values_K.view(size, -1).sum(1)


def spread(values_U: Tensor, entries: int) -> Tensor:
    """Each unit's value at each of its entries, ``entries`` in all."""
    return values_U.repeat_interleave(entries // len(values_U))


def _compactor(difference: Tensor) -> Tensor:
    """C = I + D in float64, always stacked: [parts, K, K]."""
    compactor_PKK = difference.to(torch.float64, copy=True).view(-1, *difference.shape[-2:])
    compactor_PKK.diagonal(dim1=-2, dim2=-1).add_(1)
    return compactor_PKK
