"""One trajectory on rows of questions that are shown twice, whatever ZeRO stage, world size,
micro-batch and stops."""

from pathlib import Path

import pytest

from tests.data.test_questions import TASKS, data_of
from tests.equivalence import small
from tests.equivalence.small import STEPS, Runs, same
from tests.launching import evaluations, losses

# Far from uniform, so that it matters which token begins a row, and where its answer is.
CAUSAL = small.CAUSAL | {"initializer_range": 0.3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("questions"))


def run(runs: Runs, name: str, ranks: int, *words: str, modelling: bool = True) -> Path:
    """A run of KI by a live teacher on two tasks."""
    fields = {"objective", "sources", "validation_fraction"}
    data = data_of(runs.folder).model_dump(mode="json", include=fields) | {"validation": None}
    data["questions"] = {"task_tokens": TASKS, "room": 6, "modelling": modelling}
    changes = {"model": {"config": CAUSAL}, "teacher": small.causal()["teacher"]}
    return runs.run(name, ranks, "data.masking.draws=null", *words, data=data, **changes)


@pytest.fixture(scope="module")
def reference(runs) -> Path:
    return run(runs, "one", 1)


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("whole", 1, ("train.micro_batch=8",)),
        ("zero1", 2, ("deepspeed=zero1", "train.micro_batch=2")),
        ("zero2", 2, ("deepspeed=zero2", "train.micro_batch=4")),
        ("zero3", 2, ("deepspeed=zero3", "train.micro_batch=2")),
    ],
)
def test_one_trajectory(runs, reference, name, ranks, words):
    same(run(runs, name, ranks, *words), reference)


def test_one_trajectory_over_a_stop(runs, reference):
    runs.copied(reference, "stopped", step=2)
    same(run(runs, "stopped", 2, "deepspeed=zero2"), reference)


def test_each_reading_counts(runs, reference):
    """As questions alone, rows have other losses."""
    alone = run(runs, "alone", 1, modelling=False)
    assert len(losses(reference)) == STEPS
    assert losses(alone)[0] != pytest.approx(losses(reference)[0], abs=1e-2)
    assert evaluations(alone)[0] != pytest.approx(evaluations(reference)[0], abs=1e-2)
