"""Views: what a row looks like to the model in an epoch (inputs) and what is asked of it (labels).

Masked LMs see BERT's masks (Devlin et al. 2019, section 3.1: 80 % mask token, 10 % random, 10 % as
it was). Every mask is a pure function of (seed, draw, row id, position), ``draw`` being the epoch
modulo ``masking.draws``: it does not depend on ranks, batches or the Python at hand.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.counter import below, mix, uniform
from dskd.data.vocabulary import (
    continues_word,
    real_ids,
    special_ids,
    tokenizer_fingerprint,
    vocabulary_size,
)
from dskd.errors import ConfigError
from dskd.files import fingerprint
from dskd.settings import Data, Masking

_COUNT, _KEY, _KIND, _TOKEN = 1, 2, 3, 4  # one stream of random numbers for each decision
_FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk> come first in a fairseq dictionary


class View(Protocol):
    """Turns rows into inputs and labels; the same for the same arguments, always.

    ``draws`` is the number of different views of a row (epoch e shows number ``e % draws``), None
    for one per epoch; ``fingerprint`` covers everything else that the result depends on.
    """

    draws: int | None
    fingerprint: str

    def __call__(
        self,
        row_ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(inputs_BT, labels_BT)``, int64; labels are IGNORE where nothing is asked."""
        ...


