"""Scores of answers that a model wrote, each by its name; all in per cent, more is better.

They are those of LAMOL (Sun et al. 2020) and L2KD (Chuang et al. 2020), who took most of them from
decaNLP (McCann et al. 2018); ``tests/golden`` has values of their code. BLEU is sacrebleu's, the
Porter stemmer of ROUGE is nltk's; both come with ``pip install 'dskd[tasks]'``.

Shape letter: R examples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from dskd.errors import ConfigError, DataError
from dskd.settings.sets import AnswerMetricName
from dskd.tasks.dialogues import dialogue_scores
from dskd.tasks.queries import QUERY_KEYS, is_query, same_query
from dskd.tasks.rouge import rouge_scores

Detail = Literal["query", "turn"]
"""What an example has besides its texts: the query that answers it (WikiSQL), or its turn in a
dialogue (WOZ)."""


@dataclass(frozen=True)
class Answers:
    """What a model answers R examples, R >= 1, and what would have been right.

    Attributes:
        predicted_R: the model's texts.
        references_R: of each example the right texts, at least one.
        details_R: of each example an entry of the answer file that WikiSQL and WOZ come with:
            ``{"sql": {"sel", "agg", "conds"}, "table": {"header"}, ..}``, or the name of the turn
            and its answer; None: there is no such file.
    """

    predicted_R: Sequence[str]
    references_R: Sequence[Sequence[str]]
    details_R: Sequence[Any] | None = None


@dataclass(frozen=True)
class AnswerMetric:
    """One score, and those that come with it.

    Attributes:
        compute: them, by name; the first has the metric's own name.
        detail: what it takes of each example besides the texts.
        library: what it takes besides numpy.
    """

    compute: Callable[[Answers], dict[str, float]]
    detail: Detail | None = None
    library: str | None = None


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNANSWERABLE = {"unanswerable"}


def normalised(text: str) -> str:
    """A text in lower case without punctuation, then without articles, its words one space apart
    (SQuAD; Rajpurkar et al. 2016, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(predicted: str, reference: str) -> float:
    """F1 of two bags of words, 0 to 1; 0 without a common word, also if both are empty."""
    words, wanted = predicted.split(), reference.split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _best(
    answers: Answers, score: Callable[[str, str], float], prepare: Callable[[str], str] = str
) -> float:
    """The mean over the examples of the best score that any reference gives, in per cent."""
    pairs = zip(answers.predicted_R, answers.references_R, strict=True)
    return _percent([max(score(prepare(p), prepare(r)) for r in refs) for p, refs in pairs])


def _equal(predicted: str, reference: str) -> float:
    return float(predicted == reference)


def _exact(answers: Answers) -> dict[str, float]:
    return {"em": _best(answers, _equal)}


def _normalised_exact(answers: Answers) -> dict[str, float]:
    return {"nem": _best(answers, _equal, normalised)}


def _normalised_f1(answers: Answers) -> dict[str, float]:
    return {"nf1": _best(answers, word_f1, normalised)}


def _words(text: str) -> set[str]:
    """The words of a text in lower case, without punctuation, articles and ``and``."""
    words = {word.translate(_PUNCTUATION) for word in text.lower().split()}
    return words - {"the", "a", "an", "and", ""}


def _corpus_f1(answers: Answers) -> dict[str, float]:
    """F1 over all examples of answers that have the words of all references together, and no other
    (QA-ZRE; Levy et al. 2017, section 5); ``unanswerable`` is no answer."""
    right = answered = answerable = 0
    for predicted, references in zip(answers.predicted_R, answers.references_R, strict=True):
        words = _words(predicted)
        wanted = set().union(*map(_words, references))
        answered += words != _UNANSWERABLE
        answerable += wanted != _UNANSWERABLE
        right += words == wanted != _UNANSWERABLE
    f1 = 200 * right / (answered + answerable) if right else 0.0
    precision, recall = (100 * right / n if right else 0.0 for n in (answered, answerable))
    return {"corpus_f1": f1, "precision": precision, "recall": recall}


def _bleu(answers: Answers) -> dict[str, float]:
    """BLEU of the whole corpus, letters in lower case; an example may have fewer references."""
    from sacrebleu import corpus_bleu

    most = max(map(len, answers.references_R))
    streams = [
        [refs[n] if n < len(refs) else None for refs in answers.references_R] for n in range(most)
    ]
    return {"bleu": corpus_bleu(list(answers.predicted_R), streams, lowercase=True).score}


def _rouge(answers: Answers) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L, and first the mean of the three."""
    pairs = zip(answers.predicted_R, answers.references_R, strict=True)
    each = [rouge_scores(predicted, references) for predicted, references in pairs]
    means = {name: _percent([scores[name].f for scores in each]) for name in each[0]}
    return {"avg_rouge": sum(means.values()) / len(means), **means}


def _details(answers: Answers) -> Sequence[Any]:
    assert answers.details_R is not None, "check_answer_metric and check_detail refuse it"
    return answers.details_R


def _logical_forms(answers: Answers) -> dict[str, float]:
    pairs = zip(answers.predicted_R, _details(answers), strict=True)
    return {"lfem": _percent([same_query(predicted, detail) for predicted, detail in pairs])}


def _dialogues(answers: Answers) -> dict[str, float]:
    names, wanted = zip(*_details(answers), strict=True)
    return dialogue_scores(names, answers.predicted_R, wanted)


ANSWER_METRICS: dict[str, AnswerMetric] = {
    "em": AnswerMetric(_exact),
    "nem": AnswerMetric(_normalised_exact),
    "nf1": AnswerMetric(_normalised_f1),
    "corpus_f1": AnswerMetric(_corpus_f1),
    "bleu": AnswerMetric(_bleu, library="sacrebleu"),
    "avg_rouge": AnswerMetric(_rouge, library="nltk"),
    "lfem": AnswerMetric(_logical_forms, detail="query"),
    "joint_goal_em": AnswerMetric(_dialogues, detail="turn"),
}
"""By the names that settings and results give them."""


def check_answer_metric(name: AnswerMetricName, details: bool, setting: str) -> None:
    """Refuse a metric without its library, or without the details that it takes.

    Args:
        details: whether the examples have an answer file.
        setting: what names the metric, for the message.

    Raises:
        ConfigError: names the setting, the metric and what it takes.
    """
    metric = ANSWER_METRICS[name]
    if metric.detail is not None and not details:
        what = {"query": "queries of WikiSQL", "turn": "turns of WOZ"}[metric.detail]
        raise ConfigError(f"{setting}: {name} is of {what}; name their file in `answers`")
    if metric.library is not None and find_spec(metric.library) is None:
        raise ConfigError(f"{setting}: {name} needs {metric.library}: pip install 'dskd[tasks]'")


def check_detail(name: AnswerMetricName, detail: Any, place: str) -> None:
    """Refuse an entry of an answer file that is not what a metric takes.

    Args:
        place: the file and which of its entries it is.

    Raises:
        DataError: names the place and what belongs there.
    """
    wanted = ANSWER_METRICS[name].detail
    if wanted == "query" and not is_query(detail):
        raise DataError(f"{place}: {name} takes {QUERY_KEYS}")
    turn = isinstance(detail, list) and len(detail) == 2 and all(isinstance(t, str) for t in detail)
    if wanted == "turn" and not turn:
        raise DataError(f'{place}: {name} takes ["NAME_OF_DIALOGUE_TURN", "ANSWER"]')
