"""fp16 from the first step to the resumed run: it is refused without a GPU."""

import json
import re
from pathlib import Path

import pytest

from dskd.engine.checkpoints import MANIFEST
from dskd.engine.ds_config import load_preset
from dskd.system.files import read_manifest
from dskd.errors import CheckpointError
from tests.equivalence.small import Runs
from tests.launching import cut_back, evaluations, losses
from tests.shadow.cases import on_cpu, plain_losses, train

STAGES = [1, 2, 3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("fp16"))


def run(runs: Runs, name: str, stage: int, power: int = 8) -> Path:
    """Six steps, with a loss scale of 2^power at first, which halves at every overflow."""
    ds = load_preset(f"zero{stage}")
    ds["fp16"] |= {"initial_scale_power": power, "hysteresis": 1}
    path = runs.folder / f"zero{stage}-{power}.json"
    path.write_text(json.dumps(ds))
    words = ("train.steps=6", "train.batch=8", f"deepspeed={path}")
    with plain_losses():
        return train(runs, name, "ki live", stage, "fp16", *words)


def skipped(told: str) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d+): fp16 overflow, skipped", told)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("power", [8,24])
def test_explore(runs, capfd, stage, power):
    out = run(runs, f"a{stage}-{power}", stage, power)
    told = skipped(capfd.readouterr().out)
    m = [read_manifest(p / MANIFEST, CheckpointError)["state"]["progress"] for p in sorted((out/"train/checkpoints").glob("step-*"))]
    res = []
    for to in STAGES:
        copy = runs.copied(out, f"a{stage}-{power}-{to}", step=4)
        run(runs, copy.name, to, power)
        res.append((to, skipped(capfd.readouterr().out), [a-b for a,b in zip(losses(copy), losses(out))]))
    with capfd.disabled():
        print(stage, power, told, losses(out), m)
        for r in res: print("   ", r)
