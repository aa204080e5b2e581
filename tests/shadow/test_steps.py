"""Every method trains on a CUDA device as on the CPU, at every ZeRO stage, in fp32 and in bf16; and
no line of dskd waits for the device more often than ``waits.json`` allows.
"""

import json
from pathlib import Path

import pytest

from tests.equivalence.small import Runs
from tests.launching import evaluations, losses
from tests.shadow import watched
from tests.shadow.cases import CASES, on_cpu, plain_losses, ranks_of, train

STAGES = [0, 1, 2, 3]
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}
BUDGET = json.loads(Path(__file__).with_name("waits.json").read_text())
"""Waits that are dskd's to mend, by case and stage: for each micro-batch (``passes``), for each
step beside these (``training``), for each batch of an evaluation and of a sweep over all rows
(capture, questions), and for each choice of the units that WID removes (``masks``)."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="module")
def on_the_cpu(runs):
    """Losses and evaluations of a run there, in fp32."""
    found = {}

    def run(case: str, stage: int) -> list[float]:
        if (case, stage) not in found:
            with on_cpu():
                out = train(runs, f"cpu {case} {stage}", case, stage, "fp32")
            found[case, stage] = losses(out) + evaluations(out)
        return found[case, stage]

    return run


@pytest.fixture(scope="module")
def on_the_device(runs):
    """The folder of a run there, and its waits."""
    found = {}

    def run(case: str, stage: int, precision: str) -> tuple[Path, watched.Waits]:
        key = (case, stage, precision)
        if key not in found:
            file = runs.folder / f"waits {key}.json"
            with plain_losses(), watched.watched(file):
                out = train(runs, f"{case} {stage} {precision}", *key)
            found[key] = out, watched.read(file)
        return found[key]

    return run


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(on_the_cpu, on_the_device, case, stage, precision):
    out, _ = on_the_device(case, stage, precision)
    found = losses(out) + evaluations(out)
    assert len(found) == 3
    assert found == pytest.approx(on_the_cpu(case, stage), abs=TOLERANCE[precision])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_no_more_than_it_may(on_the_device, case, stage):
    _, waits = on_the_device(case, stage, "bf16")
    of_memories = 4 // ranks_of(stage) if case == "l2kd memories" else 0
    assert waits.times["training"] == 2 and waits.times["passes"] == 4 + of_memories
    budget = BUDGET[case][str(stage)]
    assert budget.keys() == waits.times.keys()
    for within, allowed in budget.items():
        own = waits.own(within)
        assert sum(own.values()) <= allowed * waits.times[within], (within, own)
