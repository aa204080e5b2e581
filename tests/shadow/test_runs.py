"""Whole runs on a CUDA device: captured, trained, stopped, exported and evaluated as on the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from dskd.stores.shard import map_shard
from dskd.stores.store import shard_path
from tests.equivalence.small import Runs, step_lines
from tests.launching import evaluations, exported_nll, losses
from tests.shadow.cases import on_cpu, plain_losses, train

KINDS = [("ki cached", 1), ("self average", 2), ("wid", 2), ("ki live", 3), ("muki stored", 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def run(runs: Runs, name: str, kind: tuple[str, int], until: str = "evaluate") -> Path:
    return train(runs, name, *kind, "fp32", "train.steps=4", f"until={until}")


@pytest.fixture(scope="module")
def finished(runs):
    """Runs on the device from the text to the exported student's scores, by case and stage; and
    each one as a kill after its second step would have left it."""
    found = {}
    with plain_losses():
        for kind in KINDS:
            out = run(runs, "{} {}".format(*kind), kind, until="train")
            half = runs.copied(out, f"half {out.name}", step=2)
            found[kind] = run(runs, out.name, kind), half
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_exported_student_scores_as_on_the_cpu(runs, finished, kind):
    with on_cpu():
        expected = run(runs, "cpu {} {}".format(*kind), kind)
    out, _ = finished[kind]
    assert losses(out) == pytest.approx(losses(expected), abs=1e-5)
    assert evaluations(out) == pytest.approx(evaluations(expected), abs=1e-5)
    assert exported_nll(out) == pytest.approx(exported_nll(expected), abs=1e-5)
    sizes = [json.loads((o / "train" / "summary.json").read_text()) for o in (out, expected)]
    assert sizes[0]["parameters"] == sizes[1]["parameters"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_goes_on_bit_for_bit(runs, finished, kind):
    out, half = finished[kind]
    with plain_losses():
        run(runs, half.name, kind)
    assert losses(half) == losses(out)
    assert exported_nll(half) == exported_nll(out)


def test_a_cache_is_that_of_the_cpu(runs, finished):
    with on_cpu():
        expected = run(runs, "cpu capture", ("ki cached", 0), until="cache") / "cache"
    found = finished["ki cached", 1][0] / "cache"
    numbers = range(len([*found.glob("shard-*")]))
    assert len(numbers) > 1
    for number in numbers:
        mine, theirs = (map_shard(shard_path(folder, number))[0] for folder in (found, expected))
        assert mine["tail"] == pytest.approx(theirs["tail"], abs=1e-5)
        # By token: nearly equal ones may change places.
        assert by_token(mine) == pytest.approx(by_token(theirs), abs=1e-5)


def test_scores_of_a_panel_are_those_of_the_cpu(runs, finished):
    with on_cpu():
        expected = run(runs, "cpu scores", ("muki stored", 0), until="scores") / "cache"
    found = finished["muki stored", 2][0] / "cache"
    for teacher in ("one", "two"):
        shards = [folder / teacher / "train" for folder in (found, expected)]
        assert len([*shards[0].glob("shard-*")]) == 1
        mine, theirs = (map_shard(shard_path(folder, 0))[0] for folder in shards)
        assert mine.keys() == theirs.keys() and len(mine["entropy"]) == 42
        for name, values in mine.items():
            assert np.allclose(values, theirs[name], atol=1e-6), (teacher, name)


def by_token(columns) -> np.ndarray:
    found = np.zeros(columns["logprobs"].shape, np.float32)
    np.put_along_axis(found, columns["ids"].astype(np.int64), columns["logprobs"], 1)
    return found


# Adam's first steps make the most of rounding where WID has set entries to zero.
KERNELS = {"ki live": 1e-5, "ki cached": 1e-5, "ki routed": 1e-5, "wid": 2e-4}


@pytest.mark.parametrize("case", KERNELS)
def test_the_kernels_train_as_the_closed_forms(runs, case):
    """As a GPU launches them, on its tensors, but in Triton's interpreter."""
    with plain_losses():
        expected = train(runs, f"plain {case}", case, 1, "fp32")
    out = train(runs, f"kernels {case}", case, 1, "fp32")
    assert losses(out) == pytest.approx(losses(expected), abs=KERNELS[case])
    assert evaluations(out) == pytest.approx(evaluations(expected), abs=KERNELS[case])
    removed = [[line.get("removed", 0.0) for line in step_lines(run)] for run in (out, expected)]
    assert removed[0] == pytest.approx(removed[1], abs=1e-3)
