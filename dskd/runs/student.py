"""The student in its engine, as a run trains it and as it is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dskd.engine import reshard
from dskd.engine.checkpoints import Saved
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import Engine, decay_groups, stage_of
from dskd.engine.hooks import HookChain, StepHooks
from dskd.engine.manifests import MANIFEST
from dskd.engine.zero import full_shape, sharded_construction
from dskd.errors import CheckpointError, DskdError
from dskd.models.build import parameter_count
from dskd.models.configs import stored_folder
from dskd.models.frozen import model_of
from dskd.models.reading import unrounded_weights
from dskd.models.speed import checkpoint_activations, compile_layers
from dskd.runs.context import RunContext
from dskd.settings.model import Model
from dskd.system import dist
from dskd.system.log import say
from dskd.teachers.setup import TeacherSetup
from dskd.training.early_stopping import EarlyStopping
from dskd.training.objective import Objective


@dataclass(frozen=True)
class StudentInEngine:
    """A student that DeepSpeed holds.

    Attributes:
        engine: around ``objective``.
        objective: holds the student.
        hooks: what is done around the steps, apart from the loss.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        parameters: their number: ``parameters`` of what is exported, ``trained_parameters`` of what
            is trained.
    """

    engine: Engine
    objective: Objective
    hooks: StepHooks
    precision: str
    parameters: dict[str, int]


def build_student(
    context: RunContext,
    settings: Model,
    ds: dict[str, Any] | None,
    where: str,
    device: torch.device | None = None,
    *,
    new_head: bool = False,
) -> PreTrainedModel:
    """A model in the student's precision (collective), sharded as ``ds`` says, or whole on
    ``device`` but for its buffers; with ``new_head`` it may get a random head for the classes.

    Raises:
        ConfigError: it cannot be built; the message names the setting ``where``.
    """
    with dist.agreed():
        precision, prepared = precision_of(context.ds), context.prepared
        rows = {"tokenizer": prepared.tokenizer, "classes": prepared.classes}
        how = {"ds": ds, "precision": precision, "device": device, "new_head": new_head}
        return model_of(context.run, settings, where, **rows, **how)


def student_to_train(
    context: RunContext, setup: TeacherSetup, saved: Saved | None
) -> StudentInEngine:
    """The student, taught by ``setup``, with all that is done around its steps: as it starts, or as
    it was ``saved`` (collective)."""
    return _in_engine(context, setup, saved, training=True)


def student_to_export(context: RunContext, saved: Saved) -> StudentInEngine:
    """The student of a checkpoint, with no more than what the method has put into it (collective):
    what keeps teacher and data up to date is of no use any more."""
    return _in_engine(context, TeacherSetup(), saved, training=False)


def _in_engine(
    context: RunContext, setup: TeacherSetup, saved: Saved | None, *, training: bool
) -> StudentInEngine:
    run, stage = context.run, stage_of(context.ds)
    ds = _config(context, saved)
    of_classes = run.data.objective == "classification"
    student = build_student(context, context.student, ds, where="model", new_head=of_classes)
    # Before the method's hooks, which may put other modules into the student.
    config = context.method.exported_config(student.config)
    exported = parameter_count(config, "export", run.data.objective)
    with dist.agreed(), sharded_construction(ds):
        # Again, as the student's config is known now; and before anything is put into it.
        context.method.check(run, student.config)
        hooks = _hooks(context, setup, student, training=training)
    # After the hooks: they wrap layers, also those that were put in.
    if run.train.activation_checkpointing:
        checkpoint_activations(student)
    if run.train.compile:
        compile_layers(student)
    trained = sum(full_shape(p).numel() for p in student.parameters())
    objective = Objective(student, context.method, setup.teacher_of(student))
    # Groups before the engine: DeepSpeed lays its flat partitions out by them, once.
    groups = decay_groups(objective, run.train.weight_decay, run.train.decay_all)
    engine = Engine(objective, hooks.groups(groups), ds, monitor=training)
    if saved is not None:
        # The hooks' state before the weights, for which a compacted student must be one again.
        with dist.agreed():
            restore_hooks(hooks, saved)
        hooks.load(saved.folder)
        _load(engine, saved, stage, native=_is_native(context, saved))
    elif run.checkpoint.export == "fp32" and precision_of(ds) != "fp32":
        _take_unrounded(engine, student, context.student)
    counts = {"parameters": exported, "trained_parameters": trained}
    return StudentInEngine(engine, objective, hooks, precision_of(ds), counts)


def _take_unrounded(engine: Engine, student: PreTrainedModel, settings: Model) -> None:
    """Have the optimizer begin with the stored weights of the model that the student starts as,
    which round to what it computes with; else it begins with that."""
    folder = stored_folder(settings, "model")
    if folder is None:
        return
    weights = engine.weights(gradients=False)
    with dist.agreed(), torch.no_grad():
        for name, values in unrounded_weights(student, folder, "model.path"):
            shard = weights.shard(name)
            if shard is not None:
                end = shard.start + len(shard.weight)
                shard.weight.copy_(values.flatten()[shard.start : end])


def _hooks(
    context: RunContext, setup: TeacherSetup, student: PreTrainedModel, *, training: bool
) -> HookChain:
    """What is done around the steps: the method's part first, which may edit what the others see;
    then the teacher's, which averages the weights as the method leaves them."""
    own = context.method.hooks(student, context)
    assert own is None or context.method.remakes_student or not own.defines_export, (
        context.method.kind
    )
    found = {"method": own, "teacher": setup.hooks}
    if training:
        found["masks"] = context.masks.hooks(context, student)
        if context.run.evaluation.patience is not None:
            found["stopping"] = EarlyStopping(context.run.evaluation.patience, context.scored)
    return HookChain({name: hooks for name, hooks in found.items() if hooks is not None})


def _is_native(context: RunContext, saved: Saved) -> bool:
    return reshard.is_native(saved, dist.world(), stage_of(context.ds), precision_of(context.ds))


def _config(context: RunContext, saved: Saved | None) -> dict[str, Any]:
    """The student's DeepSpeed config, which must say beforehand that a checkpoint of another shape
    is loaded.

    Raises:
        CheckpointError: the checkpoint cannot be brought to this shape.
    """
    ds, stage = context.ds, stage_of(context.ds)
    if saved is None:
        return ds
    with dist.agreed():
        reshard.check_files(saved)
        if not _is_native(context, saved):
            reshard.check_reshard(saved, stage, precision_of(ds))
    if _is_native(context, saved):
        return ds
    if stage == 0:  # DeepSpeed loads no universal checkpoint there; the engine does
        return ds
    return {**ds, "checkpoint": {**ds.get("checkpoint", {}), "load_universal": True}}


def restore_hooks(hooks: StepHooks, saved: Saved) -> None:
    """Hand the hooks their state.

    Raises:
        CheckpointError: it is not one that they give.
    """
    try:
        hooks.restore(saved.state["hooks"])
    except DskdError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(
            f"{saved.folder / MANIFEST}: its `state` is not one that the run's hooks keep "
            f"({problem!r})"
        ) from problem


def _load(engine: Engine, saved: Saved, stage: int, *, native: bool) -> None:
    """Read weights and optimizer, converted first where the checkpoint has another shape."""
    if native:
        engine.load(saved.folder.parent, saved.folder.name)
        return
    say(f"converting {saved.folder} (ZeRO-{saved.stage}, {saved.world} ranks)")
    folder = reshard.convert(saved)
    if stage:
        engine.load(folder.parent, folder.name)
    else:
        reshard.load_into_plain(engine, folder)
    reshard.discard(folder)