class CausalView:
    """The next token at every position: ``labels[t] = ids[t + 1]``, IGNORE at a row's end."""

    draws: int | None = 1
    fingerprint: str = fingerprint({"view": "causal"})

    def __call__(
        self,
        row_ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(ids_BT, labels_BT)``; see :class:`View`."""
        labels_BT = np.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = ids_BT[:, 1:]
        labels_BT[np.arange(ids_BT.shape[1]) >= lengths_B[:, None] - 1] = IGNORE
        return ids_BT, labels_BT


class MaskedView:
    """BERT masking by counter-based random numbers.

    A row with c tokens that may be masked (all but the special ones) gets ``int(p * c + u)`` of
    them, u uniform in [0, 1), without replacement: those with the smallest random keys. With
    ``whole_word``, c counts words, and a word's tokens share its fate. Random tokens come evenly
    from the vocabulary without the special tokens.

    Raises:
        ConfigError: the shares exceed 1, the tokenizer has no mask token, or its words are unknown.
    """

    def __init__(self, masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        mask_id = _checked_mask_id(masking, tokenizer)
        special_V = special_ids(tokenizer)
        self.draws = masking.draws
        self.fingerprint = _masking_fingerprint(masking, tokenizer, seed)
        self._masking = masking
        self._seed = seed
        self._mask_id = mask_id
        self._special_V = special_V
        self._pool = np.setdiff1d(real_ids(tokenizer), np.flatnonzero(special_V))
        self._continues_V = continues_word(tokenizer) if masking.whole_word else None

    def __call__(
        self,
        row_ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(inputs_BT, labels_BT)``; see :class:`View`."""
        draws_B = epochs_B if self.draws is None else epochs_B % self.draws
        places_T = np.arange(ids_BT.shape[1])
        maskable_BT = ~self._special_V[ids_BT] & (places_T < lengths_B[:, None])
        heads_BT = self._heads(ids_BT, maskable_BT)
        # The place of the word's first token, at each of its tokens (of the token itself, if there
        # are no words).
        head_of_BT = np.maximum.accumulate(np.where(heads_BT, places_T, 0), axis=1)
        chosen_BT = self._choose(draws_B, row_ids_B, heads_BT)
        rows, places = np.nonzero(np.take_along_axis(chosen_BT, head_of_BT, axis=1) & maskable_BT)
        labels_BT = np.full_like(ids_BT, IGNORE)
        labels_BT[rows, places] = ids_BT[rows, places]
        inputs_BT = ids_BT.copy()
        inputs_BT[rows, places] = self._replace(
            draws_B[rows],
            row_ids_B[rows],
            places,
            head_of_BT[rows, places],
            ids_BT[rows, places],
        )
        return inputs_BT, labels_BT

    def _heads(
        self, ids_BT: NDArray[np.int64], maskable_BT: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """What is chosen among: all maskable tokens, or those that begin a word (that continue
        none, or follow a special token)."""
        if self._continues_V is None:
            return maskable_BT
        follows_BT = np.zeros_like(maskable_BT)
        follows_BT[:, 1:] = maskable_BT[:, :-1]
        return maskable_BT & ~(self._continues_V[ids_BT] & follows_BT)

    def _choose(
        self,
        draws_B: NDArray[np.int64],
        row_ids_B: NDArray[np.int64],
        heads_BT: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """``int(p * heads + u)`` of each row's heads, those with the smallest keys."""
        heads_B = heads_BT.sum(axis=1)
        u_B = uniform(self._seed, _COUNT, draws_B, row_ids_B)
        number_B = (self._masking.probability * heads_B + u_B).astype(np.int64)
        places_T = np.arange(heads_BT.shape[1])
        keys_BT = mix(self._seed, _KEY, draws_B[:, None], row_ids_B[:, None], places_T)
        keys_BT[~heads_BT] = np.iinfo(np.uint64).max
        # A threshold on sorted values, not an argsort: equal keys cannot be ordered two ways.
        largest_B1 = np.take_along_axis(
            np.sort(keys_BT, axis=1), np.maximum(number_B - 1, 0)[:, None], axis=1
        )
        return heads_BT & (keys_BT <= largest_B1) & (number_B > 0)[:, None]

    def _replace(
        self,
        draws: NDArray[np.int64],
        row_ids: NDArray[np.int64],
        places: NDArray[np.int64],
        fate_places: NDArray[np.int64],
        ids: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """What the model sees at the chosen places: the token itself, a random one, or the mask."""
        fate = uniform(self._seed, _KIND, draws, row_ids, fate_places)
        kept = fate < self._masking.keep
        random = ~kept & (fate < self._masking.keep + self._masking.random)
        drawn = self._pool[below(len(self._pool), self._seed, _TOKEN, draws, row_ids, places)]
        return np.where(kept, ids, np.where(random, drawn, self._mask_id))


class FairseqView:
    """The masks of the original Knowledge Inheritance code (fairseq 0.9), bit for bit.

    There are only 10^6 different masks, special tokens can be masked, and the mask token itself is
    among the random ones; choose it to repeat the paper's runs.

    Raises:
        ConfigError: the vocabulary is not laid out as fairseq's, or whole words are asked for.
    """

    def __init__(self, masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._mask_id = _checked_mask_id(masking, tokenizer)
        specials = set(np.flatnonzero(special_ids(tokenizer)).tolist()) - {self._mask_id}
        size = vocabulary_size(tokenizer)
        if specials != set(range(_FAIRSEQ_SPECIALS)) or self._mask_id != size - 1:
            raise ConfigError(
                "data.masking.sampler: fairseq needs RoBERTa's vocabulary (special tokens 0..3 and "
                f"the mask token last); this tokenizer has special tokens {sorted(specials)}, the "
                f"mask token {self._mask_id} and {size} tokens"
            )
        if masking.whole_word:
            raise ConfigError("data.masking.whole_word: the fairseq sampler selects tokens only")
        self.draws = masking.draws
        self.fingerprint = _masking_fingerprint(masking, tokenizer, seed)
        self._masking = masking
        self._seed = seed
        weights_V = np.ones(size)
        weights_V[:_FAIRSEQ_SPECIALS] = 0
        self._weights_V = weights_V / weights_V.sum()

    def __call__(
        self,
        row_ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        ids_BT: NDArray[np.int64],
        lengths_B: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(inputs_BT, labels_BT)``; see :class:`View`."""
        inputs_BT = ids_BT.copy()
        labels_BT = np.full_like(ids_BT, IGNORE)
        for b, (row, epoch, length) in enumerate(
            zip(row_ids_B.tolist(), epochs_B.tolist(), lengths_B.tolist(), strict=True)
        ):
            draw = epoch if self.draws is None else epoch % self.draws
            item = ids_BT[b, :length]
            chosen, seen = self._mask_row(item, draw, row)
            labels_BT[b, :length][chosen] = item[chosen]
            inputs_BT[b, :length] = seen
        return inputs_BT, labels_BT

    def _mask_row(
        self, item: NDArray[np.int64], draw: int, row: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """The selected positions and the masked row (``data/mask_tokens_dataset.py:97-172``)."""
        settings = self._masking
        size = len(item)
        numbers = np.random.RandomState(fairseq_seed(self._seed, draw, row))
        chosen = np.zeros(size, dtype=bool)
        chosen[
            numbers.choice(size, int(settings.probability * size + numbers.rand()), replace=False)
        ] = True
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
        seen[chosen & ~kept] = self._mask_id
        if random.any():
            seen[random] = numbers.choice(len(self._weights_V), random.sum(), p=self._weights_V)
        return chosen, seen


def fairseq_seed(*parts: int) -> int:
    """fairseq's seed of a row: ``int(hash(parts) % 1e6)`` as CPython 3.8 and later computes it."""
    return int(_tuple_hash(parts) % 1e6)  # the division is done in float64, as it was there


def view_for(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> View:
    """The view of a run's rows.

    Raises:
        ConfigError: the masking settings do not fit the tokenizer.
    """
    if data.objective == "causal":
        return CausalView()
    kind = FairseqView if data.masking.sampler == "fairseq" else MaskedView
    return kind(data.masking, tokenizer, seed)


def _checked_mask_id(masking: Masking, tokenizer: PreTrainedTokenizerBase) -> int:
    if masking.keep + masking.random > 1:
        raise ConfigError(
            f"data.masking: keep ({masking.keep}) and random ({masking.random}) exceed 1 together"
        )
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "data.tokenizer: the masked objective needs a tokenizer with a mask token"
        )
    return tokenizer.mask_token_id


def _masking_fingerprint(masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    return fingerprint(
        {
            "view": "masked",
            "masking": masking.model_dump(exclude={"draws"}),  # draw d is the same in any number
            "seed": seed,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
    )


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
