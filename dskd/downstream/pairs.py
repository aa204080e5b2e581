"""How likely a language model finds sentences, and which of two it prefers: minimal pairs (BLiMP:
Warstadt et al. 2020), without any training.

Shape letters: S sentences, B rows, T tokens, N scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.batch import IGNORE, Batch
from dskd.data.foreign import raised_as
from dskd.data.json_files import checked_text, json_rows, row_value
from dskd.data.tokenizers import encoder, end_id, first_of, start_id
from dskd.errors import ConfigError, DataError
from dskd.models.families import is_causal, longest_row, positions_of
from dskd.models.frozen import evaluating
from dskd.ops import positions_ce


class Pair(NamedTuple):
    """Two sentences that differ in as little as can be, of which ``good`` is grammatical; the
    paradigm that they are of, and file and line."""

    good: str
    bad: str
    paradigm: str
    place: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of BLiMP's form: JSON lines with ``sentence_good``, ``sentence_bad`` and
    ``UID``; maybe compressed.

    Raises:
        DataError: the file cannot be read or has no pair, or a line is none; it is named.
    """
    pairs = []
    for place, row in json_rows(path, int):
        found = [
            checked_text(row_value(row, key, place, "text"), place, f"at {key!r}")
            for key in ("sentence_good", "sentence_bad", "UID")
        ]
        if not all(text.strip() for text in found):
            raise DataError(f"{place}: an empty text")
        pairs.append(Pair(*found, place))
    if not pairs:
        raise DataError(f"{path}: no pair in it")
    return pairs


class EncodedSentences(NamedTuple):
    """Sentences in tokens.

    Attributes:
        rows: of each sentence int64, with the special tokens around it.
        words: of each sentence, for each of its own tokens, of which word it is, by a number; as
            the tokenizer splits a text before it looks for tokens: punctuation is a word.
        before, behind: how many special tokens there are, the same for all.
    """

    rows: list[NDArray[np.int64]]
    words: list[list[int | None]]
    before: int
    behind: int


def encoded(
    sentences: Sequence[str],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    causal: bool,
) -> EncodedSentences:
    """The tokens of sentences: of a causal LM behind a start token (bos, or eos if there is none),
    of a masked one between those that rows begin and end with.

    Raises:
        ConfigError: the tokenizer has no start token for a causal LM, or no mask token.
        DataError: a sentence has no tokens; names its place.
    """
    if causal:
        start = first_of(tokenizer.bos_token_id, tokenizer.eos_token_id)
        if start is None:
            raise ConfigError("pairs: the tokenizer has neither bos nor eos for a start token")
        before, behind = [start], []
    else:
        if tokenizer.mask_token_id is None:
            raise ConfigError("pairs: the tokenizer has no mask token")
        ends = start_id(tokenizer, "masked"), end_id(tokenizer, "masked")
        before, behind = [[] if token is None else [token] for token in ends]
    with raised_as(DataError, "pairs: the tokenizer cannot encode the sentences"):
        found = encoder(tokenizer, "pairs").encode_batch(sentences, add_special_tokens=False)
    for place, each in zip(places, found, strict=True):
        if not each.ids:
            raise DataError(f"{place}: the tokenizer makes no token of a sentence")
    rows = [np.array([*before, *each.ids, *behind], dtype=np.int64) for each in found]
    return EncodedSentences(rows, [each.word_ids for each in found], len(before), len(behind))


class _Row(NamedTuple):
    """A row of a forward pass: the sentence that it is of, its tokens, and labels at those that are
    scored."""

    sentence: int
    ids_T: Tensor
    labels_T: Tensor


