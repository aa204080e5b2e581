"""Damage, changed inputs and settings, losses out of range: named, and nothing trained on them."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dskd.engine.engine import Engine
from dskd.training import trainer
from tests.faults.runs import Ranks, refused, train, write_recipe
from tests.launching import losses

CHECKPOINT = "run/train/checkpoints/step-00000004"
FILES = [
    "data/*/manifest.json",
    *(
        f"data/*/{split}.{part}"
        for split in ("train", "validation")
        for part in ("ids", "offsets", "domains")
    ),
    "data/*/tokenizer/tokenizer.json",
    "data/*/tokenizer/tokenizer_config.json",
    "run/inputs.json",
    "run/cache/manifest.json",
    "run/cache/shard-00000.safetensors",
    "run/cache/shard-00001.safetensors",
    f"{CHECKPOINT}/manifest.json",
    f"{CHECKPOINT}/mp_rank_00_model_states.pt",
    f"{CHECKPOINT}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    f"{CHECKPOINT}/zero_pp_rank_1_mp_rank_00_optim_states.pt",
]
"""Every kind of file that training reads, in a run that was stopped at step 5."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run killed after step 5, saved at step 4, and its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder)

    def dies_in_step_6(rank: int) -> None:
        original = trainer.learning_rate

        def rate(settings, step):
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(settings, step)

        trainer.learning_rate = rate

    ranks = Ranks(folder, recipe, trap=dies_in_step_6)
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
    read = {
        path for top in ("data", "run/cache", CHECKPOINT) for path in folder.glob(f"{top}/**/*")
    }
    files = {path for path in read - listed if path.is_file() and "shard" not in path.name}
    missed = {path for path in files if path.stat().st_size}  # not a lock, which is empty
    assert not missed


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
        ("train.lr=0.02", "train.lr: 0.01, now 0.02"),
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
    given = [
        f"out={tmp_path / 'run'}",
        "teacher.model=null",
        f"teacher.path={folder / 'run/cache'}",
    ]
    try:
        corpus.write_text(text + " more")
        assert f"{folder / 'run'}: data changed" in refused(folder, recipe)
        assert f"{folder / 'run' / 'cache'}: made with another data" in refused(
            folder, recipe, *given
        )
    finally:
        corpus.write_text(text)
    assert trained(folder) == before
    assert not (tmp_path / "run" / "train").exists()


EACH_STEP = ["evaluation.every=1", "checkpoint.every=1"]
PLAIN = ["method={kind: lm}", "teacher=null", "train.warmup=3", *EACH_STEP]


def steps_saved(run: Path) -> list[int]:
    folders = (run / "train" / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in folders)


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
