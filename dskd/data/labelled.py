"""What examples are made of: the classes of the data, and the tokens and label of each row.

Golden cases of the original (lancopku/MUKI, ``run_glue.py``) say how classes are dealt to parts.

Shape letter: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import UNLABELLED
from dskd.data.examples import Example, examples
from dskd.data.foreign import raised_as
from dskd.data.tokenizers import encoder
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data
from dskd.settings.labels import LabelPart
from dskd.settings.parsing import nearest

_SHOWN = 10


@dataclass(frozen=True)
class LabelSet:
    """The classes of the data.

    Attributes:
        classes: names of those that are taken, sorted by code point, in the order of the logits;
            none: rows have numbers.
        others: names of the further ones of the sources, whose rows are left out.
        own: what a label is not that is none of these, for the message.
    """

    classes: tuple[str, ...]
    others: frozenset[str] = frozenset()
    own: str = "that of no row of data.sources"

    def takes(self, example: Example) -> bool:
        """Whether an example is one of the rows.

        Raises:
            DataError: it is of another class than these and the further ones.
        """
        if not self.classes or example.label is None or example.label in self.classes:
            return True
        if example.label not in self.others:
            known = _shown(sorted({*self.classes, *self.others}))
            raise DataError(
                f"{example.place}: the label {example.label!r} is {self.own}; theirs are {known}"
            )
        return False


def label_set(data: Data) -> LabelSet:
    """The classes of ``data.sources``, as far as ``data.labels`` takes them; reads them once.

    Raises:
        ConfigError: ``data.labels`` names a class that no row has, or there are too few for it.
        DataError: all rows are of one class; see :func:`~dskd.data.examples.examples`.
    """
    if data.regression:
        return LabelSet(())
    labelled = data.labelled_sources
    found = {e.label for source in labelled for e in examples(source) if e.label is not None}
    names = sorted(map(str, found))
    if isinstance(data.labels, list):
        unknown = [name for name in data.labels if name not in found]
        if labelled and unknown:
            near = nearest(unknown[0], names)
            raise ConfigError(
                f"data.labels: {unknown[0]!r} is the label of no row of data.sources{near}; theirs "
                f"are {_shown(names)}"
            )
        taken = sorted(data.labels)
    elif isinstance(data.labels, LabelPart):
        part, of = data.labels.part, data.labels.of
        taken = parts_of(names, of)[part]
        if len(taken) < 2:
            raise ConfigError(
                f"data.labels: part {part} of {of} is {taken}, of {len(names)} classes: there is "
                "nothing to tell apart"
            )
    else:
        taken = names
    if not taken:
        raise DataError("data.sources: no row has a label; name the classes in data.labels")
    if len(taken) < 2:
        raise DataError(f"data.sources: {taken[0]!r} is the only label; it takes two at least")
    return LabelSet(tuple(taken), frozenset(found) - set(taken))


def parts_of(names: Sequence[str], count: int) -> list[list[str]]:
    """Names in ``count`` parts, by code point: each gets as many, the last one what is left."""
    ordered = sorted(names)
    size = len(ordered) // count
    parts = [ordered[n * size : (n + 1) * size] for n in range(count - 1)]
    return [*parts, ordered[(count - 1) * size :]]


class EncodedExamples(NamedTuple):
    """Rows of tokens and what belongs to them.

    Attributes:
        rows: the tokens of each.
        labels_R: int32, the index of each row's class, ``UNLABELLED`` without one; or float32, its
            number, nan without one.
        seconds_R: int32, where the tokens of its second text begin; its length, if its tokenizer
            marks none.
    """

    rows: list[NDArray[np.int64]]
    labels_R: NDArray[np.int32] | NDArray[np.float32]
    seconds_R: NDArray[np.int32]


class ExampleEncoder:
    """Examples to rows, by the tokenizer's own template; texts beyond ``data.block_size`` tokens
    are cut as by HuggingFace's ``truncation=True``, of a pair the longer one first.

    Attributes:
        cut: number of rows that were.
    """

    def __init__(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str]
    ) -> None:
        self._backend = encoder(tokenizer)
        with raised_as(ConfigError, f"data.block_size: {data.block_size} are too few tokens"):
            self._backend.enable_truncation(
                data.block_size, strategy="longest_first", direction=tokenizer.truncation_side
            )
        # As HuggingFace: a tokenizer may type its tokens and yet hand no types to a model.
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self._index = {name: index for index, name in enumerate(classes)}
        self.cut = 0

    def __call__(self, found: list[Example]) -> EncodedExamples:
        """The rows of some examples; the tokenizer's own threads share the work.

        Raises:
            DataError: a text has no tokens, or its template types that are not 0 and then 1.
        """
        texts = [e.text if e.pair is None else e.texts for e in found]
        with raised_as(DataError, "data.tokenizer: cannot encode the text"):
            encoded = self._backend.encode_batch(texts, add_special_tokens=True)
        rows, seconds = [], []
        for example, tokens in zip(found, encoded, strict=True):
            if all(tokens.special_tokens_mask):  # true of no tokens at all, too
                raise DataError(f"{example.place}: data.tokenizer makes no token of its text")
            rows.append(np.array(tokens.ids, dtype=np.int64))
            seconds.append(_second(tokens.type_ids, example) if self._typed else len(tokens.ids))
            self.cut += bool(tokens.overflowing)
        labels_R = self._labels([example.label for example in found])
        return EncodedExamples(rows, labels_R, np.array(seconds, dtype=np.int32))

    def _labels(self, labels: list[str | float | None]) -> NDArray[np.int32] | NDArray[np.float32]:
        if self._index:
            index = [UNLABELLED if name is None else self._index[name] for name in labels]
            return np.array(index, dtype=np.int32)
        return np.array([np.nan if n is None else n for n in labels], dtype=np.float32)


def _second(types: list[int], example: Example) -> int:
    """Where the tokens of type 1 begin."""
    begin = types.index(1) if 1 in types else len(types)
    if types != [0] * begin + [1] * (len(types) - begin):
        raise DataError(
            f"{example.place}: data.tokenizer gives its tokens types that are not 0 for the first "
            f"text and then 1 for the second: {types[:_SHOWN]}"
        )
    return begin


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
