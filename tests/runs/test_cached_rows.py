"""A cache holds the rows that its runs read, gets others before they go on, and is the same store
however that comes about."""

import json
from pathlib import Path

import numpy as np
import pytest

from dskd.data.loader import rows_taken
from dskd.runs.changes import settings_in
from dskd.settings.recipe import SINGLE, read
from dskd.settings.teachers import CachedRows
from dskd.stores.cost import read_costs
from dskd.stores.logits import LogitCache
from dskd.stores.manifest import read_spec, write_spec
from dskd.stores.store import shard_path
from tests.equivalence.small import LIVE, Runs, cached, causal, settings
from tests.launching import evaluations, forked, losses

SEED, STEPS, BATCH = 3, 4, 8  # of the small settings
TEACHER = cached(LIVE)
CONSTANT = {"train": {"schedule": "constant"}, "method": {"kind": "ki", "schedule": "constant"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cached_rows"))


@pytest.fixture(scope="module")
def short(runs) -> Path:
    """Four steps of eight rows, of some 160."""
    return runs.run("short", 1, teacher=TEACHER, **CONSTANT)


def held(folder: Path) -> np.ndarray:
    """The rows in a store, bool [draws, rows], found in its shards; and as its manifest counts."""
    cache = LogitCache(folder, {})
    spec = cache.store.spec
    found = np.zeros((spec.draws, spec.rows), bool)
    for shard, record in enumerate(cache.store.records):
        rows = cache.store.held(shard)
        assert len(rows) == record.rows
        found[spec.span(shard)[0], rows] = True
    return found


def taken(shape: tuple[int, int], count: int, seed: int = SEED) -> np.ndarray:
    draws, rows = shape
    return rows_taken(rows, seed, count, draws)


def values(folder: Path, draw: int, row: int) -> dict[str, np.ndarray]:
    store = LogitCache(folder, {}).store
    return store.read(np.array([row]), np.array([draw]), store.spec.columns)[1]


def test_a_short_run_captures_what_it_reads_and_is_the_run_of_a_full_cache(runs, short):
    found = held(short / "cache")
    assert found.sum() == STEPS * BATCH == found[0].sum() < found.shape[1]
    np.testing.assert_array_equal(found, taken(found.shape, STEPS * BATCH))
    full = runs.run("full", 1, teacher=TEACHER | {"cache": {"epochs": 2}}, **CONSTANT)
    assert held(full / "cache").all()
    assert losses(full) == losses(short) and len(losses(short)) == STEPS
    assert evaluations(full) == evaluations(short)
    for row in np.flatnonzero(found[0]).tolist():
        ours, theirs = (values(run / "cache", 0, row) for run in (short, full))
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)


def test_two_ranks_capture_the_same_bytes(runs, short):
    two = runs.run("two", 2, teacher=TEACHER, **CONSTANT)
    names = sorted(path.name for path in (short / "cache").glob("[!c.]*"))
    assert len(names) > 5 and "manifest.json" in names
    for name in names:
        assert (two / "cache" / name).read_bytes() == (short / "cache" / name).read_bytes()
    one, other = (read_costs(run / "cache").total for run in (short, two))
    assert one.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})


def test_a_longer_run_captures_the_rest_before_it_goes_on(runs, short):
    """Over the end of the first epoch: then it is the unbroken run."""
    out, steps = runs.copied(short, "longer"), 40
    before = {row: values(out / "cache", 0, row) for row in np.flatnonzero(held(out / "cache")[0])}
    forked(1, str(out / "config.yaml"), f"train.steps={steps}")
    found = held(out / "cache")
    assert found[0].all() and 0 < found[1].sum() == steps * BATCH - found.shape[1]
    np.testing.assert_array_equal(found, taken(found.shape, steps * BATCH))
    for row, columns in before.items():
        for name, array in values(out / "cache", 0, row).items():
            np.testing.assert_array_equal(array, columns[name])
    whole = runs.run("whole", 1, "train.steps=40", teacher=TEACHER, **CONSTANT)
    assert losses(out) == losses(whole) and len(losses(out)) == steps
    cost = read_costs(out / "cache")
    assert list(cost.by) == [".."] and cost.total.rows == steps * BATCH
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / "cache").iterdir() if p.name[0] != "."}
    forked(1, str(out / "config.yaml"))  # all is there
    assert stamps == {name: (out / "cache" / name).stat().st_mtime_ns for name in stamps}


