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
    (source,) = rows["data"]["sources"]
    rows["data"]["sources"] = [source | {"domain": domain} for domain in "ab"]
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


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": {"block_size": 24}},
         "teacher.path: run fills fills it with scores of other rows: data.block_size differ"),
        ({"seed": 5}, "seed: run fills fills"),
        ({"teacher": {"passes": 4}}, "teacher.passes: 4 passes a row, but run fills fills"),
        ({"teacher": {"dropout": 0.2}}, "teacher.dropout: run fills fills"),
        ({"teacher": {"teachers": {"one": {"model": {"path": "run:two"}}}}},
         "teacher.teachers.one.model: run fills fills"),
        ({"teacher": {"teachers": {"two": {"precision": "bf16"}}}},
         "teacher.teachers.two.precision: run fills fills"),
        ({"teacher": {"teachers": {"one": {"domains": ["a"]}}}},
         "teacher.teachers.one.domains: run fills fills"),
    ],
)  # fmt: skip
def test_scores_of_something_else_are_refused(tmp_path, change, line):
    found = refused(tmp_path, reads=change)
    assert f"runs.reads.{line}" in found, found


def test_what_scores_do_not_depend_on_may_differ(tmp_path):
    checked(recipe_of(tmp_path, runs_of(tmp_path)))
    free = {"method": {"kind": "vkd"}, "teacher": {"micro_batch": 2}, "train": {"lr": 1e-5}}
    checked(recipe_of(tmp_path, runs_of(tmp_path, reads=free)))
    single = {"seed": 5, "teacher": {"passes": 1}}
    runs = runs_of(tmp_path, fills={"teacher": {"passes": 1}}, reads=single)
    runs["reads"]["teacher"]["teachers"] = {"two": {"model": {"path": "run:two"}}}
    checked(recipe_of(tmp_path, runs))
