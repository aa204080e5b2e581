"""Self-Evolution gives one store and one trajectory in any geometry, and goes on in any other.

Tiny students in forked ranks, by the user's command; losses and evaluations agree to 1e-5 (fp32),
stores to the byte.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dskd.log import read_metrics
from tests.equivalence.small import CAUSAL, LIVE, MASKED, STEPS, Runs, cached, source
from tests.launching import cut_back, evaluations, losses

# Far from uniform, so that it matters which tokens are hard.
STUDENT = {"config": MASKED | {"num_hidden_layers": 1, "initializer_range": 0.3}}
HARD = {"kind": "hard_tokens", "metric": "quantile", "quantile": 0.3, "least": 0.1, "most": 0.2}
EVOLUTION = {"kind": "self_evolution", "smoothing": 0.3}
KI = {"kind": "ki", "temperature": 2.0, "schedule": "linear", "steps": STEPS}
SETTINGS: dict[str, dict[str, Any]] = {
    "evolution": {"method": EVOLUTION, "teacher": {"kind": "self"}},
    # 5 steps an epoch: asked again before steps 6 and 11
    "refreshed": {
        "method": EVOLUTION,
        "teacher": {"kind": "self"},
        "train": {"steps": 12, "batch": 16},
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


def train(runs: Runs, name: str, ranks: int, *words: str, of: str, **more: Any) -> Path:
    """A run of one of the settings."""
    masking = HARD | ({"refresh": 1} if of == "refreshed" else {})
    data: dict[str, Any] = {"masking": masking, "sources": [source(runs.folder, "left")]}
    if of == "causal":
        masking = {key: value for key, value in HARD.items() if key not in ("least", "most")}
        data |= {"objective": "causal", "packing": "contiguous", "masking": masking}
    data["masking"]["draws"] = None if of == "refreshed" else 2
    tree = {"model": STUDENT, "data": data} | SETTINGS[of] | more
    return runs.run(name, ranks, *words, **tree)


def shards(folder: Path) -> dict[str, bytes]:
    """The files of a store."""
    found = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert found
    return found


def same(a: Path, b: Path) -> None:
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    assert evaluations(a) == pytest.approx(evaluations(b), abs=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("evolution"))


@pytest.fixture(scope="module")
def references(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, several micro-batches a step."""
    return {of: train(runs, of, 1, of=of) for of in SETTINGS}


GEOMETRIES = [
    ("evolution", 0, 2, 2),
    ("evolution", 2, 2, 4),
    ("evolution", 3, 2, 2),
    ("evolution", 0, 1, 8),
    ("refreshed", 2, 2, 4),
    ("refreshed", 3, 2, 8),
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


def test_it_is_another_trajectory_than_without(runs, references):
    """Of the masks, of the smoothing and of the weights: each changes the losses."""
    plain = train(runs, "plain", 1, "method.smoothing=0.0", of="evolution", teacher=None)
    masks = {"masking": {"draws": 2}, "sources": [source(runs.folder, "left")]}
    random = train(runs, "random", 1, of="evolution", data=masks)
    weighed = train(runs, "light", 1, "method.hard_weight=1.0", of="causal")
    for other, of in ((plain, "evolution"), (random, "evolution"), (weighed, "causal")):
        assert losses(other)[0] != pytest.approx(losses(references[of])[0], abs=1e-3)


def test_a_cached_teacher_gives_what_a_live_one_does(runs, references):
    """The cache holds the masks of the hard tokens."""
    out = train(runs, "cached", 1, of="ki", teacher=cached(LIVE))
    same(out, references["ki"])


@pytest.mark.parametrize(("of", "step"), [("evolution", 2), ("refreshed", 8), ("refreshed", 5)])
def test_resumed(runs, references, of, step):
    """From an ordinary checkpoint, and from one that was made to ask the student again."""
    out = runs.folder / f"{of}-resumed-{step}"
    shutil.copytree(references[of], out)
    cut_back(out, step=step)
    for folder in out.glob("questions-epoch-*"):
        if int(folder.name[-5:]) * 5 >= step:
            shutil.rmtree(folder)
    train(runs, out.name, 1, of=of)
    same(out, references[of])


def test_asking_goes_on_where_it_was_stopped(runs, references):
    """Both before training and between two steps."""
    out = runs.folder / "refreshed-asking"
    shutil.copytree(references["refreshed"], out)
    cut_back(out, step=5)
    shutil.rmtree(out / "questions-epoch-00002")
    for name in ("questions", "questions-epoch-00001"):
        (out / name / "manifest.json").unlink()
        (out / name / "shard-00000.safetensors").unlink()
    train(runs, out.name, 1, of="refreshed")
    same(out, references["refreshed"])
    for name in ("questions", "questions-epoch-00001", "questions-epoch-00002"):
        assert shards(out / name) == shards(references["refreshed"] / name)


def test_the_student_is_asked_again(references):
    """Its answers change as it trains, and every other epoch has a store of its own."""
    run = references["refreshed"]
    stores = ["questions", "questions-epoch-00001", "questions-epoch-00002"]
    assert sorted(path.name for path in run.glob("questions*")) == stores
    first, second, third = (shards(run / name) for name in stores)
    assert first != second != third


def test_the_last_checkpoint_is_the_best(references):
    """Though the validation loss of an earlier one is lower, or may be."""
    lines = read_metrics(references["evolution"] / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line][-1] == STEPS
