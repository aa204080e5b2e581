"""A loss that is not finite because of a method's weights: all ranks say which, and where."""

import pytest
import torch

from dskd import ops
from dskd.batch import Batch, Positions, Signal, Term
from dskd.engine.hooks import StepHooks
from dskd.errors import NonFiniteError
from dskd.methods.base import Method
from dskd.methods.lm import LanguageModelling
from dskd.system import dist
from tests.ranks import run_ranks
from tests.training import test_passes
from tests.training.waits import HostWaits


class Weighted(Method):
    """Cross entropy with a weight for each token, one of which is another on one rank."""

    kind: str = "weighted"
    weight: str
    on_rank: int

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        weight_N = torch.ones_like(positions.hidden_ND[:, 0])
        if dist.rank() == self.on_rank:
            weight_N[2] = float(self.weight)
        losses = ops.positions_ce(positions, weight_N)
        return {"tokens": Term(losses.total, {"ce": losses.label_N.sum()})}


def one_step(rank: int, world: int, method: Method) -> tuple[str, bool] | int:
    """What the step says and whether another rank prints it; or how often it waited."""
    ds = test_passes.settings(0, "fp32", world, offload=False)
    trainer, engine = test_passes.trainer_of(ds, "fp32", StepHooks(), dropout=False)
    engine.module.method = method
    with HostWaits() as waits:
        waits.put(engine.module.parameters())
        try:
            trainer.step(stop=False).read()
        except NonFiniteError as problem:
            return str(problem), problem.printed_by_other_rank
    return sum(waits.lines.values())


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_the_first_bad_weight_is_named_by_all_ranks(word):
    problem = (
        f"step 1: the loss is {word}, and rank 1's label_weight: {word} at [2]; "
        f"the last checkpoint is intact"
    )
    method = Weighted(weight=word, on_rank=1)
    assert run_ranks(one_step, 2, method) == [(problem, False), (problem, True)]


def test_while_the_loss_is_finite_weights_are_not_read():
    weighted, plain = (
        run_ranks(one_step, 1, method, world=1)
        for method in (Weighted(weight="0.5", on_rank=0), LanguageModelling())
    )
    assert weighted == plain
