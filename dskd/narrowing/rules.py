"""How the removed units of a student become zero: the two rules, over any shard of any parameter.

:class:`Annealed` (the default) scales the removed entries of C = I + D down to exactly zero by a
schedule of its own. :class:`Original` pulls them there through Adam, as the paper's code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dskd.engine.shards import ParameterShards
from dskd.narrowing.rule import Edit, Groups, Rule
from dskd.narrowing.units import Ranking, Units, original_count, ramp_count

NEAR_ZERO = 0.01
"""Size (:meth:`Rule.largest_removed`) up to which the original rule's removed units count as gone.

Once their second moments have decayed, removed entries stay near zero in bursts of up to 6 times
the learning rate, 3e-4 with the paper's: a column of 768 entries of a BERT, all
of them in a burst at once, has a norm of 0.008.
"""

_MOMENTUM = 0.9  # of the original's injection, whatever the optimiser's betas


class Annealed(Rule):
    """The exact rule: removed entries follow a schedule instead of an optimiser.

    At every ``every``-th step k grows by one, and ``k / ramp`` of each group's units are removed,
    chosen among the kept ones and never taken back. A removed entry has gradient 0 and first moment
    0, and after each of the ``anneal`` steps from its removal on C is scaled by alpha_a /
    alpha_(a-1), alpha_a = 1 - a / anneal: linearly to exactly 0. It stays there whatever a weight
    decay of D does. Kept entries, norms and biases are not touched.
    """

    def __init__(
        self, groups: Groups, *, every: int, ramp: int, anneal: int, ranking: Ranking = "group"
    ) -> None:
        super().__init__(groups, every, ranking)
        self.ramp = ramp
        self.anneal = anneal

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Scale the removed entries of C down; ``lr`` plays no part."""
        del lr
        matrices = self._matrices(weights, self._begun())
        self._edit(matrices, lambda at_U: {"ratio_K": self._ratio(at_U, step + 1)})

    def settled(self, steps: int) -> bool:
        """Whether the ramp is over and every removed unit has been through its ``anneal`` steps."""
        latest = max(int(at_U.max()) for at_U in self.removed_at.values())
        return self.chosen() and (latest == 0 or steps - latest + 1 >= self.anneal)

    def complete(self, steps: int, weights: ParameterShards) -> bool:
        """Whether removed entries are exactly 0, as :meth:`settled`; kept ones are the student."""
        return self.settled(steps)

    def _begun(self) -> list[str]:
        return [name for name, at_U in self.removed_at.items() if at_U.any()]

    def _ratio(self, at_U: Tensor, t: int) -> Tensor:
        """What C of each unit is multiplied by after step t: 1 where kept, float64 [U]."""
        left_U = (self.anneal - (t - at_U + 1)).clamp(min=0).double()
        return torch.where(at_U > 0, left_U / (left_U + 1), 1.0)

    def _before(self, weights: ParameterShards, t: int, changed: list[str]) -> None:
        matrices = self._matrices(weights, self._begun())
        # a moment stays 0 once the gradient is; before the first step there are none
        reset = bool(changed) and any(shard.moments for *_, shard in matrices)

        def edit(at_U: Tensor) -> dict[str, Tensor]:
            keep_U = (at_U == 0).double()
            zero_U = torch.zeros_like(keep_U)
            values = {"gate_K": keep_U, "pull_K": zero_U}
            return values | {"fade_K": keep_U, "push_K": zero_U} if reset else values

        self._edit(matrices, edit)

    def _count(self, units: Units, t: int) -> int:
        return ramp_count(units.cut, t, self.every, self.ramp)

    def _staying(self, group: str) -> Tensor | None:
        return self.removed_at[group] > 0


class Original(Rule):
    """The rule of the paper's code, through an Adam without bias correction.

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
        groups: Groups,
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
        self._compactors = {m.name for units in self.groups.values() for m in units.members}

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Decay C of compactors, and the other parameters named in ``decay``."""
        matrices = self._matrices(weights, self.groups)
        for decay in set(self.decay.values()):
            alike = [one for one in matrices if self.decay.get(one.shard.name) == decay]
            self._edit(alike, _alike(ratio_K=1 - lr * decay))
        for name, decay in self.decay.items():
            shard = None if name in self._compactors else weights.shard(name)
            if shard is not None:
                shard.weight.mul_(1 - lr * decay)

    def settled(self, steps: int) -> bool:
        """False: this rule brings removed entries near zero, never to it."""
        return False

    def complete(self, steps: int, weights: ParameterShards) -> bool:
        """Whether all units are removed that shall be and none is larger than ``NEAR_ZERO``."""
        return self.chosen() and self.largest_removed(weights) <= NEAR_ZERO

    def _before(self, weights: ParameterShards, t: int, changed: list[str]) -> None:
        for optimised in weights.groups:
            beta1, beta2 = optimised["betas"]
            root = math.sqrt(1 - beta2**t)
            optimised["lr"] *= (1 - beta1**t) / root
            optimised["eps"] = self.eps / root
        matrices = self._matrices(weights, self.groups)
        if t <= self.every:
            self._edit(matrices, _alike(gate_K=1.0, pull_K=1.0))
        else:
            self._edit([*matrices, *self._vectors(weights)], self._pull)

    def _pull(self, at_U: Tensor) -> dict[str, Tensor]:
        """The penalty on removed units, and where it is above 1 the injection."""
        removed_U = (at_U > 0).double()
        values = {"gate_K": 1 - removed_U, "pull_K": min(self.penalty, 1.0) * removed_U}
        if self.penalty > 1:
            push_U = (1 - _MOMENTUM) * (self.penalty - 1) * removed_U
            values |= {"fade_K": torch.full_like(removed_U, _MOMENTUM), "push_K": push_U}
        return values

    def _count(self, units: Units, t: int) -> int:
        return original_count(units.cut, t, self.every)

    def _staying(self, group: str) -> Tensor | None:
        return None


def _alike(**values: float) -> Edit:
    """The same values for every unit."""
    return lambda at_U: {
        name: torch.full_like(at_U, value, dtype=torch.float64) for name, value in values.items()
    }