def test_a_capture_of_more_rows_goes_on_where_it_was_killed(runs, short):
    """Some shards have got their rows, one is damaged, and the store is not complete."""
    whole = runs.copied(short, "unkilled")
    forked(1, str(whole / "config.yaml"), "train.steps=8")
    killed = runs.copied(short, "killed")
    content = json.loads((killed / "cache/manifest.json").read_text())
    shards = range(len(content["shards"]))
    forked(1, str(killed / "config.yaml"), "train.steps=8", "until=cache")
    for shard in shards[1::2]:  # these had not been reached
        path = shard_path(killed / "cache", shard)
        path.write_bytes(shard_path(short / "cache", shard).read_bytes())
    path = shard_path(killed / "cache", 0)
    path.write_bytes(path.read_bytes()[:-5])
    (killed / "cache" / "manifest.json").write_bytes(begun(runs, short))
    forked(2, str(killed / "config.yaml"), "train.steps=8", "until=train")
    np.testing.assert_array_equal(held(killed / "cache"), held(whole / "cache"))
    for shard in shards:
        ours, theirs = (shard_path(run / "cache", shard).read_bytes() for run in (killed, whole))
        assert ours == theirs, shard
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)


def begun(runs: Runs, short: Path) -> bytes:
    """The manifest of a capture that is not complete."""
    folder = runs.folder / "begun"
    folder.mkdir(exist_ok=True)
    write_spec(folder, read_spec(short / "cache")[0], None)
    return (folder / "manifest.json").read_bytes()


def test_the_runs_of_a_recipe_share_what_all_of_them_read(tmp_path):
    """The one that captures reads less than one that has no teacher's model, and another seed."""
    folder = Runs(tmp_path).folder
    base = settings(folder) | {"out": str(folder / "runs"), "seed": 3}
    base["data"] |= causal()["data"]
    base["model"] = causal()["model"]
    teacher = {**causal()["teacher"], **cached({}), "temperatures": [2.0]}
    read_only = {"kind": "cached", "path": "run:first"}
    recipe = {
        "base": base,
        "runs": {
            "first": {"teacher": teacher},
            "second": {"teacher": read_only, "train": {"steps": 7}, "seed": 5},
        },
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    forked(1, str(folder / "r.yaml"))
    found = held(folder / "runs/first/cache")
    wanted = taken(found.shape, 32) | taken(found.shape, 56, seed=5)
    np.testing.assert_array_equal(found, wanted)
    assert not found.all()
    # Alone, the second goes no further than there are rows.
    words = [str(folder / "runs/second/config.yaml"), "train.steps=9"]
    before = {p: p.read_bytes() for p in (folder / "runs/second").rglob("*.json")}
    forked(1, *words, status=2)
    assert before == {p: p.read_bytes() for p in (folder / "runs/second").rglob("*.json")}
    assert settings_in(read(folder / "runs/second/config.yaml").runs[SINGLE]).train.steps == 7


@pytest.mark.parametrize(
    ("steps", "more", "told"),
    [
        (4, {"cache": {"rows": 30}}, "teacher.cache: 30 rows, but the run reads 2 others"),
        (5, {"model": None}, "lacks 8 of the 40 rows that the run reads"),
    ],
)
def test_what_a_run_reads_cannot_be_left_out(runs, short, capfd, steps, more, told):
    teacher = TEACHER | {"path": str(short / "cache")} | more
    recipe = settings(runs.folder) | {"teacher": teacher}
    path = runs.folder / "less.yaml"
    path.write_text(json.dumps(recipe))
    words = [str(path), f"out={runs.folder}/less", f"train.steps={steps}"]
    forked(1, *words, status=2)
    assert told in capfd.readouterr().err
    assert not list((runs.folder / "less").rglob("step-*"))


def test_either_epochs_or_rows():
    with pytest.raises(ValueError, match="either epochs or rows"):
        CachedRows()
    with pytest.raises(ValueError, match="either epochs or rows"):
        CachedRows(rows=3, epochs=1)
