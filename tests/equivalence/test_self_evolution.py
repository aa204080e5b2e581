"""Self-Evolution gives one store and one trajectory in any geometry, and goes on in any other.

Tiny students in forked ranks, by the user's command; losses and evaluations agree to 1e-5 (fp32),
the first stores to the byte and later ones to float16's rounding.

44 rows in batches of 8: the epochs 1 and 2 are read from steps 6 (with four rows of the epoch
before) and 12 on, so the student is asked again after steps 5 and 11.
"""

import json
import os
import shutil
import signal
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dskd.data.prepared import open_prepared, prepare
from dskd.data.sources import documents
from dskd.engine.checkpoints import MANIFEST
from dskd.errors import StoreError
from dskd.hardness import refresh
from dskd.hardness.store import Hardness
from dskd.settings.data import BuiltinSource
from dskd.settings.recipe import read
from dskd.stores.shard import map_shard
from dskd.stores.store import shard_path
from dskd.system.files import read_manifest, write_manifest
from tests.equivalence.small import CAUSAL, LIVE, MASKED, STEPS, Runs, cached, same, source
from tests.launching import cut_back, forked, losses

ROWS, BATCH = 44, 8
# Far from uniform, so that it matters which tokens are hard.
STUDENT = {"config": MASKED | {"num_hidden_layers": 1, "initializer_range": 0.3}}
HARD: dict[str, Any] = {
    "kind": "hard_tokens",
    **{"metric": "quantile", "quantile": 0.3, "least": 0.1, "most": 0.2},
    **{"rows_per_shard": 16, "micro_batch": 8},
}
EVOLUTION = {"kind": "self_evolution", "smoothing": 0.3}
KI = {"kind": "ki", "temperature": 2.0, "schedule": "linear", "steps": STEPS}
SETTINGS: dict[str, dict[str, Any]] = {
    "evolution": {"method": EVOLUTION, "teacher": {"kind": "self"}},
    "refreshed": {
        "method": EVOLUTION,
        "teacher": {"kind": "self"},
        "train": {"steps": 12},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 4, "keep": 9},
    },
    "causal": {
        "method": EVOLUTION | {"hard_weight": 3.0},
        "teacher": {"kind": "self", "weights": "frozen"},
        "model": {"config": CAUSAL | {"initializer_range": 0.3}},
    },
    "ki": {"method": KI, "teacher": LIVE},
}
STORES = ["questions", "questions-epoch-00001", "questions-epoch-00002"]


def train(runs: Runs, name: str, ranks: int, *words: str, of: str, **more: Any) -> Path:
    """A run of one of the settings."""
    masking = HARD | ({"refresh": 1, "draws": None} if of == "refreshed" else {"draws": 2})
    data: dict[str, Any] = {"masking": masking, "sources": [source(runs.folder, "few")]}
    if of == "causal":
        masking = {key: value for key, value in masking.items() if key not in ("least", "most")}
        data |= {"objective": "causal", "packing": "contiguous", "masking": masking}
    return runs.run(name, ranks, *words, **{"model": STUDENT, "data": data} | SETTINGS[of] | more)


def shards(folder: Path) -> dict[str, bytes]:
    """The files of a store."""
    found = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert len(found) > 1
    return found


def answers(folder: Path) -> np.ndarray:
    """All NLLs of a store, negative where wrong."""
    numbers = range(len(shards(folder)))
    return np.concatenate([map_shard(shard_path(folder, n))[0]["nll"] for n in numbers])


def stores(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("questions*"))


def same_answers(a: Path, b: Path) -> None:
    """Of a student: its weights may differ by rounding."""
    np.testing.assert_allclose(answers(a), answers(b), rtol=1e-2, atol=1e-3)


