"""GEM through the step loop equals a plain float64 model at every ZeRO stage and geometry."""

import itertools

import pytest
import torch
from torch import Tensor

from dskd.batch import Term
from dskd.continual.gem import GradientMemories
from dskd.engine.hooks import HookChain, StepHooks
from dskd.engine.shards import ParameterShards
from tests.continual.loops import (
    EPS,
    GEOMETRIES,
    LR,
    METHOD,
    flat_gradient,
    loop_of,
    mean_loss,
    own,
    rows_of,
    steps,
    student,
    whole_weights,
)
from tests.ranks import run_ranks

TASKS, STEPS, RIDGE = 3, 4, 1e-3


def least(P_tt: Tensor, q_t: Tensor, margin: float) -> Tensor:
    """The best of the minima over all choices of which entries are at the bound."""
    best, found = float("inf"), None
    for free in itertools.product([False, True], repeat=len(q_t)):
        free_t, v_t = torch.tensor(free), torch.full_like(q_t, margin)
        if any(free):
            rest_t = q_t[free_t] + P_tt[free_t][:, ~free_t] @ v_t[~free_t]
            v_t[free_t] = torch.linalg.solve(P_tt[free_t][:, free_t], -rest_t)
        value = float(v_t @ P_tt @ v_t / 2 + q_t @ v_t)
        if v_t.min() >= margin and value < best:
            best, found = value, v_t
    return found


def projected(
    now: Tensor, memories: list[Tensor], clip: float | None, average: bool
) -> tuple[Tensor, int]:
    """The step's gradient as GEM leaves it, and how many memories it pointed against."""
    if clip is not None:
        now, *memories = (g * (clip / (g.norm() + 1e-6)).clamp(max=1) for g in (now, *memories))
    memories_tP = torch.stack(memories)
    against_t = memories_tP @ now
    violated = int((against_t < 0).sum())
    if violated and average:
        now = now - (against_t[0] / (memories[0] @ memories[0])) * memories[0]
    elif violated:
        P_tt = memories_tP @ memories_tP.T + RIDGE * torch.eye(len(memories), dtype=now.dtype)
        now = now + memories_tP.T @ least(P_tt, against_t, 0.5)
    return now, violated


def memory_losses(model: torch.nn.Module, step: int, average: bool) -> list[Tensor]:
    """Of each memory, or of all rows together."""
    rows = [rows_of(task, 50 + step) for task in range(TASKS)]
    if average:
        return [mean_loss(model, [half for halves in rows for half in halves])]
    return [mean_loss(model, halves) for halves in rows]


def hooks_of(micro: int, **options) -> GradientMemories:
    """GEM with a memory of each earlier task, whose rows are others before each step."""
    return GradientMemories(
        TASKS, lambda memory, step: own(rows_of(memory, 50 + step), micro), **options
    )


class Compared(StepHooks):
    """Compares the gradient that GEM leaves with that of a float64 model of the same weights,
    relative to its largest entry."""

    def __init__(self, gem: GradientMemories, clip: float | None, average: bool) -> None:
        self.gem, self.how, self.model = gem, (clip, average), student().double()
        self.worst: list[float] = []
        self.violated: list[int] = []

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, whole in weights.wholes(parameters):
                parameters[name].copy_(whole)
        losses = memory_losses(self.model, step, self.how[1])
        memories = [flat_gradient(self.model, loss) for loss in losses]
        now = flat_gradient(self.model, mean_loss(self.model, rows_of(TASKS, step + 1)))
        expected, violated = projected(now, memories, *self.how)
        assert self.gem.rates() == {"violated": violated}
        self.violated.append(violated)
        sizes = [parameter.numel() for parameter in parameters.values()]
        parts = dict(zip(parameters, expected.split(sizes), strict=True))
        for shard in weights.shards():
            part = parts[shard.name][shard.start : shard.start + len(shard.gradient)]
            difference = (shard.gradient - part).abs().max() / expected.abs().max()
            self.worst.append(difference.item())


def _compared(rank, stage, world, micro, clip, average, **how):
    del rank
    gem = hooks_of(micro, clip=clip, average=average)
    compared = Compared(gem, clip, average)
    chain = HookChain({"gem": gem, "compared": compared})
    trainer, _ = loop_of(stage, world, micro, TASKS, lambda model: chain, **how)
    steps(trainer, 0, STEPS)
    return compared.worst, compared.violated


