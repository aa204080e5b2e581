"""Training in bf16: close to fp32, the same at every ZeRO stage, and resumed bit for bit."""

from pathlib import Path

import pytest

from tests.equivalence.small import Runs
from tests.launching import evaluations, losses

STAGES = [0, 1, 2, 3]
# Measured with PyTorch 2.13 on CPU: 3.4e-4 from fp32; 0 among ZeRO-0, 1 and 2; 4.7e-4 to ZeRO-3.
FROM_FP32 = 3e-3
AMONG_STAGES = 2e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("bf16"))


def train(runs: Runs, name: str, stage: int, precision: str = "bf16") -> Path:
    return runs.run(name, 2, f"deepspeed=zero{stage}", f"train.precision={precision}")


@pytest.fixture(scope="module")
def stages(runs) -> dict[int, Path]:
    """A bf16 run at each ZeRO stage, with two ranks."""
    return {stage: train(runs, f"zero{stage}", stage) for stage in STAGES}


def apart(a: Path, b: Path) -> float:
    """Largest difference between two runs' training and evaluation losses."""
    pairs = zip(losses(a) + evaluations(a), losses(b) + evaluations(b), strict=True)
    return max(abs(x - y) for x, y in pairs)


def test_close_to_fp32(runs, stages):
    exact = train(runs, "fp32", 0, "fp32")
    for stage, out in stages.items():
        assert 0 < apart(out, exact) < FROM_FP32, stage  # bf16 was used


def test_stages_agree(stages):
    for stage in STAGES[1:]:
        assert apart(stages[stage], stages[0]) < AMONG_STAGES, stage


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resumed_bit_for_bit(runs, stages, stage):
    out = runs.copied(stages[stage], f"again{stage}", step=2)
    train(runs, out.name, stage)
    assert losses(out) == losses(stages[stage])
    assert evaluations(out) == evaluations(stages[stage])


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 3)])
def test_resumed_at_another_stage(runs, stages, saved, loaded):
    out = runs.copied(stages[saved], f"{saved}-{loaded}", step=2)
    train(runs, out.name, loaded)
    assert apart(out, stages[saved]) < AMONG_STAGES
