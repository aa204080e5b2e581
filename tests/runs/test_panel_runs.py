"""Panels of what earlier runs of a recipe train and leave: what is refused before they start."""

from pathlib import Path

import pytest

from dskd.errors import ConfigError
from dskd.settings.yaml_tree import merge
from tests.runs.test_labelled_runs import labelled
from tests.runs.test_plan import checked, recipe_of

DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def runs_of(folder: Path, **changes: dict) -> dict:
    """Two teachers, a student that stores what they say, and one that reads it."""
    rows = labelled(folder)
    panel = {
        "kind": "panel",
        "passes": 3,
        "teachers": {name: {"model": {"path": f"run:{name}"}} for name in ("one", "two")},
    }
    student = {"method": {"kind": "muki"}, "teacher": panel}
    runs = {
        "one": merge(rows, {"method": {"kind": "finetune"}}),
        "two": merge(rows, {"method": {"kind": "finetune"}}),
        "fills": merge(rows, student),
        "reads": merge(rows, merge(student, {"teacher": {"path": "run:fills"}})),
    }
    return {name: merge(run, changes.get(name, {})) for name, run in runs.items()}


def refused(folder: Path, **changes: dict) -> str:
    """What the checks say, with nothing made."""
    with pytest.raises(ConfigError) as caught:
        checked(recipe_of(folder, runs_of(folder, **changes)))
    assert not (folder / "runs").exists() and not (folder / "data").exists()
    return str(caught.value)


def test_a_teacher_that_an_earlier_run_trains_needs_dropout(tmp_path):
    dry = {"model": {"config": DRY}}
    found = refused(tmp_path, two=dry)
    start = "runs.fills.teacher.teachers.two.model: a bert without dropout (hidden_dropout_prob 0,"
    assert found.startswith(start), found
    for teacher in ({"passes": 1}, {"dropout": 0.1}):
        both = {name: {"teacher": teacher} for name in ("fills", "reads")}
        checked(recipe_of(tmp_path, runs_of(tmp_path, two=dry, **both)))
