"""What a run's stages share: which checkpoint is exported."""

from pathlib import Path

import pytest
import torch

from dskd.methods.base import build_method
from dskd.runs.context import RunContext
from dskd.settings.data import Data, HardTokens, Masking
from dskd.settings.run import Run
from tests.engine.test_checkpoints import save

HARD = HardTokens(kind="hard_tokens")


@pytest.mark.parametrize(
    ("method", "masking", "objective", "best"),
    [
        ("lm", Masking(), "masked", 1),
        ("lm", HARD, "masked", 2),
        ("lm", HARD, "causal", 1),
        ("self_evolution", HARD, "masked", 2),
        ("self_evolution", HARD, "causal", 2),
    ],
)
def test_where_random_masks_judge_hard_ones_the_last_checkpoint_is_exported(
    tmp_path: Path, method: str, masking: Masking | HardTokens, objective: str, best: int
) -> None:
    run = Run(out=tmp_path, data=Data(objective=objective, masking=masking))
    context = RunContext(run, build_method({"kind": method}), torch.device("cpu"))
    for step, nll in ((1, 2.0), (2, 3.0)):
        save(context.checkpoints, step, nll)
    assert context.checkpoints.best().step == best
