"""Disks that are full or may not be written: one message, nothing half-written, and it goes on."""

import re
import resource
import subprocess
from pathlib import Path

import pytest

from dskd.runs import stages
from dskd.system.log import Metrics
from tests.disks import fill_up, limited, small_disk
from tests.faults.runs import Ranks, refused, steps_saved, train, write_recipe
from tests.launching import losses

WORDS = ["until=train"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """Settings whose rows and cache are there, beside the run that a test makes."""
    folder = tmp_path_factory.mktemp("recipe")
    path = write_recipe(folder)
    train(folder, path, "until=cache", world=1)
    return path


def words_of(recipe: str, out: Path) -> list[str]:
    cache = Path(recipe).parent / "run" / "cache"
    return [recipe, *WORDS, f"out={out}", f"teacher.path={cache}"]


def one_message(told: str) -> str:
    """The only error that was printed."""
    assert "Traceback" not in told
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    return error


def leftovers(run: Path) -> list[Path]:
    """What is hidden in a run's folder, apart from its lock."""
    return [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_checkpoint_that_does_not_fit(recipe, tmp_path, stage):
    """The second one, beside the first; it goes on from there once there is room."""
    with small_disk(tmp_path / "disk", "800k") as disk:
        run = disk / "run"
        words = [*words_of(recipe, run), f"deepspeed={stage}"]
        for _ in range(2):
            error = one_message(refused(tmp_path, *words, world=2))
            # A file of the new one, or the folder in which it cannot even be begun.
            where = rf"{re.escape(str(run))}/train/checkpoints(/\.saving-step-0000000\S*)?"
            told = r"cannot write the checkpoint: the disk is full \(No space left"
            assert re.search(f"{where}: {told}", error), error
            assert not leftovers(run)
            kept = steps_saved(run)
            # As of a job that was killed: all that is left of the disk is taken.
            half = run / "train" / "checkpoints" / f".saving-step-0000000{kept[-1] + 2}"
            half.mkdir()
            (run / "train" / ".metrics.jsonl.4711.tmp").write_bytes(b"half")
            fill_up(half)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        train(tmp_path, *words)
        assert len(losses(run)) == 8
        assert not leftovers(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_cannot_write_its_part(recipe, tmp_path, rank):
    """Its optimizer's; the others end with it, by the same message."""

    def limit(this: int) -> None:
        if this == rank:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))

    ranks = Ranks(tmp_path, *words_of(recipe, tmp_path / "run"), trap=limit)
    assert ranks.statuses() == [2, 2], ranks.output()
    error = one_message(ranks.output())
    assert "cannot write the checkpoint: a file may not be that large here" in error
    assert steps_saved(tmp_path / "run") == []
    assert not leftovers(tmp_path / "run")
    train(tmp_path, *words_of(recipe, tmp_path / "run"))


def test_metrics_that_cannot_be_written(recipe, tmp_path):
    """By rank 0 alone; all end before the next checkpoint, which would go on without them."""

    def spoil(rank: int) -> None:
        original = Metrics.write

        def write(metrics, **values):
            if rank == 0 and values["step"] == 3:
                metrics.path = Path("/dev/full")
            original(metrics, **values)

        Metrics.write = write

    ranks = Ranks(tmp_path, *words_of(recipe, tmp_path / "run"), trap=spoil)
    assert ranks.statuses() == [2, 2], ranks.output()
    wanted = (
        "error: /dev/full: cannot write the metrics: the disk is full (No space left on device)"
    )
    assert one_message(ranks.output()) == wanted
    assert steps_saved(tmp_path / "run") == [2]
    train(tmp_path, *words_of(recipe, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 8


def test_settings_that_do_not_fit(recipe, tmp_path):
    """Nor anything else of a run; and a disk that may not be written at all."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        run = disk / "run"
        run.mkdir()
        fill_up(disk)
        error = one_message(refused(tmp_path, *words_of(recipe, run)))
        assert error.startswith(f"error: {run}/config.yaml: cannot write the settings: the disk is")
        assert not leftovers(run)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "it is read-only (Read-only file" in one_message(
            refused(tmp_path, *words_of(recipe, run))
        )


def test_a_store_that_does_not_fit(recipe, tmp_path):
    """What fits of it is kept, and gone on with."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        words = [recipe, f"out={disk / 'run'}", "until=cache"]
        error = one_message(refused(tmp_path, *words, world=2))
        # What it cost is written after each round of shards, and may be the first not to fit.
        what = r"(shard-0000|cost.json)\S* cannot write (a shard of the store|what was spent)"
        told = f"error: {disk}/run/cache/{what}: the disk is full .No space left on dev"
        found = re.match(told, error)
        assert found is not None, error
        assert not leftovers(disk)
        before = {path.name for path in disk.glob("run/cache/shard-*")}
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        train(tmp_path, *words)
        assert before < {path.name for path in disk.glob("run/cache/shard-*")}


def test_an_export_that_does_not_fit(recipe, tmp_path):
    """Beside the checkpoints, which are kept."""
    run = tmp_path / "run"

    def limit(rank: int) -> None:
        original = stages.export

        def export(*args, **options):
            with limited(1000):
                original(*args, **options)

        stages.export = export

    words = [*words_of(recipe, run), "until=evaluate"]
    ranks = Ranks(tmp_path, *words, trap=limit)
    assert ranks.statuses() == [2, 2], ranks.output()
    error = one_message(ranks.output())
    assert error.startswith(f"error: {run}/export: cannot write the exported model: a file may not")
    assert not leftovers(run)
    (run / ".export.tmp").mkdir()  # as of a job that was killed
    train(tmp_path, *words)
    assert (run / "scores.json").is_file()
    assert not leftovers(run)
