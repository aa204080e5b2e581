"""How much of a teacher's probability the K kept tokens of a logit cache hold, over all positions.

Every position is looked at. Its mass is of float32; as floats from 0 to 1 are in the order of their
bits, percentiles are found exactly by counting these bits, the high half of all masses and then the
low half of those that share the high half of the one that is asked for: in little memory, however
large the cache.

Shape letters: N positions of a shard, K kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dskd.stores.logits import LogitCache, LogitLayout
from dskd.stores.store import shard_arrays

PERCENTILES = (5, 50)
_HALF = 1 << 16


@dataclass(frozen=True)
class KeptMass:
    """The mass of the kept tokens at a temperature.

    Attributes:
        mean: over all positions.
        percentiles: by per cent, the smallest mass that so many per cent of the positions do not
            exceed.
    """

    temperature: float
    mean: float
    percentiles: dict[int, float]


def kept_masses(cache: LogitCache, percentiles: Sequence[int] = PERCENTILES) -> list[KeptMass]:
    """The mass at temperature 1 and at each whose tail is stored; empty without positions."""
    counts = [_Counts(heat, percentiles) for heat in sorted({1.0, *cache.layout.temperatures})]
    for look in (_Counts.count_high, _Counts.count_low):
        for arrays in shard_arrays(cache.store):
            for each in counts:
                look(each, _mass_N(cache.layout, arrays, each.heat))
    return [each.result() for each in counts if each.count]


def _mass_N(
    layout: LogitLayout, arrays: Mapping[str, np.ndarray], heat: float
) -> NDArray[np.float32]:
    """The mass of the kept tokens at each position of a shard."""
    kept_N = np.exp(arrays["logprobs"].astype(np.float64) / heat).sum(1)
    if heat in layout.temperatures:
        tail_N = arrays["tail"][:, layout.temperatures.index(heat)].astype(np.float64)
        kept_N = kept_N / (kept_N + np.exp(tail_N))
    return np.minimum(kept_N, 1.0).astype(np.float32)  # 16 bits may add up to a little more


class _Counts:
    """The masses at one temperature, counted by their bits."""

    def __init__(self, heat: float, percentiles: Sequence[int]) -> None:
        self.heat = heat
        self.count = 0
        self._percentiles = percentiles
        self._sums: list[float] = []
        self._high_H = np.zeros(_HALF, np.int64)
        self._low: dict[int, NDArray[np.int64]] = {}

    def count_high(self, mass_N: NDArray[np.float32]) -> None:
        """The first look at some masses."""
        self.count += len(mass_N)
        self._sums.append(math.fsum(mass_N.tolist()))
        self._high_H += np.bincount(_bits(mass_N) >> 16, minlength=_HALF)

    def count_low(self, mass_N: NDArray[np.float32]) -> None:
        """The second look, when all have had the first."""
        bits_N = _bits(mass_N)
        for half in {self._half(cent) for cent in self._percentiles}:
            low_H = np.bincount(bits_N[bits_N >> 16 == half] & (_HALF - 1), minlength=_HALF)
            self._low[half] = self._low.get(half, 0) + low_H

    def result(self) -> KeptMass:
        """What was found."""
        found = {cent: self._percentile(cent) for cent in self._percentiles}
        return KeptMass(self.heat, math.fsum(self._sums) / self.count, found)

    def _rank(self, cent: int) -> int:
        """Which of the masses is asked for, from the smallest on, counted from 1."""
        return max(1, -(-self.count * cent // 100))

    def _half(self, cent: int) -> int:
        """The high half of its bits."""
        return int(np.searchsorted(self._high_H.cumsum(), self._rank(cent)))

    def _percentile(self, cent: int) -> float:
        half = self._half(cent)
        rest = self._rank(cent) - int(self._high_H[:half].sum())
        low = int(np.searchsorted(self._low[half].cumsum(), rest))
        return float(np.uint32(half << 16 | low).view(np.float32))


def _bits(mass_N: NDArray[np.float32]) -> NDArray[np.int64]:
    return mass_N.view(np.uint32).astype(np.int64)
