"""A run of epochs is the run of as many steps, over stops too, and is looked at when they end."""

from math import ceil
from pathlib import Path

import pytest

from dskd.data.prepared import open_prepared, prepare
from dskd.runs.change_log import read_changes
from dskd.settings.recipe import SINGLE, read
from dskd.system.log import read_metrics
from tests.equivalence.small import Runs, step_lines
from tests.launching import forked, losses

TRAIN = {"steps": None, "epochs": 1.5, "warmup": 0.3, "batch": 48, "micro_batch": 24}
EPOCH = {"evaluation": {"every": "epoch"}, "checkpoint": {"every": "epoch", "keep": 9}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("length"))


@pytest.fixture(scope="module")
def epochs(runs) -> Path:
    return runs.run("epochs", 1, "method={kind: lm}", "teacher=null", train=TRAIN, **EPOCH)


def rows_of(run: Path) -> int:
    data = read(run / "config.yaml").runs[SINGLE].data
    return len(open_prepared(prepare(data)).train)


def evaluated(run: Path) -> list[int]:
    lines = read_metrics(run / "train" / "metrics.jsonl")
    return [line["step"] for line in lines if "eval_nll" in line]


def test_the_same_steps_in_numbers(runs, epochs):
    """Losses and rates to the bit, and one evaluation and checkpoint an epoch."""
    rows = rows_of(epochs)
    steps = ceil(1.5 * rows / 48)
    assert rows % 48 and steps > ceil(rows / 48) > 2
    train = TRAIN | {"steps": steps, "epochs": None, "warmup": ceil(0.3 * steps)}
    counted = runs.run("steps", 1, "method={kind: lm}", "teacher=null", train=train)
    assert losses(counted) == losses(epochs) and len(losses(epochs)) == steps
    assert [x["lr"] for x in step_lines(counted)] == [x["lr"] for x in step_lines(epochs)]
    assert evaluated(epochs) == [ceil(rows / 48), steps]
    saved = sorted(path.name for path in (epochs / "train" / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in evaluated(epochs)]


def test_a_killed_run_goes_on_to_the_same_end(runs, epochs):
    out = runs.copied(epochs, "resumed", ceil(rows_of(epochs) / 48))
    forked(1, str(out / "config.yaml"))
    assert losses(out) == losses(epochs) and evaluated(out) == evaluated(epochs)
    train = read(out / "config.yaml").runs[SINGLE].train
    assert (train.steps, train.epochs, train.warmup) == (None, 1.5, 0.3)


def test_more_epochs_are_more_steps(runs, epochs):
    """How long a run is in steps, and so whether it goes on, is known once its rows are counted."""
    out, steps = runs.copied(epochs, "longer"), ceil(2.5 * rows_of(epochs) / 48)
    forked(1, str(out / "config.yaml"), "train.epochs=2.5")
    assert len(losses(out)) == steps and losses(out)[: len(losses(epochs))] == losses(epochs)
    (line,) = read_changes(out / "history.jsonl")
    assert line["step"] == len(losses(epochs)) and line["changed"] == {"train.epochs": [1.5, 2.5]}


def test_the_same_length_in_steps_is_no_other_one(runs, epochs):
    out = runs.copied(epochs, "in-steps")
    words = [f"train.steps={len(losses(epochs))}", "train.epochs=null"]
    forked(1, str(out / "config.yaml"), *words)
    assert losses(out) == losses(epochs) and not (out / "history.jsonl").exists()


def test_fewer_epochs_than_are_taken_are_refused(epochs, capfd):
    forked(1, str(epochs / "config.yaml"), "train.epochs=1", status=2)
    assert f"has taken {len(losses(epochs))} steps, which train.epochs" in capfd.readouterr().err


def test_what_does_not_fit_the_counted_steps_is_refused_after_the_data(runs, epochs, capfd):
    words = [str(epochs / "config.yaml"), f"out={runs.folder / 'refused'}", "train.warmup=90"]
    forked(1, *words, status=2)
    steps = ceil(1.5 * rows_of(epochs) / 48)
    assert f"train.warmup: 90 is more than train.steps {steps}" in capfd.readouterr().err
    assert not (runs.folder / "refused" / "train").exists()


def test_what_a_method_needs_is_looked_at_once_the_steps_are_counted(runs, epochs, capfd):
    """Before the rows are there, only that it may be long enough."""
    forked(1, str(epochs / "config.yaml"), "until=export")
    out, steps = runs.folder / "narrow", ceil(1.5 * rows_of(epochs) / 48)
    method = f"method={{kind: wid, hidden_size: 16, every: {steps}, ramp: 1, anneal: 2}}"
    words = [f"out={out}", f"model={{path: {epochs}/export}}", method, "train.clip=0"]
    forked(1, str(epochs / "config.yaml"), *words, "until=train", status=2)
    told = capfd.readouterr().err
    assert f"are zero after step {steps + 1}, train.steps is {steps}" in told
    assert not (out / "train").exists()
