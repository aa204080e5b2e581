"""Counter-based random numbers: a pure function of integers, the same on every machine.

Every number is a hash of its coordinates (seed, epoch, row, position ...), so there is no state to
keep and any part of a draw can be made alone. Only wrapping uint64 arithmetic is used, which numpy
does alike everywhere. The mixing is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_BITS = 0xFFFFFFFFFFFFFFFF


def mix(*parts: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers to uint64, elementwise over the broadcast shape of ``parts``.

    Args:
        parts: integers or integer arrays; Python integers count modulo 2^64. Put the parts of
            smaller shape first: each part costs one pass over the shape so far.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _finalise((state ^ _unsigned(part)) + _GAMMA)
    return np.asarray(state)


def uniform(*parts: ArrayLike) -> NDArray[np.float64]:
    """``mix(*parts)`` as float64 in [0, 1), multiples of 2^-53."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit: int, *parts: ArrayLike) -> NDArray[np.int64]:
    """``mix(*parts)`` as int64 in [0, limit), by the high bits (``limit`` at most 2^31)."""
    high = mix(*parts) >> np.uint64(32)
    return ((high * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def _unsigned(part: ArrayLike) -> NDArray[np.uint64] | np.uint64:
    if isinstance(part, int):
        return np.uint64(part & _BITS)
    array = np.asarray(part)
    assert array.dtype.kind in "iu", f"counters are integers, not {array.dtype}"
    return array.astype(np.uint64)
