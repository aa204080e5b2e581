"""A corpus of fairseq as items to pack: its ids as they are, blank lines one for one.

The text encoder (``packing.Encoder``) is not in the way, so rows are those of fairseq's
TokenBlockDataset, but for items that are longer than a row: they are cut here, fairseq drops such
rows. A *document* is what stands between blank items; with the blanks behind it, up to the next
document, it goes to one split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.data.fairseq_vocabulary import check_tokenizer, read_dictionary
from dskd.data.indexed import Indexed, corpus_prefixes, dictionary_of
from dskd.data.packing import Items, cut
from dskd.data.sources import source_name
from dskd.data.tokenizers import end_id, start_id
from dskd.errors import ConfigError, DataError
from dskd.settings.data import FairseqSource

_TOKENS = 1 << 20
"""Of a stretch that is in memory at a time, about."""
_ITEMS = 1 << 18
"""Most items of a stretch."""
_START, _END = 0, 2
_EXAMPLE = 200
"""Tokens that are decoded to show how the first document begins."""

Side = Callable[[bool], str]
"""The split of documents that are held out, or are not."""


@dataclass(frozen=True)
class Stretch:
    """Some documents of a corpus, or a part of a long one.

    Attributes:
        items: by split.
        documents: by split, how many end here.
        longest: tokens of the longest document that ends here, without blank items.
        tokens: of all items.
    """

    items: dict[str, Items]
    documents: dict[str, int]
    longest: int
    tokens: int


class Corpus:
    """All parts of a corpus, one behind the other, in the vocabulary of a tokenizer.

    What can be told at once is checked at once: the dictionary, the index, ids here and there.
    Every id and every item's end is checked while rows are made.

    Args:
        source: the settings.
        tokenizer: of the rows.
        objective: ``masked`` or ``causal``.

    Attributes:
        tokens: of all items.

    Raises:
        DataError: a file is missing or damaged.
        ConfigError: ``dict.txt`` cannot be read, or is not the vocabulary of the tokenizer.
    """

    def __init__(
        self, source: FairseqSource, tokenizer: PreTrainedTokenizerBase, objective: str
    ) -> None:
        self._where = source_name(source)
        self._limit = source.documents
        self._prefixes = corpus_prefixes(source.path, self._where)
        self._dictionary = dictionary_of(self._prefixes[0])
        symbols = read_dictionary(self._dictionary)
        tokens = check_tokenizer(tokenizer, symbols, "data.tokenizer", str(self._dictionary))
        _check_ends(tokenizer, objective)
        self._vocabulary = len(tokens)
        self._tokenizer = tokenizer
        self._parts = [Indexed(prefix, self._where) for prefix in self._prefixes]
        self._begins = np.cumsum([0, *map(len, self._parts)])
        self.tokens = sum(part.tokens for part in self._parts)
        for prefix, part in zip(self._prefixes, self._parts, strict=True):
            self._refuse_beyond(part.sampled(), f"{prefix}.bin")
        self._read(0, 1)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def stretches(self, block: int, side: Side, fraction: float | None) -> Iterator[Stretch]:
        """All items in their order, stretch by stretch; an item goes to the split of its document.

        Args:
            block: most tokens of a row besides its start token; longer items are cut.
            side: names the splits.
            fraction: of the documents that are held out, by a hash of their ids; None: none is.

        Raises:
            DataError: an id is beyond the dictionary, an item has no end, or all are blank.
        """
        for bounds in self._groups():
            first, last = int(bounds[0]), int(bounds[-1])
            if len(bounds) > 2:
                yield self._several(bounds, block, side, fraction)
                continue
            held, count = self._one(first, last, fraction)
            name = side(held)
            for begin, end in self._windows(first, last):
                ids, sizes = self._read(begin, end)
                whole = end == last
                documents = {name: int(whole)}
                items = {name: _items(ids, sizes, block)}
                yield Stretch(items, documents, count if whole else 0, len(ids))

    def beginning(self) -> str:
        """How the first document begins, as text."""
        first, last = next(self._windows(0, len(self)))
        ids, _ = self._read(first, last)
        return self._tokenizer.decode(ids[ids != _END][:_EXAMPLE].tolist())

    def _several(
        self, bounds: NDArray[np.int64], block: int, side: Side, fraction: float | None
    ) -> Stretch:
        """Whole documents, which begin at ``bounds``; the last of these is the end."""
        ids, sizes = self._read(int(bounds[0]), int(bounds[-1]))
        counts_D = np.diff(bounds)
        of_items = np.repeat(np.arange(len(counts_D)), counts_D)
        whole_D = np.bincount(of_items, weights=sizes).astype(np.int64)
        text_D = whole_D - np.bincount(of_items, weights=sizes == 1).astype(np.int64)
        held_D = np.zeros(len(counts_D), dtype=bool)
        if fraction is not None:
            begins = (np.cumsum(whole_D) - whole_D).tolist()
            for d, (begin, count) in enumerate(zip(begins, text_D.tolist(), strict=True)):
                held_D[d] = _below(_digest(ids[begin : begin + count]).intdigest(), fraction)
        items, documents = {}, {}
        for held in (False, True):
            taken_D = held_D == held
            if not taken_D.any():
                continue
            taken = taken_D[of_items]
            own = (ids, sizes)
            if not taken.all():
                own = (ids[np.repeat(taken, sizes)], sizes[taken])
            items[side(held)] = _items(*own, block)
            documents[side(held)] = int(taken_D.sum())
        return Stretch(items, documents, int(text_D.max()), len(ids))

    def _one(self, first: int, last: int, fraction: float | None) -> tuple[bool, int]:
        """Whether one document of any length is held out, and its tokens."""
        digest, count = _digest(np.empty(0, dtype=np.int64)), 0
        for begin, end in self._windows(first, last):
            sizes = self._sizes(begin, end)
            count += int(sizes[sizes > 1].sum())
            if fraction is not None:
                ids, _ = self._read(begin, end)
                digest.update(_bytes(ids[np.repeat(sizes > 1, sizes)]))
        return fraction is not None and _below(digest.intdigest(), fraction), count

    def _groups(self) -> Iterator[NDArray[np.int64]]:
        """Where documents begin and, last, where the last one ends: of one document, however long,
        or of several that are a stretch together. Blank items ahead of all belong to the first."""
        left, begun, seen = self._limit, 0, False
        for found in self._document_begins():
            begins = found if seen else found[1:]
            seen |= len(found) > 0
            if not len(begins):
                continue
            for every in (np.array([begun, begins[0]]), begins):
                bounds = every if left is None else every[: left + 1]
                if left is not None:
                    left -= len(bounds) - 1
                if len(bounds) > 1:
                    yield bounds
            if left == 0:
                return
            begun = int(begins[-1])
        if not seen:
            raise DataError(f"{self._where}: no text in it")
        yield np.array([begun, len(self)])

    def _document_begins(self) -> Iterator[NDArray[np.int64]]:
        """The items that follow a blank one and are none, stretch by stretch."""
        before = True
        for first, last in self._windows(0, len(self)):
            blank = self._sizes(first, last) == 1
            yield first + np.flatnonzero(~blank & np.append(before, blank[:-1]))
            before = bool(blank[-1])

    def _windows(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Ranges of items of about ``_TOKENS`` tokens."""
        while first < last:
            ends = np.cumsum(self._sizes(first, min(first + _ITEMS, last)))
            count = max(1, int(np.searchsorted(ends, _TOKENS, "right")))
            yield first, first + count
            first += count

    def _sizes(self, first: int, last: int) -> NDArray[np.int64]:
        pieces = [part.sizes[a:b] for _, part, a, b in self._inside(first, last)]
        return np.concatenate(pieces).astype(np.int64)

    def _read(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and sizes of some items."""
        sizes = self._sizes(first, last)
        pieces = []
        for number, part, a, b in self._inside(first, last):
            ids, name = part.ids(a, b), f"{self._prefixes[number]}.bin"
            self._refuse_beyond(ids, name)
            ends = ids[np.cumsum(part.sizes[a:b], dtype=np.int64) - 1]
            if (ends != _END).any():
                item = a + int(np.argmax(ends != _END))
                text = f"item {item} ends with {ends[item - a]}, not with </s> (2)"
                raise DataError(f"{name}: {text}; it was written without ends of lines")
            pieces.append(ids)
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)), sizes

    def _inside(self, first: int, last: int) -> Iterator[tuple[int, Indexed, int, int]]:
        """Which items of which parts a range of all items is."""
        for number, part in enumerate(self._parts):
            begin = int(self._begins[number])
            a, b = max(first - begin, 0), min(last - begin, len(part))
            if a < b:
                yield number, part, a, b

    def _refuse_beyond(self, ids: NDArray[np.int64], name: str) -> None:
        for index in (int(ids.min()), int(ids.max())):
            if not 0 <= index < self._vocabulary:
                raise DataError(
                    f"{name}: it holds id {index}, but {self._dictionary} makes {self._vocabulary} "
                    "(4 special, its lines, <mask>): another dictionary, or damaged"
                )


def _check_ends(tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
    """Refuse a tokenizer by which rows begin or end otherwise than fairseq's."""
    end, start = end_id(tokenizer, objective), start_id(tokenizer, objective)
    if end != _END:
        raise ConfigError(f"data.tokenizer: its end token is {end}, fairseq's is 2 (</s>)")
    if objective == "masked" and start != _START:
        raise ConfigError(f"data.tokenizer: rows would begin with {start}, fairseq's do with 0")


def _items(ids: NDArray[np.int64], sizes: NDArray[np.int64], block: int) -> Items:
    each = sizes.tolist()
    if int(sizes.max()) > block:
        each = [piece for size in each for piece in cut(size, block)]
    return Items(ids, each, [size == 1 for size in each])  # no piece is of one token


def _digest(ids: NDArray[np.int64]) -> xxhash.xxh3_64:
    return xxhash.xxh3_64(_bytes(ids))


def _bytes(ids: NDArray[np.int64]) -> bytes:
    return ids.astype("<i8", copy=False).tobytes()


def _below(digest: int, fraction: float) -> bool:
    """As ``preparing`` holds out texts."""
    return digest < fraction * 2**64
