"""The masks of fairseq, from which the code of several papers descends, bit for bit.

There are only 10^6 different masks, special tokens can be masked, and the mask token itself is
among the random ones; they are here to repeat the papers' runs.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.data.mask_draws import checked_mask_id
from dskd.data.tokenizers import special_ids, vocabulary_size
from dskd.errors import ConfigError
from dskd.settings.data import MaskShares

_SPECIALS = 4  # <s> <pad> </s> <unk> come first in a fairseq dictionary


class FairseqMask:
    """Masks one row, given its random numbers.

    Args:
        sampler: the value of ``data.masking.sampler``, for messages.

    Attributes:
        mask_id: the mask token.

    Raises:
        ConfigError: the vocabulary is not laid out as fairseq's.
    """

    def __init__(
        self, masking: MaskShares, tokenizer: PreTrainedTokenizerBase, sampler: str
    ) -> None:
        self.mask_id = checked_mask_id(masking, tokenizer)
        specials = set(np.flatnonzero(special_ids(tokenizer)).tolist()) - {self.mask_id}
        size = vocabulary_size(tokenizer)
        if specials != set(range(_SPECIALS)) or self.mask_id != size - 1:
            raise ConfigError(
                f"data.masking.sampler: {sampler} needs RoBERTa's vocabulary (special tokens 0..3 "
                f"and the mask token last); this tokenizer has special tokens {sorted(specials)}, "
                f"the mask token {self.mask_id} and {size} tokens"
            )
        self._masking = masking
        weights_V = np.ones(size)
        weights_V[:_SPECIALS] = 0
        self._weights_V = weights_V / weights_V.sum()

    def __call__(
        self,
        item: NDArray[np.int64],
        seed: int,
        besides: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """The selected positions and the masked row (``data/mask_tokens_dataset.py:97-172``).

        Args:
            item: the row, without padding.
            seed: of its random numbers, from :func:`fairseq_seed`.
            besides: bool, positions that are selected in any case; random others are, too.
        """
        settings, numbers = self._masking, np.random.RandomState(seed)
        size = len(item)
        chosen = np.zeros(size, dtype=bool) if besides is None else besides.copy()
        others = np.flatnonzero(~chosen)
        number = min(int(settings.probability * size + numbers.rand()), len(others))
        chosen[numbers.choice(others, number, replace=False)] = True
        kept = random = np.zeros(size, dtype=bool)
        share = settings.random + settings.keep
        if share > 0:
            other = chosen & (numbers.rand(size) < share)
            if settings.random == 0:
                kept = other
            elif settings.keep == 0:
                random = other
            else:
                decision = numbers.rand(size) < settings.keep / share
                kept, random = other & decision, other & ~decision
        seen = item.copy()
        seen[chosen & ~kept] = self.mask_id
        if random.any():
            seen[random] = numbers.choice(len(self._weights_V), random.sum(), p=self._weights_V)
        return chosen, seen


def fairseq_seed(*parts: int) -> int:
    """fairseq's seed of a row: ``int(hash(parts) % 1e6)`` as CPython 3.8 and later computes it."""
    return int(_tuple_hash(parts) % 1e6)  # the division is done in float64, as it was there


def _tuple_hash(parts: tuple[int, ...]) -> int:
    """CPython's hash of a tuple of integers since 3.8 (xxHash with two primes), on 64 bits."""
    bits = 0xFFFFFFFFFFFFFFFF
    first, second, fifth = 11400714785074694791, 14029467366897019727, 2870177450012600261
    state = fifth
    for part in parts:
        lane = abs(part) % (2**61 - 1)
        lane = -lane if part < 0 else lane
        state = (state + (-2 if lane == -1 else lane) * second) & bits
        state = ((state << 31) | (state >> 33)) & bits
        state = (state * first) & bits
    state = (state + (len(parts) ^ (fifth ^ 3527539))) & bits
    if state == bits:
        return 1546275796
    return state - 2**64 if state >= 2**63 else state
