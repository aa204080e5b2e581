"""Which checkpoints are kept and chosen, and that one is whole or refused by name."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.manifests import Progress, Score
from dskd.errors import CheckpointError
from dskd.system.files import read_manifest, write_manifest
from tests.ranks import run_ranks

LOSS = Selection()


def state_of(step: int) -> dict[str, Any]:
    """What the trainer keeps."""
    return {"progress": asdict(Progress(step, step)), "hooks": {}}


def save(
    checkpoints: Checkpoints, step: int, value: float | None, selection: Selection = LOSS
) -> None:
    """Save as the trainer does, with a file for the engine's."""
    folder = checkpoints.folder / checkpoints.begin(step)
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights.pt").write_bytes(bytes([step]) * 100)
    score = None if value is None else asdict(selection.score(value))
    about = {"world": 1, "stage": 2, "precision": "fp32", "score": score}
    about["state"] = state_of(step)
    checkpoints.commit(step, about)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, selection=LOSS)
    kept = []
    for step, nll in enumerate([5.0, 3.0, 4.0, 3.5, 3.6, 2.0, 2.5, 2.6], 1):
        save(checkpoints, step, nll)
        kept.append(steps(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    best, latest = checkpoints.best(), checkpoints.latest()
    assert (best.step, best.score.value, best.state) == (6, 2.0, state_of(6))
    assert (latest.step, latest.folder) == (8, tmp_path / "step-00000008")


def test_the_best_of_equals_is_the_first_and_one_without_evaluation_never(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, selection=LOSS)
    for step, nll in [(1, 3.0), (2, 3.0), (3, None)]:
        save(checkpoints, step, nll)
    assert steps(tmp_path) == [1, 3]
    assert checkpoints.best().step == 1
    assert checkpoints.latest().score is None


def test_where_the_evaluation_does_not_select_the_latest_is_the_best(tmp_path):
    """It keeps what it was evaluated at, and no older one is kept for a lower loss."""
    checkpoints = Checkpoints(tmp_path, keep=2, selection=None)
    for step, nll in enumerate([2.0, 3.0, 4.0], 1):
        save(checkpoints, step, nll)
        best = checkpoints.best()
        assert (best.step, best.score.value) == (step, nll)
    assert steps(tmp_path) == [2, 3]


def test_a_score_may_be_better_the_higher_it_is(tmp_path):
    """The same rules as of a loss, the other way around; a manifest names metric and direction."""
    selection = Selection("eval_accuracy", higher_is_better=True)
    checkpoints = Checkpoints(tmp_path, keep=1, selection=selection)
    for step, value in enumerate([0.5, 0.7, 0.6, 0.7, 0.2, None], 1):
        save(checkpoints, step, value, selection)
    assert steps(tmp_path) == [2, 6]
    assert checkpoints.best().score == Score("eval_accuracy", 0.7, higher_is_better=True)
    assert checkpoints.manifests()[2]["score"] == asdict(checkpoints.best().score)


def test_none_and_leftovers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=1, selection=LOSS)
    checkpoints.clean()
    assert checkpoints.latest() is None
    save(checkpoints, 4, 1.0)
    for leftover in (".saving-step-00000008", ".dead-step-00000002", ".universal-step-00000004"):
        (tmp_path / "run" / leftover / "inner").mkdir(parents=True)
    assert checkpoints.latest().step == 4
    checkpoints.clean()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"\x02" * 99, "truncated or grown"),
        (b"\x02" * 99 + b"\x03", "damaged, its checksum is not as saved"),
    ],
)
def test_a_damaged_one_is_named_with_the_way_out(tmp_path, content, message):
    checkpoints = Checkpoints(tmp_path, keep=2, selection=LOSS)
    save(checkpoints, 1, 3.0)
    save(checkpoints, 2, 2.0)
    path = tmp_path / "step-00000002" / "inner" / "weights.pt"
    path.unlink() if content is None else path.write_bytes(content)
    for load in (checkpoints.latest, checkpoints.best):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert str(caught.value).startswith(f"{path}: {message}")
        assert str(caught.value).endswith(f"delete {path.parents[1]}")
    for left in (path.parents[1] / "manifest.json", path, path.parent, path.parents[1]):
        left.rmdir() if left.is_dir() else left.unlink(missing_ok=True)
    assert checkpoints.latest().step == 1


