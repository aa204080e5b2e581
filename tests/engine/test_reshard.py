"""A checkpoint goes on at any world size and ZeRO stage, with the same losses."""

import shutil
from pathlib import Path

import pytest

from dskd.engine.checkpoints import Saved
from dskd.engine.reshard import check_reshard
from dskd.errors import CheckpointError
from tests.launching import cut_back, forked, losses

RECIPE = """
seed: 3
data:
  folder: {folder}/data
  sources: [{{kind: builtin, documents: 60}}]
  tokenizer: {{vocab_size: 320}}
  block_size: 32
model:
  config:
    model_type: roberta
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 64
    hidden_dropout_prob: 0.0
    attention_probs_dropout_prob: 0.0
teacher: null
method: {{kind: lm}}
train: {{steps: 4, batch: 8, micro_batch: 2, lr: 0.01, warmup: 1, weight_decay: 0.5}}
evaluation: {{every: 2, rows: 4}}
checkpoint: {{every: 2}}
until: train
"""
GEOMETRIES = [(0, 1), (0, 2), (1, 2), (3, 2), (2, 1), (3, 1)]  # (ZeRO stage, ranks)


def train(folder: Path, name: str, geometry: tuple[int, int], *words: str) -> Path:
    stage, ranks = geometry
    recipe = folder / "run.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    forked(ranks, str(recipe), f"out={folder / name}", f"deepspeed=zero{stage}", *words)
    return folder / name


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """A run of each geometry, cut back to half its steps."""
    folder = tmp_path_factory.mktemp("universal")
    reference = losses(train(folder, "reference", (0, 1)))
    for geometry in GEOMETRIES:
        out = train(folder, f"half-{geometry}", geometry)
        assert losses(out) == pytest.approx(reference, abs=1e-5)
        shutil.copytree(out, folder / f"whole-{geometry}")
        cut_back(out, step=2)
    return folder


PAIRS = [  # saved, loaded: every geometry is saved and loaded
    ((0, 1), (1, 2)),
    ((0, 1), (2, 2)),
    ((0, 2), (3, 1)),
    ((1, 2), (0, 1)),
    ((2, 1), (3, 2)),
    ((3, 1), (0, 2)),
    ((3, 2), (2, 1)),
    ((3, 2), (1, 1)),
    ((0, 2), (0, 2)),
    ((2, 1), (2, 1)),
    ((3, 2), (3, 2)),
]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=str)
def test_goes_on_in_any_geometry(halves, saved, loaded):
    out = halves / f"{saved}-{loaded}"
    shutil.copytree(halves / f"half-{saved}", out)
    train(halves, out.name, loaded)
    reference = losses(halves / "reference")
    assert losses(out) == pytest.approx(reference, abs=1e-5)
    if saved == loaded:
        assert losses(out) == losses(halves / f"whole-{saved}")  # bit for bit
    assert not list((out / "train" / "checkpoints").glob(".*"))


def test_other_precision_is_refused(tmp_path):
    """`train.precision: auto` on another machine, say."""
    saved = Saved(tmp_path, step=2, world=2, stage=2, precision="bf16", score=None, state={})
    with pytest.raises(CheckpointError, match=r"train\.precision bf16, cannot go on in fp32"):
        check_reshard(saved, stage=2, precision="fp32")
    with pytest.raises(CheckpointError, match="ZeRO-0 run cannot change"):
        check_reshard(saved, stage=0, precision="bf16")
    check_reshard(saved, stage=3, precision="bf16")
