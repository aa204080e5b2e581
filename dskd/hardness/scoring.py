"""Where a model is asked how well it knows the tokens of a row, and what it then sees.

A masked LM is shown the rows as they are and asked for every token in its place, in one pass (as in
the paper), or asked for masked tokens: in draw d of n for those whose random rank is d modulo n, so
that every token that may be masked is asked about exactly once. A causal LM is asked for the next
token, everywhere.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.counter import mix
from dskd.data.tokenizers import special_ids, tokenizer_fingerprint
from dskd.data.views import CausalView
from dskd.errors import ConfigError
from dskd.settings.data import Data, HardTokens
from dskd.system.files import fingerprint

_RANK = 6  # stream of random numbers, apart from those of the masks and of the order of rows
_ROUNDING = 1e-9  # 1 / (1 / 49) is more than 49


@dataclass(frozen=True)
class ScoringPlan:
    """Which places of a row are asked about in which draw; kept in the store as JSON values.

    Attributes:
        shown: ``token``: every token, as it stands there; ``mask``: every token but the special
            ones, masked; ``next``: the token after each place, of a causal LM.
        draws: number of passes that ask about everything once; more than 1 for ``mask`` only.
        seed: of the ranks, for ``mask`` only.
        special: ids of the special tokens, for ``mask`` only.
    """

    shown: Literal["token", "mask", "next"]
    draws: int = 1
    seed: int | None = None
    special: tuple[int, ...] = ()

    def tree(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "special": list(self.special)}

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> ScoringPlan:
        """The inverse of :meth:`tree`."""
        return ScoringPlan(**{**tree, "special": tuple(tree["special"])})

    def draw_of(
        self,
        row_ids_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The draw [B, T] in which each place is asked about, -1 where it never is.

        Args:
            row_ids_B: row ids.
            ids_BT: the rows themselves, right-padded.
            lengths_B: their lengths.
        """
        places_T = np.arange(ids_BT.shape[1])
        if self.shown != "mask":
            ends_B = lengths_B - (self.shown == "next")
            return np.where(places_T < ends_B[:, None], 0, -1)
        maskable_BT = ~self._is_special(ids_BT) & (places_T < lengths_B[:, None])
        keys_BT = mix(self.seed, _RANK, row_ids_B[:, None], places_T)
        keys_BT[~maskable_BT] = np.iinfo(np.uint64).max
        order_BT = np.argsort(keys_BT, axis=1, kind="stable")  # of equal keys the first place first
        rank_BT = np.empty_like(order_BT)
        np.put_along_axis(rank_BT, order_BT, np.broadcast_to(places_T, order_BT.shape), axis=1)
        return np.where(maskable_BT, rank_BT % self.draws, -1)

    def targets(self, ids_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token [B, T] that each place is asked for; anything where none is."""
        return np.roll(ids_BT, -1, axis=1) if self.shown == "next" else ids_BT

    def _is_special(self, ids_BT: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._special_S[np.minimum(ids_BT, len(self._special_S) - 1)]

    @cached_property
    def _special_S(self) -> NDArray[np.bool_]:
        """True for the special ids; its last entry stands for all larger ids."""
        special_S = np.zeros(max(self.special, default=-1) + 2, bool)
        special_S[list(self.special)] = True
        return special_S


class ScoringView:
    """A :class:`~dskd.data.views.View` whose labels are the tokens that are asked about.

    Args:
        plan: which places.
        tokenizer: of the rows; ``mask`` needs its mask token.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    def __init__(self, plan: ScoringPlan, tokenizer: PreTrainedTokenizerBase) -> None:
        self.plan = plan
        self.draws: int | None = plan.draws
        about: dict[str, Any] = {"view": "scoring", **plan.tree()}
        self._mask_id = 0
        if plan.shown == "mask":
            if tokenizer.mask_token_id is None:
                raise ConfigError(
                    "data.masking.shown: mask, but the tokenizer (data.tokenizer) has no mask token"
                )
            self._mask_id = tokenizer.mask_token_id
            about["tokenizer"] = tokenizer_fingerprint(tokenizer)
        self.fingerprint = fingerprint(about)

    def __call__(
        self,
        row_ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(inputs_BT, labels_BT)``; see :class:`~dskd.data.views.View`."""
        if self.plan.shown == "next":
            return CausalView()(row_ids_B, epochs_B, ids_BT, lengths_B)
        draw_of_BT = self.plan.draw_of(row_ids_B, ids_BT, lengths_B)
        asked_BT = draw_of_BT == (epochs_B % self.plan.draws)[:, None]
        labels_BT = np.where(asked_BT, ids_BT, IGNORE)
        if self.plan.shown == "token":
            return ids_BT, labels_BT
        return np.where(asked_BT, self._mask_id, ids_BT), labels_BT


def scoring_view(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> ScoringView:
    """The view by which a run's model is asked about its rows (``data.masking`` of hard tokens).

    Raises:
        ConfigError: the tokenizer has no mask token, and is to show masks.
    """
    masking = data.masking
    assert isinstance(masking, HardTokens), masking
    if data.objective == "causal":
        return ScoringView(ScoringPlan("next"), tokenizer)
    if masking.shown == "token":
        return ScoringView(ScoringPlan("token"), tokenizer)
    draws = math.ceil(1 / masking.probability - _ROUNDING)
    special = tuple(np.flatnonzero(special_ids(tokenizer)).tolist())
    return ScoringView(ScoringPlan("mask", draws, seed, special), tokenizer)
