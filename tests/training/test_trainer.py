"""What the loop leaves: metrics, monitors, summary; and what its settings change."""

import csv
import json
from pathlib import Path

import pytest

from dskd.engine.ds_config import load_preset
from dskd.methods.inheritance_loss import inheritance_rate
from dskd.settings.recipe import read
from dskd.system.log import read_metrics
from dskd.training.learning_rate import learning_rate
from tests.faults.runs import STEPS, Ranks, train, write_recipe
from tests.launching import evaluations, losses


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run on two ranks with a CSV monitor."""
    folder = tmp_path_factory.mktemp("trainer")
    recipe = write_recipe(folder)
    monitor = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "monitored"}
    (folder / "ds.json").write_text(json.dumps(load_preset("zero2") | {"csv_monitor": monitor}))
    train(folder, recipe, f"deepspeed={folder / 'ds.json'}", "until=train")
    return folder


def step_lines(out: Path) -> list[dict]:
    return [line for line in read_metrics(out / "train" / "metrics.jsonl") if "loss" in line]


def test_metrics(run):
    """The loss is (1 - alpha) CE + alpha KL, and a term of weight 0 is not computed."""
    settings = read(run / "run.yaml").runs["run"]
    lines = step_lines(run / "run")
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        alpha = inheritance_rate("linear", step, 6)
        terms = line["terms"]
        assert line["alpha"] == pytest.approx(alpha)
        assert line["lr"] == learning_rate(settings.train, step)
        assert ("ce" in terms, "kl" in terms) == (alpha < 1, alpha > 0)
        whole = (1 - alpha) * terms.get("ce", 0) + alpha * terms.get("kl", 0)
        assert line["loss"] == pytest.approx(whole, rel=1e-6)
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
        assert line["peak_memory_bytes"] > 1e7
    assert losses(run / "run")[-1] < losses(run / "run")[-2] < 5.3  # it learns
    assert evaluations(run / "run") == sorted(evaluations(run / "run"), reverse=True)


def test_the_monitor_gets_the_same_numbers(run):
    def column(name: str) -> list[list[float]]:
        path = run / "csv" / "monitored" / f"{name}.csv"
        _, *rows = csv.reader(path.read_text().splitlines())
        return [[float(value) for value in row] for row in rows]

    lines = step_lines(run / "run")
    assert column("train_loss") == [[line["step"], line["loss"]] for line in lines]
    kl = [[n, line["terms"]["kl"]] for n, line in enumerate(lines[:6], 1)]
    assert column("train_terms_kl") == kl
    assert column("train_lr") == [[line["step"], line["lr"]] for line in lines]
    for name in ("grad_norm", "seconds", "alpha", "tokens_per_second", "peak_memory_bytes"):
        assert column(f"train_{name}") == [[x["step"], x[name]] for x in lines if name in x], name
    assert column("eval_nll") == [[2 * n, nll] for n, nll in enumerate(evaluations(run / "run"), 1)]


def test_summary(run):
    summary = json.loads((run / "run" / "train" / "summary.json").read_text())
    scores = evaluations(run / "run")
    assert summary["steps"] == summary["best_step"] == STEPS
    assert summary["eval_nll"] == summary["best_eval_nll"] == scores[-1]
    assert summary["parameters"] == 36736
    assert summary["wall_seconds"] > 0 and summary["peak_memory_bytes"] > 1e7
    assert summary["tokens"] <= STEPS * 8 * 32
    assert summary["tokens_per_second"] > 0


def test_a_sparser_log_tells_the_same(run, tmp_path):
    """Every third step and the last; also in one rank, without accumulation, at ZeRO-0."""
    words = [str(run / "run.yaml"), f"out={tmp_path}", f"teacher.path={run / 'run' / 'cache'}"]
    words += ["until=train", "log_every=3", "deepspeed=zero0", "train.micro_batch=8"]
    words += ["model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0"]
    ranks = Ranks(tmp_path, *words, world=1)
    assert ranks.statuses() == [0], ranks.output()
    assert [line["step"] for line in step_lines(tmp_path)] == [3, 6, 8]


def test_what_is_done_is_not_done_again(run):
    """The second call says so at once and changes nothing."""
    files = {path: path.stat().st_mtime_ns for path in (run / "run").rglob("*.pt")}
    metrics = (run / "run" / "train" / "metrics.jsonl").read_bytes()
    ranks = Ranks(run, str(run / "run.yaml"), "until=train")
    assert ranks.statuses() == [0, 0], ranks.output()
    assert "step 1/8" not in ranks.output() and "eval nll" in ranks.output()
    assert files == {path: path.stat().st_mtime_ns for path in (run / "run").rglob("*.pt")}
    assert metrics == (run / "run" / "train" / "metrics.jsonl").read_bytes()
