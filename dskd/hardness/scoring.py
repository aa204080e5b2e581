"""Which tokens of a row a model scores (how well does it predict them?), and what it then sees.

A masked LM sees the rows as they are and scores every token in its place, in one pass (as in the
paper), or it scores masked tokens: in draw d of n those whose random rank is d modulo n, so that
every token that may be masked is scored exactly once. A causal LM scores every next token.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.counter import mix
from dskd.data.prepared import RowBatch
from dskd.data.tokenizers import special_ids, tokenizer_fingerprint
from dskd.data.views import CausalView, Shown, draws_of
from dskd.errors import ConfigError
from dskd.settings.data import Data, HardTokens
from dskd.system.files import fingerprint

_RANK = 6  # stream of random numbers, apart from those of the masks and of the order of rows
_ROUNDING = 1e-9  # 1 / (1 / 49) is more than 49


@dataclass(frozen=True)
class ScoringPlan:
    """Which places of a row are scored in which draw; kept in the store as JSON values.

    Attributes:
        shown: ``token``: every token, as it stands there; ``mask``: every token but the special
            ones, masked; ``next``: the token after each place, of a causal LM.
        draws: number of passes that score everything once; more than 1 for ``mask`` only.
        seed: of the ranks, for ``mask`` only.
        special: ids of the special tokens, for ``mask`` only.
    """

    shown: Literal["token", "mask", "next"]
    draws: int = 1
    seed: int | None = None
    special: tuple[int, ...] = ()

    def tree(self) -> dict[str, Any]:
        """The plan as a mapping of JSON values."""
        return {**asdict(self), "special": list(self.special)}

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> ScoringPlan:
        """The inverse of :meth:`tree`."""
        return ScoringPlan(**{**tree, "special": tuple(tree["special"])})

    def draw_of(self, rows: RowBatch) -> NDArray[np.int64]:
        """The draw [B, T] in which each place of the rows is scored, -1 where it never is."""
        places_T = np.arange(rows.tokens_BT.shape[1])
        if self.shown != "mask":
            ends_B = rows.lengths_B - (self.shown == "next")
            return np.where(places_T < ends_B[:, None], 0, -1)
        maskable_BT = ~np.isin(rows.tokens_BT, self.special) & rows.real_BT
        keys_BT = mix(self.seed, _RANK, rows.ids_B[:, None], places_T)
        keys_BT[~maskable_BT] = np.iinfo(np.uint64).max
        order_BT = np.argsort(keys_BT, axis=1, kind="stable")  # of equal keys the first place first
        rank_BT = np.empty_like(order_BT)
        np.put_along_axis(rank_BT, order_BT, np.broadcast_to(places_T, order_BT.shape), axis=1)
        return np.where(maskable_BT, rank_BT % self.draws, -1)

    def targets(self, rows: RowBatch) -> NDArray[np.int64]:
        """The token [B, T] that is scored at each place; anything where none is."""
        tokens_BT = rows.tokens_BT
        return np.roll(tokens_BT, -1, axis=1) if self.shown == "next" else tokens_BT


class ScoringView:
    """A :class:`~dskd.data.views.View` whose labels are the tokens that are scored.

    Args:
        plan: which tokens.
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

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows as the model sees them, the tokens to score as labels; see
        :class:`~dskd.data.views.View`."""
        if self.plan.shown == "next":
            return CausalView()(rows)
        tokens_BT, draws_B = rows.tokens_BT, draws_of(rows, self.plan.draws)
        scored_BT = self.plan.draw_of(rows) == draws_B[:, None]
        labels_BT = np.where(scored_BT, tokens_BT, IGNORE)
        if self.plan.shown == "token":
            return Shown(tokens_BT, labels_BT)
        return Shown(np.where(scored_BT, self._mask_id, tokens_BT), labels_BT)


def scoring_view(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> ScoringView:
    """The view of the rows that a run's model scores (``data.masking`` of hard tokens).

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
