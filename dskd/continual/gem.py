"""Gradient Episodic Memory: steps that do not raise the loss of earlier tasks' rows.

Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", and Chaudhry et al.
2019, "Efficient Lifelong Learning with A-GEM". Before a step the gradients of the memories are
taken by passes that no step follows. If the step's own gradient points against one of them, as much
of them is added to it as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch, Loss, LossCounts
from dskd.continual.gradients import (
    Pieces,
    gram_of,
    has_pieces,
    held_pieces,
    load_pieces,
    save_pieces,
)
from dskd.continual.quadratic import minimise
from dskd.engine.hooks import Probe, StepHooks
from dskd.engine.shards import ParameterShards
from dskd.errors import NonFiniteError
from dskd.system import dist

_NEAR_ZERO = 1e-6
"""Added to a norm that a gradient is divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""

MemoryBatches = Callable[[int, int], Sequence[Batch]]
"""``batches(memory, step)``: this rank's micro-batches of a memory, numbered from 0, before a step;
as many on every rank (:meth:`dskd.continual.memories.RowMemory.batches`)."""


class GradientMemories(StepHooks):
    """Projects every step's gradient so that it lowers the losses of all memories.

    With the gradients G [t, P] of t memories and g [P] of the step, each first scaled down to the
    norm ``clip``: if any product ``G g`` is negative, g becomes ``g + G' v`` with the v that
    minimises ``v (G G' + ridge I) v / 2 + (G g) v`` over ``v >= margin`` (equation 11).

    The learning rate's step is then the optimiser's; what clips the gradient afterwards clips the
    sum. On a GPU the host waits once a step, for the inner products. A rank keeps t pieces of a
    gradient. The pieces must not be multiplied by a loss scale, so not in fp16.

    Args:
        memories: number t of earlier tasks, at least 1.
        batches: their rows.
        loss: whose gradients are taken, None: the method's.
        counts: what goes with ``loss``, as :class:`~dskd.engine.hooks.Probe` has it.
        clip: the largest norm of a gradient; None: as they are.
        margin: the least multiple of each memory's gradient that is added where any is.
        ridge: added to the diagonal of the products.
        every: steps that a memory's gradient is used for until it is taken anew.
        average: take one gradient of all memories together, r, and make ``g - (g r / r r) r`` of g
            if ``g r`` is negative (A-GEM, equation 11): one pass over t memories' rows and one
            piece kept; ``margin`` and ``ridge`` play no part.
    """

    def __init__(
        self,
        memories: int,
        batches: MemoryBatches,
        *,
        loss: Loss | None = None,
        counts: LossCounts | None = None,
        clip: float | None = 1.0,
        margin: float = 0.5,
        ridge: float = 1e-3,
        every: int = 1,
        average: bool = False,
    ) -> None:
        assert memories >= 1, "without an earlier task there is nothing to remember"
        self._groups = [[*range(memories)]] if average else [[m] for m in range(memories)]
        self._batches = batches
        self._loss = (loss, counts)
        self._clip = clip
        self._margin = margin
        self._ridge = ridge
        self._every = every
        self._average = average
        self._gradients: list[dict[str, Tensor]] = []
        self._stored: Path | None = None
        """The folder of a checkpoint from which the gradients are still to be read."""
        self._starts: dict[str, int] = {}
        """Where the pieces that this rank is to write into a checkpoint begin."""
        self._step = -1
        """The last one, in completed steps before it."""
        self._violated = 0

    def before_passes(self, probe: Probe, step: int) -> None:
        """Take the memories' gradients, where it is time."""
        if step % self._every and (self._gradients or self._stored is not None):
            return
        self._stored = None
        self._gradients = []
        for group in self._groups:
            batches = [batch for memory in group for batch in self._batches(memory, step)]
            held = held_pieces(probe(batches, *self._loss))
            self._gradients.append({name: piece.clone() for name, piece in held.items()})

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Project the gradient.

        Raises:
            NonFiniteError: a memory's gradient is not finite, on every rank.
        """
        del lr
        if self._stored is not None:
            self._gradients = load_pieces(self._stored, len(self._groups), weights)
            self._stored = None
        self._step = step
        if weights.spread or dist.rank() == 0:  # at ZeRO-0 every rank has all
            self._starts = {shard.name: shard.start for shard in weights.shards()}
        gradients = [*self._gradients, held_pieces(weights)]
        gram = gram_of(gradients, weights).cpu().numpy()
        if not np.isfinite(gram[:-1, :-1]).all():
            raise NonFiniteError(f"step {step + 1}: the gradient of a memory is NaN or infinite")
        if np.isfinite(gram).all():  # else it is the step's own, which the trainer refuses
            multiples = self._multiples(gram)
            if (multiples != np.eye(len(gram))[-1]).any():
                _replace(weights, gradients, multiples)

    def _multiples(self, gram: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much each gradient is multiplied in the sum that takes the place of the last one,
        the step's own; given the inner products of all, which are not zero."""
        scales = np.ones(len(gram))
        if self._clip is not None:
            scales = np.minimum(1.0, self._clip / (np.sqrt(gram.diagonal()) + _NEAR_ZERO))
        gram = gram * np.outer(scales, scales)
        among, against = gram[:-1, :-1], gram[:-1, -1]
        self._violated = int((against < 0).sum())
        if not self._violated:
            added = np.zeros(len(against))
        elif self._average:
            added = -against / among[0]
        else:
            among = (among + among.T) / 2 + self._ridge * np.eye(len(against))
            added = minimise(among, against, self._margin)
        return np.append(added, 1.0) * scales

    def rates(self) -> dict[str, float | Tensor]:
        """``violated``: how many memories the step's gradient pointed against."""
        return {"violated": float(self._violated)}

    def save(self, folder: Path) -> None:
        """Write the memories' gradients, if the next step is to use them again."""
        if self._starts and (self._step + 1) % self._every:
            save_pieces(folder, self._gradients, self._starts)

    def load(self, folder: Path) -> None:
        """Have the gradients read when the shards are at hand."""
        self._stored = folder if has_pieces(folder) else None


def _replace(
    weights: ParameterShards, gradients: Sequence[Pieces], multiples: NDArray[np.float64]
) -> None:
    """Put a sum of multiples of the gradients in the place of the step's own."""
    for name, gradient in held_pieces(weights).items():
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros_like(gradient, dtype=wide)
        for multiple, pieces in zip(multiples.tolist(), gradients, strict=True):
            total.add_(pieces[name], alpha=multiple)
        gradient.copy_(total)
