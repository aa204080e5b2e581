"""What the trials of a grid come to: the rate that is chosen, means over seeds, differences of
models seed by seed. Nothing here reads a file or trains.

Scores are in the direction that a metric has: ``higher`` says whether larger ones are better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

LEAST = 5
"""Seeds of which an interval is given: of fewer it says nothing."""
_CONFIDENCE = 0.95


class Scored(NamedTuple):
    """One trial.

    Attributes:
        lr, seed: of it.
        selecting: its best score on the rows that select; nan where it is undefined, or the trial
            diverged.
        reported: scores by ``split_metric``, the same names for all trials of a task; nan as above.
        failed: whether it says the same of every row, or diverged.
    """

    lr: float
    seed: int
    selecting: float
    reported: Mapping[str, float]
    failed: bool = False


def chosen_rate(trials: Sequence[Scored], *, higher: bool) -> float:
    """The rate whose mean selecting score over all seeds is the best, the smallest of equals; a
    mean with a score that is nan is worse than any other."""

    def key(lr: float) -> tuple[float, float]:
        # Shares of rows whose sums are equal differ in their last bits.
        mean = round(fmean(trial.selecting for trial in trials if trial.lr == lr), 12)
        worth = -math.inf if math.isnan(mean) else (mean if higher else -mean)
        return worth, -lr

    return max({trial.lr for trial in trials}, key=key)


def summary(trials: Sequence[Scored], *, higher: bool) -> dict[str, Any]:
    """The grid of a model on a task: the chosen rate, and of its trials the reported scores with
    their mean, sample standard deviation (None of a single seed) and median.

    ``failed`` counts the failed trials of the chosen rate, which stay in the mean;
    ``failed_of_all`` those of all rates.
    """
    lr = chosen_rate(trials, higher=higher)
    own = sorted((trial for trial in trials if trial.lr == lr), key=lambda trial: trial.seed)
    names = own[0].reported
    return {
        "lr": lr,
        "seeds": [trial.seed for trial in own],
        "selecting": [trial.selecting for trial in own],
        "failed": sum(trial.failed for trial in own),
        "failed_of_all": sum(trial.failed for trial in trials),
        "trials": len(trials),
        "scores": {name: spread([trial.reported[name] for trial in own]) for name in names},
        "rates": {
            f"{rate:g}": fmean(trial.selecting for trial in trials if trial.lr == rate)
            for rate in sorted({trial.lr for trial in trials})
        },
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values with their mean, sample standard deviation (None of a single one) and median, which
    are nan if one of them is."""
    found: dict[str, Any] = {"values": list(values), "mean": fmean(values)}
    if any(map(math.isnan, values)):
        return found | {"sd": math.nan, "median": math.nan}
    return found | {"sd": stdev(values) if len(values) > 1 else None, "median": median(values)}


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """The differences of two models on the same seeds, first minus second: their mean, sample
    standard deviation, and from :data:`LEAST` seeds on the two-sided t interval of 95 per cent."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    found = spread(differences)
    count, sd = len(differences), found["sd"]
    interval = None
    if count >= LEAST:
        from scipy.stats import t

        half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * sd / math.sqrt(count)
        interval = [found["mean"] - half, found["mean"] + half]
    return {"differences": differences, "mean": found["mean"], "sd": sd, "interval": interval}


def comparisons(models: Mapping[str, Mapping[str, Any]], score: str) -> list[dict[str, Any]]:
    """Each two models' difference on a task.

    Args:
        models: of each what :func:`summary` says.
        score: which of its scores.
    """
    values = {name: of["scores"][score]["values"] for name, of in models.items()}
    return [
        {"first": one, "second": other, **paired(values[one], values[other])}
        for one, other in combinations(values, 2)
    ]


GLUE_8 = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")


def glue_average(numbers: Mapping[str, float]) -> tuple[str, float] | None:
    """The mean over the tasks of GLUE, each of one number, and over which: all nine, or the usual
    eight without WNLI; None where one of those is missing."""
    for names, what in (((*GLUE_8, "wnli"), "9 tasks"), (GLUE_8, "8 tasks, without WNLI")):
        if all(name in numbers for name in names):
            return what, fmean(numbers[name] for name in names)
    return None
