"""Penalties on weights: the original's steps, and a plain model's at every ZeRO stage."""

import pytest
import torch
from torch import Tensor

from dskd.continual.kept_weights import KeptWeights, keep_weights
from dskd.continual.original_adamw import OriginalAdamW
from dskd.continual.penalty import DecoupledPenalty, GradientPenalty, WeightPenalty
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards
from tests.continual.cases import CASES
from tests.continual.loops import (
    EPS,
    GEOMETRIES,
    LR,
    loop_of,
    mean_loss,
    rows_of,
    steps,
    student,
    whole_weights,
)
from tests.ranks import run_ranks

STEPS, STRENGTH, DECAY, TASK = 4, 30.0, 0.1, 2


def penalty_of(folder, strength):
    """The penalty of what was kept in a folder."""
    kept = KeptWeights.of(folder, {})
    return WeightPenalty(kept.omega, kept.anchor, strength)


def written(folder, omega, anchor):
    """Keep these."""
    model = torch.nn.Module()
    model.named_parameters = anchor.items
    keep_weights(folder, lambda: model, lambda model: omega, fingerprints={})


def test_golden_steps_of_the_original_adamw(tmp_path):
    """Adam, the penalty, the decay, in this order; eps as it is."""
    case = CASES["reg_adamw_3_steps"]
    given = case["inputs"]
    values = {key: torch.tensor(given[key], dtype=torch.float64) for key in ("omega", "anchor")}
    written(tmp_path, *({"p": value} for value in values.values()))
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.tensor(given["p0"], dtype=torch.float64))
    hooks = OriginalAdamW(model, given["eps"], penalty_of(tmp_path, given["reg_lambda"]))
    groups = [{"params": [model.p], "weight_decay": given["weight_decay"]}]
    how = {"betas": given["betas"], "eps": given["eps"], "lr": given["lr"]}
    optimizer = torch.optim.AdamW(hooks.groups(groups), **how)
    for step, gradient in enumerate(given["grads"]):
        model.p.grad = torch.tensor(gradient, dtype=torch.float64)
        named = {"p": model.p}
        hooks.before_step(ParameterShards(named, optimizer, gradients=True), step, given["lr"])
        optimizer.step()
        hooks.after_step(ParameterShards(named, optimizer, gradients=False), step, given["lr"])
        wanted = torch.tensor(case["expected"]["params"][step], dtype=torch.float64)
        torch.testing.assert_close(model.p.detach(), wanted, rtol=0, atol=1e-7)


def importances() -> dict[str, Tensor]:
    """Some that are drawn, most of them small."""
    generator = torch.Generator().manual_seed(4)
    shapes = {name: p.shape for name, p in student().named_parameters()}
    return {name: torch.rand(shape, generator=generator) ** 4 for name, shape in shapes.items()}


def anchors() -> dict[str, Tensor]:
    """Not far from where the student begins."""
    generator = torch.Generator().manual_seed(5)
    named = student().named_parameters()
    return {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in named}


def hooks_of(kind: str, folder, model) -> StepHooks:
    penalty = penalty_of(folder, STRENGTH)
    if kind == "gradient":
        return GradientPenalty(penalty)
    if kind == "decoupled":
        return DecoupledPenalty(penalty)
    return OriginalAdamW(model, EPS, penalty if kind == "original" else None)


def plain(kind: str) -> dict[str, Tensor]:
    """The weights after some steps in float64, Adam written out."""
    model, omega, anchor = student().double(), importances(), anchors()
    named = dict(model.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    original = kind in ("original", "adamw")
    for step in range(STEPS):
        loss = mean_loss(model, rows_of(TASK, step + 1))
        gradients = torch.autograd.grad(loss, list(named.values()))
        correction = 1 - 0.99 ** (step + 1)
        eps = EPS / correction**0.5 if original else EPS
        for (name, parameter), of_loss in zip(named.items(), gradients, strict=True):
            w = parameter.detach().clone()
            pull = 2 * STRENGTH * omega[name] * (w - anchor[name])
            gradient = of_loss + pull if kind == "gradient" else of_loss
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.99 * v[name] + 0.01 * gradient**2
            if not original:
                w *= 1 - LR * DECAY
            w -= LR * m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / correction).sqrt() + eps)
            if kind in ("decoupled", "original"):
                w -= LR * 2 * STRENGTH * omega[name] * (w - anchor[name])
            if original:
                w -= LR * DECAY * w
            with torch.no_grad():
                parameter.copy_(w)
    return {name: parameter.detach() for name, parameter in named.items()}


def _trained(rank, stage, world, micro, kind, folder):
    """The weights, and the loss that the model then computes."""
    del rank
    trainer, engine = loop_of(
        stage, world, micro, TASK, lambda model: hooks_of(kind, folder, model), decay=DECAY
    )
    steps(trainer, 0, STEPS)
    weights = whole_weights(engine)
    trainer.progress.step = STEPS
    return weights, trainer.step(stop=False).read().loss


KINDS = ["gradient", "decoupled", "original", "adamw"]
PLACES = [(*place, KINDS[n % 4]) for n, place in enumerate(GEOMETRIES)]
PLACES += [(*place, KINDS[n % 4]) for n, place in enumerate(GEOMETRIES[5:], 7)]


@pytest.mark.parametrize(("stage", "world", "micro", "kind"), PLACES)
def test_one_trajectory_at_every_stage(stage, world, micro, kind, tmp_path):
    written(tmp_path, importances(), anchors())
    expected = plain(kind)
    model = student().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    loss = mean_loss(model, rows_of(TASK, STEPS + 1)).item()
    for weights, computed in run_ranks(_trained, stage, world, micro, kind, tmp_path, world=world):
        for name, value in expected.items():
            found = torch.tensor(weights[name], dtype=torch.float64)
            torch.testing.assert_close(found, value.flatten(), rtol=1e-6, atol=1e-6)
        assert computed == pytest.approx(loss, rel=1e-6)  # by the weights as they were edited


def test_the_kinds_are_not_the_same(tmp_path):
    """Nor is any of them training without: the test above would not see it."""
    written(tmp_path, importances(), anchors())
    found = [torch.cat([v.flatten() for v in plain(kind).values()]) for kind in (*KINDS, "none")]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert (one - other).abs().max() > 1e-4
