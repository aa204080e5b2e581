"""Rows of questions: how context, question and answer follow each other, and how they are cut.

A row is ``context question ANS answer END``, at most ``block`` tokens. It is stored once and read
in two ways (LAMOL: Sun et al. 2020, section 3.1): as a question, where ``answer END`` is learnt,
and behind the token of its task, where all of it is learnt. Neither is longer than the row.

What is too long is cut in one place, for row and prompt alike, so that labels stay at their tokens:
first the context at its end, so far that ``room`` tokens are left for an answer or all of a longer
one; then, if there is no context left, the answer at its end, but for ``room`` tokens with END. (In
the original a cut answer's labels were those of other tokens, and the longest prompts left one
token for the answer.)

Shape letter: S tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.data.foreign import raised_as
from dskd.data.questions import Question
from dskd.data.tokenizers import encoder, vocabulary_size
from dskd.data.written import Written
from dskd.errors import DataError
from dskd.settings.data import Data


class QuestionLayout(NamedTuple):
    """What rows and prompts are made by.

    Attributes:
        answer: id of the token between question and answer.
        end: id of the token behind the answer.
        block: most tokens of a row.
        room: tokens that a prompt leaves for an answer, ``end`` included.
    """

    answer: int
    end: int
    block: int
    room: int

    def row(self, context: list[int], question: list[int], answer: list[int]) -> list[int]:
        """A row of training.

        Raises:
            DataError: the question leaves too little room for an answer.
        """
        room = max(self.room, min(len(answer) + 1, self._left(question)))
        shown = self._cut(context, question, room)
        return [*shown, *question, self.answer, *answer[: room - 1], self.end]

    def prompt(self, context: list[int], question: list[int]) -> list[int]:
        """What an answer is written behind.

        Raises:
            DataError: the question leaves too little room for an answer.
        """
        return [*self._cut(context, question, self.room), *question, self.answer]

    def _left(self, question: list[int]) -> int:
        """Tokens that a question without a context leaves."""
        return self.block - len(question) - 1

    def _cut(self, context: list[int], question: list[int], room: int) -> list[int]:
        left = self._left(question) - room
        if left < 0:
            raise DataError(
                f"its question of {len(question)} tokens leaves no data.questions.room of "
                f"{self.room} in a row of data.block_size {self.block}"
            )
        return context[:left]

    def parsed(self, written_S: list[int]) -> list[int] | None:
        """The row that a model wrote behind a task's token, as one of training; None if it is none.

        Args:
            written_S: the tokens behind the task's; what stands behind an end token is not read.

        Returns:
            The tokens up to the end token, and that (there was none in a row that grew too long,
            which is kept). None: there is not exactly one answer token; question or answer may be
            empty, as in the original.
        """
        ends = written_S.index(self.end) if self.end in written_S else len(written_S)
        row = written_S[:ends]
        return [*row, self.end] if row.count(self.answer) == 1 else None


def layout_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> QuestionLayout:
    """The layout of a run's rows."""
    of = data.questions
    assert of is not None
    answer = tokenizer.convert_tokens_to_ids(of.answer_token)
    return QuestionLayout(answer, tokenizer.eos_token_id, data.block_size, of.room)


def task_ids(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of each of ``data.domains``, the id of the token behind which its rows are written."""
    of = data.questions
    assert of is not None
    return [tokenizer.convert_tokens_to_ids(of.task_token(domain)) for domain in data.domains]


class QuestionEncoder:
    """Questions to rows and prompts.

    Attributes:
        cut: number of rows that were cut.
        answers_cut: number of those whose answer was.
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = encoder(tokenizer)
        self._layout = layout_of(data, tokenizer)
        assert data.questions is not None
        self._names = data.questions.answer_token, tokenizer.eos_token
        self._size = vocabulary_size(tokenizer)
        self.cut = self.answers_cut = 0

    def __call__(self, found: Sequence[Question | Written]) -> list[NDArray[np.int64]]:
        """The rows of some questions, each with its first answer, and rows as they were written.

        Raises:
            DataError: a question has no tokens or too many of them, or what was written is no row;
                names its place.
        """
        rows = iter(self._of_questions([each for each in found if isinstance(each, Question)]))
        return [self._as_written(e) if isinstance(e, Written) else next(rows) for e in found]

    def _as_written(self, written: Written) -> NDArray[np.int64]:
        place, size = written.place, self._size
        ids = self._ids_of(written.text) if written.ids is None else written.ids
        for token in ids:
            if not 0 <= token < size:
                raise DataError(f"{place}: the token {token} is none of data.tokenizer's {size}")
        row = self._layout.parsed(ids)
        if row is None:
            count, named = ids.count(self._layout.answer), self._names[0]
            before = " before its end token" if self._layout.end in ids else ""
            raise DataError(f"{place}: not exactly one {named}{before}, in all {count}")
        if len(row) > self._layout.block:
            text = f"{len(row)} tokens, more than data.block_size {self._layout.block}"
            raise DataError(f"{place}: a row of {text}")
        return np.array(row, dtype=np.int64)

    def _ids_of(self, text: str) -> list[int]:
        """The tokens of a written text up to the end token, of which the answer token is known by
        its name."""
        answer, end = self._names
        parts = self._tokens(text.split(end, maxsplit=1)[0].split(answer))
        ids = parts[0]
        for part in parts[1:]:
            ids = [*ids, self._layout.answer, *part]
        return ids

    def _of_questions(self, found: Sequence[Question]) -> list[NDArray[np.int64]]:
        answers = self._tokens([question.answers[0] for question in found])
        rows = []
        for question, context, asked, answer in zip(
            found, *self._asked(found), answers, strict=True
        ):
            with _named(question):
                row = self._layout.row(context, asked, answer)
            written = row.index(self._layout.answer) + 1
            self.cut += len(row) < len(context) + len(asked) + len(answer) + 2
            self.answers_cut += len(row) - written <= len(answer)
            rows.append(np.array(row, dtype=np.int64))
        return rows

    def prompts(self, found: Sequence[Question]) -> list[NDArray[np.int64]]:
        """What the answers of some questions are written behind.

        Raises:
            DataError: as for their rows.
        """
        prompts = []
        for question, context, asked in zip(found, *self._asked(found), strict=True):
            with _named(question):
                prompts.append(np.array(self._layout.prompt(context, asked), dtype=np.int64))
        return prompts

    def longest_answer(self, found: Sequence[Question]) -> int:
        """Number of tokens of the longest right answer of some questions, at least 1."""
        tokens = self._tokens([answer for question in found for answer in question.answers])
        return max(1, *map(len, tokens))

    def _asked(self, found: Sequence[Question]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of the contexts and of the questions."""
        asked = self._tokens([question.text for question in found])
        for question, tokens in zip(found, asked, strict=True):
            if not tokens:
                raise DataError(f"{question.place}: data.tokenizer makes no token of its question")
        return self._tokens([question.context for question in found]), asked

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        with raised_as(DataError, "data.tokenizer: cannot encode the text"):
            encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        return [tokens.ids for tokens in encoded]


@contextmanager
def _named(question: Question) -> Iterator[None]:
    """A question that is too long is refused by its place."""
    try:
        yield
    except DataError as problem:
        raise DataError(f"{question.place}: {problem}") from problem
