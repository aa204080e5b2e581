"""fp16 from the first step to the exported model: without a GPU it is refused."""

import json
import re
from pathlib import Path

import pytest

from dskd.engine.checkpoints import MANIFEST
from dskd.engine.ds_config import load_preset
from dskd.errors import CheckpointError
from dskd.system.files import read_manifest
from tests.equivalence.small import Runs
from tests.launching import evaluations, exported_nll, losses
from tests.shadow.cases import on_cpu, plain_losses, train

STEPS = 6
KINDS = [("ki live", 1), ("ki live", 2), ("ki live", 3), ("self average", 2), ("wid", 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("fp16"))


def run(runs: Runs, name: str, case: str, stage: int, power: int) -> Path:
    """The run of a case whose loss scale begins at 2^power and halves with every overflow."""
    ds = load_preset(f"zero{stage}")
    ds["fp16"] |= {"initial_scale_power": power, "hysteresis": 1}
    path = runs.folder / f"zero{stage}-{power}.json"
    path.write_text(json.dumps(ds))
    words = (f"train.steps={STEPS}", "train.batch=8", "until=evaluate", f"deepspeed={path}")
    with plain_losses():
        return train(runs, name, case, stage, "fp16", *words)


def skipped(told: str) -> list[int]:
    """The steps that were tried in vain, each as often as it was."""
    return [int(step) for step in re.findall(r"step (\d+): fp16 overflow, skipped", told)]


def progress(out: Path, step: int) -> dict:
    manifest = out / "train" / "checkpoints" / f"step-{step:08d}" / MANIFEST
    return read_manifest(manifest, CheckpointError)["state"]["progress"]


@pytest.fixture
def overflowing(runs, capfd):
    """The run of a case and stage whose loss scale is too large at first, and what it said."""

    def overflown(kind: tuple[str, int]) -> tuple[Path, str]:
        told = runs.folder / "{} {}.txt".format(*kind)
        out = runs.folder / "{} {}".format(*kind)
        if not told.exists():
            run(runs, out.name, *kind, power=24)
            told.write_text(capfd.readouterr().out)
        return out, told.read_text()

    return overflown


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_that_overflow_are_skipped_and_tried_again(overflowing, kind):
    """With the next batch: the steps are as many, the batches are more."""
    out, told = overflowing(kind)
    assert skipped(told).count(1) >= 2
    assert len(losses(out)) == STEPS
    assert progress(out, STEPS)["position"] == STEPS + len(skipped(told))
    assert all(loss < 7 for loss in losses(out))
    assert exported_nll(out) == pytest.approx(evaluations(out)[-1], abs=5e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_goes_on_bit_for_bit_with_the_loss_scale_of_then(runs, overflowing, capfd, kind):
    out, told = overflowing(kind)
    half = runs.copied(out, "half {} {}".format(*kind), step=4)
    run(runs, half.name, *kind, power=24)
    assert skipped(capfd.readouterr().out) == [step for step in skipped(told) if step > 4]
    assert losses(half) == losses(out)
    assert evaluations(half) == evaluations(out)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_goes_on_at_another_stage_with_the_loss_scale_of_then(runs, overflowing, capfd, stage):
    out, _ = overflowing(("ki live", stage))
    other = stage % 3 + 1
    half = runs.copied(out, f"at {other} after {stage}", step=4)
    run(runs, half.name, "ki live", other, power=24)
    assert len(skipped(capfd.readouterr().out)) <= 1
    assert losses(half) == pytest.approx(losses(out), abs=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_overflow_it_trains_as_fp32_on_the_cpu(runs, capfd, stage):
    out = run(runs, f"small scale {stage}", "ki live", stage, power=8)
    assert not skipped(capfd.readouterr().out)
    with on_cpu():
        words = (f"train.steps={STEPS}", "train.batch=8")
        expected = train(runs, f"cpu {stage}", "ki live", stage, "fp32", *words)
    assert losses(out) == pytest.approx(losses(expected), abs=1e-3)
    assert losses(out) != losses(expected)
