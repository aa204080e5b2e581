"""Memory of the device: what a run logs of it, and what DeepSpeed's buckets take."""

import json
from pathlib import Path

import pytest

from dskd.engine.ds_config import load_preset
from tests.equivalence.small import Runs, step_lines
from tests.shadow.cases import plain_losses, train

REDUCED = 50_000_000
"""Elements of the bucket that a large model gets."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("memory"))


def summary(out: Path) -> dict:
    return json.loads((out / "train" / "summary.json").read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_small_model_gets_small_buckets(runs, stage):
    """Two of the least size, in bf16; of that for large models they were held all the same."""
    ds = load_preset(f"zero{stage}")
    ds["zero_optimization"]["reduce_bucket_size"] = REDUCED
    path = runs.folder / f"zero{stage}.json"
    path.write_text(json.dumps(ds))
    with plain_losses():
        small = summary(train(runs, f"small {stage}", "lm", stage, "bf16"))
        words = [f"deepspeed={path}"]
        large = summary(train(runs, f"large {stage}", "lm", stage, "bf16", *words))
    assert small["parameters"] < 1e5
    assert small["peak_memory_bytes"] < 22e6
    saved = large["peak_memory_bytes"] - small["peak_memory_bytes"]
    assert saved == 2 * 2 * (REDUCED - 5_000_000)


def test_what_is_reserved_is_logged_beside_what_tensors_took(runs):
    """The device reserves no more than that."""
    with plain_losses():
        out = train(runs, "logged", "lm", 1, "bf16")
    for line in (*step_lines(out), summary(out)):
        assert line["reserved_memory_bytes"] == line["peak_memory_bytes"] > 1e6
