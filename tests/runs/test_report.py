"""The report: steps to the control's loss, the table's numbers, the HTML, damaged files."""

import json
import math
import re
from pathlib import Path

import pytest

from dskd.errors import CheckpointError, ConfigError, DiskError
from dskd.runs.report import (
    print_table,
    read_history,
    scores_section,
    steps_to,
    table,
    write_report,
)
from dskd.system.log import read_metrics
from tests.disks import limited


def make_run(folder: Path, nlls: list[float], *, alpha: bool, scores: dict | None = None) -> Path:
    """A finished run: one training line and one evaluation every 100 steps."""
    lines = []
    for index, nll in enumerate(nlls, 1):
        step = index * 100
        terms = {"ce": nll + 0.1, **({"kl": nll / 2} if alpha else {})}
        line = {"step": step, "loss": nll, "terms": terms, "lr": 1e-3 / index, "grad_norm": None}
        lines.append({**line, **({"alpha": 1 / index} if alpha else {})})
        lines.append({"step": step, "eval_nll": nll, "eval_bits": nll * 1.4427, "eval_ppl": 2**nll})
    summary = {
        "steps": 100 * len(nlls), "metric": "eval_nll", "higher_is_better": False,
        "eval_nll": nlls[-1], "tokens_per_second": 12345.6, "peak_memory_bytes": 3 * 2**29,
        "wall_seconds": 125.0, "parameters": 1234567, "trained_parameters": 7654321,
    }  # fmt: skip
    (folder / "train").mkdir(parents=True)
    (folder / "train/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "train/summary.json").write_text(json.dumps(summary))
    if scores:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    scores = {"eval_nll": 2.5, "of": "x"}
    ki = make_run(tmp_path / "ki", [5.0, 4.0, 3.0, 2.5], alpha=True, scores=scores)
    return {"ki": ki, "scratch": make_run(tmp_path / "scratch", [6.0, 5.0, 4.0, 3.2], alpha=False)}


def cells(made, row: int) -> list[str]:
    return [list(column.cells)[row] for column in made.columns]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.2, 280.0), (4.0, 200.0), (3.5, 250.0), (5.0, 100.0), (9.0, 100.0), (2.5, 400.0),
        (2.4, None),
    ],
)  # fmt: skip
def test_steps_are_linear_between_evaluations(target, expected):
    points = [(100, 5.0), (200, 4.0), (300, 3.0), (400, 2.5)]
    assert steps_to(points, target) == (None if expected is None else pytest.approx(expected))


def test_the_first_crossing_counts():
    assert steps_to([(10, 4.0), (20, 2.0), (30, 5.0), (40, 1.0)], 3.0) == 15.0


def test_a_score_that_rises_is_reached_from_below():
    points = [(100, 0.5), (200, 0.7), (300, 0.6)]
    assert steps_to(points, 0.6, higher_is_better=True) == pytest.approx(150.0)
    assert steps_to(points, 0.8, higher_is_better=True) is None


def test_steps_to_leaves_out_what_was_undefined():
    points = [(10, math.nan), (20, 0.2), (30, math.nan), (40, 0.6)]
    assert steps_to(points, 0.4, higher_is_better=True) == pytest.approx(30.0)
    assert steps_to(points[2:], 0.4, higher_is_better=True) == 40.0


def rising(folder: Path) -> None:
    """Make a run's score one that is better the higher it is: a tenth of what its loss was."""
    path = folder / "train/summary.json"
    summary = json.loads(path.read_text()) | {"metric": "eval_accuracy", "higher_is_better": True}
    path.write_text(json.dumps(summary))
    path = folder / "train/metrics.jsonl"
    lines = read_metrics(path)
    for number, line in enumerate(lines):
        if "eval_nll" in line:
            lines[number] = {"step": line["step"], "eval_accuracy": line["eval_nll"] / 10}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_are_compared_by_the_controls_score(tmp_path, runs):
    """What another score selects has none of it, and has no perplexity."""
    folders = {"a": make_run(tmp_path / "a", [2.0, 6.0], alpha=False)}
    folders["b"] = make_run(tmp_path / "b", [3.0, 4.0], alpha=False)
    for folder in folders.values():
        rising(folder)
    made = table(folders, "b")
    assert [str(c.header) for c in made.columns][3] == "eval accuracy"
    assert str(made.columns[-2].header) == "steps to b's final score"
    assert cells(made, 0)[3:5] == ["0.6000", "-"]
    assert cells(made, 0)[-2:] == ["150.0", "1.33x"]  # 200 / 150
    assert cells(table({**folders, "ki": runs["ki"]}, "b"), 2)[-2:] == ["not reached", "-"]
    write_report(folders, tmp_path, "b", [scores_section])


