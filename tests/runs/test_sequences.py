"""What runs remember that learn tasks one after the other: closed forms, and which runs are in
sequence."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dskd.cli import main
from dskd.errors import CheckpointError
from dskd.runs.sequences import ScoreMatrix, print_sequences, sequences_of, sequences_section
from dskd.settings.run import Run
from dskd.settings.yaml_tree import merge
from dskd.system.files import write_manifest
from tests.launching import forked
from tests.runs.test_plan import recipe_of
from tests.runs.test_question_runs import asked

TASKS = ["rev", "maj", "shift"]


def matrix(scores, learnt=(0, 1, 2)) -> ScoreMatrix:
    return ScoreMatrix("lll", TASKS[: len(scores)], learnt, TASKS, np.array(scores, float))


@pytest.mark.parametrize(
    ("scores", "learnt", "average", "forgetting", "transfer"),
    [
        # (90 - 30 + 80 - 70) / 2 both ways: each task is best where it was learnt.
        ([[90, 10, 0], [60, 80, 5], [30, 70, 95]], (0, 1, 2), 65, 35, -35),
        # (95 - 30 + 85 - 70) / 2, as a later run and one before it were better.
        ([[90, 85, 0], [95, 80, 5], [30, 70, 95]], (0, 1, 2), 65, 40, -35),
        # In another order; the last run is better than all before it: what it forgets is below 0.
        ([[1, 2, 50], [40, 3, 60], [44, 90, 70]], (2, 0, 1), 68, (60 - 70 + 40 - 44) / 2, 12),
        # The first task again at the end: it forgot nothing of it, but of the one between.
        ([[90, 0, 0], [20, 80, 0], [95, 50, 0]], (0, 1, 0), 145 / 3, 30, -30),
        ([[90, 10, 0]], (0,), 100 / 3, None, None),
        ([[90, 100, 80]], (None,), 90, None, None),
    ],
)  # fmt: skip
def test_closed_forms(scores, learnt, average, forgetting, transfer):
    found = matrix(scores, learnt)
    assert found.average == pytest.approx(average)
    assert found.forgetting == (None if forgetting is None else pytest.approx(forgetting))
    assert found.backward_transfer == (None if transfer is None else pytest.approx(transfer))


def a_run(folder: Path, name: str, task: str, start: str | None = None, **more) -> Run:
    """An evaluated run, whose scores are three numbers made of its name."""
    metrics = more.pop("metrics", {task: "em" for task in TASKS})
    source = {"kind": "questions", "path": "x"}
    run = {
        "out": str(folder / name),
        "method": {"kind": "lm"},
        "model": {"path": str(folder / start / "export") if start else "gpt2"},
        "data": {"objective": "causal", "sources": [source | {"domain": task}], "questions": {}},
        "evaluation": {"sets": {t: {"metric": m, "sources": [source]} for t, m in metrics.items()}},
    }
    run = Run.model_validate(merge(run, more), strict=False)
    run.out.mkdir(parents=True)
    scores = {f"{t}_{m}": float(ord(name[-1]) % 7 + k) for k, (t, m) in enumerate(metrics.items())}
    (run.out / "scores.json").write_text(json.dumps(scores | {"eval_nll": 1.0}))
    prints = {f"evaluation.sets.{t}": f"print of {t}" for t in metrics}
    write_manifest(run.out / "inputs.json", prints)
    return run


def made(folder: Path) -> dict[str, Run]:
    """Two sequences of three tasks in two orders, one that branches off, runs that stand alone."""
    runs = {
        "rev-teacher": ("rev", None), "rev": ("rev", None), "maj": ("maj", "rev"),
        "shift": ("shift", "maj"), "ewc-maj": ("maj", "rev"), "ewc-shift": ("shift", "ewc-maj"),
        "back-shift": ("shift", None), "back-maj": ("maj", "back-shift"),
        "back-rev": ("rev", "back-maj"),
    }  # fmt: skip
    found = {name: a_run(folder, name, *of) for name, of in runs.items()}
    every = {"data": {"sources": [{"kind": "questions", "path": "x", "domain": t} for t in TASKS]}}
    found["multitask"] = a_run(folder, "multitask", "rev", **every)
    return found


def named(groups: list[list[ScoreMatrix]]) -> list[dict[str, list[str]]]:
    return [{each.name: list(each.runs) for each in group} for group in groups]


ALL = {
    "rev-teacher": ["rev-teacher"], "rev, maj, shift": ["rev", "maj", "shift"],
    "rev, ewc-maj, ewc-shift": ["rev", "ewc-maj", "ewc-shift"],
    "back": ["back-shift", "back-maj", "back-rev"], "multitask": ["multitask"],
}  # fmt: skip


def test_runs_that_begin_as_each_others_exports_are_a_sequence(tmp_path):
    runs = made(tmp_path)
    (group,) = sequences_of(runs)
    assert named([group]) == [ALL]
    back = next(each for each in group if each.name == "back")
    assert back.learnt == [2, 1, 0] and list(back.sets) == TASKS
    assert back.scores_TS.tolist() == [
        [float(ord(name[-1]) % 7 + k) for k in range(3)] for name in back.runs
    ]
    (runs["ewc-maj"].out / "scores.json").unlink()  # not evaluated yet
    (group,) = sequences_of(runs)
    assert "ewc-shift" in named([group])[0] and "rev, ewc-maj, ewc-shift" not in named([group])[0]
    assert sequences_of({name: runs[name] for name in ("rev", "shift", "back-rev")}) == []


def test_a_recipes_folder_may_have_been_moved(tmp_path):
    runs = made(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = {
        name: run.model_copy(update={"out": tmp_path / "new" / name}) for name, run in runs.items()
    }
    assert named(sequences_of(moved)) == [ALL]


def test_other_sets_are_another_group(tmp_path):
    """Sets of other metrics, or other questions under the same names; their order plays no part."""
    runs = {"rev": a_run(tmp_path, "rev", "rev"), "maj": a_run(tmp_path, "maj", "maj", "rev")}
    nf1 = {"metrics": dict.fromkeys(TASKS, "nf1")}
    turned = {"metrics": {t: "em" for t in TASKS[::-1]}}
    runs["shift"] = a_run(tmp_path, "shift", "shift", "maj", **nf1)
    runs["x-rev"] = a_run(tmp_path, "x-rev", "rev", **turned)
    runs["x-maj"] = a_run(tmp_path, "x-maj", "maj", "x-rev", **turned)
    (group,) = sequences_of(runs)
    assert named([group]) == [{"rev, maj": ["rev", "maj"], "x": ["x-rev", "x-maj"]}]
    scores = json.loads((tmp_path / "x-maj" / "scores.json").read_text())
    assert group[1].scores_TS[-1].tolist() == [scores[f"{task}_em"] for task in TASKS]
    prints = {f"evaluation.sets.{t}": "of other questions" for t in TASKS}
    write_manifest(tmp_path / "x-maj" / "inputs.json", prints)
    assert named(sequences_of(runs)) == [{"rev, maj": ["rev", "maj"], "x-rev": ["x-rev"]}]


def test_a_run_that_learns_no_set_or_several_begins_none(tmp_path):
    runs = {"start": a_run(tmp_path, "start", "text")}
    runs |= {
        "rev": a_run(tmp_path, "rev", "rev", "start"),
        "maj": a_run(tmp_path, "maj", "maj", "rev"),
    }
    assert named(sequences_of(runs)) == [{"rev, maj": ["rev", "maj"]}]


def test_scores_that_are_damaged_are_named(tmp_path):
    runs = {"rev": a_run(tmp_path, "rev", "rev"), "maj": a_run(tmp_path, "maj", "maj", "rev")}
    (tmp_path / "rev" / "scores.json").write_text('{"rev_em": 3.0, "maj_em": 1}')
    with pytest.raises(CheckpointError, match=r"rev/scores\.json: damaged, 'shift_em' is missing"):
        sequences_of(runs)


def test_what_is_printed_and_shown(tmp_path, capsys):
    groups = sequences_of(made(tmp_path))
    print_sequences(groups)
    out = capsys.readouterr().out
    back = next(each for each in groups[0] if each.name == "back")
    line = next(line for line in out.splitlines() if line.strip().startswith("\u2502 back "))
    cells = [cell.strip() for cell in line.strip("\u2502 ").split("\u2502")]
    numbers = [*back.scores_TS[-1], back.average, back.forgetting, back.backward_transfer]
    assert cells == ["back", *(f"{number:.1f}" for number in numbers)]
    assert "back: scores by set, in per cent" in out and "multitask: scores" not in out
    page = sequences_section(groups)
    assert page.count("<caption") == 3 and page.count("outline: 2px") == 9
    assert page.count("<figure><svg") == 3 and not re.search(r"https?://|<script", page)
    assert sequences_section([]) == ""


def lifelong(folder: Path) -> dict:
    """Three runs: one task, the other one after it, and both at once; all answer both sets."""
    both = asked(folder)
    up, down = both["data"]["sources"]
    sets = {s["domain"]: {"sources": [s], "metric": "em", "rows": 4} for s in (up, down)}
    both["evaluation"] = {"sets": sets}

    def run(sources: list, **more) -> dict:
        return merge(both, {"data": {"sources": sources}, **more})

    stored = {"tokenizer": {"kind": "pretrained", "path": "run:up"}}
    later = {"sources": [down], **stored}
    return {
        "up": run([up]),
        "down": merge(run([down]), {"data": later, "model": {"path": "run:up", "config": {}}}),
        "multitask": merge(run([up, down]), {"data": stored}),
    }


def test_a_recipe_shows_its_sequence_and_so_does_a_report_of_its_folders(tmp_path, capfd):
    runs = lifelong(tmp_path)
    runs["down"]["model"].pop("config")
    forked(1, str(recipe_of(tmp_path, runs)))
    out = capfd.readouterr().out
    assert "up, down: scores by set, in per cent" in out and "backward transfer" in out
    page = (tmp_path / "runs" / "report.html").read_text()
    assert page.index("Tasks learnt one after the other") < page.index("Runs compared")
    scores = json.loads((tmp_path / "runs" / "down" / "scores.json").read_text())
    shown = re.search(r"<td class=\"text\">down</td>(.*?)</tr>", page).group(1)
    assert re.findall(r">([\d.]+)<", shown) == [f"{scores[k]:.1f}" for k in ("up_em", "down_em")]
    moved = shutil.move(tmp_path / "runs", tmp_path / "moved")
    for words in ([moved], [f"{moved}/down", f"{moved}/up"]):
        assert main(["report", *map(str, words), "--out", str(tmp_path)]) == 0
        assert "up, down: scores by set, in per cent" in capfd.readouterr().out
        assert "Tasks learnt one after" in (tmp_path / "report.html").read_text()
    assert main(["report", f"{moved}/multitask", f"{moved}/down", "--out", str(tmp_path)]) == 2
    assert "cannot be compared" in capfd.readouterr().err
