"""What a student is evaluated by: sums over its supervised positions or what is kept of each of
them, and the numbers made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dskd.batch import TARGETS, UNLABELLED, Batch, Positions
from dskd.data.bytes_of_text import Text
from dskd.data.loader import evenly_spaced
from dskd.data.prepared import Prepared
from dskd.engine.checkpoints import Selection
from dskd.engine.stage import StageContext
from dskd.errors import ConfigError, DataError
from dskd.ops import positions_ce
from dskd.settings.base import Section
from dskd.settings.run import Run
from dskd.tasks.metrics import METRICS, MetricName, Predictions, check_metric


@dataclass(frozen=True)
class Metric:
    """Numbers about a student's supervised positions.

    Attributes:
        sums: of the positions of one batch, float64 [S] with S the same for every batch: what is
            added up over batches and ranks.
        results: what the S sums over all rows come to, by name. Whole numbers are counts, which
            the log does not show.
    """

    sums: Callable[[Positions, Batch], Tensor]
    results: Callable[[Sequence[float]], dict[str, float]]


@dataclass(frozen=True)
class ValueMetric:
    """Numbers about all supervised positions together, which no sums tell: a rank correlation.

    What it keeps stays in memory until the end of an evaluation, so it is for labelled rows, which
    have one supervised position each, rather than for tokens.

    Attributes:
        values: of the positions of one batch, float64 [N, S] with S the same for every batch.
        results: what the values [P, S] of all positions come to, by name; P >= 1, in the order of
            the rows.
        of_part: the same of a part of the rows, a domain's, where what all rows need may be
            missing; None: as ``results``.
    """

    values: Callable[[Positions, Batch], Tensor]
    results: Callable[[NDArray[np.float64]], dict[str, float]]
    of_part: Callable[[NDArray[np.float64]], dict[str, float]] | None = None


AnyMetric = Metric | ValueMetric


def _lm_sums(positions: Positions, batch: Batch) -> Tensor:
    del batch
    nll = positions_ce(positions).total.double()
    return torch.stack([nll, nll.new_tensor(len(positions.labels_N))])


def _lm_results(sums: Sequence[float]) -> dict[str, float]:
    nll, tokens = sums
    mean = nll / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf  # beyond, exp overflows
    return {"nll": mean, "bits": mean / math.log(2), "ppl": ppl, "tokens": int(tokens)}


LM_LOSS = Metric(_lm_sums, _lm_results)
"""The plain LM loss of a supervised position: ``nll`` (nats), ``bits``, ``ppl``, and ``tokens``,
the number of positions."""

BITS_PER_BYTE = "bits_per_byte"
"""The LM loss of a causal model in bits, per byte of the text as UTF-8, whatever its tokens are."""


def bits_per_byte(results: Mapping[str, float], text: Text) -> dict[str, float]:
    """What :data:`LM_LOSS` comes to per byte of a text, of all whose rows the results are.

    A token's mean bits, times the tokens, divided by the bytes (Gao et al. 2020, "The Pile",
    section 3.1): all bytes of the documents count, and all tokens, those that end documents among
    them. The first token of a row without a start token, which nothing predicts, so counts as the
    mean of the others do; with one, this is the sum over all positions.
    """
    return {BITS_PER_BYTE: results["bits"] * text.tokens / text.bytes}


TEACHER_KL = "teacher_kl"
"""Of a method of panels: the KL of the student from what the method makes of its teachers, as its
loss has it but for weights, in nats; a mean over the rows."""

BY_TEACHERS = Selection(f"eval_{TEACHER_KL}")
"""Selection without labels."""


def has_labels(run: Run, prepared: Prepared) -> bool:
    """Whether one of the validation rows that a run's student is evaluated on has a label."""
    ids_R = evenly_spaced(len(prepared.validation), run.evaluation.rows)
    return bool((prepared.validation.labels_B(ids_R) != UNLABELLED).any())