def damage(folder: Path) -> None:
    """Change a byte in the middle of a shard."""
    content = bytearray(shard_path(folder, 1).read_bytes())
    content[-5] ^= 1
    shard_path(folder, 1).write_bytes(content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("evolution"))
    texts = (text.strip()[:155] for text in islice(documents(BuiltinSource(documents=12)), 12))
    (runs.folder / "few.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return runs


@pytest.fixture(scope="module")
def references(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, several micro-batches a step."""
    return {of: train(runs, of, 1, of=of) for of in SETTINGS}


@pytest.fixture
def copied(runs, references, request) -> Path:
    """The refreshed run, to be cut back."""
    name = request.node.name.replace("[", "-").rstrip("]")
    return runs.copied(references["refreshed"], name)


# ---- one trajectory ------------------------------------------------------------------------------

GEOMETRIES = [
    ("evolution", 0, 2, 2),
    ("evolution", 2, 2, 4),
    ("evolution", 3, 2, 2),
    ("evolution", 0, 1, 8),
    ("refreshed", 2, 2, 4),
    ("refreshed", 3, 2, 2),
    ("causal", 0, 2, 4),
    ("causal", 3, 2, 2),
    ("ki", 2, 2, 2),
]


@pytest.mark.parametrize(("of", "stage", "world", "micro"), GEOMETRIES)
def test_geometry_plays_no_part(runs, references, of, stage, world, micro):
    words = (f"deepspeed=zero{stage}", f"train.micro_batch={micro}")
    run = train(runs, f"{of}-{stage}-{world}-{micro}", world, *words, of=of)
    same(run, references[of])
    assert shards(run / "questions") == shards(references[of] / "questions")
    assert stores(run) == stores(references[of])
    for name in stores(run)[1:]:
        same_answers(run / name, references[of] / name)


def test_it_is_another_trajectory_than_without(runs, references):
    """Of the masks, of the smoothing and of the weights: each changes the losses."""
    plain = train(runs, "plain", 1, "method.smoothing=0.0", of="evolution", teacher=None)
    masks = {"masking": {"draws": 2}, "sources": [source(runs.folder, "few")]}
    random = train(runs, "random", 1, of="evolution", data=masks)
    weighed = train(runs, "light", 1, "method.hard_weight=1.5", of="causal")
    for other, of in ((plain, "evolution"), (random, "evolution"), (weighed, "causal")):
        assert losses(other)[0] != pytest.approx(losses(references[of])[0], abs=1e-3)


def test_a_cached_teacher_gives_what_a_live_one_does(runs, references):
    """The cache holds the masks of the hard tokens."""
    out = train(runs, "cached", 1, of="ki", teacher=cached(LIVE))
    same(out, references["ki"])


def test_the_student_is_asked_again(references):
    """Its answers change as it trains, and every epoch has a store of its own."""
    run = references["refreshed"]
    data = read(run / "config.yaml").runs["run"].data
    assert len(open_prepared(prepare(data)).train) == ROWS
    assert stores(run) == STORES
    first, second, third = (answers(run / name) for name in STORES)
    assert np.abs(first - second).mean() > 0.1 and np.abs(second - third).mean() > 0.1
    saved = sorted(path.name[-2:] for path in (run / "train" / "checkpoints").iterdir())
    assert saved == ["04", "05", "08", "11", "12"]


# ---- going on ------------------------------------------------------------------------------------


def test_resumed(runs, references):
    out = runs.copied(references["evolution"], "evolution-resumed", step=2)
    train(runs, out.name, 2, "deepspeed=zero2", of="evolution")
    same(out, references["evolution"])


@pytest.mark.parametrize("step", [5, 8, 11])
def test_resumed_between_two_stores(runs, references, copied, step):
    """From an ordinary checkpoint and from those that were made to ask the student, in another
    geometry; the store of the epochs before is not looked at when none of it is left to read."""
    cut_back(copied, step=step)
    for name, asked in zip(STORES[1:], (5, 11), strict=True):
        if asked >= step:
            shutil.rmtree(copied / name)
    if step == 11:
        damage(copied / "questions")
    train(runs, copied.name, 2, "deepspeed=zero2", of="refreshed")
    same(copied, references["refreshed"])
    assert stores(copied) == STORES
    for name in STORES[1:]:
        same_answers(copied / name, references["refreshed"] / name)


def test_asking_goes_on_where_it_was_stopped(runs, references, copied, capfd):
    """Both before training and between two steps; what is there is not asked again."""
    cut_back(copied, step=5)
    shutil.rmtree(copied / STORES[2])
    for name in STORES[:2]:
        (copied / name / MANIFEST).unlink()
        shard_path(copied / name, 0).unlink()
    kept = {name: shard_path(copied / name, 1).stat().st_mtime_ns for name in STORES[:2]}
    train(runs, copied.name, 1, of="refreshed")
    same(copied, references["refreshed"])
    for name in STORES:
        assert shards(copied / name).keys() == shards(references["refreshed"] / name).keys()
        asked = answers(references["refreshed"] / name)
        np.testing.assert_array_equal(answers(copied / name), asked)
    assert kept == {name: shard_path(copied / name, 1).stat().st_mtime_ns for name in STORES[:2]}
    assert "is made anew" not in capfd.readouterr().out


def test_what_is_whole_is_not_asked_again(runs, references, copied, capfd):
    """The step after the store is taken again, the store is only opened."""
    cut_back(copied, step=5)
    train(runs, copied.name, 1, of="refreshed")
    said = capfd.readouterr().out
    assert "going on from step 5" in said and "epochs to come (batch 5)" not in said
    same(copied, references["refreshed"])


@pytest.mark.parametrize("left", ["checkpoint", "nothing"])
def test_what_another_student_said_is_asked_again(runs, references, copied, capfd, left):
    """The folder has the right name and rows; the student that it is of learned at another rate."""
    other = runs.folder / "other"
    if not other.exists():
        train(runs, "other", 1, "train.lr=0.02", "train.steps=6", of="refreshed")
    if left == "checkpoint":
        cut_back(copied, step=5)
    else:
        shutil.rmtree(copied / "train")
    shutil.rmtree(copied / STORES[1])
    shutil.copytree(other / STORES[1], copied / STORES[1])
    assert (answers(copied / STORES[1]) != answers(references["refreshed"] / STORES[1])).any()
    capfd.readouterr()
    train(runs, copied.name, 1, of="refreshed")
    same(copied, references["refreshed"])
    said = capfd.readouterr().out
    assert "epochs to come (batch 5)" in said
    assert ("fingerprints.model is" in said) == (left == "checkpoint")


def test_dropout_goes_on_after_a_store_is_made_anew(runs, capfd):
    """Its first attempt fails in eval mode."""
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = {"config": STUDENT["config"] | dropout}
    whole = train(runs, "dropout", 1, of="refreshed", model=model)
    copy = runs.copied(whole, "dropout-copy", step=5)
    path = copy / STORES[1] / "manifest.json"
    content = read_manifest(path, StoreError)
    content["store"]["fingerprints"]["model"] = "another"
    write_manifest(path, content)
    train(runs, copy.name, 1, of="refreshed", model=model)
    assert "is made anew" in capfd.readouterr().out
    assert losses(copy) == losses(whole)


def test_a_full_disk_costs_no_answers(runs, references, copied, monkeypatch, capfd):
    """What was written is gone on with once there is room."""
    cut_back(copied, step=5)
    for shard in (1, 2):
        shard_path(copied / STORES[1], shard).unlink()
    (copied / STORES[1] / "manifest.json").unlink()
    first = shard_path(copied / STORES[1], 0).stat().st_ino

    def full(path, data, what):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("dskd.stores.store.write_atomic", full)
        forked(1, str(runs.folder / "refreshed.yaml"), f"out={copied}", status=2)
    assert "No space left on device" in capfd.readouterr().err
    train(runs, copied.name, 1, of="refreshed")
    assert "is made anew" not in capfd.readouterr().out
    assert shard_path(copied / STORES[1], 0).stat().st_ino == first
    same(copied, references["refreshed"])


def test_a_damaged_store_of_a_student_says_how_to_go_back(runs, references, copied, capfd):
    """Beyond the checkpoint whose student was asked; from there it is mended without more ado."""
    recipe, out = str(runs.folder / "refreshed.yaml"), f"out={copied}"
    cut_back(copied, step=8)
    damage(copied / STORES[1])
    forked(2, recipe, out, status=2)
    said = capfd.readouterr().err
    assert said.count("error:") == 1
    assert f"{STORES[1]}/shard-00001.safetensors: damaged" in said
    assert "to score again, delete the checkpoints after step 5 in " in said
    assert "manifest.json" not in said
    shutil.rmtree(copied / STORES[1])
    forked(1, recipe, out, status=2)
    said = capfd.readouterr().err
    assert "no such file; it holds the scores of the student after step 5: to " in said
    for step in (4, 5):
        shutil.rmtree(copied / "train" / "checkpoints" / f"step-{step:08d}")
    forked(1, recipe, out, status=2)
    assert f"to train again from the beginning, delete {copied}/train" in capfd.readouterr().err
    saved = "train/checkpoints/step-00000005"
    shutil.copytree(references["refreshed"] / saved, copied / saved)
    shutil.copytree(references["refreshed"] / STORES[1], copied / STORES[1])
    damage(copied / STORES[1])
    shutil.rmtree(copied / "train/checkpoints/step-00000008")
    forked(1, recipe, out)
    assert f"{STORES[1]} is made anew" in capfd.readouterr().out
    same(copied, references["refreshed"])


def test_stores_that_no_checkpoint_needs_are_removed(runs, references):
    out = train(runs, "one-kept", 1, "checkpoint.keep=1", of="refreshed")
    assert stores(out) == [STORES[0], STORES[2]]
    same(out, references["refreshed"])


def test_a_signal_while_the_student_scores(runs, references, monkeypatch):
    """On one rank: all stop after the round, and what was scored is kept."""
    question = refresh.question

    def interrupted(*args, stop=None, **more):
        def after_a_round():
            if shard_path(out / STORES[1], 0).exists() and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        return question(*args, stop=stop and after_a_round, **more)

    out = runs.folder / "signalled"
    recipe, words = str(runs.folder / "refreshed.yaml"), (f"out={out}", "train.micro_batch=2")
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "question", interrupted)
        forked(2, recipe, *words, status=75)
    assert len(shards(out / STORES[1])) == 2  # of three: one round of two ranks
    assert json.loads((out / STORES[1] / MANIFEST).read_text())["shards"] is None
    forked(2, recipe, *words)
    same(out, references["refreshed"])


def test_a_lengthened_run_is_the_unbroken_one(runs):
    """It asks its student again where the unbroken one does, also after the end that it had."""
    short, longer = ({"steps": steps, "schedule": "constant"} for steps in (12, 18))
    out = train(runs, "half", 1, of="refreshed", train=short)
    forked(1, str(out / "config.yaml"), "train.steps=18")
    whole = train(runs, "whole", 1, of="refreshed", train=longer)
    assert losses(out) == losses(whole) and len(losses(out)) == 18
    assert stores(out) == stores(whole) == [*STORES, "questions-epoch-00003"]
    for name in stores(whole):
        assert shards(out / name) == shards(whole / name), name


# ---- before training -----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["evolution", "refreshed"])
def test_a_damaged_store_is_found_where_it_is_the_last_stage(runs, references, of, capfd):
    """Of a finished run, which needs it no more; a finished run without it scores the rows."""
    out = runs.copied(references[of], f"last-{of}")
    words = (str(runs.folder / f"{of}.yaml"), f"out={out}", "until=question")
    whole = shards(out / "questions")
    damage(out / "questions")
    forked(1, *words, status=2)
    told = capfd.readouterr().err
    assert "questions/shard-00001.safetensors: damaged" in told
    assert "; remove manifest.json beside it and capture again" in told
    (out / "questions" / MANIFEST).unlink()
    forked(1, *words)
    assert shards(out / "questions") == whole


def test_what_is_hard_may_be_chosen_after_asking(runs, references, capfd):
    """Until a mask depends on it; the store stays as it is."""
    out = runs.folder / "chosen"
    recipe, chosen = str(runs.folder / "evolution.yaml"), "data.masking.quantile=0.1"
    forked(1, recipe, f"out={out}", "until=question")
    asked = shards(out / "questions")
    forked(1, recipe, f"out={out}", "data.masking.shown=mask", status=2)
    forked(1, recipe, f"out={out}", chosen)
    assert shards(out / "questions") == asked == shards(references["evolution"] / "questions")
    assert read(out / "config.yaml").runs["run"].data.masking.quantile == 0.1
    other = runs.folder / "chosen-first"
    forked(1, recipe, f"out={other}", chosen)
    assert losses(out) == losses(other) != losses(references["evolution"])
    capfd.readouterr()
    forked(1, recipe, f"out={out}", status=2)
    assert "data.masking.quantile: 0.1, now 0.3" in capfd.readouterr().err


def test_one_rank_finds_the_quantile_for_all(runs, monkeypatch):
    """When the store is opened, and not in the loader's thread."""
    quantile = Hardness.quantile

    def watched(self, share, rows, special_V):
        alone = threading.current_thread().name.startswith("dskd-rank0")
        assert alone or share in self.quantiles
        return quantile(self, share, rows, special_V)

    monkeypatch.setattr(Hardness, "quantile", watched)
    train(runs, "watched", 2, "deepspeed=zero0", of="evolution")


def test_epochs_too_short_to_ask_between_are_told_once(runs, references, capfd):
    del references  # the recipe is there
    recipe = str(runs.folder / "refreshed.yaml")
    words = ("train.batch=48", "train.micro_batch=4")
    forked(2, recipe, f"out={runs.folder / 'short'}", *words, status=2)
    said = capfd.readouterr().err
    assert said.count("1 epochs of 44 rows are less than train.batch, 48") == 1
