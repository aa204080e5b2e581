"""Dropout whose masks are a function of (a row's seed, which dropout of the model, the place in the
row).

So what a model makes of a row with dropout depends neither on the rows beside it nor on padding,
ranks or the order of passes. The model attends eagerly (a fused attention drops inside its kernel),
and its dropouts have the rows in their first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dskd.data.counter import mix

_AXES = 8  # stream of random numbers, apart from those of masks, rows and seeds
_CALL, *_STEPS = (mix(_AXES, np.arange(5)).astype(np.int64) | 1).tolist()
"""Odd numbers by which the key grows with the call and along each axis. They have nothing to do
with each other: by multiples of one, or of a small number, places on a diagonal would have one key,
and one mask."""
_FIRST, _SECOND = (  # of SplitMix64's finaliser, as in data/counter.py
    np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64).astype(np.int64).tolist()
)
_BITS = 24  # of a random number that is compared with the probability
_AT_ONCE = 1 << 20
"""Places whose random numbers exist at once, but at least those of a row: they take 8 bytes each,
4 times as much as what is dropped in 16 bits, and stay in a CPU's cache."""


class CounterDropout(TorchFunctionMode):
    """Replaces ``torch.nn.functional.dropout``, and so ``nn.Dropout``, while it is entered.

    Args:
        seeds_B: int64, of each row, on the device of the model; copies of a row that are to be
            dropped differently have different ones.
    """

    def __init__(self, seeds_B: Tensor) -> None:
        super().__init__()
        self._seeds_B = seeds_B
        self._calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Dropout by the counter's masks; every other function as it is."""
        kwargs = kwargs or {}
        if function is dropout:
            return self._dropout(*args, **kwargs)
        if function is scaled_dot_product_attention:
            assert not kwargs.get("dropout_p"), "dropout inside of a fused attention"
        return function(*args, **kwargs)

    def _dropout(
        self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        del inplace  # a copy serves as well
        if not training or p == 0.0:
            return values
        assert len(values) == len(self._seeds_B), "a dropout has something else than rows first"
        assert values.dim() <= 1 + len(_STEPS), values.shape
        self._calls += 1
        seeds_B = self._seeds_B + self._calls * _CALL % 2**63
        found = values / (1.0 - p)
        rows = max(1, _AT_ONCE // max(values[:1].numel(), 1))
        for first in range(0, len(found), rows):
            some = slice(first, first + rows)
            random = _random(seeds_B[some], found.shape[1:])
            found[some].masked_fill_(random < round(p * 2**_BITS), 0.0)
        return found


def _random(seeds_S: Tensor, shape: Sequence[int]) -> Tensor:
    """A random number of ``_BITS`` bits for each place of each row [S, ...]."""
    key = seeds_S
    for size, step in zip(shape, _STEPS, strict=False):
        key = key[..., None] + torch.arange(size, device=key.device) * step
    return (finalised(key) >> (64 - _BITS)) & (1 << _BITS) - 1


def finalised(key: Tensor) -> Tensor:
    """64 random bits of each key (int64), in place of the key."""
    key ^= (key >> 30) & (1 << 34) - 1  # shifted without the sign
    key *= _FIRST
    key ^= (key >> 27) & (1 << 37) - 1
    key *= _SECOND
    key ^= (key >> 31) & (1 << 33) - 1
    return key
