"""Runs of students that teach themselves: alike in any geometry, resumed, exported."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import small
from tests.equivalence.small import STEPS, Runs, causal, step_lines
from tests.launching import cut_back, evaluations, exported_nll, losses

WEIGHTS = ("current", "frozen", "average")
STEEP = {"kind": "self_evolution", "smoothing": 0.5}


def train(runs: Runs, name: str, ranks: int, *words: str, weights: str, **changes: Any) -> Path:
    """A run of the tiny student that teaches itself, on random masks."""
    teacher = {"kind": "self", "weights": weights, "decay": 0.5}
    tree = {"teacher": teacher, "method": STEEP, "deepspeed": "zero0"}
    return runs.run(name, ranks, *words, **(changes | tree))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("self"))


@pytest.fixture(scope="module")
def references(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, two micro-batches a step."""
    return {weights: train(runs, weights, 1, weights=weights) for weights in WEIGHTS}


def same(a: Path, b: Path) -> None:
    small.same(a, b)
    assert column(a, "kl") == pytest.approx(column(b, "kl"), abs=1e-5)


def column(run: Path, term: str) -> list[float]:
    return [line["terms"][term] for line in step_lines(run)]


def test_the_three_teachers_are_alike_at_first_only(references):
    """All start at the student's weights, and part as soon as a step has moved it."""
    kl = {weights: column(run, "kl") for weights, run in references.items()}
    assert kl["frozen"][0] == pytest.approx(kl["current"][0], abs=1e-6) and kl["frozen"][0] > 0
    assert kl["average"][0] == pytest.approx(kl["current"][0], abs=1e-6)
    last = [kl[weights][-1] for weights in WEIGHTS]
    apart = [abs(a - b) for a, b in zip(last, last[1:] + last[:1], strict=True)]
    assert min(apart) > 1e-4
    for line in (line for run in references.values() for line in step_lines(run)):
        terms = line["terms"]
        assert line["loss"] == pytest.approx(0.5 * terms["ce"] + 0.5 * terms["kl"], rel=1e-6)


@pytest.mark.parametrize(("stage", "ranks", "micro"), [(2, 2, 4), (3, 2, 2)])
def test_the_average_is_the_same_in_any_geometry(runs, references, stage, ranks, micro):
    """For the other teachers test_self_evolution.py shows it."""
    words = [f"deepspeed=zero{stage}", f"train.micro_batch={micro}"]
    name = f"average-{stage}-{ranks}-{micro}"
    same(train(runs, name, ranks, *words, weights="average"), references["average"])


def test_a_sharded_frozen_copy_is_the_same(runs, references):
    words = ["teacher.deepspeed=zero3", "deepspeed=zero3", "train.micro_batch=4"]
    same(train(runs, "sharded", 2, *words, weights="frozen"), references["frozen"])


def test_activation_checkpointing_changes_nothing(runs, references):
    words = ["train.activation_checkpointing=true", "deepspeed=zero3"]
    same(train(runs, "recomputed", 2, *words, weights="current"), references["current"])


RESUMED = [("average", (3, 2), (3, 2)), ("average", (2, 2), (3, 1)), ("frozen", (0, 1), (2, 2))]


@pytest.mark.parametrize(("weights", "saved", "loaded"), RESUMED)
def test_goes_on_where_it_was(runs, references, weights, saved, loaded):
    """Bit for bit in the same geometry, to rounding in another."""
    name = "{}-{}-{}--{}-{}".format(weights, *saved, *loaded)
    stage, ranks = saved
    out = train(runs, name, ranks, f"deepspeed=zero{stage}", weights=weights)
    whole = losses(out), column(out, "kl")
    cut_back(out, step=2)
    stage, ranks = loaded
    train(runs, name, ranks, f"deepspeed=zero{stage}", weights=weights)
    same(out, references[weights])
    if saved == loaded:
        assert (losses(out), column(out, "kl")) == whole


@pytest.mark.parametrize("weights", ["frozen", "average"])
def test_causal_students(runs, weights):
    """They part from what taught them at first, which is why their own weights are refused."""
    changes = {key: value for key, value in causal().items() if key != "teacher"}
    kl = column(train(runs, f"causal-{weights}", 1, weights=weights, **changes), "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # the same rows, no dropout
    assert max(map(abs, kl)) > 1e-6


def test_the_last_checkpoint_is_exported_whatever_its_loss(runs, references):
    """Of a run whose validation loss rises: its learning rate grows far too high."""
    changes = {"train": {"steps": STEPS, "lr": 3.0, "warmup": STEPS, "clip": 0.0}}
    changes["checkpoint"] = {"keep": 1}
    out = train(runs, "rising", 1, "until=evaluate", weights="current", **changes)
    scores = evaluations(out)
    assert scores[-1] > scores[0]
    summary = json.loads((out / "train" / "summary.json").read_text())
    assert summary["best_step"] == STEPS
    assert summary["best_eval_nll"] == summary["eval_nll"] == scores[-1]
    kept = [path.name for path in (out / "train" / "checkpoints").iterdir()]
    assert kept == [f"step-{STEPS:08d}"]
    assert exported_nll(out) == pytest.approx(scores[-1], abs=1e-5)


def test_the_student_is_exported_and_not_its_average(runs, references):
    out = runs.copied(references["average"], "exported")
    train(runs, out.name, 2, "deepspeed=zero3", "until=evaluate", weights="average")
    assert exported_nll(out) == pytest.approx(evaluations(out)[-1], abs=1e-5)


def test_without_smoothing_it_is_language_modelling(runs):
    """The same losses bit for bit; no teacher is built, though one is named."""
    tree = {"deepspeed": "zero0", "teacher": {"kind": "self", "weights": "average"}}
    plain = runs.run("plain", 1, **tree, method={"kind": "lm"})
    own = runs.run("own", 1, **tree, method={"kind": "self_evolution", "smoothing": 0.0})
    assert losses(own) == losses(plain)
    assert not list(own.rglob("average.safetensors")) + list(plain.rglob("average.safetensors"))
