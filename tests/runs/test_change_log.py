"""What is written down of changed settings, and what a killed job wrote too early."""

import json
from pathlib import Path

import pytest

from dskd.errors import CheckpointError
from dskd.runs.change_log import changes_of, changes_section, note, read_changes
from dskd.settings.folders import RunFolder
from dskd.settings.recipe import SINGLE, read
from dskd.settings.run import Run


def run_of(*words: str) -> Run:
    return read(None, words).runs[SINGLE]


BEFORE, NOW = run_of(), run_of("train.steps=40", "evaluation.every=5", "train.batch=32")
CHANGED = {"train.steps": [20, 40], "evaluation.every": [10, 5]}


def noted(folder: Path) -> list[tuple[int, dict]]:
    return [(line["step"], line["changed"]) for line in read_changes(folder / "history.jsonl")]


def test_what_changed_is_noted_once(tmp_path):
    """Its settings are written after it: a line of settings that never were is taken back."""
    assert changes_of(BEFORE, NOW) == CHANGED
    for _ in range(2):  # killed in between
        note(RunFolder(tmp_path), BEFORE, CHANGED, 20)
        assert noted(tmp_path) == [(20, CHANGED)]
    note(RunFolder(tmp_path), NOW, {}, 20)
    assert noted(tmp_path) == [(20, CHANGED)]
    third = {"train.lr": [1e-3, 1e-4]}
    note(RunFolder(tmp_path), NOW, third, 40)
    note(RunFolder(tmp_path), NOW, {}, 40)
    assert noted(tmp_path) == [(20, CHANGED)]
    note(RunFolder(tmp_path), BEFORE, {}, 20)
    assert noted(tmp_path) == []


def test_a_run_that_was_not_changed_has_no_history(tmp_path):
    note(RunFolder(tmp_path), BEFORE, {}, 20)
    assert not list(tmp_path.iterdir())
    assert changes_section({"run": RunFolder(tmp_path)}) == ""


def test_the_report_has_a_line_for_each_setting(tmp_path):
    note(RunFolder(tmp_path), BEFORE, CHANGED, 20)
    (line,) = read_changes(tmp_path / "history.jsonl")
    shown = changes_section({"<run>": RunFolder(tmp_path), "other": RunFolder(tmp_path / "none")})
    cells = ["&lt;run&gt;", "20", line["date"], "train.steps", "20", "40"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in shown
    assert shown.count("<tr>") == 3


@pytest.mark.parametrize(
    "line",
    [{"step": 3}, {"step": 3, "date": "", "changed": {}}, {"date": "", "changed": {"a": []}}],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(CheckpointError, match=rf"^{path}, line 1: "):
        read_changes(path)
