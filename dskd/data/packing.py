"""Packing: documents become sentences of tokens, and these become rows of at most ``block`` tokens.

The cuts are pure functions from sizes to ``(begin, end)`` token slices, as fairseq's
TokenBlockDataset makes them (Liu et al. 2019, section 4.2: FULL-SENTENCES and DOC-SENTENCES).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.data.foreign import raised_as
from dskd.data.tokenizers import encoder, end_id, start_id
from dskd.errors import DataError
from dskd.settings.data import Data

TokenSpan = tuple[int, int]


def complete(sizes: Sequence[int], block: int) -> list[TokenSpan]:
    """Whole sentences, greedily, until the next would not fit; documents are crossed.

    A sentence longer than ``block`` becomes a row of its own (:func:`cut` leaves none).
    """
    return _greedy(sizes, block, [False] * len(sizes), least=1)


def complete_doc(
    sizes: Sequence[int], block: int, separators: Sequence[bool] | None = None
) -> list[TokenSpan]:
    """As :func:`complete`, and a row ends with its document; rows of one token are dropped.

    Args:
        sizes: tokens of each sentence or document separator.
        block: most tokens of a row.
        separators: which entries separate documents (they go into no row); None: those of size 1,
            as in the original, where a lone end token stands between documents.
    """
    if separators is None:
        separators = [size == 1 for size in sizes]
    return _greedy(sizes, block, separators, least=2)


def _greedy(
    sizes: Sequence[int], block: int, separators: Sequence[bool], least: int
) -> list[TokenSpan]:
    """Whole sentences until a separator or one that would not fit; rows below ``least`` go."""
    slices: list[TokenSpan] = []
    begin = end = 0
    for size, separator in [*zip(sizes, separators, strict=True), (0, True)]:  # ends the last row
        if separator or end - begin + size > block:
            if end - begin >= least:
                slices.append((begin, end))
            begin = end
        end += size
        if separator:
            begin = end
    return slices


def contiguous(total: int, block: int) -> list[TokenSpan]:
    """One stream of ``total`` tokens, cut every ``block``; the last row may be shorter."""
    return [(begin, min(begin + block, total)) for begin in range(0, total, block)]


def cut(size: int, block: int) -> list[int]:
    """``size`` or, if it is above ``block``, full pieces and a rest of at least two tokens (one
    token would look like a document separator)."""
    if size <= block:
        return [size]
    full, rest = divmod(size, block)
    if rest == 1:
        return [block] * (full - 1) + [block - 1, 2]
    return [block] * full + [rest] * (rest > 0)


class Items(NamedTuple):
    """A stretch of text as tokens: sentences and document separators, one behind the other.

    A separator is one token long for masked LMs and empty for causal ones.
    """

    ids: NDArray[np.int64]
    sizes: list[int]
    separators: list[bool]


class Encoder:
    """Documents to items, in the form that the objective needs.

    Masked: a sentence is a line without the space around it, and ends with the end token; a lone
    end token follows each document, as the original's blank lines became. Causal: a sentence is a
    line with its line ends (the whole document if the packing is contiguous), and only a document's
    last one ends with the end token. A sentence above ``block`` tokens is cut; no token is lost.

    Attributes:
        block: most tokens of a row besides its start token.
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = encoder(tokenizer)
        self._end = end_id(tokenizer, data.objective)
        self._masked = data.objective == "masked"
        self._whole = data.packing == "contiguous"
        self.block = data.block_size - (start_id(tokenizer, data.objective) is not None)

    def __call__(self, texts: list[str]) -> Items:
        """The items of the documents; the tokenizer's own threads share the work."""
        documents = [self._sentences(text) for text in texts]
        flat = [sentence for document in documents for sentence in document]
        with raised_as(DataError, "data.tokenizer: cannot encode the text"):
            encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        items = Items([], [], [])
        for document in documents:
            found = [tokens for _ in document if (tokens := next(encoded).ids)]
            if found:
                self._append(items, found)
        return Items(np.array(items.ids, dtype=np.int64), items.sizes, items.separators)

    def _sentences(self, text: str) -> list[str]:
        if self._masked:
            return [sentence for line in text.splitlines() if (sentence := line.strip())]
        return [text] if self._whole else re.findall(r"[^\n]*\n+|[^\n]+", text)

    def _append(self, items: Items, sentences: list[list[int]]) -> None:
        """Add one document to ``items``, whose ids are still a list."""
        for number, tokens in enumerate(sentences, 1):
            ends = self._masked or number == len(sentences)
            items.ids.extend(tokens + [self._end] * ends)
            pieces = cut(len(tokens) + ends, self.block)
            items.sizes.extend(pieces)
            items.separators.extend([False] * len(pieces))
        items.ids.extend([self._end] * self._masked)
        items.sizes.append(int(self._masked))
        items.separators.append(True)


class Packer:
    """Packs one domain's text stretch by stretch, with the result of packing it in one go.

    Args:
        packing: ``complete``, ``complete_doc`` or ``contiguous``.
        block: most tokens of a row.
    """

    def __init__(self, packing: str, block: int) -> None:
        self._packing = packing
        self._block = block
        self._open = Items(np.empty(0, dtype=np.int64), [], [])

    def add(self, items: Items) -> list[NDArray[np.int64]]:
        """The rows that are certain after ``items``, which must end with a document, or with a
        sentence of two tokens or more."""
        items = Items(
            np.concatenate([self._open.ids, items.ids]),
            self._open.sizes + items.sizes,
            self._open.separators + items.separators,
        )
        slices = self._slices(items)
        begin = len(items.ids)
        if slices and (self._packing != "complete_doc" or not items.separators[-1]):  # it may grow
            begin = slices.pop()[0]
        starts = np.cumsum([0, *items.sizes])  # one of them is begin if sizes count
        first = int(np.searchsorted(starts, begin))
        self._open = Items(items.ids[begin:], items.sizes[first:], items.separators[first:])
        return [items.ids[a:b] for a, b in slices]

    def finish(self) -> list[NDArray[np.int64]]:
        """The row that was still open, if any."""
        return [self._open.ids[a:b] for a, b in self._slices(self._open)]

    def _slices(self, items: Items) -> list[TokenSpan]:
        if self._packing == "contiguous":
            return contiguous(len(items.ids), self._block)
        if self._packing == "complete":
            return complete(items.sizes, self._block)
        return complete_doc(items.sizes, self._block, items.separators)