def test_table_numbers(runs):
    made = table(runs, "scratch")
    last = [str(column.header) for column in made.columns[-2:]]
    assert last == ["steps to scratch's final loss", "fewer by"]
    assert cells(made, 0) == [
        *("ki", "1,234,567", "400", "2.5000", "5.66", "12,346", "1.50 GiB", "-", "-"),
        "2:05",
        *("280.0", "1.43x"),  # 400 / 280
    ]
    assert cells(made, 1)[-2:] == ["400", "-"]


def test_what_a_gpu_had_reserved_is_shown_beside_what_tensors_took(runs):
    path = runs["ki"] / "train" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"reserved_memory_bytes": 2**31}))
    assert cells(table(runs, "scratch"), 0)[6] == "1.50 GiB (2.00 reserved)"
    path.write_text(json.dumps(summary | {"reserved_memory_bytes": "2"}))
    with pytest.raises(CheckpointError, match=r"summary\.json: damaged, 'reserved_memory_bytes'"):
        table(runs, "scratch")


def test_a_run_that_never_gets_there_says_so(tmp_path, runs):
    runs["slow"] = make_run(tmp_path / "slow", [6.0, 5.0, 4.0, 3.9], alpha=False)
    assert cells(table(runs, "scratch"), 2)[-2:] == ["not reached", "-"]


def test_without_a_control_there_is_no_comparison(runs, capsys):
    assert len(table(runs, None).columns) == 10
    print_table(runs, None)
    printed = capsys.readouterr().out
    assert "12,346" in printed
    assert "2.5000" in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_history_by_name(runs):
    history = read_history(runs["ki"])
    assert history.rate("alpha") == [(100, 1.0), (200, 0.5), (300, 1 / 3), (400, 0.25)]
    assert history.term("kl") == [(100, 2.5), (200, 2.0), (300, 1.5), (400, 1.25)]
    assert read_history(runs["scratch"]).rate("alpha") == []
    assert read_history(runs["scratch"]).term("kl") == []


def test_html_is_self_contained(tmp_path, runs):
    runs["<b>&"] = make_run(tmp_path / "odd", [3.0], alpha=False)
    path = write_report(runs, tmp_path, "scratch", [scores_section])
    page = path.read_text()
    assert path == tmp_path / "report.html"
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "280.0" in page
    assert not re.search(r"https?://|<script|<link", page)
    assert "<img" not in page and page.count("<figure><svg") == 5  # nll, ce, kl, alpha, lr
    scores = page[page.index("Scores of the exported models") :]
    assert "<th>run</th><th>eval_nll</th></tr>" in scores
    assert "<td>ki</td><td>2.5</td></tr>" in scores


def damage(name: str, text: str):
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("train/metrics.jsonl", '{"step": 1}\n'), "metrics.jsonl, line 1: damaged, 'loss'"),
        (damage("train/metrics.jsonl", '{"step": 1,\n'), "metrics.jsonl, line 1: not JSON"),
        (damage("train/metrics.jsonl", "[1]\n"), "metrics.jsonl, line 1: damaged, not an object"),
        (damage("train/metrics.jsonl", ""), "metrics.jsonl: no evaluation in it"),
        (damage("train/metrics.jsonl", '{"step": 1, "eval_nll": "x"}\n'), "line 1: damaged, 'eval"),
        (damage("train/summary.json", '{"steps": 4'), "summary.json: damaged, not readable"),
        (damage("train/summary.json", '{"eval_nll": 4.0}'), "summary.json: damaged, 'steps'"),
        (damage("scores.json", "7"), "scores.json: damaged, not an object"),
        (lambda folder: (folder / "train/summary.json").unlink(), "summary.json: no such file"),
        (lambda folder: (folder / "train/metrics.jsonl").unlink(), "metrics.jsonl: no such file"),
    ],
)
def test_damage_is_named(runs, tmp_path, change, message):
    change(runs["ki"])
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        write_report(runs, tmp_path, "scratch", [scores_section])
    assert str(runs["ki"]) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_an_unknown_control_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="control run 'scrath' is none of: ki, scratch"):
        write_report(runs, tmp_path, "scrath", [])


def test_a_report_that_does_not_fit_leaves_nothing(tmp_path, runs):
    with limited(1000), pytest.raises(DiskError, match=r"report\.html: cannot write the report: "):
        write_report(runs, tmp_path, None, [])
    assert not list(tmp_path.glob("*report*"))


def test_a_line_that_is_no_object_is_named(runs):
    path = runs["ki"] / "train/metrics.jsonl"
    path.write_text("3\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1: damaged, not an object"):
        table(runs, None)
