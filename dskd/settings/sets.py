"""Settings of named sets: rows besides the validation rows that a student is evaluated on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dskd.settings.base import Section
from dskd.settings.data import Data, Source
from dskd.settings.labels import Columns

AnswerMetricName = Literal[
    "em", "nem", "nf1", "corpus_f1", "bleu", "avg_rouge", "lfem", "joint_goal_em"
]


class NamedSet(Section):
    """Rows of other sources, in the run's tokens, classes and domains; none of them is trained on
    or held out. Results are called ``<name>_<metric>``."""

    sources: list[Source] = Field(min_length=1)
    metric: AnswerMetricName | None = None
    """null: the rows are evaluated by the method's metrics, whenever the validation rows are. Else
    the exported model answers the questions, greedily, in the stage ``evaluate``, and this is how
    its answers are scored, in per cent: ``em`` (exact match), ``nem`` and ``nf1`` (exact match and
    F1 of words, both without case, punctuation and articles), ``corpus_f1``, ``bleu``,
    ``avg_rouge``, ``lfem`` (of WikiSQL) or ``joint_goal_em`` (of WOZ)."""
    rows: int | None = Field(None, ge=1)
    """Use only so many rows, evenly spaced; null: all."""
    longest: int | None = Field(None, ge=1)
    """Most tokens of an answer; null: as many as the longest reference of the set has."""


def named_sources(sets: dict[str, NamedSet]) -> list[tuple[str, Source]]:
    """All sources of the sets by the names of their settings."""
    return [
        (f"evaluation.sets.{name}.sources.{n}", source)
        for name, own in sets.items()
        for n, source in enumerate(own.sources)
    ]


def set_problems(sets: dict[str, NamedSet], data: Data) -> Iterator[tuple[str, str]]:
    """What is wrong with the sets of a run with these rows: names of settings, and what it is."""
    for name, own in sets.items():
        where = f"evaluation.sets.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            yield where, "the name of a set is made of letters, digits, . _ and -, at most 100"
        if name == "eval" or name.startswith(("eval_", "eval.")):
            text = "results of the validation rows are called eval_METRIC and eval.DOMAIN_METRIC"
            yield where, f"{text}; choose another"
        if own.metric is not None and data.questions is None:
            text = f"{own.metric} scores answers to questions, but the rows are none"
            yield f"{where}.metric", f"{text} (data.questions)"
        if own.metric is None and own.longest is not None:
            text = f"{own.longest} tokens of an answer, but without {where}.metric none is written"
            yield f"{where}.longest", text
        if data.objective != "classification":
            continue
        for n, source in enumerate(own.sources):
            if isinstance(source, Columns) and not source.labelled:
                text = "missing; without label or target there is nothing to evaluate by"
                yield f"{where}.sources.{n}.label", text
