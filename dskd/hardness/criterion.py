"""Which tokens of the training rows are hard, and which of these a bounded number of masks take.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dskd.data.mask_draws import smallest
from dskd.data.prepared import RowBatch, RowSet
from dskd.hardness.store import Hardness
from dskd.settings.data import HardTokens

_LARGEST_BITS = np.uint64(0x7FFFFFFF)  # of a float32 without its sign
_NOT_HARD = np.uint64(1 << 63)
_HALF = np.uint64(32)


HardnessOf = Callable[[int], Hardness]
"""Opens a store: 0 is the one made before training, g the one after ``g * refresh`` epochs."""


class HardCriterion:
    """Which tokens of some rows are hard, by the scores that their epoch's store holds; safe in
    threads.

    Args:
        masking: ``metric``, its ``threshold`` or ``quantile``, and ``refresh`` count here.
        hardness_of: opens the stores, when they are first needed.
        rowset: the training rows, of which the quantile is taken.
        special_V: bool, the special tokens, which the quantile leaves out.
    """

    def __init__(
        self,
        masking: HardTokens,
        hardness_of: HardnessOf,
        rowset: RowSet,
        special_V: NDArray[np.bool_],
    ) -> None:
        self._masking = masking
        self._hardness_of = hardness_of
        self._rowset = rowset
        self._special_V = special_V
        self._cuts: dict[int, float] = {}

    def __call__(self, rows: RowBatch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """How hard each token is, and whether it counts as hard.

        Returns:
            nll_BT: nats, NaN at tokens without a score.
            hard_BT: bool; False at tokens without a score; special tokens may be hard.
        """
        nll_BT = np.empty(rows.tokens_BT.shape, np.float32)
        hard_BT = np.empty(rows.tokens_BT.shape, bool)
        refresh = self._masking.refresh
        indices_B = np.zeros_like(rows.epochs_B) if refresh is None else rows.epochs_B // refresh
        for refresh_index in np.unique(indices_B).tolist():
            here = np.flatnonzero(indices_B == refresh_index)
            nll_BT[here], wrong_BT = self._hardness_of(refresh_index).read(rows.select(here))
            if self._masking.metric == "correctness":
                hard_BT[here] = wrong_BT
            else:
                hard_BT[here] = nll_BT[here] > self.cut(refresh_index)
        return nll_BT, hard_BT

    def cut(self, refresh_index: int) -> float:
        """The NLL that hard tokens exceed, for the metrics ``confidence`` and ``quantile``."""
        masking = self._masking
        if masking.metric == "confidence":
            return masking.threshold
        if refresh_index not in self._cuts:
            cut = self._hardness_of(refresh_index).quantile
            self._cuts[refresh_index] = cut(masking.quantile, self._rowset, self._special_V)
        return self._cuts[refresh_index]


def select(
    hard_BT: NDArray[np.bool_],
    nll_BT: NDArray[np.float32],
    maskable_BT: NDArray[np.bool_],
    least_B: NDArray[np.int64],
    most_B: NDArray[np.int64],
    keys_BT: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Choose what is masked: the hardest of the hard tokens, up to ``most``; where they are fewer
    than ``least``, all of them and random others.

    Args:
        hard_BT: which tokens are hard.
        nll_BT: how hard; looked at where a token is hard and maskable.
        maskable_BT: which may be chosen.
        least_B: so many of each row, if it has them.
        most_B: at most so many; not less than ``least_B``.
        keys_BT: random keys, which order equally hard tokens and those that are not hard.
    """
    hard_BT = hard_BT & maskable_BT
    number_B = np.maximum(np.minimum(hard_BT.sum(axis=1), most_B), least_B)
    # One key orders all: hard tokens come first, by the falling bits of an NLL that is not negative
    # (which order as its values do) and then by half a random key; next the others; then the rest.
    hardness_BT = nll_BT.astype(np.float32).view(np.uint32).astype(np.uint64)
    of_hard_BT = ((_LARGEST_BITS - hardness_BT) << _HALF) | (keys_BT >> _HALF)
    ranks_BT = np.where(hard_BT, of_hard_BT, _NOT_HARD | (keys_BT >> np.uint64(1)))
    ranks_BT[~maskable_BT] = np.iinfo(np.uint64).max
    return smallest(ranks_BT, number_B) & maskable_BT
