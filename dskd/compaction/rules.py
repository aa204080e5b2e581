"""How the removed units of a student become zero: the two rules, over any shard of any parameter.

:class:`Annealed` (the default) scales the removed entries of C = I + D down to exactly zero by a
schedule of its own. :class:`Original` pulls them there through Adam, as the paper's code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dskd.compaction.masks import Ranking, Units, original_count, original_end, ramp_count, spread
from dskd.compaction.rule import Rule
from dskd.compaction.tiles import Tile, tiles
from dskd.errors import ConfigError
from dskd.shards import Weights

_MOMENTUM = 0.9  # of the original's injection, whatever the optimiser's betas


class Annealed(Rule):
    """The exact rule (spec, R8): removed entries follow a schedule instead of an optimiser.

    At every ``every``-th step k grows by one, and ``k / ramp`` of each group's units are removed,
    chosen among the kept ones and never taken back. A removed entry has gradient 0 and first moment
    0, and after each of the ``anneal`` steps from its removal on C is scaled by alpha_a /
    alpha_(a-1), alpha_a = 1 - a / anneal: linearly to exactly 0. It stays there whatever a weight
    decay of D does. Kept entries, norms and biases are not touched.
    """

    def __init__(
        self,
        groups: Mapping[str, Units],
        *,
        every: int,
        ramp: int,
        anneal: int,
        ranking: Ranking = "group",
    ) -> None:
        super().__init__(groups, every, ranking)
        self.ramp = ramp
        self.anneal = anneal

    def after_step(self, weights: Weights, step: int, lr: float) -> None:
        """Scale the removed entries of C down; ``lr`` plays no part."""
        del lr
        for group, side, shard in self._shards(weights, self._begun()):
            ratio_U = self._ratio(self._on(group, shard.weight.device), step + 1)
            ratio_K = spread(ratio_U, shard.shape[-1]).to(shard.weight.dtype)
            for tile in tiles(shard):
                # C <- ratio C; of D = C - I that is ratio D - (1 - ratio) I
                tile.weight_RC.mul_(tile.along(ratio_K, side))
                tile.diagonal().sub_(1 - tile.on_diagonal(ratio_K))

    def ends_at(self) -> int:
        """The step after which the last units are zero."""
        return self.every * self.ramp + self.anneal - 1

    def settled(self, steps: int) -> bool:
        """Whether the ramp is over and every removed unit has been through its ``anneal`` steps."""
        for name, units in self.groups.items():
            at_U = self.removed_at[name]
            if int((at_U > 0).sum()) < units.cut.remove:
                return False
            if units.cut.remove and steps - int(at_U.max()) + 1 < self.anneal:
                return False
        return True

    def _begun(self) -> list[str]:
        return [name for name, at_U in self.removed_at.items() if at_U.any()]

    def _ratio(self, at_U: Tensor, t: int) -> Tensor:
        """What C of each unit is multiplied by after step t: 1 where kept, float64 [U]."""
        left_U = (self.anneal - (t - at_U + 1)).clamp(min=0).double()
        return torch.where(at_U > 0, left_U / (left_U + 1), 1.0)

    def _before(self, weights: Weights, t: int, changed: list[str]) -> None:
        for group, side, shard in self._shards(weights, self._begun()):
            for tile in tiles(shard):
                removed = self._removed(group, shard, tile, side)
                if tile.gradient_RC is not None:
                    tile.gradient_RC.masked_fill_(removed, 0)
                if group in changed and "exp_avg" in tile.moments:
                    tile.moments["exp_avg"].masked_fill_(removed, 0)

    def _count(self, units: Units, t: int) -> int:
        return ramp_count(units.cut, t, self.every, self.ramp)

    def _staying(self, group: str) -> Tensor | None:
        return self.removed_at[group] > 0


class Original(Rule):
    """The rule of the paper's code (spec, section 3), through an Adam without bias correction.

    Masks are chosen anew at every ``every``-th step. Until the first: gradient + C for every entry
    of a compactor. After it, for the removed entries of compactors, norms and biases: gradient
    min(penalty, 1) C instead of the loss's, and with a penalty above 1 the first moment of all
    their entries becomes 0.9 m + 0.1 (penalty - 1) C where removed, 0.9 m where kept, before Adam
    sees it. Removed entries fall towards 0 but are never set to it.

    The optimiser is torch's AdamW (or one with its arithmetic) with weight decay 0: the decay is
    done here, after the step and of C. Its learning rate and eps are rescaled before each step so
    that its bias correction cancels. The gradients must not be scaled (fp16), nor clipped.

    Args:
        penalty: the original's ``l2_lambda``.
        eps: Adam's, before the rescaling.
        decay: weight decay by parameter, times how many times the base learning rate its own is.
            Parameters not named do not decay.
    """

    def __init__(
        self,
        groups: Mapping[str, Units],
        *,
        every: int,
        penalty: float,
        eps: float,
        decay: Mapping[str, float],
        ranking: Ranking = "original",
    ) -> None:
        super().__init__(groups, every, ranking)
        self.penalty = penalty
        self.eps = eps
        self.decay = dict(decay)
        members = [member for units in self.groups.values() for member in units.members]
        self._compactors = {member.name for member in members}

    @staticmethod
    def check_clipping(clip: float) -> None:
        """Refuse ``train.clip``: the penalty is part of the gradient, and far larger (spec, R2).

        Raises:
            ConfigError: gradients would be clipped.
        """
        if clip > 0:
            raise ConfigError(
                f"train.clip: {clip} would clip the penalty of method.rule original together with"
                " the gradient; it must be 0"
            )

    def after_step(self, weights: Weights, step: int, lr: float) -> None:
        """Decay C of compactors, and the other parameters named in ``decay``."""
        for name, decay in self.decay.items():
            shard = weights.shard(name)
            if shard is None:
                continue
            shard.weight.mul_(1 - lr * decay)
            if name in self._compactors:  # C = I + D
                for tile in tiles(shard):
                    tile.diagonal().sub_(lr * decay)

    def ends_at(self) -> int:
        """The step of the last change of a mask's size; units are exchanged until the end."""
        return max(original_end(units.cut, self.every) for units in self.groups.values())

    def settled(self, steps: int) -> bool:
        """Never: removed entries only come near zero."""
        return False

    def _before(self, weights: Weights, t: int, changed: list[str]) -> None:
        for optimised in weights.groups:
            beta1, beta2 = optimised["betas"]
            root = math.sqrt(1 - beta2**t)
            optimised["lr"] *= (1 - beta1**t) / root
            optimised["eps"] = self.eps / root
        for group, side, shard in self._shards(weights, self.groups):
            for tile in tiles(shard):
                if t <= self.every:
                    tile.gradient_RC.add_(tile.compactor())
                else:
                    removed = self._removed(group, shard, tile, side)
                    self._pull(tile, tile.compactor(), removed)
        if t > self.every:
            self._pull_vectors(weights)

    def _pull_vectors(self, weights: Weights) -> None:
        for group, units in self.groups.items():
            for vector in units.vectors:
                shard = weights.shard(vector.name)
                if shard is None:
                    continue
                rows = torch.Size((vector.parts, 1, shard.shape[0] // vector.parts))
                shard = replace(shard, shape=rows)
                for tile in tiles(shard):
                    self._pull(tile, tile.weight_RC, self._removed(group, shard, tile, "left"))

    def _pull(self, tile: Tile, value_RC: Tensor, removed: Tensor) -> None:
        """The penalty on removed entries, whose values are those of C or of a vector."""
        weak, strong = min(self.penalty, 1.0), max(self.penalty - 1.0, 0.0)
        gradient_RC = tile.gradient_RC
        gradient_RC.copy_(torch.where(removed, weak * value_RC, gradient_RC))
        if strong:
            pulled_RC = (1 - _MOMENTUM) * strong * value_RC * removed
            tile.moments["exp_avg"].mul_(_MOMENTUM).add_(pulled_RC)

    def _count(self, units: Units, t: int) -> int:
        return original_count(units.cut, t, self.every)

    def _staying(self, group: str) -> Tensor | None:
        return None
