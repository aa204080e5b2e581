"""A finished or stopped run gets more steps or another rate, and no more than that."""

import json
import shutil
from pathlib import Path

import pytest

from dskd.runs.change_log import read_changes
from dskd.settings.recipe import SINGLE, read
from tests.equivalence.small import Runs, same, step_lines
from tests.launching import evaluations, forked, losses
from tests.runs.test_plan import BERT, recipe_of

LM = ("method={kind: lm}", "teacher=null", "until=evaluate")
HALF, WHOLE = 60, 120


def of_steps(steps: int) -> dict:
    train = {"steps": steps, "schedule": "constant", "lr": 0.003}
    return {"train": train, "evaluation": {"every": 20}, "checkpoint": {"every": None}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("going_on"))


@pytest.fixture(scope="module")
def half(runs) -> Path:
    return runs.run("half", 1, *LM, **of_steps(HALF))


def copied(runs: Runs, half: Path, name: str, step: int | None = None) -> Path:
    """The half run in another folder, where its settings are its own."""
    return runs.copied(half, name, step)


def lengthened(out: Path, *words: str, ranks: int = 1, status: int = 0) -> None:
    forked(ranks, str(out / "config.yaml"), *words, status=status)


def changed(out: Path) -> list[tuple[int, dict]]:
    return [(line["step"], line["changed"]) for line in read_changes(out / "history.jsonl")]


def content(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def metrics(out: Path) -> bytes:
    return (out / "train" / "metrics.jsonl").read_bytes()


def test_a_lengthened_run_is_the_unbroken_one(runs, half):
    """To the bit, at a constant rate; what was taken and written before stays as it is."""
    out = copied(runs, half, "longer")
    lengthened(out, f"train.steps={WHOLE}")
    assert metrics(out).startswith(metrics(half))
    assert changed(out) == [(HALF, {"train.steps": [HALF, WHOLE]})]
    assert "Changed on the way" in (out / "report.html").read_text()
    assert read(out / "config.yaml").runs[SINGLE].train.steps == WHOLE
    unbroken = runs.run("unbroken", 1, *LM, **of_steps(WHOLE))
    assert losses(out) == losses(unbroken) and len(losses(out)) == WHOLE
    assert evaluations(out) == evaluations(unbroken)
    for name in ("scores.json", "export/model.safetensors"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes() != b""
        assert (out / name).read_bytes() != (half / name).read_bytes(), name
    assert json.loads((out / "train" / "summary.json").read_text())["steps"] == WHOLE
    assert not (unbroken / "history.jsonl").exists()
    before = content(out)
    lengthened(out)  # all is done
    assert {k: v for k, v in content(out).items() if k != "report.html"} == {
        k: v for k, v in before.items() if k != "report.html"
    }


def test_on_two_ranks(runs, half):
    out = copied(runs, half, "on-two")
    lengthened(out, f"train.steps={WHOLE}", "train.micro_batch=2", ranks=2)
    unbroken = runs.folder / "unbroken"
    if not unbroken.exists():
        runs.run("unbroken", 1, *LM, **of_steps(WHOLE))
    same(out, unbroken)
    assert losses(out)[:HALF] == losses(half)


def test_a_stopped_run_with_another_rate(runs, half):
    out = copied(runs, half, "stopped", 40)
    words = ["train.lr=0.001", "evaluation.every=10", "until=train"]
    lengthened(out, *words)
    assert [line["lr"] for line in step_lines(out)] == [0.003 * (n > 0) for n in range(40)] + (
        [0.001] * 20
    )
    assert losses(out)[:41] == losses(half)[:41] and losses(out)[41:] != losses(half)[41:]
    rates = {"train.lr": [0.003, 0.001], "evaluation.every": [20, 10]}
    assert changed(out) == [(40, rates)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.steps=40"], "has taken 60 steps, which train.steps cannot change any more"),
        (["train.lr=0.1"], "has taken 60 steps, which train.lr cannot change any more"),
        (["train.steps=120", "seed=4"], "seed: 3, now 4"),
        (["train.steps=120", "evaluation.rows=2"], "evaluation.rows: 4, now 2"),
    ],
)
def test_what_changes_no_step_or_all_of_them_is_refused(half, capfd, words, told):
    before = content(half)
    lengthened(half, *words, status=2)
    assert told in capfd.readouterr().err
    assert content(half) == before


def test_the_last_checkpoint_is_gone(runs, half, capfd):
    out = copied(runs, half, "gone")
    last = out / "train" / "checkpoints" / f"step-{HALF:08d}"
    shutil.rmtree(last)
    before = content(out)
    lengthened(out, f"train.steps={WHOLE}", status=2)
    assert f"{last}: the last checkpoint is gone" in capfd.readouterr().err
    assert content(out) == before


def test_looks_alone_are_noted_where_steps_are_still_to_come(runs, half):
    out = copied(runs, half, "looks")
    lengthened(out, "log_every=7")
    assert not (out / "history.jsonl").exists()
    assert read(out / "config.yaml").runs[SINGLE].log_every == 7


# ---- other runs that read its export -------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Two runs, of which the second begins as the first one's export; carried out."""
    path = recipe_of(
        tmp_path, {"a": {"model": {"config": BERT}}, "b": {"model": {"path": "run:a"}}}
    )
    forked(1, str(path))
    return path


def test_what_was_made_of_the_old_export_does_not_stay(recipe, tmp_path, capfd):
    longer = [str(recipe), "runs.a.train.steps=4"]
    before = content(tmp_path / "runs")
    forked(1, *longer, status=2)
    told = capfd.readouterr().err
    assert "runs.b.model.path: " in told and "is to be made anew, as run a goes on" in told
    assert content(tmp_path / "runs") == before
    other = tmp_path / "other.yaml"
    other.write_bytes((tmp_path / "runs" / "b" / "config.yaml").read_bytes())
    forked(1, str(other), f"out={tmp_path}/b")  # in no recipe with the first
    weights = (tmp_path / "b" / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "runs" / "b")
    forked(1, *longer)
    assert changed(tmp_path / "runs" / "a") == [(2, {"train.steps": [2, 4]})]
    assert (tmp_path / "runs/b/export/model.safetensors").read_bytes() != weights
    forked(1, str(tmp_path / "b" / "config.yaml"), "train.steps=3", status=2)
    assert f"{tmp_path}/b: model changed since the run was started" in capfd.readouterr().err