class RowScores(Section):
    """Settings of a method of labelled rows: what its student is evaluated by. The loss is always
    among it, as ``loss``: the cross entropy in nats, or the squared error."""

    metric: MetricName = "accuracy"
    """Which metric selects the best checkpoint, each in its direction: of classes ``accuracy``,
    ``ece`` (expected calibration error), ``macro_f1``, ``micro_f1`` or ``matthews``, of two classes
    ``f1`` (of the second in the order of their names: ``1`` of ``0`` and ``1``, but
    ``not_duplicate`` of ``duplicate`` and ``not_duplicate``) or ``accuracy_and_f1`` (their mean),
    of numbers ``pearson``, ``spearman`` or ``pearson_and_spearman``, of either ``loss``."""
    further_metrics: list[MetricName] = Field(default_factory=list)
    """More of them, which are evaluated besides."""

    def metrics(self, context: StageContext) -> tuple[AnyMetric, ...]:
        """All that are named.

        Raises:
            ConfigError: one of them is of two classes, and the rows have others.
        """
        return (self.row_metric({}, len(context.prepared.classes or ()) or None),)

    def row_metric(
        self,
        within: Mapping[str, Collection[int]],
        classes: int | None = None,
        *,
        required: bool = True,
    ) -> ValueMetric:
        """All that are named; and ``accuracy.NAME``, by names of groups of classes: that on the
        rows whose class is one of the group, if there are any. Rows without any label have none of
        them, which is refused where they are ``required``. ``classes`` is how many there are."""
        names = dict.fromkeys(["loss", self.metric, *self.further_metrics])
        for name in names:
            if METRICS[name].binary and classes not in (None, 2):
                setting = "metric" if name == self.metric else "further_metrics"
                raise ConfigError(
                    f"method.{setting}: {name} is of two classes, but the rows have {classes}"
                )
        return _row_metric(names, within, classes, required)

    def selection(self) -> Selection:
        """By ``metric``, on the validation rows."""
        of = METRICS[self.metric]
        return Selection(f"eval_{self.metric}", of.higher_is_better, of.worst)

    def check_metrics(self, run: Run) -> None:
        """Refuse metrics of other labels than the run's rows have, and those without a library.

        Raises:
            ConfigError: names setting and metric.
        """
        labels = "numbers" if run.data.regression else "classes"
        check_metric(self.metric, labels, "method.metric")
        for name in self.further_metrics:
            check_metric(name, labels, "method.further_metrics")


def _row_metric(
    names: Iterable[MetricName],
    within: Mapping[str, Collection[int]],
    classes: int | None,
    required: bool,
) -> ValueMetric:
    """These metrics of labelled rows, those without a label left out."""

    def results(values_P4: NDArray[np.float64]) -> dict[str, float]:
        found = of_part(values_P4)
        if required and not found:
            raise DataError("data.validation: none of the validation rows has a label")
        return found

    def of_part(values_P4: NDArray[np.float64]) -> dict[str, float]:
        labelled_R4 = values_P4[~np.isnan(values_P4[:, 0])]
        if not len(labelled_R4):
            return {}
        predictions = Predictions(*labelled_R4.T, classes=classes)
        found = {name: METRICS[name].compute(predictions) for name in names}
        right_R = predictions.labels_R == predictions.predicted_R
        for name, own in within.items():
            own_R = np.isin(predictions.labels_R, list(own))
            if own_R.any():
                found[f"accuracy.{name}"] = float(right_R[own_R].mean())
        return found

    return ValueMetric(_row_values, results, of_part)


def _row_values(positions: Positions, batch: Batch) -> Tensor:
    """Label (nan: none), prediction, confidence and loss of each row, float64 [N, 4]."""
    logits_NC = positions.logits_NV.double()
    unlabelled_N = positions.labels_N == UNLABELLED
    numbers_N = batch.columns.get(TARGETS)
    if numbers_N is None:
        logprobs_NC = logits_NC.log_softmax(1)
        best_N, predicted_N = logprobs_NC.max(1)
        labels_N, confidence_N = positions.labels_N.double(), best_N.exp()
        at_N1 = positions.labels_N.clamp(min=0)[:, None]
        loss_N = -logprobs_NC.gather(1, at_N1)[:, 0]
    else:
        predicted_N = logits_NC[:, 0]
        labels_N, confidence_N = numbers_N.double(), torch.ones_like(predicted_N)
        loss_N = (predicted_N - labels_N).square()
    labels_N = labels_N.masked_fill(unlabelled_N, math.nan)
    return torch.stack([labels_N, predicted_N.double(), confidence_N, loss_N], dim=1)
