"""Inheritance rates and learning rates: the original's tables, closed forms, edges."""

import itertools
import math

import pytest

from dskd.methods.inheritance_loss import inheritance_rate
from dskd.settings.run import Train
from dskd.training.learning_rate import learning_rate
from tests.goldens import golden

GOLDEN, EVOLUTION = golden("ki"), golden("self_evolution")
L2KD = next(case for case in golden("continual")["cases"] if case["kind"] == "schedule")
KINDS = {"linear": "linear", "then": "switch"}


@pytest.mark.parametrize("mode", KINDS)
def test_inheritance_rate_is_the_original_one(mode):
    table = GOLDEN["alpha_schedule"]
    for step, alpha in table[mode].items():
        assert inheritance_rate(KINDS[mode], int(step), table["max_update_distil"]) == alpha


@pytest.mark.parametrize("golden", [GOLDEN["lr_schedule"], EVOLUTION["lr"]], ids=["ki", "self"])
def test_learning_rate_is_the_original_one(golden):
    train = Train(
        lr=golden["peak"],
        warmup=golden["warmup"],
        steps=golden["total"],
        end_lr=golden.get("end", 0.0),
        power=golden.get("power", 1.0),
        schedule="polynomial",
    )
    for step, lr in golden["table"].items():
        assert learning_rate(train, int(step)) == lr
        assert learning_rate(train.model_copy(update={"schedule": "linear"}), int(step)) == lr


def test_learning_rate_is_that_of_l2kd_which_counts_rows():
    """So a step is of a single row here. There is no warm-up: a share of 0.005 of 100 rows."""
    of = L2KD["inputs"]
    assert int(of["warmup_ratio"] * of["n_train"]) == 0
    train = Train(lr=of["base_lr"], warmup=0, steps=of["n_train"] * of["epochs"], schedule="linear")
    found = [learning_rate(train, seen) for seen in of["samples_seen"]]
    assert found == pytest.approx(L2KD["expected"], abs=L2KD["tol"] * of["base_lr"])


def test_cosine_rate():
    assert inheritance_rate("cosine", 0, 8, 0.6) == 0.6
    assert inheritance_rate("cosine", 2, 8) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-15)
    assert inheritance_rate("cosine", 4, 8, 0.6) == pytest.approx(0.3, rel=1e-15)
    assert inheritance_rate("cosine", 8, 8) == inheritance_rate("cosine", 99, 8) == 0.0


def test_start_scales_every_schedule_and_constant_never_ends():
    assert inheritance_rate("linear", 3, 4, 0.8) == pytest.approx(0.2, rel=1e-15)
    assert inheritance_rate("switch", 3, 4, 0.8) == 0.8
    assert inheritance_rate("switch", 0, 0) == 0.0
    assert inheritance_rate("constant", 10**9, 0, 0.5) == 0.5


@pytest.mark.parametrize("kind", ["linear", "switch", "cosine", "constant"])
def test_rate_never_rises_and_stays_in_range(kind):
    rates = [inheritance_rate(kind, step, 37) for step in range(60)]
    assert all(1.0 >= a >= b >= 0.0 for a, b in itertools.pairwise(rates))
    assert all((rate > 0) == (kind == "constant" or step < 37) for step, rate in enumerate(rates))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_decay_without_length_is_refused(kind):
    with pytest.raises(AssertionError, match=f"{kind}.*at least 1 step"):
        inheritance_rate(kind, 0, 0)


def test_learning_rate_shapes():
    base = {"lr": 1.0, "warmup": 10, "steps": 110, "end_lr": 0.1}
    polynomial = Train(**base, schedule="polynomial", power=2.0)
    assert learning_rate(polynomial, 60) == pytest.approx(0.9 * 0.25 + 0.1, rel=1e-15)
    assert learning_rate(Train(**base, schedule="linear", power=2.0), 60) == pytest.approx(0.55)
    cosine = Train(**base, schedule="cosine")
    assert learning_rate(cosine, 35) == pytest.approx(0.9 * (1 + math.sqrt(0.5)) / 2 + 0.1)
    assert learning_rate(cosine, 60) == pytest.approx(0.55, rel=1e-15)
    constant = Train(**base, schedule="constant")
    assert learning_rate(constant, 11) == learning_rate(constant, 500) == 1.0
    for train in (polynomial, cosine, constant):
        assert [learning_rate(train, step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert learning_rate(polynomial, 110) == learning_rate(cosine, 111) == 0.1


@pytest.mark.parametrize("schedule", ["linear", "polynomial", "cosine", "constant"])
def test_without_warmup_the_first_step_has_the_peak_rate(schedule):
    assert learning_rate(Train(lr=0.3, warmup=0, steps=5, schedule=schedule), 0) == 0.3


def test_a_run_that_is_all_warmup_ends_at_the_peak():
    assert learning_rate(Train(lr=0.5, warmup=4, steps=4), 4) == 0.5
