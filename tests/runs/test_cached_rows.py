"""A cache holds the rows that its runs read, gets others before they go on, and is the same store
however that comes about."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dskd.data.loader import rows_taken
from dskd.errors import CheckpointError
from dskd.runs.about import About, Spent, read_about
from dskd.runs.cached_rows import _read
from dskd.runs.changes import settings_in
from dskd.runs.history import read_summary
from dskd.runs.identity import time_text
from dskd.settings.recipe import SINGLE, read
from dskd.settings.teachers import CachedRows
from dskd.stores.cost import read_costs
from dskd.stores.logits import LogitCache
from dskd.stores.manifest import read_spec, write_spec
from dskd.stores.store import shard_path
from tests.equivalence.small import LIVE, LIVE_OTHER, Runs, cached, causal, routed, settings
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


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The folder of two runs; the one that captures reads less than the other, which has no
    teacher's model, another seed, and goes twice as far."""
    folder = Runs(tmp_path_factory.mktemp("recipe")).folder
    base = settings(folder) | {"out": str(folder / "runs"), "until": "train"}
    base["data"] |= causal()["data"]
    base["model"] = causal()["model"]
    teacher = {**causal()["teacher"], **cached({}), "temperatures": [2.0]}
    read_only = {"kind": "cached", "path": "run:first"}
    second = {"teacher": read_only, "train": {"steps": 7}, "seed": 5}
    runs = {"first": {"teacher": teacher}, "second": second}
    (folder / "r.yaml").write_text(json.dumps({"base": base, "runs": runs}))
    forked(1, str(folder / "r.yaml"))
    return folder / "runs"


def test_the_runs_of_a_recipe_share_what_all_of_them_read(recipe):
    found = held(recipe / "first" / "cache")
    wanted = taken(found.shape, 32) | taken(found.shape, 56, seed=5)
    np.testing.assert_array_equal(found, wanted)
    assert not found.all()


def test_alone_a_run_goes_no_further_than_there_are_rows(recipe):
    """Nothing of it is touched, its settings are as before."""
    second = recipe / "second"
    before = {p: p.read_bytes() for p in second.rglob("*.json")}
    forked(1, str(second / "config.yaml"), "train.steps=9", status=2)
    assert before == {p: p.read_bytes() for p in second.rglob("*.json")}
    assert settings_in(read(second / "config.yaml").runs[SINGLE]).train.steps == 7


def test_what_was_made_once_is_counted_once(recipe):
    """In the summaries: the first run's time is its own, and shared for the second."""
    first, second = (about_of(recipe / name) for name in ("first", "second"))
    assert first.preparing.own > 0 == first.preparing.shared
    assert second.preparing == Spent(own=0.0, shared=first.preparing.own)
    assert first.capture.seconds.own > 0 == first.capture.seconds.shared
    assert second.capture.seconds == Spent(own=0.0, shared=first.capture.seconds.own)
    assert first.capture.rows == int(held(recipe / "first/cache").sum()) == second.capture.rows
    shards = sum(path.stat().st_size for path in (recipe / "first/cache").glob("shard-*"))
    assert first.capture.bytes == shards
    assert first.ranks == 1 and first.libraries["torch"] == torch.__version__
    assert first.data == second.data and first.data.evaluated == 4 < first.data.held_out
    assert first.data.sources == ["left: text left.txt", "right: text right.txt"]
    assert first.data.validation == ["valid: text valid.txt"]


def about_of(run: Path) -> About:
    return read_about(run, read_summary(run))


def test_the_report_names_data_settings_cost_and_versions(recipe):
    page = (recipe / "report.html").read_text()
    assert str(recipe.parent) not in page
    assert "<td>seed</td><td>3</td><td>5</td>" in page
    assert re.search("<td>teacher.path</td><td[^>]*>null</td><td[^>]*>first/cache</td>", page)
    assert "<td>train.steps</td><td>4</td><td>7</td>" in page
    assert "<td>teacher.micro_batch" not in page  # which neither was given
    first = about_of(recipe / "first")
    cost = f"<td>{first.capture.rows}</td><td>{first.capture.tokens:,}</td>"
    assert page.count(cost) == 2
    own, shared = (time_text(s) for s in (first.capture.seconds, Spent(own=0, shared=2.25)))
    assert f"<td>first</td><td>{own}</td>" in page and shared == "2.2 s shared"
    assert time_text(Spent(own=75, shared=3)) == "1:15 + 3.0 s shared"
    assert page.count(f"<td>{torch.__version__}</td>") == 2
    assert page.count(f"<td>{first.data.fingerprint[:8]}</td>") == 2
    for title in ("norm of the gradient", "tokens/s", "peak memory of rank 0", "learning rate"):
        assert f"<figcaption>{title}" in page


def test_a_summary_of_before_says_nothing_and_a_damaged_one_is_refused(recipe, tmp_path):
    summary = read_summary(recipe / "first")
    assert read_about(tmp_path, {"steps": 3}) is None
    damaged = {**summary, "about": {**summary["about"], "ranks": "2"}}
    with pytest.raises(CheckpointError, match=r"summary\.json: damaged, 'about\.ranks' is not"):
        read_about(tmp_path, damaged)


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


@pytest.mark.parametrize(("precision", "count"), [("bf16", 32), ("fp16", 2 * 50)])
def test_a_run_that_may_skip_steps_may_read_all(short, monkeypatch, precision, count):
    """A step that fp16 overflow skips is taken again, by rows that follow."""
    monkeypatch.setattr("dskd.runs.cached_rows.precision_of", lambda config: precision)
    assert _read(read(short / "config.yaml").runs[SINGLE], rows=50, draws=2) == count


def test_each_domain_has_its_own_rows_captured(runs):
    """What of the first 32 rows is of the domain; then the cache alone, without its model."""
    teacher = routed(cached(LIVE), cached(LIVE_OTHER))
    out = runs.run("routed", 1, teacher=teacher)
    left, right = (held(out / "cache" / name) for name in ("left", "right"))
    assert left.sum() > 0 < right.sum() and not (left & right).any()
    np.testing.assert_array_equal(left | right, taken(left.shape, STEPS * BATCH))
    stored = {
        name: {"kind": "cached", "path": str(out / "cache" / name), "model": None}
        for name in ("left", "right")
    }
    again = runs.run("stored", 1, teacher={"kind": "routed", "domains": stored})
    assert losses(again) == losses(out)


def test_either_epochs_or_rows():
    with pytest.raises(ValueError, match="either epochs or rows"):
        CachedRows()
    with pytest.raises(ValueError, match="either epochs or rows"):
        CachedRows(rows=3, epochs=1)
