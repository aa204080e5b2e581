"""The exponential moving average of a student's weights, which may teach it.

After every step that was taken, ``mean = decay mean + (1 - decay) weight``, in fp32, starting at
the weights that training starts at. Every rank holds the whole mean and a replica that computes
with it, and puts each parameter together once a step, in fp32: with ZeRO about as much traffic as
the step's gradients, at stages 1 and 2 in buckets, at stage 3 one parameter after the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards
from dskd.system import dist

_FILE = "average.safetensors"


class Average(StepHooks):
    """Keeps a replica of the student at the average of its weights, and in the checkpoints.

    Args:
        replica: the student as it starts, whole, on this rank's device. In 16 bits it is rounded
            from a mean of its own in fp32.
        decay: factor of the mean.
    """

    def __init__(self, replica: nn.Module, decay: float) -> None:
        named = replica.named_parameters()
        self._replica = {name: p.detach() for name, p in named if p.requires_grad}
        self._mean = {name: weight.float() for name, weight in self._replica.items()}
        self._decay = decay

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Move the mean (collective under ZeRO)."""
        del step, lr
        for name, whole in weights.wholes(self._mean):
            mean = self._mean[name]
            mean.lerp_(whole.to(mean.device), 1.0 - self._decay)
        self._publish()

    def save(self, folder: Path) -> None:
        """The mean, written by rank 0 as ``average.safetensors``."""
        if dist.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mean = {name: value.cpu().contiguous() for name, value in self._mean.items()}
            save_file(mean, folder / _FILE)

    def load(self, folder: Path) -> None:
        """The mean as it was, bit for bit."""
        stored = load_file(folder / _FILE)
        for name, mean in self._mean.items():
            mean.copy_(stored[name])
        self._publish()

    def _publish(self) -> None:
        """Round the mean into a replica that is not the mean itself."""
        for name, weight in self._replica.items():
            if weight.dtype != torch.float32:
                weight.copy_(self._mean[name])
