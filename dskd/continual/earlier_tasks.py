"""What a method does for earlier tasks: hooks around the steps, and the stage ``importance``.

The method says what is learnt of a row (:class:`RowLoss`); the settings, which of its parts there
are (:mod:`dskd.continual.settings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dskd.batch import Batch, Loss, LossCounts
from dskd.continual.gem import GradientMemories
from dskd.continual.importance import (
    ImportanceSweep,
    mean_square_probability,
    prompts,
    terms_of,
)
from dskd.continual.kept_weights import OMEGA_FILE, KeptWeights, keep_weights
from dskd.continual.memories import RowMemory, drawn_rows
from dskd.continual.original_adamw import OriginalAdamW
from dskd.continual.penalty import DecoupledPenalty, GradientPenalty, WeightPenalty
from dskd.continual.settings import Memories, Penalty
from dskd.data.loader import make_batch
from dskd.data.views import Reader, View
from dskd.engine.hooks import HookChain, StepHooks
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError
from dskd.models.build import model_fingerprint
from dskd.models.frozen import model_of
from dskd.settings.folders import student_settings
from dskd.settings.model import Model
from dskd.system import dist
from dskd.system.files import file_hash
from dskd.system.log import say

IMPORTANCE = "importance"
"""Of the stage, and of the folder that it leaves."""


class RowLoss(NamedTuple):
    """What is learnt of rows of earlier tasks, and where weights matter to this one.

    Attributes:
        loss: without a teacher.
        counts: what its terms are divided by.
        view: what is seen of a row.
        readers: of the columns that loss and counts read.
    """

    loss: Loss
    counts: LossCounts
    view: View
    readers: Sequence[Reader]


def new_rows(context: StageContext) -> NDArray[np.int64]:
    """Ids of the training rows that are not replayed, int64 [rows], in their order."""
    train, domains = context.prepared.train, context.prepared.domains
    replayed = [domains.index(domain) for domain in context.run.data.replayed_domains]
    return np.flatnonzero(~np.isin(train.domains_B(np.arange(len(train))), replayed))


def hooks_of(
    student: PreTrainedModel,
    context: StageContext,
    rows: RowLoss,
    *,
    penalty: Penalty | None,
    memories: Memories | None,
    original_adamw: bool,
) -> StepHooks | None:
    """What is done around the steps (collective); None: nothing.

    A penalty in the gradient comes before the projection, which is of all that the step follows; a
    decoupled one between the original AdamW's step and its decay, where it is in the original.

    Raises:
        StoreError: importances are missing, damaged, or not of the model that the run starts as.
        ConfigError: there are fewer rows than ``memories`` takes.
    """
    found: dict[str, StepHooks] = {}
    pull = None if penalty is None else _pull(penalty, student, context)
    if pull is not None and penalty is not None and penalty.update == "gradient":
        found["penalty"], pull = GradientPenalty(pull), None
    if memories is not None:
        found["memories"] = _memories(memories, context, rows)
    if original_adamw:
        found["adamw"] = OriginalAdamW(student, context.run.train.eps, pull)
    elif pull is not None:
        found["penalty"] = DecoupledPenalty(pull)
    return HookChain(found) if found else None


def _pull(
    penalty: Penalty, student: PreTrainedModel, context: StageContext
) -> WeightPenalty | None:
    kept = _kept_earlier(penalty, context)
    if kept is None:
        return None
    kept.check_model(student)
    return WeightPenalty(kept.omega, kept.anchor, penalty.strength)


def _kept_earlier(penalty: Penalty, context: StageContext) -> KeptWeights | None:
    """What the run of the task before left, of the model that this one starts as."""
    if penalty.folder is None:
        return None
    # The stored model alone: config and new tokens say how this run reads it.
    stored = Model(path=context.run.model.path, revision=context.run.model.revision)
    return KeptWeights.of(
        penalty.folder / IMPORTANCE, _prints(penalty, stored, context, "model.path")
    )


def _prints(penalty: Penalty, of: Model, context: StageContext, where: str) -> dict[str, str]:
    """Fingerprints that importances of a model have for the next task."""
    model = dist.on_rank0(lambda: model_fingerprint(of, seed=context.run.seed, where=where))
    return {"model": model, "kind": penalty.kind, "anchor": penalty.anchor}


def _memories(memories: Memories, context: StageContext, rows: RowLoss) -> GradientMemories:
    run = context.run
    assert run.data.memory is not None, "Memories.check refuses that"
    rowset = context.rows_of(run.data.memory)
    domains_R = rowset.domains_B(np.arange(len(rowset)))
    new = len(new_rows(context))
    count = int(memories.share * new)
    if not count:
        text = f"no row of each memory, for the run has {new} new ones"
        raise ConfigError(f"method.memories.share: {memories.share}: {text}")
    found = []
    for task, domain in enumerate(dict.fromkeys(source.domain for source in run.data.memory)):
        own = np.flatnonzero(domains_R == context.prepared.domains.index(domain))
        kept = own[drawn_rows(len(own), min(count, len(own)), run.seed, task)]
        if memories.per_step is not None and memories.per_step > len(kept):
            text = f"more than the {len(kept)} rows of the memory {domain!r}"
            raise ConfigError(f"method.memories.per_step: {memories.per_step}: {text}")
        found.append(
            RowMemory(
                rows_M=kept,
                rowset=rowset,
                view=rows.view,
                readers=rows.readers,
                per_step=memories.per_step,
                micro_batch=run.train.micro_batch,
                seed=run.seed,
                task=task,
            )
        )
    return GradientMemories(
        len(found),
        lambda memory, step: found[memory].batches(step),
        loss=rows.loss,
        counts=rows.counts,
        clip=memories.clip,
        margin=memories.margin,
        ridge=memories.ridge,
        every=memories.every,
        average=memories.kind == "a_gem",
    )


def importance_stage(penalty: Penalty, rows_of: Callable[[StageContext], RowLoss]) -> Stage:
    """The stage that leaves ``importance/``: how much the exported model's answers to the run's new
    questions depend on each weight, and the weights that the next task is pulled towards."""

    def measure(context: StageContext) -> None:
        _measure(penalty, context, rows_of(context))

    whole = f"{IMPORTANCE}/{OMEGA_FILE}"
    kind = f"{penalty.kind}, anchor {penalty.anchor}"
    return Stage(IMPORTANCE, measure, "evaluate", (IMPORTANCE,), whole, kind=kind)


def _measure(penalty: Penalty, context: StageContext, rows: RowLoss) -> None:
    run, folder = context.run, context.folder.path / IMPORTANCE
    exported = Model(path=str(context.folder.export))
    earlier = _kept_earlier(penalty, context)
    prints = _prints(penalty, exported, context, "export")
    prints |= {"rows": penalty.rows, "data": context.prepared.fingerprint}
    if earlier is not None:
        prints["earlier"] = dist.on_rank0(lambda: file_hash(earlier.omega.path))
    made = keep_weights(
        folder,
        partial(_whole_model, context, exported, "export"),
        partial(_importance, penalty, context, rows),
        fingerprints=prints,
        earlier=earlier,
        start=(
            partial(_whole_model, context, student_settings(run), "model")
            if penalty.anchor == "first"
            else None
        ),
    )
    if made:
        say(f"measured how much the task needs each weight, to {folder}")


def _whole_model(context: StageContext, settings: Model, where: str) -> nn.Module:
    """A model of the run in fp32, whole on every rank: squares of 16-bit gradients would vanish."""
    run, tokenizer, device = context.run, context.prepared.tokenizer, context.device
    # The run's own attention may be one for 16 bits only.
    settings = settings.model_copy(update={"attention": "auto"})
    with dist.agreed():
        model = model_of(run, settings, where, tokenizer, None, "fp32", device)
    return model.to(device)


def _importance(
    penalty: Penalty, context: StageContext, rows: RowLoss, model: nn.Module
) -> dict[str, Tensor]:
    """The importances of a model's weights for the run's new rows."""
    train = context.run.train

    def batch_of(row_ids_B: NDArray[np.int64]) -> Batch:
        first_epoch_B = np.zeros_like(row_ids_B)
        return make_batch(context.prepared.train, rows.view, row_ids_B, first_epoch_B, rows.readers)

    sweep = ImportanceSweep(
        rows_M=new_rows(context),
        make=batch_of,
        measure="square" if penalty.kind == "ewc" else "absolute",
        group=1 if penalty.rows == "example" else train.batch,
        micro_batch=train.micro_batch,
        device=context.device,
    )
    by_labels = penalty.kind == "ewc"
    loss = rows.loss if by_labels else mean_square_probability
    return sweep(model, terms_of(model, loss), rows.counts if by_labels else prompts, _progress)


def _progress(done: int, groups: int) -> None:
    """Say every tenth of rank 0's way."""
    if done * 10 // groups > (done - 1) * 10 // groups:
        say(f"importances: {done} of {groups} gradients")
