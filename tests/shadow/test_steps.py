"""Every method trains on a CUDA device as on the CPU, at every ZeRO stage, in fp32 and in bf16."""

import pytest

from tests.equivalence.small import Runs
from tests.launching import evaluations, losses
from tests.shadow.cases import CASES, on_cpu, plain_losses, train

TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


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


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(runs, on_the_cpu, case, stage, precision):
    expected = on_the_cpu(case, stage)
    with plain_losses():
        out = train(runs, f"{case} {stage} {precision}", case, stage, precision)
    found = losses(out) + evaluations(out)
    assert len(found) == 3
    assert found == pytest.approx(expected, abs=TOLERANCE[precision])
