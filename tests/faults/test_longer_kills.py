"""kill -9 while a finished run is made to go on: the next call finds the run of the old settings,
or that of the new ones, whole."""

import shutil
from pathlib import Path

import pytest

from dskd.runs import change_log, changes
from dskd.settings.recipe import SINGLE, read
from dskd.system.log import Metrics
from tests.faults.runs import STEPS, Ranks, Trap, die, train, write_recipe
from tests.faults.test_kills import _trap, assert_same, before
from tests.launching import evaluations, losses

LONGER = STEPS + 4


def _half_a_folder(original, path, *args, **kwargs):
    if Path(path).name == ".export.gone":
        (Path(path) / "model.safetensors").unlink()
        die()
    return original(path, *args, **kwargs)


MOMENTS: list[tuple[str, Trap, list[str], int]] = [
    ("nothing removed", before(changes, "_remove"), ["export", "scores.json"], STEPS),
    ("scores removed", before(changes, "_remove", call=2), ["export"], STEPS),
    ("half an export removed", _trap(shutil, "rmtree", _half_a_folder, None, rank=0), [], STEPS),
    ("a summary without results", before(changes, "_remove"), [], STEPS),
    ("all removed", before(changes, "note"), [], STEPS),
    ("history, old settings", before(changes, "_write"), [], STEPS),
    ("history once more", before(changes, "_write"), [], STEPS),
    ("first step to come", before(Metrics, "write"), [], LONGER),
]
"""What has happened, the trap that kills there, what is left, the steps of the settings by then."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    recipe = Path(write_recipe(folder))
    train(folder, str(recipe), world=1)
    shutil.copytree(folder / "run", folder / "longer")
    train(folder, str(recipe), f"out={folder / 'longer'}", f"train.steps={LONGER}", world=1)
    return recipe


def settings_of(out: Path) -> int:
    return read(out / "config.yaml").runs[SINGLE].train.steps


def results(out: Path) -> list[str]:
    return [name for name in ("export", "scores.json") if (out / name).exists()]


def test_killed_at_every_delicate_moment(recipe, tmp_path):
    out, whole = tmp_path / "run", recipe.parent / "longer"
    shutil.copytree(recipe.parent / "run", out)
    words = [str(recipe), f"out={out}", f"train.steps={LONGER}"]
    for moment, trap, left, steps in MOMENTS:
        ranks = Ranks(tmp_path, *words, world=1, trap=trap)
        assert ranks.statuses() == [-9], (moment, ranks.output())
        assert (results(out), settings_of(out)) == (left, steps), moment
        back = tmp_path / moment
        shutil.copytree(out, back)
        if steps == STEPS:  # the old settings still lead to the old run
            train(tmp_path, str(recipe), f"out={back}", world=1)
            assert_same(back, recipe.parent / "run")
            assert change_log.read_changes(back / "history.jsonl") == []
            assert not list(back.glob(".*.gone"))
    train(tmp_path, *words, world=1)
    assert losses(out) == losses(whole) and len(losses(out)) == LONGER
    assert evaluations(out) == evaluations(whole)
    for name in ("scores.json", "export/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    for folder in (out, whole):
        (line,) = change_log.read_changes(folder / "history.jsonl")
        assert (line["step"], line["changed"]) == (STEPS, {"train.steps": [STEPS, LONGER]})
