"""What the rules of ``rules.py`` share: the masks, when they change, and their place in a state.

Masks are chosen at every ``every``-th step t (counted from 1; ``step`` completed ones come before
it, t = step + 1), between its backward pass and the optimiser's step. All ranks have the same ones:
rank 0's, from whole weights. What they do to the entries that a rank holds is one
:func:`dskd.ops.update` of all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dskd.engine.shards import ParameterShards, Shard
from dskd.errors import CheckpointError
from dskd.narrowing.units import Ranking, Units, lost, lowest, scores, spread
from dskd.ops import Piece, update
from dskd.system import dist

Groups = Mapping[str, Units]
Edit = Callable[[Tensor], dict[str, Tensor]]
"""From a group's ``removed_at`` [U] to the units' values [U], by their names in ``Piece``."""


class Held(NamedTuple):
    """A shard of a compactor, or of a vector (its shape: [parts, K]), that belongs to a group."""

    group: str
    side: Literal["left", "right", "vector"]
    shard: Shard


class Rule(ABC):
    """Masks, when they change, and what is done to removed entries around each optimiser step.

    Args:
        groups: the units by the name of their group.
        every: optimiser steps between two masks (the original's ``w_step``).
        ranking: what the units are ranked by.
    """

    def __init__(self, groups: Groups, every: int, ranking: Ranking) -> None:
        self.groups = dict(groups)
        self.every = every
        self.ranking = ranking
        self.removed_at: dict[str, Tensor] = {}
        """By group: the step t whose mask removed each unit, 0 where it is kept; int64 [U]."""
        for name, units in self.groups.items():
            # Said, because where a ZeRO-3 student is made, DeepSpeed's default is its device.
            self.removed_at[name] = torch.zeros(units.cut.size, dtype=torch.int64, device="cpu")
        self._cached: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def keep(self) -> dict[str, Tensor]:
        """Which units of each group are kept: bool [U] by group."""
        return {name: at_U == 0 for name, at_U in self.removed_at.items()}

    def kept(self) -> dict[str, int]:
        """How many units of each group are kept, by group."""
        return {name: int(keep_U.sum()) for name, keep_U in self.keep.items()}

    def before_step(self, weights: ParameterShards, step: int) -> list[str]:
        """Choose new masks if it is time, and edit gradients and moments.

        To be called after the last backward pass of the step, before clipping. Collective.

        Returns:
            The groups whose masks changed.
        """
        t = step + 1
        changed = self._choose(weights, t) if t % self.every == 0 else []
        self._before(weights, t, changed)
        return changed

    @abstractmethod
    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Edit the weights after the optimiser's step; the caller publishes them.

        Args:
            step: the same as before the step.
            lr: the base learning rate of the step.
        """

    @abstractmethod
    def settled(self, steps: int) -> bool:
        """Whether after so many steps all units are removed that shall be, and exactly zero."""

    @abstractmethod
    def complete(self, steps: int, weights: ParameterShards) -> bool:
        """Whether after so many steps the kept units alone are the student. Collective."""

    def chosen(self) -> bool:
        """Whether as many units are removed as shall be in the end."""
        wanted = {name: units.cut.remove for name, units in self.groups.items()}
        return all(int((at_U > 0).sum()) >= wanted[n] for n, at_U in self.removed_at.items())

    def largest_removed(self, weights: ParameterShards) -> float:
        """Largest size of a removed unit: the root mean square norm of its columns and rows in all
        compactors, 1 in the beginning. Collective; gathers every compactor."""
        largest = 0.0
        for name, at_U in self.removed_at.items():
            if at_U.any():
                square_U, count = lost(self.groups[name], weights.whole)
                largest = max(largest, float(square_U.cpu()[at_U > 0].max()) / count)
        return math.sqrt(dist.broadcast_object(largest))

    def removed_norm(self, weights: ParameterShards) -> Tensor:
        """Euclidean norm of all removed entries of all compactors: a float64 scalar on the model's
        device, for which nothing has waited. Collective."""
        matrices = self._matrices(weights, self.groups)
        square = torch.zeros((), dtype=torch.float64, device=weights.device)
        for (group, _, shard), squares_K in zip(matrices, self._edit(matrices), strict=True):
            removed_U = self._on(group, shard.weight.device) > 0
            square += (squares_K.double() * spread(removed_U, shard.shape[-1])).sum()
        return (dist.sum_over_ranks(square) if weights.spread else square).sqrt()

    def state(self) -> dict[str, Any]:
        """JSON: for each group the removed units by the step of the mask that removed them."""
        removed: dict[str, dict[str, list[int]]] = {}
        for name, at_U in self.removed_at.items():
            steps = at_U.unique().tolist()
            removed[name] = {str(t): (at_U == t).nonzero()[:, 0].tolist() for t in steps if t > 0}
        return {"removed": removed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``.

        Raises:
            CheckpointError: it is of other groups or sizes.
        """
        removed = state["removed"]
        if removed.keys() != self.groups.keys():
            there, here = ", ".join(sorted(removed)), ", ".join(sorted(self.groups))
            raise CheckpointError(f"masks of the groups {there}; this student has {here}")
        for name, by_step in removed.items():
            size = self.groups[name].cut.size
            at_U = torch.zeros(size, dtype=torch.int64)
            for t, units in by_step.items():
                if not all(0 <= unit < size for unit in units):
                    raise CheckpointError(f"mask of {name}: removes units it has not, of {size}")
                at_U[units] = int(t)
            self.removed_at[name] = at_U
        self._cached.clear()

    @abstractmethod
    def _before(self, weights: ParameterShards, t: int, changed: list[str]) -> None:
        """Edit gradients and moments."""

    @abstractmethod
    def _count(self, units: Units, t: int) -> int:
        """How many units of a group are removed at step t."""

    @abstractmethod
    def _staying(self, group: str) -> Tensor | None:
        """The removed units that must stay so, or None if any may return; bool [U]."""

    def _choose(self, weights: ParameterShards, t: int) -> list[str]:
        """New masks; the groups where they differ. Rank 0's count, so that ranks cannot part."""
        chosen: dict[str, list[int]] = {}
        for group, units in self.groups.items():
            count, stay_U = self._count(units, t), self._staying(group)
            if stay_U is None or int(stay_U.sum()) < count:
                score_U = scores(units, weights.whole, self.ranking).cpu()
                removed_U = lowest(score_U, count, units.cut.chunks, stay_U)
                chosen[group] = removed_U.nonzero()[:, 0].tolist()
        changed = []
        for group, removed in dist.broadcast_object(chosen).items():
            before_U = self.removed_at[group]
            removed_U = torch.zeros_like(before_U, dtype=torch.bool)
            removed_U[removed] = True
            since_U = torch.where(before_U > 0, before_U, t)
            self.removed_at[group] = torch.where(removed_U, since_U, 0)
            if not torch.equal(before_U > 0, removed_U):
                changed.append(group)
        self._cached.clear()
        return changed

    def _matrices(self, weights: ParameterShards, groups: Iterable[str]) -> list[Held]:
        """What this rank holds of the groups' compactors."""
        found = [
            (group, member.side, weights.shard(member.name))
            for group in groups
            for member in self.groups[group].members
        ]
        return [Held(group, side, shard) for group, side, shard in found if shard is not None]

    def _vectors(self, weights: ParameterShards) -> list[Held]:
        """What this rank holds of the groups' norms and biases."""
        held = []
        for group, units in self.groups.items():
            for vector in units.vectors:
                shard = weights.shard(vector.name)
                if shard is not None:
                    rows = torch.Size((vector.parts, shard.shape[0] // vector.parts))
                    held.append(Held(group, "vector", replace(shard, shape=rows)))
        return held

    def _edit(self, held: Sequence[Held], edit: Edit = lambda _: {}) -> list[Tensor]:
        """Edit what is held; the squared norms [K] of each one's entries as they were."""
        made: dict[tuple[str, int], dict[str, Tensor]] = {}
        pieces = []
        for group, side, shard in held:
            weight, entries = shard.weight, shard.shape[-1]
            if (group, entries) not in made:
                values = edit(self._on(group, weight.device))
                made[group, entries] = {
                    name: spread(value_U, entries).to(weight.dtype)
                    for name, value_U in values.items()
                }
            values = made[group, entries]
            gradient = shard.gradient if "gate_K" in values else None
            moment = shard.moments["exp_avg"] if "push_K" in values else None
            pieces.append(Piece(weight, shard.start, shard.shape, side, gradient, moment, **values))
        return update(pieces)

    def _on(self, group: str, device: torch.device) -> Tensor:
        """``removed_at`` on a device, copied there once a mask."""
        if (group, device) not in self._cached:
            self._cached[group, device] = self.removed_at[group].to(device)
        return self._cached[group, device]
