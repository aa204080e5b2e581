"""Damage, changed inputs and settings, losses out of range: named, and nothing trained on them."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd.engine.engine import Engine
from dskd.errors import CheckpointError
from dskd.system.files import file_hash, read_manifest, write_manifest
from tests.faults.runs import Ranks, refused, steps_saved, train, write_recipe
from tests.faults.test_kills import signal_in_step
from tests.launching import losses

CHECKPOINT = "run/train/checkpoints/step-00000004"
FILES = [
    "data/*/manifest.json",
    *(f"data/*/train.{part}" for part in ("ids", "offsets", "domains")),
    *(f"data/*/validation.{part}" for part in ("ids", "offsets", "domains")),
    "data/*/tokenizer/tokenizer.json",
    "data/*/tokenizer/tokenizer_config.json",
    "data/*/cost.json",
    "run/inputs.json",
    "run/cache/cost.json",
    "run/cache/manifest.json",
    *(f"run/cache/shard-0000{shard}.safetensors" for shard in (0, 1)),
    f"{CHECKPOINT}/manifest.json",
    f"{CHECKPOINT}/mp_rank_00_model_states.pt",
    *(f"{CHECKPOINT}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)),
]
"""Every kind of file that training reads, in a run that was stopped at step 5."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run killed after step 5, saved at step 4, and its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder)
    ranks = Ranks(folder, recipe, trap=signal_in_step(6, signal.SIGKILL, rank=0))
    assert -signal.SIGKILL in ranks.statuses(), ranks.output()
    assert (folder / CHECKPOINT).is_dir()
    return folder, recipe


def trained(folder: Path) -> tuple[bytes, list[str]]:
    """What would change if anything were trained."""
    metrics = (folder / "run" / "train" / "metrics.jsonl").read_bytes()
    return metrics, sorted(path.name for path in (folder / CHECKPOINT).parent.iterdir())


def test_every_kind_of_file_is_flipped(stopped):
    folder, _ = stopped
    listed = {path for pattern in FILES for path in folder.glob(pattern)}
    for top in ("data", "run/cache", CHECKPOINT):
        read = {path for path in folder.glob(f"{top}/**/*") if path.is_file()}
        files = {path for path in read - listed if "shard" not in path.name}
        assert not {path for path in files if path.stat().st_size}  # not a lock, which is empty


@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_byte(stopped, pattern):
    folder, recipe = stopped
    (path,) = folder.glob(pattern)
    before, whole = trained(folder), path.read_bytes()
    draw = random.Random(pattern)
    place = draw.randrange(len(whole))
    flipped = bytes([whole[place] ^ 1 << draw.randrange(8)])
    path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
    try:
        told = refused(folder, recipe, world=2)
    finally:
        path.write_bytes(whole)
    assert str(path) in told
    assert "Traceback" not in told
    assert trained(folder) == before


@pytest.mark.parametrize(("entry", "value"), [("world", 3), ("stage", 0), ("stage", 3)])
def test_a_manifest_of_other_files(stopped, tmp_path, entry, value):
    """Each entry may be right by itself, as the checksum is."""
    folder, recipe = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    manifest = tmp_path / CHECKPOINT / "manifest.json"
    content = read_manifest(manifest, CheckpointError)
    write_manifest(manifest, content | {entry: value})
    told = refused(tmp_path, recipe, f"out={tmp_path / 'run'}", world=2)
    assert f"error: {manifest.parent}" in told
    assert "Traceback" not in told


