"""A run that gets no better ends, exports its best, and ends there again however it was stopped."""

import json
from pathlib import Path

import pytest

from dskd.engine.checkpoints import Selection
from dskd.settings.compare import differences
from dskd.settings.recipe import read
from dskd.system.log import read_metrics
from dskd.training.early_stopping import EarlyStopping
from tests.equivalence.small import Runs
from tests.launching import evaluations, forked, losses

LM = ["method={kind: lm}", "teacher=null"]


def ends_after(scores: list[float], *, patience: int = 2, higher: bool = False) -> int | None:
    """The number of the evaluation after which training is over."""
    stopping = EarlyStopping(patience, Selection("eval_x", higher_is_better=higher))
    for number, score in enumerate(scores, 1):
        assert not stopping.over()
        stopping.evaluated(score)
        if stopping.over():
            return number
    return None


def test_only_a_better_score_keeps_it_going():
    assert ends_after([3.0, 2.0, 2.0, 2.5, 1.0]) == 4
    assert ends_after([3.0, 2.0, 2.5, 1.0, 1.5, 1.4]) == 6
    assert ends_after([3.0, 2.0, 1.0]) is None
    assert ends_after([-0.2, -0.1, 0.0, 0.1], higher=True) is None
    assert ends_after([0.5, 0.4], patience=1, higher=True) == 2


def test_it_counts_on_from_its_state():
    scores = [3.0, 2.0, 2.5, 2.4, 2.3]
    selection = Selection()
    for cut in range(len(scores)):
        first, then = EarlyStopping(3, selection), EarlyStopping(3, selection)
        for score in scores[:cut]:
            first.evaluated(score)
        then.restore(json.loads(json.dumps(first.state())))
        for score in scores[cut:]:
            then.evaluated(score)
        assert then.over() and then.state() == {"best": 2.0, "since": 3}


@pytest.mark.parametrize(
    "state", [{"best": 1.0}, {"best": "1", "since": 1}, {"best": None, "since": -1}]
)
def test_what_no_run_writes_is_refused(state):
    with pytest.raises((LookupError, ValueError)):
        EarlyStopping(1, Selection()).restore(state)


def test_with_it_the_cadence_of_evaluations_is_settled():
    patient = read(None, ["evaluation.patience=2"]).runs["run"]
    changed = read(None, ["evaluation.patience=2", "evaluation.every=5"]).runs["run"]
    assert differences(patient, changed) == ["evaluation.every: 10, now 5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def stopped(runs) -> Path:
    """A run whose weights stay as they are: the first of its evaluations is the best."""
    train = {"lr": 0.0, "steps": 40}
    evaluation = {"every": 2, "patience": 2}
    checkpoint = {"every": 4, "keep": 9}
    sections = {"train": train, "evaluation": evaluation, "checkpoint": checkpoint}
    return runs.run("stopped", 2, *LM, "deepspeed=zero2", **sections)


def saved(run: Path) -> list[int]:
    folders = (run / "train" / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in folders)


def test_a_run_that_gets_no_better_ends(stopped):
    """After the third evaluation, with a checkpoint that is not due otherwise."""
    assert len(losses(stopped)) == 6 and len(evaluations(stopped)) == 3
    assert saved(stopped) == [4, 6]
    summary = json.loads((stopped / "train" / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"]) == (6, 4)  # of equals the first
    metrics = (stopped / "train" / "metrics.jsonl").read_bytes()
    forked(2, str(stopped / "config.yaml"))  # nothing more to do
    assert (stopped / "train" / "metrics.jsonl").read_bytes() == metrics


def test_it_is_not_lengthened(stopped, capfd):
    """More steps would not be taken."""
    forked(1, str(stopped / "config.yaml"), "train.steps=50", status=2)
    told = "training ended by itself after step 6, before train.steps 40; it takes no more"
    assert told in capfd.readouterr().err


@pytest.mark.parametrize("step", [4, 6])
def test_a_killed_run_ends_where_it_would_have(runs, stopped, step):
    out = runs.copied(stopped, f"from{step}", step)
    forked(1, str(out / "config.yaml"), "deepspeed=zero0")
    assert losses(out) == pytest.approx(losses(stopped), abs=1e-5)
    lines = read_metrics(out / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_nll" in line] == [2, 4, 6]
    assert json.loads((out / "train" / "summary.json").read_text())["steps"] == 6


def test_the_best_is_exported_or_the_last_as_chosen(runs):
    """At a rate that spoils the student again, the first checkpoint is the best."""
    sections = {"train": {"lr": 30.0, "steps": 4, "clip": 0.0, "warmup": 3}}
    for select, step in (("metric", 2), ("last", 4)):
        out = runs.run(select, 1, *LM, f"evaluation.select={select}", **sections)
        first, last = evaluations(out)
        assert first < last
        summary = json.loads((out / "train" / "summary.json").read_text())
        assert (summary["best_step"], summary["steps"]) == (step, 4)
        assert summary["best_eval_nll"] == (first if select == "metric" else last)
