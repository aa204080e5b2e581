"""One trajectory on rows of questions that are shown twice, whatever ZeRO stage, world size,
micro-batch and stops."""

from pathlib import Path

import pytest

from tests.data.test_questions import TASKS, data_of, opened
from tests.equivalence import small
from tests.equivalence.small import STEPS, Runs, same
from tests.launching import evaluations, losses

# Far from uniform, so that it matters which token begins a row, and where its answer is.
CAUSAL = small.CAUSAL | {"initializer_range": 0.3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("questions"))


METHODS = {
    "ki": {},
    "l2kd": {"method": {"kind": "l2kd", "word_kd": True}},
}
"""By L2KD one of the two tasks is taught and the other replayed."""


def run(
    runs: Runs, name: str, ranks: int, *words: str, method: str = "ki", modelling: bool = True
) -> Path:
    """A run of a method with a live teacher on two tasks."""
    fields = {"objective", "sources", "validation_fraction"}
    data = data_of(runs.folder).model_dump(mode="json", include=fields) | {"validation": None}
    data["questions"] = {"task_tokens": TASKS, "room": 6, "modelling": modelling}
    if method == "l2kd":  # what is replayed is in tokens that there are
        stored = opened(data_of(runs.folder)).folder / "tokenizer"
        data["tokenizer"] = {"kind": "pretrained", "path": str(stored)}
        data["sources"][1]["kind"] = "replayed"
    changes = {"model": {"config": CAUSAL}, "teacher": small.causal()["teacher"]}
    changes |= {"data": data, **METHODS[method]}
    return runs.run(f"{method}-{name}", ranks, "data.masking.draws=null", *words, **changes)


@pytest.fixture(scope="module", params=METHODS)
def reference(runs, request) -> tuple[Path, str]:
    return run(runs, "one", 1, method=request.param), request.param


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
    out, method = reference
    same(run(runs, name, ranks, *words, method=method), out)


def test_one_trajectory_over_a_stop(runs, reference):
    out, method = reference
    runs.copied(out, f"{method}-stopped", step=2)
    same(run(runs, "stopped", 2, "deepspeed=zero2", method=method), out)


def test_each_reading_counts(runs):
    """As questions alone, rows have other losses."""
    reference, alone = run(runs, "one", 1), run(runs, "alone", 1, modelling=False)
    assert len(losses(reference)) == STEPS
    assert losses(alone)[0] != pytest.approx(losses(reference)[0], abs=1e-2)
    assert evaluations(alone)[0] != pytest.approx(evaluations(reference)[0], abs=1e-2)
