"""The settings of a run, typed. Those of its data, models and teachers are in the files beside this
one; ``recipe.py`` reads them from YAML and the command line.

The YAML decides *what* is trained (data, models, batch, steps, rates); the DeepSpeed JSON named by
``deepspeed`` decides *how* (ZeRO stage, offload, buckets). The defaults are the 20-step toy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dskd.settings.base import FREE, OF_STEPS_TO_COME, Freedom, RunPath, Section
from dskd.settings.data import Data
from dskd.settings.model import Model
from dskd.settings.parsing import either
from dskd.settings.sets import NamedSet
from dskd.settings.teachers import TINY, AnyTeacher, LiveTeacher, Precision

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Factor of a running average."""
Schedule = Literal["linear", "cosine", "constant", "polynomial"]

Warmup = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)],
    either("a number of steps, or a share of them below 1"),
]
Every = Annotated[
    Annotated[int, Field(ge=1)] | Literal["epoch"], either("a number of steps from 1 on, or epoch")
]
"""Steps from one to the next; ``epoch``: the steps in which an epoch of the training rows ends."""


class Train(Section):
    """The optimisation; batch sizes count rows."""

    steps: Annotated[int | None, OF_STEPS_TO_COME] = Field(20, ge=1)
    """Optimiser steps; null where ``epochs`` says how long."""
    epochs: Annotated[float | None, OF_STEPS_TO_COME] = Field(None, gt=0)
    """Passes over the training rows, in place of ``steps``: so many steps that no fewer rows are
    taken."""
    batch: int = Field(16, ge=1)
    """Rows of one optimiser step, over all ranks and accumulation steps."""
    micro_batch: Annotated[int, FREE] = Field(8, ge=1)
    """Rows of one forward pass on one rank."""
    lr: Annotated[float, OF_STEPS_TO_COME] = Field(1e-3, ge=0)
    """Peak learning rate."""
    schedule: Annotated[Schedule, OF_STEPS_TO_COME] = "linear"
    """Decay after the warm-up."""
    warmup: Annotated[Warmup, OF_STEPS_TO_COME] = 2
    """Steps of linear warm-up from 0; below 1: a share of all steps, rounded up."""
    end_lr: Annotated[float, OF_STEPS_TO_COME] = Field(0.0, ge=0)
    power: Annotated[float, OF_STEPS_TO_COME] = Field(1.0, gt=0)
    """Exponent of the polynomial decay."""
    weight_decay: float = Field(0.01, ge=0)
    decay_all: bool = False
    """Also decay biases and norms, as the original Knowledge Inheritance code does."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    precision: Precision = "auto"
    """``auto``: bf16 on a GPU that has it, else fp32."""
    activation_checkpointing: Annotated[bool, FREE] = False
    compile: Annotated[bool, FREE] = False
    """Run the student's layers through ``torch.compile``."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        """Where ``epochs`` alone is given, the default of ``steps`` does not stand beside it."""
        if self.epochs is not None and "steps" not in self.model_fields_set:
            object.__setattr__(self, "steps", None)  # frozen, but nobody has seen it yet
        return self


class Evaluation(Section):
    """The method's metrics on the validation rows. One of them, by most methods the plain LM loss,
    selects the best checkpoint, but not where hard tokens are masked or by method
    ``self_evolution``."""

    every: Annotated[Every, FREE] = 10
    """Steps between evaluations, or ``epoch`` (the last step is always evaluated)."""
    rows: int | None = Field(None, ge=1)
    """Use only so many validation rows; null: all. Bits per byte are of all of them only."""
    select: Literal["metric", "last", "teacher_kl"] = "metric"
    """Which checkpoint is exported: the best by the method's metric; the last one; or, by methods
    of panels and without labels, ``teacher_kl``: the one nearest to what the method makes of its
    teachers, by the mean KL over the validation rows, each of which counts alike."""
    patience: int | None = Field(None, ge=1)
    """Training ends after so many evaluations in a row without a better score; null: it takes all
    its steps."""
    micro_batch: Annotated[int, FREE] = Field(16, ge=1)
    """Rows of a forward pass on one rank, or answers that are written at a time."""
    sets: dict[str, NamedSet] = Field(default_factory=dict)
    """Further rows to evaluate on, by name; none of them selects a checkpoint."""
    examples: Annotated[int, FREE] = Field(3, ge=0, le=20)
    """So many validation rows of which the report shows how the exported model goes on with them,
    or what it fills in where tokens are masked; of labelled rows none. They are made when it is
    evaluated, and stay."""

    def freedom(self, name: str) -> Freedom | None:
        """As marked; but where evaluations end the training, how often they come is settled."""
        return None if name == "every" and self.patience is not None else super().freedom(name)


class Checkpoint(Section):
    """When to save and how many to keep."""

    every: Annotated[Every | None, FREE] = None
    """Steps between checkpoints, or ``epoch`` (the last step is always saved); null: a checkpoint
    comes with every evaluation."""
    keep: Annotated[int, FREE] = Field(2, ge=1)
    """Most recent checkpoints kept; the best one, if the evaluation selects, besides."""
    export: Literal["trained", "fp32"] = "trained"
    """Number format of the exported weights. ``trained``: the one that the student computes in;
    ``fp32``: as the optimizer has them, unrounded, for a run that goes on with them; and such a run
    begins with the fp32 weights of ``model.path`` itself, not with what 16 bits keep of them."""


class Run(Section):
    """One run: a student trained by a method."""

    out: Annotated[Path, RunPath(), FREE] = Path("runs/toy")
    """Folder of everything the run writes; null in a settings file: the folder that it lies in."""
    seed: int = Field(1, ge=0, lt=2**63)
    until: Annotated[str, FREE] = "evaluate"
    """Last stage to run."""
    deepspeed: Annotated[str, RunPath(), FREE] = "zero1"
    """A shipped preset (``zero1`` is ``ds_configs/zero1.json``) or a path to a DeepSpeed JSON."""
    method: dict[str, Any] = Field(
        default_factory=lambda: {"kind": "ki", "schedule": "linear", "steps": 10}
    )
    """The method's own settings; ``kind`` names it."""
    data: Data = Data()
    model: Model = Model(config=TINY)
    teacher: AnyTeacher | None = LiveTeacher()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log_every: Annotated[int | None, FREE] = Field(None, ge=1)
    """Steps between lines of ``metrics.jsonl``, each of which is a progress line, too; null: every
    step has its line there, and every few seconds one is shown."""
    ranks_timeout: Annotated[float, FREE] = Field(10.0, ge=0.05, le=100_000)
    """Minutes after which a rank is lost that does not start, does not answer, or keeps the others
    waiting; three times as long where one piece of work may be long (loading, compiling, saving).
    Longer than a step takes. Of several runs the longest counts."""

    @property
    def saves_every(self) -> Every:
        """Steps between checkpoints, or ``epoch``."""
        return self.evaluation.every if self.checkpoint.every is None else self.checkpoint.every
