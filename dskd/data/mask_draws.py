"""The random numbers of masks: how many tokens, which of them, and what replaces each.

All are pure functions of (seed, draw, row id, position), so a mask does not depend on ranks,
batches or the Python at hand.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.counter import below, mix, uniform
from dskd.data.tokenizers import real_ids, special_ids
from dskd.errors import ConfigError
from dskd.settings.data import MaskShares

_COUNT, _KEY, _KIND, _TOKEN = 1, 2, 3, 4  # one stream of random numbers for each decision


def number(
    seed: int,
    share: float,
    draws_B: NDArray[np.int64],
    row_ids_B: NDArray[np.int64],
    counts_B: NDArray[np.int64],
) -> NDArray[np.int64]:
    """``int(share * count + u)``, u uniform in [0, 1): a row's own in a draw, for every share."""
    u_B = uniform(seed, _COUNT, draws_B, row_ids_B)
    return (share * counts_B + u_B).astype(np.int64)


def order_keys(
    seed: int, draws_B: NDArray[np.int64], row_ids_B: NDArray[np.int64], width: int
) -> NDArray[np.uint64]:
    """``keys_BT``, by which a row's tokens are in random order."""
    places_T = np.arange(width)
    return mix(seed, _KEY, draws_B[:, None], row_ids_B[:, None], places_T)


def smallest(keys_BT: NDArray[np.uint64], number_B: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Bool [B, T], the ``number`` smallest keys of each row, at most T."""
    # A threshold on sorted values, not an argsort: equal keys cannot be ordered two ways.
    last_B = np.clip(number_B - 1, 0, keys_BT.shape[1] - 1)
    largest_B1 = np.take_along_axis(np.sort(keys_BT, axis=1), last_B[:, None], axis=1)
    return (keys_BT <= largest_B1) & (number_B > 0)[:, None]


class Replacer:
    """Replaces the tokens that were chosen: some stay, some become random ones, most the mask.

    Random tokens come evenly from the vocabulary without the special tokens.

    Args:
        masking: its ``keep`` and ``random`` count here.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    def __init__(self, masking: MaskShares, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._mask_id = checked_mask_id(masking, tokenizer)
        self._keep, self._random = masking.keep, masking.random
        self._pool = np.setdiff1d(real_ids(tokenizer), np.flatnonzero(special_ids(tokenizer)))
        self._seed = seed

    def __call__(
        self,
        draws_B: NDArray[np.int64],
        row_ids_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        chosen_BT: NDArray[np.bool_],
        drawn_at_BT: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows without the chosen tokens, which become the labels.

        Args:
            chosen_BT: the tokens to replace.
            drawn_at_BT: of each token, the place whose draw (kept, random, masked) it shares;
                None: its own.

        Returns:
            inputs_BT, labels_BT: int64; labels are IGNORE where nothing is predicted.
        """
        rows, places = np.nonzero(chosen_BT)
        draws, row_ids, ids = draws_B[rows], row_ids_B[rows], ids_BT[rows, places]
        drawn_at = places if drawn_at_BT is None else drawn_at_BT[rows, places]
        replacement = uniform(self._seed, _KIND, draws, row_ids, drawn_at)
        kept = replacement < self._keep
        random = ~kept & (replacement < self._keep + self._random)
        drawn = self._pool[below(len(self._pool), self._seed, _TOKEN, draws, row_ids, places)]
        inputs_BT, labels_BT = ids_BT.copy(), np.full_like(ids_BT, IGNORE)
        inputs_BT[rows, places] = np.where(kept, ids, np.where(random, drawn, self._mask_id))
        labels_BT[rows, places] = ids
        return inputs_BT, labels_BT


def checked_mask_id(masking: MaskShares, tokenizer: PreTrainedTokenizerBase) -> int:
    """The mask token's id, to be put where a selected token is neither kept nor made random.

    Raises:
        ConfigError: there is none.
    """
    assert masking.keep + masking.random <= 1, masking  # settings.checks refuses it by name
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "data.tokenizer: the masked objective needs a tokenizer with a mask token"
        )
    return tokenizer.mask_token_id


def maskable(
    ids_BT: NDArray[np.int64], lengths_B: NDArray[np.int64], special_V: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Bool [B, T], the real tokens that are not special."""
    return ~special_V[ids_BT] & (np.arange(ids_BT.shape[1]) < lengths_B[:, None])