def _damage_seen_by_one(rank: int, folder: Path) -> str:
    checkpoints = Checkpoints(folder, keep=1, selection=LOSS)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.latest()
    return str(caught.value)


def test_what_one_rank_finds_is_raised_on_all(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, selection=LOSS)
    tag = checkpoints.begin(1)
    (tmp_path / tag).mkdir()
    for name in "abc":
        (tmp_path / tag / name).write_bytes(b"x" * 9)
    about = {"world": 3, "stage": 1, "precision": "bf16", "score": None, "state": state_of(1)}
    checkpoints.commit(1, about)
    (tmp_path / "step-00000001" / "b").write_bytes(b"x" * 8 + b"y")
    told = run_ranks(_damage_seen_by_one, tmp_path, world=3)
    assert told[0] == told[1] == told[2]
    assert told[0].startswith(f"{tmp_path}/step-00000001/b: damaged")


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    save(Checkpoints(tmp_path, 2, None), 1, None)
    path = tmp_path / "step-00000001/manifest.json"
    write_manifest(path, read_manifest(path, ValueError) | {"format": 1})
    with pytest.raises(CheckpointError, match=r"manifest\.json: written by another version"):
        Checkpoints(tmp_path, 2, None).latest()


PATHS = ["../weights.pt", "/etc/passwd", "a/../../b", "..", "", ".", "a\0b"]
SEAL = {"bytes": 100, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("step", value) for value in (2, 0, -1, True, "1", 1.0, None, 10**30)),
        *(("world", value) for value in (0, -1, 1.5, "1", None, True)),
        *(("stage", value) for value in (4, -1, 2.5, "2", None)),
        *(("precision", value) for value in ("fp64", 32, None, ["fp32"])),
        *(("score", value) for value in (3.0, {}, [], {"metric": "eval_nll"})),
        ("score", {"metric": "eval_nll", "value": "low", "higher_is_better": False}),
        ("score", {"metric": "eval_nll", "value": math.nan, "higher_is_better": False}),
        ("score", {"metric": "eval_nll", "value": 1.0, "higher_is_better": "no"}),
        ("score", {"metric": 3, "value": 1.0, "higher_is_better": False}),
        *(("state", value) for value in ({}, None, {"progress": {}, "hooks": {}})),
        ("state", {"progress": asdict(Progress(1, 1)), "hooks": 3}),
        ("state", {"progress": asdict(Progress(1, 0)), "hooks": {}}),
        ("state", {"progress": asdict(Progress(2, 2)), "hooks": {}}),
        ("state", {"progress": asdict(Progress(1, 1, tokens=-4)), "hooks": {}}),
        ("state", {"progress": asdict(Progress(1, 1, wall_seconds=math.inf)), "hooks": {}}),
        ("state", {"progress": asdict(Progress(1, 1)) | {"more": 1}, "hooks": {}}),
        *(("files", value) for value in (None, [], {"a": None}, {"a": {"bytes": 1}})),
        ("files", {"inner/weights.pt": SEAL | {"bytes": -1}}),
        ("files", {"inner/weights.pt": SEAL | {"xxh3": 7}}),
        *(("files", {path: SEAL}) for path in PATHS),
        ("more", 1),
    ],
    ids=repr,
)
def test_an_odd_manifest_with_a_right_checksum_is_refused(tmp_path, entry, value):
    save(Checkpoints(tmp_path, 2, LOSS), 1, 2.0)
    path = tmp_path / "step-00000001/manifest.json"
    content = read_manifest(path, ValueError)
    write_manifest(path, content | {entry: value})
    for read in (Checkpoints(tmp_path, 2, LOSS).latest, Checkpoints(tmp_path, 2, LOSS).best):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: damaged, ")
    assert Checkpoints(tmp_path, 2, LOSS).manifests() == {}
    write_manifest(path, {k: v for k, v in content.items() if k != entry})
    if entry in content:
        with pytest.raises(CheckpointError, match=f"damaged, {entry}: missing"):
            Checkpoints(tmp_path, 2, LOSS).latest()


def test_what_is_abandoned_is_gone_and_the_one_before_is_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, selection=LOSS)
    save(checkpoints, 1, 2.0)
    tag = checkpoints.begin(2)
    (tmp_path / tag / "inner").mkdir(parents=True)
    checkpoints.abandon(2)
    assert steps(tmp_path) == [1]
    assert checkpoints.latest().step == 1
