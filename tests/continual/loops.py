"""Tiny runs of the step loop on rows of several tasks, at any ZeRO stage and geometry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dskd.batch import Batch
from dskd.data.prefetch import Sent, send
from dskd.engine.checkpoints import Selection
from dskd.engine.engine import Engine, decay_groups
from dskd.engine.hooks import StepHooks
from dskd.engine.manifests import Progress
from dskd.methods.lm import LanguageModelling
from dskd.settings.run import Run, Train
from dskd.system import dist
from dskd.training.objective import Objective
from dskd.training.trainer import Trainer
from tests.batches import changed
from tests.models.tiny import adamw, batch, geometry, loss_of, make, without_dropout

ROWS, LR, EPS, DECAY = 8, 0.01, 1e-3, 0.1
CPU = torch.device("cpu")
METHOD = LanguageModelling(kind="lm")
WHOLE = (0, 1, 8)
"""ZeRO-0, one rank, all rows of a step in one micro-batch of at most 4 a half."""
GEOMETRIES = [(0, 1, 4), (0, 1, 2), (1, 1, 4), (2, 1, 2), (3, 1, 4)]
GEOMETRIES += [(stage, 2, micro) for stage in (0, 1, 2, 3) for micro in (2, 4)]
"""ZeRO stage, ranks and rows of a micro-batch; 8 rows a step, so 1 to 4 micro-batches a rank."""

Made = Callable[[torch.nn.Module], StepHooks]


def rows_of(task: int, number: int) -> list[Batch]:
    """8 rows of a task in two halves; most labels are one token, so that the tasks conflict."""
    halves = []
    for half in (0, 1):
        one = batch(4, seed=1000 * task + 10 * number + half)
        labels_BT = one.labels_BT.where((one.labels_BT < 0) | (one.labels_BT % 4 == 0), 7 + task)
        halves.append(changed(one, labels_BT=labels_BT))
    return halves


def own(halves: list[Batch], micro: int) -> list[Batch]:
    """This rank's micro-batches of them."""
    begins = range(dist.rank() * micro, ROWS, micro * dist.world())
    return [halves[b // 4].select(torch.arange(b % 4, b % 4 + micro)) for b in begins]


class Stream:
    """Stands in for the loader: rows of the last task."""

    def __init__(self, task: int, micro: int, position: int = 0) -> None:
        self.task, self.micro, self.position = task, micro, position

    def next_step(self) -> list[Sent]:
        self.position += 1
        batches = own(rows_of(self.task, self.position), self.micro)
        return [send(each, CPU) for each in batches]


def student(ds: dict[str, Any] | None = None, bf16: bool = False) -> torch.nn.Module:
    """A GPT-2 without dropout."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return without_dropout(make("gpt2", ds=ds, dtype=dtype, initializer_range=0.2))


def loop_of(
    stage: int, world: int, micro: int, task: int, hooks: Made, *, offload: bool = False,
    bf16: bool = False, decay: float = 0.0,
) -> tuple[Trainer, Engine]:  # fmt: skip
    """A loop of single steps over rows of ``task``."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 40}
    ds = geometry(world, ROWS // micro // world, micro * world)
    ds |= adamw(zero, offload, bf16, lr=LR, eps=EPS) | {"gradient_clipping": 0.0}
    model = student(ds, bf16)
    made = hooks(model)
    objective = Objective(model, METHOD, None)
    groups = made.groups(decay_groups(objective, decay, True))
    engine = Engine(objective, groups, ds, monitor=False)
    run = Run(train=Train(steps=100, lr=LR, schedule="constant", warmup=0))
    of = {"run": run, "precision": "bf16" if bf16 else "fp32", "method": METHOD, "hooks": made}
    idle = {"evaluate": dict, "scored": Selection(), "checkpoints": None, "metrics": None}
    loader = Stream(task, micro)
    return Trainer(**of, **idle, engine=engine, loader=loader, progress=Progress()), engine


def steps(trainer: Trainer, first: int, last: int) -> None:
    """Take the steps from ``first`` on until ``last`` are completed."""
    for step in range(first, last):
        trainer.progress.step = step
        assert trainer.step(stop=False).applied


def whole_weights(engine: Engine) -> dict[str, list[float]]:
    """The student's fp32 weights, flat."""
    names = [name for name, _ in engine.module.student.named_parameters()]
    wholes = engine.weights(gradients=False).wholes(names)
    return {name: whole.flatten().tolist() for name, whole in wholes}


def mean_loss(model: torch.nn.Module, halves: list[Batch]) -> Tensor:
    """Cross entropy of all supervised positions of some rows, their mean."""
    total = sum(loss_of(model, half) for half in halves)
    return total / sum(half.supervised for half in halves)


def flat_gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    """Its gradient with respect to all parameters, one behind the other."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
