"""The named sets of a run, ``evaluation.sets``: rows for the method's metrics, or questions that
the exported model answers. What tells that these rows, or those of ``data.memory``, changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd.batch import UNLABELLED
from dskd.data.layouts import QuestionEncoder
from dskd.data.loader import evenly_spaced
from dskd.data.prepared import RowSet
from dskd.data.questions import Question, questions
from dskd.engine.stage import StageContext
from dskd.errors import DataError, DskdError
from dskd.settings.run import Run
from dskd.settings.sets import NamedSet
from dskd.system import dist
from dskd.system.files import fingerprint
from dskd.tasks.answers import check_detail
from dskd.training.evaluation import EvaluationSet


def read_further(context: StageContext) -> dict[str, str]:
    """The fingerprint of each set, and of ``data.memory`` if there is one, by the name of its
    setting (collective).

    Raises:
        DataError: a source is missing or unreadable, or its rows are not such as the run's.
    """
    found = {}
    if context.run.data.memory is not None:
        with _said_of("data.memory"):
            found["data.memory"] = context.rows_of(context.run.data.memory).fingerprint
    for name, own in context.run.evaluation.sets.items():
        with _said_of(f"evaluation.sets.{name}"):
            found[f"evaluation.sets.{name}"] = (
                _rows(context, own).fingerprint
                if own.metric is None
                else dist.on_rank0(lambda own=own: asked_questions(context, own).fingerprint)
            )
    return found


class AskedSet(NamedTuple):
    """The questions of a set that are asked, in order.

    Attributes:
        prompts: of each, what its answer is written behind.
        longest: most tokens of an answer.
        fingerprint: of the questions, with their answers.
    """

    questions: list[Question]
    prompts: list[NDArray[np.int64]]
    longest: int
    fingerprint: str


def asked_questions(context: StageContext, own: NamedSet) -> AskedSet:
    """Read the questions of a set with a metric of answers; on one rank.

    Raises:
        DataError: a file is missing or no such file, a question is too long, or its entry of an
            answer file is not what the metric takes; names the place.
    """
    assert own.metric is not None, own
    every = [question for source in own.sources for question in questions(source)]
    taken = [every[place] for place in evenly_spaced(len(every), own.rows)]
    for question in taken:
        check_detail(own.metric, question.detail, question.place)
    encode = QuestionEncoder(context.run.data, context.prepared.tokenizer)
    longest = encode.longest_answer(taken) if own.longest is None else own.longest
    about = fingerprint([question[:-1] for question in taken])
    return AskedSet(taken, encode.prompts(taken), longest, about)


def answer_sets(run: Run) -> dict[str, NamedSet]:
    """The sets whose questions are answered, by name."""
    return {name: own for name, own in run.evaluation.sets.items() if own.metric is not None}


def evaluation_sets(context: StageContext) -> list[EvaluationSet]:
    """Those that the method's metrics are of."""
    view, found = context.validation_view, []
    for name, own in context.run.evaluation.sets.items():
        if own.metric is None:
            rows = context.rows_of(own.sources)
            found.append(EvaluationSet(name, rows, view, own.rows, text=rows.text))
    return found


def _rows(context: StageContext, own: NamedSet) -> RowSet:
    rows = context.rows_of(own.sources)
    if rows.labelled:
        labels_R = rows.labels_B(evenly_spaced(len(rows), own.rows))
        if np.all(labels_R == UNLABELLED):
            raise DataError(f"none of its {len(labels_R)} rows has a label")
    return rows


@contextmanager
def _said_of(setting: str) -> Iterator[None]:
    """What is wrong inside is said of this setting, and not of the run's own sources."""
    try:
        yield
    except DskdError as problem:
        text = str(problem).removeprefix("data.sources: ")
        raise type(problem)(f"{setting}: {text}") from problem
