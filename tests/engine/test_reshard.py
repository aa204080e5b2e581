"""A checkpoint goes on at any world size and ZeRO stage, with the same losses."""

import shutil
from pathlib import Path

import pytest

from dskd.engine.checkpoints import Saved
from dskd.engine.reshard import check_reshard
from dskd.errors import CheckpointError
from tests.equivalence.small import MASKED, Runs
from tests.launching import cut_back, losses

SETTINGS = {
    "model": {"config": MASKED | {"num_hidden_layers": 1}},
    "method": {"kind": "lm"},
    "teacher": None,
    "train": {"micro_batch": 2, "weight_decay": 0.5},
}
GEOMETRIES = [(0, 1), (0, 2), (1, 2), (3, 2), (2, 1), (3, 1)]  # (ZeRO stage, ranks)


def train(runs: Runs, name: str, geometry: tuple[int, int]) -> Path:
    stage, ranks = geometry
    return runs.run(name, ranks, f"deepspeed=zero{stage}", **SETTINGS)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Runs:
    """A run of each geometry, cut back to half its steps."""
    runs = Runs(tmp_path_factory.mktemp("universal"))
    reference = losses(train(runs, "reference", (0, 1)))
    for geometry in GEOMETRIES:
        out = train(runs, f"half-{geometry}", geometry)
        assert losses(out) == pytest.approx(reference, abs=1e-5)
        shutil.copytree(out, runs.folder / f"whole-{geometry}")
        cut_back(out, step=2)
    return runs


PAIRS = [  # saved, loaded: every geometry is saved and loaded
    ((0, 1), (1, 2)), ((0, 1), (2, 2)), ((0, 2), (3, 1)), ((1, 2), (0, 1)), ((2, 1), (3, 2)),
    ((3, 1), (0, 2)), ((3, 2), (2, 1)), ((3, 2), (1, 1)),
    ((0, 2), (0, 2)), ((2, 1), (2, 1)), ((3, 2), (3, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=str)
def test_goes_on_in_any_geometry(halves, saved, loaded):
    out = halves.folder / f"{saved}-{loaded}"
    shutil.copytree(halves.folder / f"half-{saved}", out)
    train(halves, out.name, loaded)
    reference = losses(halves.folder / "reference")
    assert losses(out) == pytest.approx(reference, abs=1e-5)
    if saved == loaded:
        assert losses(out) == losses(halves.folder / f"whole-{saved}")  # bit for bit
    assert not list((out / "train" / "checkpoints").glob(".*"))


def test_other_precision_is_refused(tmp_path):
    """`train.precision: auto` on another machine, say."""
    saved = Saved(tmp_path, step=2, world=2, stage=2, precision="bf16", score=None, state={})
    with pytest.raises(CheckpointError, match=r"train\.precision bf16, cannot go on in fp32"):
        check_reshard(saved, stage=2, precision="fp32")
    with pytest.raises(CheckpointError, match="ZeRO-0 run cannot change"):
        check_reshard(saved, stage=0, precision="bf16")
    check_reshard(saved, stage=3, precision="bf16")
