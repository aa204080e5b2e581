"""Questions: what JSON lines and files in the layout of SQuAD hold, each with its right answers.

As by ``examples.py``, nothing is left out, and whatever makes no question is refused by file and
place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dskd.data.json_files import checked_text, json_rows, json_type, row_value
from dskd.data.sources import files, limited, source_name
from dskd.data.text_files import Advance
from dskd.data.unpacking import unpacked
from dskd.errors import ConfigError, DataError
from dskd.settings.examples import QuestionSource, SquadSource

AnyQuestionSource = QuestionSource | SquadSource


class Question(NamedTuple):
    """One question.

    Attributes:
        context: what is read for it; may be empty.
        text: the question itself.
        answers: one at least; all are right, and the first is trained on. May be empty texts.
        detail: its entry of an answer file (``dskd.tasks.answers``); None: there is no such file.
        place: file and line, or file and position, for messages.
    """

    context: str
    text: str
    answers: tuple[str, ...]
    detail: Any
    place: str

    @property
    def asked(self) -> str:
        """What is known before the answer: equal ones are held out together."""
        return f"{self.context}\n{self.text}"


def questions(source: AnyQuestionSource, advance: Advance = int) -> Iterator[Question]:
    """The questions of a source, in its order.

    Raises:
        DataError: a path is missing or matches nothing; a file is not UTF-8, no JSON, or of another
            layout; a text is missing; an answer file does not fit; there is no question at all. It
            names the file and the place.
        ConfigError: an answer file for more than one file.
    """
    if isinstance(source, QuestionSource):
        found = (q for path in files(source) for q in _of_lines(path, advance))
    else:
        found = _of_squad(source, advance)
    yield from limited(found, source, "question")


def _of_lines(path: Path, advance: Advance) -> Iterator[Question]:
    for place, row in json_rows(path, advance):
        yield question_of_row(row, place)


def question_of_row(row: Any, place: str) -> Question:
    """The question that a line of JSON is.

    Raises:
        DataError: it is none; names ``place``, where it stands.
    """
    text = checked_text(row_value(row, "question", place), place, "under the key 'question'")
    context = checked_text(row.get("context", ""), place, "under the key 'context'")
    if "answer" in row and "answers" in row:
        raise DataError(f"{place}: both 'answer' and 'answers'; one of the two")
    if "answers" in row:
        answers = _texts(row["answers"], place)
    else:
        answer = row_value(row, "answer", place)
        answers = (checked_text(answer, place, "under the key 'answer'"),)
    return _question(context, text, answers, None, place)


def _texts(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else json_type(value)
        raise DataError(f"{place}: no list of texts under the key 'answers' but {what}")
    return tuple(checked_text(text, place, "in 'answers'") for text in value)


def _question(
    context: str, text: str, answers: tuple[str, ...], detail: Any, place: str
) -> Question:
    if not text.strip():
        raise DataError(f"{place}: an empty question")
    return Question(context, text, answers, detail, place)


def _of_squad(source: SquadSource, advance: Advance) -> Iterator[Question]:
    paths = files(source)
    if source.answers is not None and len(paths) > 1:
        raise ConfigError(
            f"{source_name(source)}: {len(paths)} files, but `answers` is the answer file of one"
        )
    for path in paths:
        entries = list(_entries(path))
        details: list[Any] = [None] * len(entries)
        if source.answers is not None:
            details = _details(Path(source.answers).expanduser(), entries, path)
        for (place, context, entry), detail in zip(entries, details, strict=True):
            text = checked_text(_value(entry, "question", str, place), place, "in 'question'")
            yield _question(context, text, _answers(entry, place), detail, place)
        advance(path.stat().st_size)


def _entries(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, context and entry of each question of a file."""
    content = _json(path)
    for n, article in enumerate(_value(content, "data", list, str(path))):
        for m, paragraph in enumerate(_value(article, "paragraphs", list, f"{path}: data {n}")):
            where = f"{path}: data {n}, paragraph {m}"
            context = checked_text(_value(paragraph, "context", str, where), where, "in 'context'")
            for k, entry in enumerate(_value(paragraph, "qas", list, where)):
                yield f"{where}, question {k}", context, entry


def _answers(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    """The right answers; of an impossible question the empty text, as in the original."""
    found = _value(entry, "answers", list, place)
    if not found:
        if entry.get("is_impossible") is not True:
            raise DataError(f"{place}: no answer, but it is not said to be impossible")
        return ("",)
    return tuple(
        checked_text(_value(answer, "text", str, place), place, "in 'text'") for answer in found
    )


def _details(path: Path, entries: list[tuple[str, str, dict[str, Any]]], of: Path) -> list[Any]:
    """The entry of an answer file for each question; the n-th is that of the n-th smallest id."""
    found = _json(path)
    if not isinstance(found, list) or len(found) != len(entries):
        what = f"{len(found)} entries" if isinstance(found, list) else json_type(found)
        raise DataError(f"{path}: {what}, but {of} has {len(entries)} questions")
    ids = [entry.get("id") for _, _, entry in entries]
    kinds = {type(key) for key in ids}
    if not kinds <= {str} and not kinds <= {int}:
        raise DataError(f"{of}: its questions need an id each, all texts or all numbers")
    details: list[Any] = [None] * len(entries)
    for detail, index in zip(found, sorted(range(len(ids)), key=ids.__getitem__), strict=True):
        details[index] = detail
    return details


def _json(path: Path) -> Any:
    """The one value of a JSON file."""
    with unpacked(path) as stream:
        content = stream.read()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError is one, too
        raise DataError(f"{path}: not JSON: {problem}") from problem


def _value(of: Any, key: str, kind: type, place: str) -> Any:
    """What stands under a key, of the wanted type."""
    value = row_value(of, key, place, "value")
    if not isinstance(value, kind):
        wanted = {list: "list", str: "text"}[kind]
        raise DataError(f"{place}: no {wanted} under the key {key!r} but {json_type(value)}")
    return value