OPTIONS = [(1.0, False), (None, False), (1.0, True)]
CASES = [(*place, *OPTIONS[n % 3]) for n, place in enumerate(GEOMETRIES)]


@pytest.mark.parametrize(("stage", "world", "micro", "clip", "average"), CASES)
def test_the_projected_gradient_is_that_of_a_plain_model(stage, world, micro, clip, average):
    for worst, violated in run_ranks(_compared, stage, world, micro, clip, average, world=world):
        assert max(worst) < 2e-6
        assert sum(violated) > 0  # else there was no projection to compare


def _elsewhere(rank, stage, how):
    return _compared(rank, stage, 2, 2, 1.0, False, **how)


@pytest.mark.parametrize(
    ("stage", "how", "near"),
    [(stage, {"offload": True}, 2e-6) for stage in (1, 2, 3)]
    + [(stage, {"bf16": True}, 0.05) for stage in (0, 2, 3)],
)
def test_offloaded_and_bf16_gradients_are_projected_too(stage, how, near):
    for worst, violated in run_ranks(_elsewhere, stage, how):
        assert max(worst) < near
        assert sum(violated) > 0


EVERY = 2


def plain_weights() -> dict[str, Tensor]:
    """After some steps of torch's AdamW in float64, memories' gradients taken every other step."""
    model = student().double()
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), eps=EPS, weight_decay=0.0)
    memories: list[Tensor] = []
    for step in range(STEPS):
        if step % EVERY == 0:
            losses = memory_losses(model, step, average=False)
            memories = [flat_gradient(model, loss) for loss in losses]
        now = flat_gradient(model, mean_loss(model, rows_of(TASKS, step + 1)))
        now, _ = projected(now, memories, 1.0, average=False)
        for parameter, part in zip(
            parameters, now.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    return {name: p.detach().flatten() for name, p in model.named_parameters()}


def _trained(rank, stage, world, micro, folder):
    """Weights of an undisturbed loop and of one that went on from a checkpoint in the middle of an
    interval, and what the checkpoint holds of the memories."""
    del rank
    trainer, engine = loop_of(stage, world, micro, TASKS, lambda m: hooks_of(micro, every=EVERY))
    cut = EVERY + 1
    steps(trainer, 0, cut)
    engine.save(folder, "cut")
    trainer.hooks.save(folder / "kept")
    steps(trainer, cut, STEPS)
    weights = whole_weights(engine)
    trainer.hooks.save(folder / "nothing")
    engine.destroy()
    trainer, engine = loop_of(stage, world, micro, TASKS, lambda m: hooks_of(micro, every=EVERY))
    trainer.hooks.load(folder / "kept")
    engine.load(folder, "cut")
    trainer.loader.position = cut
    steps(trainer, cut, STEPS)
    return weights, whole_weights(engine)


PLACES = [(0, 1, 4), (0, 2, 4), (1, 2, 2), (2, 2, 4), (3, 2, 2)]


@pytest.mark.parametrize(("stage", "world", "micro"), PLACES)
def test_one_trajectory_also_over_a_stop_within_an_interval(stage, world, micro, tmp_path):
    expected = plain_weights()
    for weights, resumed in run_ranks(_trained, stage, world, micro, tmp_path, world=world):
        assert weights == resumed
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.tensor(weights[name], dtype=torch.float64), value, rtol=1e-6, atol=1e-6
            )
    kept = len(list((tmp_path / "kept").iterdir()))
    assert kept == (world if stage else 1)
    assert not (tmp_path / "nothing").exists()  # the next step takes all gradients anew


def _not_a_number(rank):
    """A step before which the loss of the memories is not finite."""
    del rank

    def loss(positions, signal, batch, step):
        return {"tokens": Term(positions.logits_NV.sum() * float("nan"), {})}

    hooks = hooks_of(4, loss=loss, counts=METHOD.counts)
    trainer, _ = loop_of(2, 1, 4, TASKS, lambda model: hooks)
    steps(trainer, 6, 7)


def test_a_memory_without_a_finite_gradient_is_refused():
    with pytest.raises(AssertionError, match="NonFiniteError: step 7: the gradient of a memory is"):
        run_ranks(_not_a_number, world=1)
