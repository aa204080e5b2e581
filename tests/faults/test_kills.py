"""kill -9 at any moment, SIGTERM, SIGINT: the next call goes on and ends where it would have."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd.data import prepared, preparing
from dskd.engine import checkpoints
from dskd.engine.engine import Engine
from dskd.models import writing
from dskd.runs import stages
from dskd.stores import store
from dskd.system.log import Metrics, read_metrics
from dskd.training import trainer
from tests.faults.runs import STEPS, Ranks, Trap, die, steps_saved, train, write_recipe
from tests.launching import evaluations, losses

KILLS = 10


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed."""

    recipe: str
    run: Path
    seconds: float

    def elsewhere(self, folder: Path) -> list[str]:
        """The command line of the same run in another folder."""
        return [self.recipe, f"out={folder / 'run'}", f"data.folder={folder / 'data'}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder)
    began = time.monotonic()
    train(folder, recipe)
    return Undisturbed(recipe, folder / "run", time.monotonic() - began)


def assert_same(run: Path, reference: Path) -> None:
    """The same weights, bit for bit, and the same story on the way."""
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "export" / name).read_bytes() == (reference / "export" / name).read_bytes()
    assert (run / "scores.json").read_bytes() == (reference / "scores.json").read_bytes()
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(reference)
    assert evaluations(run) == evaluations(reference)
    lines = [
        [(line["step"], "loss" in line) for line in read_metrics(out / "train" / "metrics.jsonl")]
        for out in (run, reference)
    ]
    assert lines[0] == lines[1]
    assert not list((run / "train" / "checkpoints").glob(".*"))


def test_killed_at_random_moments(undisturbed, tmp_path):
    """Runs killed again and again, until each ends; ten kills in all, from data to evaluation."""
    draw, kills = random.Random(11), 0
    while kills < KILLS:
        folder = tmp_path / f"{draw.getrandbits(32):08x}"
        folder.mkdir()
        words = undisturbed.elsewhere(folder)
        ranks = Ranks(folder, *words)
        while not ranks.wait(draw.uniform(0, undisturbed.seconds)):
            ranks.kill()
            kills += 1
            ranks = Ranks(folder, *words)
        assert ranks.statuses() == [0, 0], ranks.output()
        assert_same(folder / "run", undisturbed.run)


def before(owner: Any, name: str, call: int = 1, rank: int = 0) -> Trap:
    """The rank dies when it is about to call a function for the so many-th time."""
    return _trap(owner, name, lambda original, *args, **kwargs: die(), call, rank)


def after(owner: Any, name: str, call: int = 1, rank: int = 0) -> Trap:
    """The rank dies when that call has returned."""

    def work(original, *args, **kwargs):
        original(*args, **kwargs)
        die()

    return _trap(owner, name, work, call, rank)


def moving(start: str, how: str = "rename") -> Trap:
    """Rank 0 dies when a file or folder whose name starts so is about to get its final name."""

    def work(original, path, target):
        if path.name.startswith(start):
            die()
        return original(path, target)

    return _trap(Path, how, work, call=None, rank=0)


def _trap(owner: Any, name: str, work: Callable[..., Any], call: int | None, rank: int) -> Trap:
    def arm(this: int) -> None:
        if this != rank:
            return
        original, calls = getattr(owner, name), 0

        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if call is None or calls == call:
                return work(original, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, trapped)

    return arm


def _half_a_file(original, state, path, *args, **kwargs):
    original(state, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def _half_a_line(original, metrics, **values):
    original(metrics, **values)
    os.truncate(metrics.path, os.path.getsize(metrics.path) - 20)
    die()


def _half_a_folder(original, path, *args, **kwargs):
    if Path(path).name.startswith(".dead-"):
        next(Path(path).glob("*.pt")).unlink()
        die()
    return original(path, *args, **kwargs)


MOMENTS: list[tuple[str, Trap, list[int]]] = [
    ("rows written, no manifest", before(preparing, "_write_manifest"), []),
    ("rows whole, not yet named", before(prepared, "_publish"), []),
    ("first shard written", after(store.Writer, "write_shard"), []),
    ("other rank's shard not yet named", moving(".shard-", "replace"), []),
    ("all shards, no manifest", before(store.Writer, "finish"), []),
    ("one step taken", after(Metrics, "write"), []),
    ("half a shard of the other rank", _trap(torch, "save", _half_a_file, 1, rank=1), []),
    ("engine's files written", after(Engine, "save"), []),
    ("other rank is done, one is not", before(Engine, "save"), []),
    ("files hashed, no manifest", before(checkpoints, "write_manifest"), []),
    ("manifest, not yet named", moving(".saving-"), []),
    ("named, nothing pruned", before(checkpoints.Checkpoints, "_prune", call=2), [2, 4]),
    ("half of one pruned", _trap(shutil, "rmtree", _half_a_folder, None, rank=0), [4, 6]),
    ("half a line of metrics", _trap(Metrics, "write", _half_a_line, 1, rank=0), [4, 6]),
    ("last checkpoint, no summary", before(stages, "_summarise"), [8]),
    ("weights exported, no tokenizer", before(writing, "_describe"), [8]),
    ("export whole, not yet named", before(writing, "_replace"), [8]),
    ("scores not yet named", moving(".scores.json", "replace"), [8]),
]
"""What has happened, the trap that kills a rank there, and the steps saved by then."""


def test_killed_at_every_delicate_moment(undisturbed, tmp_path):
    """One run, killed at each of them in turn."""
    words = undisturbed.elsewhere(tmp_path)
    for moment, trap, steps in MOMENTS:
        ranks = Ranks(tmp_path, *words, trap=trap)
        statuses = ranks.statuses()  # of the other rank too, or that of a lost connection
        assert -signal.SIGKILL in statuses and not {0, 2} & {*statuses}, (moment, ranks.output())
        assert steps_saved(tmp_path / "run") == steps, moment
    train(tmp_path, *words)
    assert_same(tmp_path / "run", undisturbed.run)


def signal_in_step(step: int, number: int, rank: int) -> Trap:
    """The rank gets a signal while it takes a step."""

    def work(original, train, taken):
        if taken == step - 1:
            os.kill(os.getpid(), number)
        return original(train, taken)

    return _trap(trainer, "learning_rate", work, None, rank)


def test_stopped_by_signals(undisturbed, tmp_path):
    """A signal to any rank: all save the next step and leave with status 75."""
    shutil.copytree(undisturbed.run / "cache", tmp_path / "run" / "cache")
    words = undisturbed.elsewhere(tmp_path)
    for number, rank, step in ((signal.SIGTERM, 1, 5), (signal.SIGINT, 0, 7)):
        ranks = Ranks(tmp_path, *words, trap=signal_in_step(step - 1, number, rank))
        assert ranks.statuses() == [75, 75], ranks.output()
        assert f"stopped by a signal; step {step} is saved" in ranks.output()
        assert (tmp_path / "run" / "train" / "checkpoints" / f"step-{step:08d}").is_dir()
        assert len(losses(tmp_path / "run")) == step
    train(tmp_path, *words)
    assert_same(tmp_path / "run", undisturbed.run)
