"""Gradients that no step follows: those of a plain model, and no trace of them in the training."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dskd.batch import Batch, Positions, Signal, Term
from dskd.data.prefetch import Sent, send
from dskd.engine.checkpoints import Selection
from dskd.engine.engine import Engine, decay_groups
from dskd.engine.hooks import HookChain, Probe, StepHooks
from dskd.engine.manifests import Progress
from dskd.engine.shards import ParameterShards
from dskd.methods.lm import LanguageModelling
from dskd.models.families import positions_of
from dskd.settings.run import Run, Train
from dskd.system import dist
from dskd.training.objective import Objective
from dskd.training.passes import count
from dskd.training.trainer import Trainer
from tests.models.tiny import adamw, batch, geometry, loss_of, make, without_dropout
from tests.ranks import run_ranks

STEPS, MICRO, ROWS = 3, 2, 4
CPU = torch.device("cpu")
METHOD = LanguageModelling(kind="lm")


def settings(stage: int, precision: str, world: int, offload: bool) -> dict[str, Any]:
    """A DeepSpeed config of two micro-batches a step; ZeRO-3 keeps small parameters whole."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 40}
    ds = geometry(world, MICRO, ROWS) | adamw(zero, offload, precision == "bf16", lr=0.01, eps=1e-3)
    return ds | {"gradient_clipping": 0.5}


def micro_batches(seed: int, number: int = MICRO) -> list[Batch]:
    """The rows of all ranks; lengths and supervised positions differ from row to row."""
    return [batch(ROWS, seed=100 * seed + micro) for micro in range(number)]


def own(batches: list[Batch]) -> list[Batch]:
    """This rank's part of them."""
    return [each.select(torch.arange(ROWS)[dist.rank() :: dist.world()]) for each in batches]


class Stream:
    """Stands in for the loader."""

    position = 0

    def next_step(self) -> list[Sent]:
        self.position += 1
        return [send(each, CPU) for each in own(micro_batches(self.position))]


def mean_square(rows: Positions, signal: Signal | None, batch: Batch, step: int) -> dict[str, Term]:
    """Another loss, with a count of its own."""
    assert signal is None
    return {"squares": Term((rows.logits_NV.float() ** 2).sum(), {})}


def rows_and_a_half(batch: Batch) -> dict[str, float]:
    return {"squares": len(batch.row_ids_B) + 0.5}


