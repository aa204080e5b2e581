"""Weights that matter to earlier tasks are pulled back to where those tasks left them.

The quadratic penalty of Elastic Weight Consolidation (Kirkpatrick et al. 2017, equation 3) and
Memory Aware Synapses (Aljundi et al. 2018, equation 3): ``strength * sum omega (w - anchor)^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd.continual.whole_tensors import WholeTensors
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards, Shard


class WeightPenalty:
    """The penalty on this rank's pieces of the weights.

    It is read from files when it is first used and then held, two pieces of fp32 beside each piece
    of a weight; nothing of it is in a checkpoint.

    Args:
        omega: importances.
        anchor: the weights that are pulled towards, of the same parameters.
        strength: the original's ``reg_lambda``.
    """

    def __init__(self, omega: WholeTensors, anchor: WholeTensors, strength: float) -> None:
        self._omega = omega
        self._anchor = anchor
        self._strength = strength
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def slope(self, shard: Shard) -> Tensor:
        """The penalty's gradient, ``2 strength omega (w - anchor)``, like ``shard.weight``."""
        if shard.name not in self._held:
            self._held[shard.name] = _beside(shard, self._omega), _beside(shard, self._anchor)
        omega, anchor = self._held[shard.name]
        return 2 * self._strength * omega * (shard.weight - anchor)


def _beside(shard: Shard, file: WholeTensors) -> Tensor:
    """What a file holds of a shard's parameter, where the shard is."""
    piece, device = file.piece(shard), shard.weight.device
    # Pinned, or the host would wait for each of the copies.
    return piece.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else piece


class DecoupledPenalty(StepHooks):
    """Pulls after the step, beside Adam, by the learning rate times the penalty's gradient, as the
    original does it: no moment of Adam's knows of it, and no clipping.

    At ZeRO-1 and 2 the weights are gathered once more a step.
    """

    def __init__(self, penalty: WeightPenalty) -> None:
        self._penalty = penalty

    @torch.no_grad()
    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Pull the weights."""
        del step
        for shard in weights.shards():
            shard.weight.sub_(self._penalty.slope(shard), alpha=lr)
        weights.publish()


class GradientPenalty(StepHooks):
    """Adds the penalty's gradient to the step's, as if it were part of the loss: Adam scales it as
    it does the rest, so the same ``strength`` means something else than after the step.

    The gradient must not be multiplied by a loss scale, so not in fp16.
    """

    def __init__(self, penalty: WeightPenalty) -> None:
        self._penalty = penalty

    @torch.no_grad()
    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Add it."""
        del step, lr
        for shard in weights.shards():
            if shard.gradient is not None:
                shard.gradient.add_(self._penalty.slope(shard))
