"""What scripted trials come to: the chosen rate, spreads, differences, averages."""

import math

import pytest

from dskd.downstream.summary import (
    GLUE_8,
    Scored,
    chosen_rate,
    comparisons,
    glue_average,
    paired,
    spread,
    summary,
)

NAN = math.nan


def trials(scores: dict[float, list[float]], failed: set[tuple[float, int]] = frozenset()):
    """Trials of seeds 0, 1, ... whose test score is a tenth of the selecting one."""
    return [
        Scored(lr, seed, score, {"test_accuracy": score / 10}, (lr, seed) in failed)
        for lr, own in scores.items()
        for seed, score in enumerate(own)
    ]


@pytest.mark.parametrize(
    ("scores", "higher", "wanted"),
    [
        # the mean decides, not the best seed
        ({1e-5: [0.7, 0.7], 2e-5: [0.9, 0.3]}, True, 1e-5),
        ({1e-5: [0.7, 0.7], 2e-5: [0.9, 0.6]}, True, 2e-5),
        # ties go to the smaller rate, in whatever order they come
        ({3e-5: [0.5, 0.7], 1e-5: [0.7, 0.5], 2e-5: [0.6, 0.6]}, True, 1e-5),
        # as right answers they are equal, in floating point the second is larger
        ({1e-5: [38 / 71, 40 / 71], 2e-5: [39 / 71, 39 / 71]}, True, 1e-5),
        # smaller is better
        ({1e-5: [0.7], 2e-5: [0.4], 3e-5: [0.4]}, False, 2e-5),
        # an undefined score is worse than any number, in either direction
        ({1e-5: [0.9, NAN], 2e-5: [0.1, 0.1]}, True, 2e-5),
        ({1e-5: [0.1, NAN], 2e-5: [9.0, 9.0]}, False, 2e-5),
        ({1e-5: [NAN], 2e-5: [-1.0]}, True, 2e-5),
        ({2e-5: [NAN], 1e-5: [NAN]}, True, 1e-5),
    ],
)
def test_the_rate_is_that_of_the_best_mean(scores, higher, wanted):
    assert chosen_rate(trials(scores), higher=higher) == wanted


def test_all_seeds_of_the_chosen_rate_are_reported_failed_ones_too():
    made = trials({1e-5: [0.2, 0.2, 0.2], 2e-5: [0.9, 0.3, 0.6]}, {(1e-5, 0), (1e-5, 2), (2e-5, 1)})
    found = summary(list(reversed(made)), higher=True)
    assert (found["lr"], found["seeds"], found["selecting"]) == (2e-5, [0, 1, 2], [0.9, 0.3, 0.6])
    assert (found["failed"], found["failed_of_all"], found["trials"]) == (1, 3, 6)
    test = found["scores"]["test_accuracy"]
    assert test["values"] == pytest.approx([0.09, 0.03, 0.06])
    assert test["mean"] == pytest.approx(0.06) and test["median"] == pytest.approx(0.06)
    assert test["sd"] == pytest.approx(0.03)
    assert found["rates"] == {"1e-05": pytest.approx(0.2), "2e-05": pytest.approx(0.6)}


def test_a_single_seed_has_no_deviation_and_nan_stays_nan():
    assert spread([0.5]) == {"values": [0.5], "mean": 0.5, "sd": None, "median": 0.5}
    assert math.isnan(spread([0.5, NAN])["mean"]) and math.isnan(spread([0.5, NAN])["median"])


FIRST, SECOND = [0.7, 0.6, 0.8, 0.7, 0.7], [0.6, 0.6, 0.6, 0.6, 0.6]
"""Differences 0.1, 0, 0.2, 0.1, 0.1: mean 0.1, sd sqrt(0.02 / 4)."""


def test_differences_of_few_seeds_have_no_interval():
    found = paired(FIRST[:4], SECOND[:4])
    assert found["differences"] == pytest.approx([0.1, 0.0, 0.2, 0.1])
    assert found["mean"] == pytest.approx(0.1) and found["interval"] is None
    assert found["sd"] == pytest.approx(math.sqrt(0.02 / 3))


def test_the_interval_of_five_seeds_is_students():
    pytest.importorskip("scipy")
    found = paired(FIRST, SECOND)
    half = 2.7764451051977987 * math.sqrt(0.02 / 4) / math.sqrt(5)  # t of 4 degrees, 97.5 %
    assert found["interval"] == pytest.approx([0.1 - half, 0.1 + half], rel=1e-9)


def test_each_two_models_are_compared_on_the_same_seeds():
    models = {
        name: summary(trials({lr: scores}), higher=True)
        for name, lr, scores in (
            ("a", 1e-5, [0.5, 0.7]),
            ("b", 2e-5, [0.4, 0.8]),
            ("c", 1e-5, [0, 1]),
        )
    }
    found = comparisons(models, "test_accuracy")
    assert [(one["first"], one["second"]) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found[0]["differences"] == pytest.approx([0.01, -0.01])


def test_the_average_of_glue_is_over_eight_tasks_or_nine():
    eight = {name: float(n) for n, name in enumerate(GLUE_8)}
    assert glue_average(eight) == ("8 tasks, without WNLI", 3.5)
    assert glue_average({**eight, "wnli": 12.5}) == ("9 tasks", 4.5)
    del eight["rte"]
    assert glue_average(eight) is None
