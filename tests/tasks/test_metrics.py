"""Scores of labelled rows: closed forms, edges, and the libraries that some of them need."""

import math
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from dskd.errors import ConfigError
from dskd.tasks import metrics
from dskd.tasks.metrics import METRICS, MetricName, Predictions, check_metric
from tests.goldens import golden


def predictions(labels: list, predicted: list, **more: list) -> Predictions:
    rest = {"confidence_R": [1.0] * len(labels), "losses_R": [0.0] * len(labels)} | more
    return Predictions(
        np.array(labels), np.array(predicted), **{n: np.array(v) for n, v in rest.items()}
    )


def score(name: str, *args: list, **more: list) -> float:
    if METRICS[name].library is not None:
        pytest.importorskip(METRICS[name].library)
    return METRICS[name].compute(predictions(*args, **more))


LABELS, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2]
"""F1 by class: 2/3 (of 3 labels and 3 predictions 2 meet), 1/2, 1."""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("accuracy", 4 / 6),
        ("micro_f1", 4 / 6),
        ("macro_f1", (2 / 3 + 1 / 2 + 1) / 3),
        # (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)), c 4 of s 6 right
        ("matthews", (4 * 6 - 14) / math.sqrt((36 - 14) * (36 - 14))),
    ],
)
def test_scores_of_classes(name, wanted):
    assert score(name, LABELS, PREDICTED) == pytest.approx(wanted, rel=1e-12)
    assert score(name, LABELS, LABELS) == 1.0


def test_a_class_that_is_predicted_and_no_label_counts_in_macro_f1():
    assert score("macro_f1", [0, 0], [0, 1]) == pytest.approx((2 / 3 + 0) / 2)


def test_matthews_of_one_class_for_all_is_0():
    assert score("matthews", [0, 1, 1], [1, 1, 1]) == 0.0


X, Y = [1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 27.0, 20.0]


def test_correlations():
    x, y = np.array(X) - 2.5, np.array(Y) - 14.0
    assert score("pearson", X, Y) == pytest.approx((x @ y) / math.sqrt((x @ x) * (y @ y)))
    assert score("spearman", X, Y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert score("spearman", [1.0, 1.0, 2.0], [5.0, 5.0, 7.0]) == pytest.approx(1.0)  # ties


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("pair", [(X, [3.0] * 4), ([3.0] * 4, X), ([1.0], [2.0])])
def test_a_correlation_with_what_does_not_vary_is_undefined(name, pair):
    assert math.isnan(METRICS[name].compute(predictions(*pair)))
    assert METRICS[name].worst == -1.0


def test_a_correlation_with_what_is_no_number_ends_a_run():
    """Not undefined: a student that predicts nan has diverged."""
    assert METRICS["pearson"].compute(predictions(X, [1.0, 2.0, math.nan, 3.0])) == -math.inf


def test_loss_is_the_mean():
    assert score("loss", [0, 1], [0, 1], losses_R=[0.5, 2.0]) == 1.25


def test_calibration_error():
    """Three bins of 15: two rows at 0.95 of which one is right, one at 0.5, one at 1/15 exactly,
    which ends the first bin."""
    more = {"confidence_R": [0.95, 0.95, 0.5, 1 / 15]}
    found = score("ece", [0, 0, 0, 0], [0, 1, 0, 1], **more)
    assert found == pytest.approx((abs(1 - 1.9) + abs(1 - 0.5) + 1 / 15) / 4)
    assert score("ece", [0, 1], [0, 1]) == 0.0
    assert score("ece", [0, 1], [1, 0]) == 1.0
    # in one bin, over- and underconfidence cancel
    assert score("ece", [0, 0], [0, 1], confidence_R=[0.5, 0.5]) == 0.0


def test_names_and_directions():
    assert list(get_args(MetricName)) == list(METRICS)
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"loss", "ece"}


GOLDEN = golden("bridges/glue_metrics")


@pytest.mark.parametrize("case", GOLDEN["classification"], ids=lambda case: case["name"])
def test_scores_of_classes_are_the_libraries_own(case):
    pytest.importorskip("sklearn")
    about = predictions(case["y"], case["p"])
    about = replace(about, classes=case["labels"])
    names = {"micro_f1": "micro_f1", "macro_f1": "macro_f1_all_labels", "accuracy": "accuracy"}
    if case["labels"] == 2:
        names |= {"f1": "f1", "matthews": "mcc"}
    for name, key in names.items():
        assert METRICS[name].compute(about) == pytest.approx(case[key], abs=1e-12), name
    if case["labels"] == 2:
        both = METRICS["accuracy_and_f1"].compute(about)
        assert both == pytest.approx((case["accuracy"] + case["f1"]) / 2, abs=1e-12)
    seen = METRICS["macro_f1"].compute(replace(about, classes=None))
    assert seen == pytest.approx(case["macro_f1_seen_labels"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["regression"], ids=lambda case: case["name"])
def test_correlations_are_the_libraries_own(case):
    pytest.importorskip("scipy")
    for name in ("pearson", "spearman", "pearson_and_spearman"):
        wanted = case.get("mean_of_both" if "and" in name else name)
        wanted = math.nan if wanted is None else wanted
        found = METRICS[name].compute(predictions(case["y"], case["p"]))
        assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(
    ("name", "labels", "told"),
    [
        (
            "accuracy",
            "numbers",
            "m: accuracy is of classes, but the labels are numbers: loss, pear",
        ),
        ("pearson", "classes", "m: pearson is of numbers, but the labels are classes: loss, accur"),
    ],
)
def test_metrics_of_other_labels_are_refused(name, labels, told):
    with pytest.raises(ConfigError) as caught:
        check_metric(name, labels, "m")
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("name", "labels", "package"),
    [
        ("macro_f1", "classes", "scikit-learn"), ("micro_f1", "classes", "scikit-learn"),
        ("matthews", "classes", "scikit-learn"), ("pearson", "numbers", "scipy"),
        ("spearman", "numbers", "scipy"),
    ],
)  # fmt: skip
def test_a_missing_library_is_named_with_the_metric_and_the_extra(
    name, labels, package, monkeypatch
):
    monkeypatch.setattr(metrics, "find_spec", lambda library: None)
    with pytest.raises(ConfigError) as caught:
        check_metric(name, labels, "method.metrics")
    assert str(caught.value) == (
        f"method.metrics: {name} needs {package}: pip install 'dskd[tasks]'"
    )


@pytest.mark.parametrize("name", ["loss", "accuracy", "ece"])
def test_the_others_need_none(name, monkeypatch):
    for library in ("sklearn", "scipy"):
        monkeypatch.setitem(sys.modules, library, None)
    check_metric(name, "classes", "m")
    assert METRICS[name].compute(predictions(LABELS, PREDICTED)) >= 0
