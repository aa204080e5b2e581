"""The AdamW of the original code, made of torch's by what is done around its step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dskd.continual.penalty import WeightPenalty
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards


class OriginalAdamW(StepHooks):
    """An AdamW whose eps is not divided by the bias correction of the second moment, and whose
    weight decay comes after the step.

    Old versions of transformers had it. With the original's eps of 1e-4, the first steps are up to
    32 times shorter than torch's where gradients are small.

    Args:
        student: the model that is trained.
        eps: Adam's.
        penalty: a decoupled one, by whose gradient times the learning rate the weights are moved
            between the step and the decay.
    """

    def __init__(
        self, student: nn.Module, eps: float, penalty: WeightPenalty | None = None
    ) -> None:
        self._names = {id(p): name for name, p in student.named_parameters()}
        self._eps = eps
        self._penalty = penalty
        self._decay: dict[str, float] = {}

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups without weight decay, which is done here."""
        for group in groups:
            decay = group["weight_decay"] * group.get("lr_scale", 1.0)
            self._decay |= {self._names[id(p)]: decay for p in group["params"]}
        return [{**group, "weight_decay": 0.0} for group in groups]

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Set eps so that the bias correction cancels."""
        del lr
        for group in weights.groups:
            group["eps"] = self._eps / math.sqrt(1 - group["betas"][1] ** (step + 1))

    @torch.no_grad()
    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Apply the penalty, then the decay."""
        del step
        for shard in weights.shards():
            if self._penalty is not None:
                shard.weight.sub_(self._penalty.slope(shard), alpha=lr)
            shard.weight.mul_(1 - lr * self._decay[shard.name])
        weights.publish()
