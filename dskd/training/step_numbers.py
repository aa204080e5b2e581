"""The numbers of an optimiser step, which the host reads when the device works on the next one.

A number that is read waits until the device has computed it. Read at once, it leaves the device
without work until the host has launched the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dskd.errors import NonFiniteError
from dskd.fused.per_token import Named, first_non_finite
from dskd.system import dist
from dskd.system.device import Fetched
from dskd.training.passes import LOSS, Shares


@dataclass(frozen=True)
class Numbers:
    """What a step's loss and gradient were.

    Attributes:
        loss: a global mean, as are ``means``, the parts of it by name.
        grad_norm: before clipping; None where DeepSpeed computes none.
        rates: what is logged beside them, by name; empty if the step is not logged.
    """

    loss: float
    means: dict[str, float]
    grad_norm: float | None
    rates: dict[str, float]


class Queued:
    """An optimiser step that the device may still have to do (collective).

    Args:
        number: of the step, from 1 on.
        shares: of its loss and parts, on the device.
        norm: of its gradient before clipping, on the device.
        weights: of this rank's losses, to be looked at if a loss is not finite.
        rates: what is logged beside its numbers, by name: numbers, or scalars on a device.
        applied: whether it is taken; if not, fp16 overflow skipped it.
        may_skip: whether one that is not taken is no error: with fp16 alone.
        stop: whether a signal came on one of the ranks.
    """

    def __init__(
        self,
        number: int,
        shares: Shares,
        norm: Tensor | None,
        weights: list[Named],
        rates: Mapping[str, float | Tensor],
        *,
        applied: bool,
        may_skip: bool,
        stop: bool,
    ) -> None:
        self.number, self.applied, self.stop = number, applied, stop
        self._may_skip = may_skip
        self._weights = weights
        self._names = sorted(shares)
        self._rates = dict(rates)
        self._computed = [name for name, rate in rates.items() if isinstance(rate, Tensor)]
        sums = dist.sum_over_ranks(torch.stack([shares[name] for name in self._names]))
        others = [rates[name].to(sums) for name in self._computed]
        others += [] if norm is None else [norm]
        self._values = Fetched(torch.cat([sums, *(each[None] for each in others)]))

    def read(self) -> Numbers:
        """The step's numbers, the same on all ranks, so that all stop or none; waits until it is
        done.

        Raises:
            NonFiniteError: one of them is NaN or infinite: the student is spoilt.
        """
        values = self._values.read()
        means = dict(zip(self._names, values, strict=False))
        rest, loss = values[len(means) :], means.pop(LOSS)
        norms = rest[len(self._computed) :]
        rates = self._rates | dict(zip(self._computed, rest, strict=False))
        for name, mean in means.items():  # before their sum: they say which of them it is
            refuse_non_finite(self.number, f"loss term '{name}'", mean, self._weights)
        refuse_non_finite(self.number, "the loss", loss, self._weights)
        grad_norm = norms[0] if norms else None
        if self.applied or not self._may_skip:
            shown = grad_norm if self.applied else math.nan
            refuse_non_finite(self.number, "the gradient's norm", shown)
        return Numbers(loss, means, grad_norm, rates)


def refuse_non_finite(
    step: int, name: str, value: float | None, weights: Iterable[Named] = ()
) -> None:
    """Stop where a number that all ranks share is out of range, before it reaches a checkpoint.

    Args:
        weights: of this rank's losses, the first bad one of which is named (then collective).

    Raises:
        NonFiniteError: it is.
    """
    if value is None or math.isfinite(value):
        return
    wrong = dist.gather_objects(first_non_finite(weights))
    because = next((f", and rank {n}'s {what}" for n, what in enumerate(wrong) if what), "")
    problem = NonFiniteError(
        f"step {step}: {name} is {value}{because}; the last checkpoint is intact"
    )
    problem.printed_by_other_rank = dist.rank() != 0
    raise problem
