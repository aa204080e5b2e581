"""Forward and backward passes over one effective batch, and gradients that no step follows.

The gradient is that of ``sum_k total_k / count_k`` over the whole effective batch, with the counts
summed over all micro-batches of all ranks before the first forward: never a mean of means. So it
does not depend on micro-batch size, accumulation or world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dskd.batch import Batch, Loss, LossCounts
from dskd.data.counter import mix
from dskd.data.prefetch import Sent, send
from dskd.engine.engine import Engine
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards
from dskd.system import dist

LOSS = ""
"""Key of the loss among the parts that it is made of."""

Shares = dict[str, Tensor]
"""Loss and parts of this rank's micro-batches by name, each divided by the global count of its
term: float64 scalars on the device, whose sums over the ranks are global means."""


class Counts:
    """Sums over all ranks and micro-batches, on the host. They are begun before the first forward
    and waited for when its loss is divided: no device has a part in them.

    Args:
        names: of the terms.
        summing: their counts, the tokens, and 1 if a signal came, of this rank.
    """

    def __init__(self, names: Sequence[str], summing: dist.Summing) -> None:
        self._names = names
        self._summing = summing

    @cached_property
    def by_term(self) -> dict[str, float]:
        """What each term's sum is divided by: 1 where nothing counts, which has a loss of 0, not of
        0 / 0."""
        return dict(zip(self._names, (v or 1.0 for v in self._sums[:-2]), strict=True))

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self._sums[-2])

    @property
    def stop(self) -> bool:
        """Whether a signal came on one of the ranks."""
        return self._sums[-1] > 0

    @cached_property
    def _sums(self) -> list[float]:
        return self._summing.sums()


def count(counts: LossCounts, batches: Sequence[Batch], *, stop: bool = False) -> Counts:
    """Begin to add up what the loss is divided by, in one all-reduce (collective).

    Args:
        counts: of one batch, by term.
        batches: this rank's micro-batches, on the CPU, so that no count waits for a GPU.
        stop: whether a signal came on this rank.
    """
    parts = [counts(batch) for batch in batches]
    names = sorted(parts[0])
    sums = [float(sum(part[name] for part in parts)) for name in names]
    tokens = float(sum(batch.tokens for batch in batches))
    return Counts(names, dist.Summing([*sums, tokens, float(stop)]))


@dataclass(frozen=True)
class Passes:
    """Runs an engine's module over micro-batches.

    Attributes:
        engine: holds the objective.
        hooks: called before every micro-batch.
        seed: of the run's dropout.
    """

    engine: Engine
    hooks: StepHooks
    seed: int

    def run(
        self,
        batches: Sequence[Sent],
        counts: Counts,
        step: int,
        draw: Sequence[int],
        loss: Loss | None = None,
    ) -> Shares:
        """Add up the gradient of a loss in the engine (collective).

        Args:
            batches: this rank's micro-batches, on the way to the engine's device.
            counts: theirs.
            step: completed optimiser steps.
            draw: integers that tell the random numbers of these passes from those of others.
            loss: None: the method's.
        """
        shares: Shares = {}
        for micro, sent in enumerate(batches):
            last = micro == len(batches) - 1
            # Dropout is a function of its coordinates, so that there is no generator state to save.
            parts = (self.seed, *draw, micro, dist.rank())
            torch.manual_seed(int(mix(*parts)) & (2**63 - 1))
            self.hooks.before_micro_batch(last)
            terms = self.engine.forward(sent.on_device(), step, loss)
            totals = [t.total.double() / counts.by_term[name] for name, t in terms.items()]
            self.engine.backward(torch.stack(totals).sum(), last)
            for name, term in terms.items():
                for part, total in {LOSS: term.total, **term.parts}.items():
                    share = total.detach().double() / counts.by_term[name]
                    shares[part] = shares.get(part, 0) + share
        return shares


@dataclass
class GradientProbe:
    """The :class:`~dskd.engine.hooks.Probe` of one step.

    Attributes:
        passes: of an engine between two steps, without a gradient.
        counts: the objective's.
        step: completed optimiser steps.
        position: of the step's batch in the stream of batches.
        calls: how often gradients were taken.
    """

    passes: Passes
    counts: LossCounts
    step: int
    position: int
    calls: int = 0

    def __call__(
        self, batches: Sequence[Batch], loss: Loss | None = None, counts: LossCounts | None = None
    ) -> ParameterShards:
        """The gradient of a loss over all ranks' micro-batches; see the protocol."""
        self.forget()
        self.calls += 1
        engine = self.passes.engine
        counted = count(self.counts if counts is None else counts, batches)
        # Negative: no micro-batch of the step draws the same numbers.
        sent = [send(batch, engine.device) for batch in batches]
        self.passes.run(sent, counted, self.step, (self.position, -self.calls), loss)
        return engine.weights(gradients=True)

    def forget(self) -> None:
        """Drop the gradient of the last call, if there was one."""
        if self.calls:
            self.passes.engine.forget()