def log_probabilities(
    model: PreTrainedModel,
    sentences: EncodedSentences,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    within_word: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> NDArray[np.float64]:
    """What a model says of each sentence, in nats, whatever is beside it in a batch [S].

    Of a causal LM the sum of the log-probabilities of all tokens, each after those before it. Of a
    masked one the pseudo-log-likelihood (Salazar et al. 2020): the sum of each token's
    log-probability where it alone is masked.

    Args:
        model: for language modelling; it is evaluated where it is.
        rows: of one forward pass.
        within_word: for masked LMs: where a token is masked, the later ones of its word are, too
            (Kauf and Ivanova 2023), for else they give it away.
        progress: told of rows done, of all.

    Raises:
        ConfigError: ``within_word`` of a tokenizer that does not split a text into words.
    """
    causal = is_causal(model.config.model_type)
    made = _causal_rows(sentences) if causal else _masked_rows(sentences, tokenizer, within_word)
    scored = [len(row) - sentences.before - sentences.behind for row in sentences.rows]
    total = len(scored) if causal else sum(scored)
    device = next(model.parameters()).device
    pad = first_of(tokenizer.pad_token_id, 0)
    sums_S = torch.zeros(len(scored), dtype=torch.float64)
    done = 0
    with evaluating(model), torch.no_grad():
        while some := list(islice(made, rows)):
            batch = _batch(some, pad)
            positions = positions_of(model, batch.to(device))
            losses_N = positions_ce(positions).label_N.double().cpu()
            sums_S -= torch.zeros_like(sums_S).index_add_(0, _sentences(batch, some), losses_N)
            done += len(some)
            progress(done, total)
    return sums_S.numpy()


def _in_order(sentences: EncodedSentences) -> list[int]:
    """The sentences by length, so that little of a batch is padding."""
    lengths = [len(row) for row in sentences.rows]
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _causal_rows(sentences: EncodedSentences) -> Iterator[_Row]:
    for sentence in _in_order(sentences):
        ids_T = torch.from_numpy(sentences.rows[sentence])
        yield _Row(sentence, ids_T, torch.cat([ids_T[1:], torch.tensor([IGNORE])]))


def _masked_rows(
    sentences: EncodedSentences, tokenizer: PreTrainedTokenizerBase, within_word: bool
) -> Iterator[_Row]:
    if within_word:
        _refuse_without_words(tokenizer)
    for sentence in _in_order(sentences):
        whole_T, words = sentences.rows[sentence], sentences.words[sentence]
        for number, word in enumerate(words):
            place = sentences.before + number
            until = place + 1
            if within_word:
                until += sum(other == word for other in words[number + 1 :])
            ids_T = torch.from_numpy(whole_T.copy())
            ids_T[place:until] = tokenizer.mask_token_id
            labels_T = torch.full_like(ids_T, IGNORE)
            labels_T[place] = int(whole_T[place])
            yield _Row(sentence, ids_T, labels_T)


def _refuse_without_words(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.backend_tokenizer.pre_tokenizer is None:
        raise ConfigError("pairs: --within-word: this tokenizer does not split a text into words")


def _batch(rows: Sequence[_Row], pad: int) -> Batch:
    ids_B = torch.arange(len(rows))
    lengths_B1 = torch.tensor([[len(row.ids_T)] for row in rows])
    ids_BT = pad_sequence([row.ids_T for row in rows], batch_first=True, padding_value=pad)
    labels = [row.labels_T for row in rows]
    return Batch.of(
        row_ids_B=ids_B,
        domains_B=torch.zeros_like(ids_B),
        ids_BT=ids_BT,
        mask_BT=(torch.arange(ids_BT.shape[1]) < lengths_B1).long(),
        labels_BT=pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    )


def _sentences(batch: Batch, rows: Sequence[_Row]) -> Tensor:
    """Of each scored position the sentence that it is of, int64 [N]."""
    of_rows_B = torch.tensor([row.sentence for row in rows])
    return of_rows_B.repeat_interleave(batch.counts_B)


@dataclass(frozen=True)
class PairScores:
    """Which sentences of pairs a model prefers.

    Attributes:
        paradigms: of each paradigm in the order of the file, whether the good sentence of each pair
            is the likelier one; a tie is not.
    """

    paradigms: dict[str, list[bool]]

    @property
    def mean(self) -> float:
        """The mean over the paradigms of the share of pairs that are told right."""
        return mean(self.shares.values())

    @property
    def all_pairs(self) -> float:
        """The share of all pairs, as lm-evaluation-harness has it."""
        return mean(float(one) for right in self.paradigms.values() for one in right)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each paradigm."""
        return {name: mean(map(float, right)) for name, right in self.paradigms.items()}


def preferred(pairs: Sequence[Pair], sums_S: NDArray[np.float64]) -> PairScores:
    """What the scores of the sentences, good and bad by turns, say of their pairs."""
    found: dict[str, list[bool]] = {}
    for pair, (good, bad) in zip(pairs, sums_S.reshape(-1, 2).tolist(), strict=True):
        found.setdefault(pair.paradigm, []).append(good > bad)
    return PairScores(found)


def pair_sentences(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, causal: bool
) -> EncodedSentences:
    """The sentences of pairs, good and bad by turns, in tokens; see :func:`encoded`."""
    sentences = [text for pair in pairs for text in (pair.good, pair.bad)]
    places = [pair.place for pair in pairs for _ in range(2)]
    return encoded(sentences, places, tokenizer, causal)


def refuse_longer(sentences: EncodedSentences, pairs: Sequence[Pair], model: Any) -> None:
    """Refuse sentences of more tokens than the model has positions.

    Raises:
        DataError: names the first one.
    """
    longest = longest_row(model.config)
    for number, row in enumerate(sentences.rows):
        if len(row) > longest:
            place = pairs[number // 2].place
            raise DataError(f"{place}: {len(row)} tokens, but the model has {longest} positions")