class LooksBack(StepHooks):
    """Takes two gradients before every step and, if ``model`` is given, compares them with those of
    a plain float64 model, relative to the largest entry."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        self.model = model
        self.worst: list[float] = []

    def before_passes(self, probe: Probe, step: int) -> None:
        memory = micro_batches(90 + step, number=3)  # not as many as the step has
        self.compare(probe(own(memory)), memory, self.label_loss)
        other = micro_batches(70 + step, number=1)
        found = probe(own(other), mean_square, rows_and_a_half)
        self.compare(found, other, self.square_loss)

    def label_loss(self, batches: list[Batch]) -> Tensor:
        count = sum(int(each.supervised_BT.sum()) for each in batches)
        return sum(loss_of(self.model, each) for each in batches) / count

    def square_loss(self, batches: list[Batch]) -> Tensor:
        count = sum(len(each.row_ids_B) for each in batches) + 0.5 * dist.world() * len(batches)
        squares = ((positions_of(self.model, each).logits_NV ** 2).sum() for each in batches)
        return sum(squares) / count

    def compare(self, found: ParameterShards, batches: list[Batch], loss: Any) -> None:
        shards = list(found.shards())
        assert all(shard.gradient is not None for shard in shards)
        if self.model is None:
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, whole in found.wholes(parameters):
                parameters[name].copy_(whole)
        gradients = torch.autograd.grad(loss(batches), list(parameters.values()))
        wanted = {n: g.flatten() for n, g in zip(parameters, gradients, strict=True)}
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        for shard in shards:
            part = wanted[shard.name][shard.start : shard.start + len(shard.gradient)]
            difference = (shard.gradient.double() - part).abs().max().item()
            self.worst.append(difference / largest)


def trainer_of(
    ds: dict[str, Any], precision: str, hooks: StepHooks, dropout: bool
) -> tuple[Trainer, Engine]:
    """A loop of single steps over the stream."""
    model = make("bert", ds=ds, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    model = model.train() if dropout else without_dropout(model)
    objective = Objective(model, METHOD, None)
    engine = Engine(objective, decay_groups(objective, 0.01, False), ds, monitor=False)
    run = Run(train=Train(steps=STEPS, lr=0.01))
    of = {"run": run, "precision": precision, "method": METHOD, "hooks": hooks, "engine": engine}
    idle = {"evaluate": dict, "scored": Selection(), "checkpoints": None, "metrics": None}
    return Trainer(**of, **idle, loader=Stream(), progress=Progress()), engine


def trained(
    rank: int, stage: int, world: int, precision: str, hooks: LooksBack | None, dropout: bool,
    offload: bool = False,
) -> tuple[list[float], dict[str, list[float]], list[float]]:  # fmt: skip
    """Losses and norms of a few steps, the weights at the end, and the largest differences."""
    del rank
    ds = settings(stage, precision, world, offload)
    trainer, engine = trainer_of(ds, precision, StepHooks() if hooks is None else hooks, dropout)
    numbers = []
    for step in range(STEPS):
        trainer.progress.step = step
        queued = trainer.step(stop=False)
        assert queued.applied
        result = queued.read()
        numbers += [result.loss, result.grad_norm]
    names = [name for name, _ in engine.module.student.named_parameters()]
    weights = engine.weights(gradients=False).wholes(names)
    found = {name: whole.tolist() for name, whole in weights}
    return numbers, found, [] if hooks is None else hooks.worst


GEOMETRIES = [(stage, world, False) for stage in (0, 1, 2, 3) for world in (1, 2)]
OFFLOADED = [(1, 2, True), (2, 2, True), (3, 2, True)]


@pytest.mark.parametrize(("stage", "world", "offload"), GEOMETRIES + OFFLOADED)
def test_a_probe_gives_the_gradient_of_a_plain_model(stage, world, offload):
    """At every step, over more and fewer micro-batches than the step's, also of another loss."""
    hooks = LooksBack(without_dropout(make("bert")).double())
    for _, _, worst in run_ranks(trained, stage, world, "fp32", hooks, False, offload, world=world):
        assert len(worst) >= 2 * STEPS
        assert max(worst) < 1e-6


BF16 = [(stage, 2, "bf16", False) for stage in (0, 1, 2, 3)]
FP32 = [(stage, world, "fp32", offload) for stage, world, offload in GEOMETRIES + OFFLOADED]


@pytest.mark.parametrize(("stage", "world", "precision", "offload"), FP32 + BF16)
def test_a_probe_leaves_no_trace(stage, world, precision, offload):
    """Loss, norm and weights are those of a run without, to the bit, dropout included."""
    with_probe, without = (
        run_ranks(trained, stage, world, precision, hooks, True, offload, world=world)
        for hooks in (LooksBack(None), None)
    )
    assert with_probe == without


def _with_fp32_sums(rank: int, hooks: StepHooks) -> bool:
    """ZeRO-1 that sums bf16 gradients in fp32 has an optimizer whose shards are not known."""
    ds = settings(1, "bf16", 1, offload=False) | {"data_types": {"grad_accum_dtype": "fp32"}}
    trainer, _ = trainer_of(ds, "bf16", hooks, dropout=False)
    return trainer.step(stop=False).applied


def test_shards_that_no_hook_looks_at_need_not_be_known():
    assert run_ranks(_with_fp32_sums, HookChain({"idle": StepHooks()}), world=1) == [True]
    refused = "ConfigError: deepspeed: it has DeepSpeed step by its BF16_Optimizer, whose weights"
    with pytest.raises(AssertionError, match=refused):
        run_ranks(_with_fp32_sums, LooksBack(None), world=1)


def _counted(rank: int) -> tuple[list[float], bool, bool]:
    """What is summed of two ranks, and whether the first one went on before the other had begun."""
    if rank == 1:
        time.sleep(0.5)
    began = time.monotonic()
    counts = count(rows_and_a_half, own(micro_batches(1)), stop=rank == 1)
    went_on = time.monotonic() - began < 0.25
    return [counts.by_term["squares"], counts.tokens], counts.stop, went_on


def test_counts_are_waited_for_only_when_a_loss_is_divided():
    """They come over the host's group meanwhile: 4 rows in each of 2 micro-batches, half a row more
    in each micro-batch of each rank."""
    tokens = sum(each.tokens for each in micro_batches(1))
    assert run_ranks(_counted) == [([10.0, tokens], True, True)] * 2