class Code:
    """What a stranger may put into a pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("pattern", [FILES[-3], FILES[-1]])
@pytest.mark.parametrize("words", [[], ["deepspeed=zero3"]], ids=str)
def test_code_in_a_checkpoint_is_not_run(stopped, tmp_path, pattern, words):
    """Neither where it goes on as it is nor where it is brought to another form."""
    folder, recipe = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    (path,) = tmp_path.glob(pattern)
    torch.save(torch.load(path, weights_only=False) | {"more": Code(tmp_path / "ran")}, path)
    manifest = path.parent / "manifest.json"
    content = read_manifest(manifest, CheckpointError)
    content["files"][path.name] = {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
    write_manifest(manifest, content)
    told = refused(tmp_path, recipe, f"out={tmp_path / 'run'}", *words, world=2)
    wanted = f"error: {path}: holds what no checkpoint of dskd does, and is not loaded: "
    assert f"{wanted}builtins.getattr, pathlib." in told
    assert "Traceback" not in told
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "run/train/checkpoints").glob(".*"))


@pytest.mark.parametrize("pattern", [FILES[1], FILES[-5], FILES[-1]])
def test_a_missing_or_truncated_file(stopped, pattern):
    folder, recipe = stopped
    (path,) = folder.glob(pattern)
    before, whole = trained(folder), path.read_bytes()
    try:
        path.write_bytes(whole[:-1])
        assert str(path) in refused(folder, recipe)
        path.unlink()
        assert str(path) in refused(folder, recipe)
    finally:
        path.write_bytes(whole)
    assert trained(folder) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=4", "train.batch: 8, now 4"),
        ("seed=4", "seed: 3, now 4"),
        ("method.temperature=1.0", "method.temperature"),
        ("teacher.k=4", "teacher.k: 8, now 4"),
        ("data.masking.probability=0.2", "data.masking.probability: 0.15, now 0.2"),
        ("model.config.hidden_size=16", "model.config.hidden_size: 32, now 16"),
    ],
)
def test_a_changed_setting(stopped, override, message):
    folder, recipe = stopped
    before = trained(folder)
    told = refused(folder, recipe, override)
    assert message in told
    assert trained(folder) == before


def test_a_changed_corpus(stopped, tmp_path):
    """Under a run in progress, and under a cache that another run is given."""
    folder, recipe = stopped
    before, corpus = trained(folder), folder / "corpus.txt"
    text = corpus.read_text()
    cache = folder / "run/cache"
    given = [f"out={tmp_path / 'run'}", "teacher.model=null", f"teacher.path={cache}"]
    try:
        corpus.write_text(text + " more")
        assert f"{folder / 'run'}: data changed" in refused(folder, recipe)
        assert f"{cache}: made with another data" in refused(folder, recipe, *given)
    finally:
        corpus.write_text(text)
    assert trained(folder) == before
    assert not (tmp_path / "run" / "train").exists()


EACH_STEP = ["evaluation.every=1", "checkpoint.every=1"]
PLAIN = ["method={kind: lm}", "teacher=null", "train.warmup=3", *EACH_STEP]


def test_a_loss_out_of_range(stopped, tmp_path):
    """It stops the run, which keeps its last good checkpoint and goes on from there."""
    _, recipe = stopped
    words = [recipe, f"out={tmp_path}", *PLAIN, "train.lr=1e30"]
    told = refused(tmp_path, *words, world=2)
    assert "error: step 2: the evaluation's eval_nll is nan; the last checkpoint is intact" in told
    assert steps_saved(tmp_path) == [1]
    told = refused(tmp_path, *words, "evaluation.every=4", "checkpoint.every=4", world=2)
    assert "going on from step 1" in told
    assert "error: step 3: loss term 'ce' is nan; the last checkpoint is intact" in told
    assert steps_saved(tmp_path) == [1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_out_of_range(stopped, tmp_path, stage):
    """Its step is neither saved nor skipped, though the loss was finite."""
    _, recipe = stopped
    words = [recipe, f"out={tmp_path}", *PLAIN, f"deepspeed=zero{stage}", "until=train"]

    def spoil_step_4(rank: int) -> None:
        original, calls = Engine.backward, 0

        def backward(engine, loss, last):
            nonlocal calls
            calls += 1
            original(engine, loss * (torch.inf if calls == 7 and rank == 1 else 1), last)

        Engine.backward = backward

    ranks = Ranks(tmp_path, *words, trap=spoil_step_4)
    assert ranks.statuses() == [2, 2], ranks.output()
    assert "error: step 4: the gradient's norm is nan" in ranks.output()
    assert steps_saved(tmp_path) == [3]


def test_what_is_whole_goes_on(stopped, tmp_path):
    """The same run, with nothing damaged or changed, goes on to its end."""
    folder, recipe = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    train(tmp_path, recipe, f"out={tmp_path / 'run'}", "until=train")
    assert len(losses(tmp_path / "run")) == 8
