"""Scores of a model on labelled rows, each by its name and with its direction.

Those that a library has are its own: scikit-learn's F1 and Matthews correlation, scipy's Pearson
and Spearman correlations, which come with ``pip install 'dskd[tasks]'``.

Shape letter: R labelled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dskd.errors import ConfigError

Labels = Literal["classes", "numbers"]
"""What rows are labelled with: the index of a class, or a number to be predicted."""

BINS = 15
"""Of confidences, in the calibration error."""

_PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy"}
"""Names of libraries in the package index, by those that are imported."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of R rows, R >= 1, and what they are labelled with.

    Attributes:
        labels_R: classes, of any dtype, or numbers.
        predicted_R: the class of the largest probability, or the predicted number.
        confidence_R: float64, that probability; of numbers nothing.
        losses_R: float64, the cross entropy in nats, or the squared error.
        classes: how many classes there are, also those that are no row's; None: those that occur.
    """

    labels_R: NDArray[Any]
    predicted_R: NDArray[Any]
    confidence_R: NDArray[np.float64]
    losses_R: NDArray[np.float64]
    classes: int | None = None


@dataclass(frozen=True)
class TaskMetric:
    """One score.

    Attributes:
        compute: it, of the predictions.
        of: the labels that it is of; None: of either.
        higher_is_better: its direction.
        library: what it takes besides numpy.
        worst: what stands for it where a checkpoint is selected by it and it is undefined (nan);
            None: it never is.
        binary: whether it is of two classes only.
    """

    compute: Callable[[Predictions], float]
    of: Labels | None = "classes"
    higher_is_better: bool = True
    library: str | None = None
    worst: float | None = None
    binary: bool = False


def _loss(predictions: Predictions) -> float:
    return float(predictions.losses_R.mean())


def _accuracy(predictions: Predictions) -> float:
    return float((predictions.labels_R == predictions.predicted_R).mean())


def _classes(predictions: Predictions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return predictions.labels_R.astype(np.int64), predictions.predicted_R.astype(np.int64)


def _f1(average: str) -> Callable[[Predictions], float]:
    """F1 over all classes; ``macro``: the mean of each class's, 0 of one that no row has or is
    given; ``micro``: of all decisions together; ``binary``: that of the second class alone."""

    def compute(predictions: Predictions) -> float:
        from sklearn.metrics import f1_score

        known = predictions.classes
        labels = None if known is None or average == "binary" else np.arange(known)
        pair = _classes(predictions)
        return float(f1_score(*pair, labels=labels, average=average, zero_division=0.0))

    return compute


def _matthews(predictions: Predictions) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(*_classes(predictions)))


def _correlation(name: str) -> Callable[[Predictions], float]:
    """A correlation of scipy's: nan where either side does not vary, and minus infinity where what
    is predicted is no number, which ends a run."""

    def compute(predictions: Predictions) -> float:
        pair = (predictions.labels_R, predictions.predicted_R)
        if not np.isfinite(predictions.predicted_R).all():
            return -math.inf
        if any(np.ptp(side_R) == 0 for side_R in pair):
            return math.nan
        from scipy import stats

        return float(getattr(stats, name)(*pair).statistic)

    return compute


def _mean_of(*computes: Callable[[Predictions], float]) -> Callable[[Predictions], float]:
    return lambda predictions: sum(each(predictions) for each in computes) / len(computes)


def _calibration_error(predictions: Predictions) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): by how much confidence and accuracy
    differ, the mean over bins of equal width, each weighed by its rows."""
    confidence_R = predictions.confidence_R
    right_R = predictions.labels_R == predictions.predicted_R
    # bin m is (m / BINS, (m + 1) / BINS]
    bins_R = np.clip(np.ceil(confidence_R * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins_R, weights=right_R - confidence_R, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right_R))


_PEARSON, _SPEARMAN = _correlation("pearsonr"), _correlation("spearmanr")

METRICS: dict[str, TaskMetric] = {
    "loss": TaskMetric(_loss, of=None, higher_is_better=False),
    "accuracy": TaskMetric(_accuracy),
    "ece": TaskMetric(_calibration_error, higher_is_better=False),
    "macro_f1": TaskMetric(_f1("macro"), library="sklearn"),
    "micro_f1": TaskMetric(_f1("micro"), library="sklearn"),
    "matthews": TaskMetric(_matthews, library="sklearn"),
    "f1": TaskMetric(_f1("binary"), library="sklearn", binary=True),
    "accuracy_and_f1": TaskMetric(
        _mean_of(_accuracy, _f1("binary")), library="sklearn", binary=True
    ),
    "pearson": TaskMetric(_PEARSON, of="numbers", library="scipy", worst=-1.0),
    "spearman": TaskMetric(_SPEARMAN, of="numbers", library="scipy", worst=-1.0),
    "pearson_and_spearman": TaskMetric(
        _mean_of(_PEARSON, _SPEARMAN), of="numbers", library="scipy", worst=-1.0
    ),
}
"""By the names that settings and results give them."""

MetricName = Literal[
    "loss",
    "accuracy",
    "ece",
    "macro_f1",
    "micro_f1",
    "matthews",
    "f1",
    "accuracy_and_f1",
    "pearson",
    "spearman",
    "pearson_and_spearman",
]


def check_metric(name: MetricName, labels: Labels, setting: str) -> None:
    """Refuse a metric of other labels, or without its library.

    Args:
        setting: what names the metric, for the message.

    Raises:
        ConfigError: names the setting, the metric and what it takes.
    """
    metric = METRICS[name]
    if metric.of not in (None, labels):
        fitting = ", ".join(n for n, other in METRICS.items() if other.of in (None, labels))
        raise ConfigError(
            f"{setting}: {name} is of {metric.of}, but the labels are {labels}: {fitting}"
        )
    if metric.library is not None and find_spec(metric.library) is None:
        raise ConfigError(
            f"{setting}: {name} needs {_PACKAGES[metric.library]}: pip install 'dskd[tasks]'"
        )
