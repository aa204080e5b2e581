"""The stages of a run: data, slice, question, cache, train, export, evaluate. Each leaves an
artefact that, whole, says that it is done; each reads only what earlier ones left."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dskd.batch import Batch
from dskd.data.loader import Loader, make_batch
from dskd.engine import reshard
from dskd.engine.checkpoints import Saved
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import Engine, decay_groups, shard_teacher, stage_of
from dskd.engine.hooks import Change
from dskd.engine.run_config import teacher_config
from dskd.engine.zero import full_shape, sharded_construction
from dskd.hardness.refresh import Renewal
from dskd.models.build import hidden_size, parameter_count
from dskd.models.frozen import model_of
from dskd.models.speed import checkpoint_activations, compile_layers
from dskd.models.writing import export
from dskd.narrowing.slice_stage import make_slice
from dskd.ops import implementation
from dskd.runs.context import Job
from dskd.settings.folders import cache_folder, sliced_folder
from dskd.settings.model import Model
from dskd.settings.teachers import CachedTeacher
from dskd.stores.fingerprints import expected
from dskd.system import dist
from dskd.system.files import write_atomic
from dskd.system.log import Metrics, peak_memory, reset_peak_memory, say
from dskd.teachers.capture import capture
from dskd.teachers.setup import TeacherSetup, each_teacher, frozen, set_up
from dskd.training.evaluation import evaluate
from dskd.training.objective import Objective
from dskd.training.trainer import CHANGE, RENEWAL, Progress, Trainer


def cache(job: Job) -> None:
    """Capture the top-k logits of every cached teacher whose model the settings name."""
    if not job.method.wants_teacher():
        return
    run, prepared = job.run, job.prepared
    for domain, teacher in each_teacher(run).items():
        if not isinstance(teacher, CachedTeacher) or teacher.model is None:
            continue
        folder = cache_folder(run, domain)
        capture(
            teacher,
            lambda domain=domain: frozen(run, domain, prepared, job.device),
            prepared,
            job.view,
            folder,
            fingerprints=expected(run, teacher, prepared, job.view),
            domain=None if domain is None else prepared.domains.index(domain),
            device=job.device,
        )
        _free()


def cut(job: Job) -> None:
    """Write the folder that a sliced student starts from."""
    if job.run.model.slice is None:
        return
    folder = sliced_folder(job.run)
    if not dist.broadcast_object(folder.exists()):
        make_slice(job.run, job.prepared.tokenizer)
        say(f"cut {job.run.model.path} to {folder}")
        _free()


def ask(job: Job) -> None:
    """Ask the model for every token of the training rows, where hard ones are to be masked."""
    if job.hardness is None:
        return
    # Of a finished run only a cache may still want masks.
    trained = dist.broadcast_object((job.run.out / "train" / "summary.json").exists())
    caches = any(isinstance(t, CachedTeacher) for t in each_teacher(job.run).values())
    if caches or not trained:
        job.hardness.first(job.position)
        _free()


def train(job: Job) -> None:
    """Train the student, from its newest checkpoint if there is one; leaves ``summary.json``."""
    summary = job.run.out / "train" / "summary.json"
    if not dist.broadcast_object(summary.exists()):
        _train(job, summary)
        _free()


def _train(job: Job, summary: Path) -> None:
    run, prepared = job.run, job.prepared
    reset_peak_memory()
    checkpoints = job.checkpoints
    checkpoints.clean()
    saved = checkpoints.latest()
    setup = TeacherSetup()
    if job.method.wants_teacher():
        setup = set_up(run, job.method.temperature, prepared, job.view, job.device)
    training = _engine(job, setup, saved, monitor=True)
    engine, precision = training.engine, training.precision
    progress = Progress(**_of_progress(saved.state)) if saved else Progress()
    if saved:
        say(f"going on from step {progress.step} ({saved.folder})")
    renewal = None
    if job.hardness is not None:
        job.hardness.begin(progress.position, saved.state[RENEWAL] if saved else {})
        renewal = Renewal(job.hardness, lambda: engine.module.student)
    loader = Loader(
        prepared.train,
        setup.view or job.view,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        seed=run.seed,
        readers=(*job.readers, *setup.readers),
        ready=None if renewal is None else lambda position: not renewal.due(position),
        position=progress.position,
        pin=job.device.type == "cuda",
    )
    trainer = Trainer(
        run=run,
        precision=precision,
        method=job.method,
        change=training.change,
        engine=engine,
        loader=loader,
        renewal=renewal,
        evaluate=lambda: _evaluate(job, engine.module),
        checkpoints=checkpoints,
        metrics=Metrics(run.out / "train" / "metrics.jsonl", progress.step),
        progress=progress,
    )
    say(f"losses by {implementation(job.device)}, weights in {precision}")
    try:
        trainer.train()
    finally:
        loader.close()
    _summarise(job, progress, training.parameters, summary)
    engine.destroy()


def export_best(job: Job) -> None:
    """Write the best checkpoint as a HuggingFace folder, ``export/``."""
    folder = job.run.out / "export"
    if not dist.broadcast_object(folder.exists()):
        _export(job, folder)
        _free()


def _export(job: Job, folder: Path) -> None:
    best = job.checkpoints.best()
    training = _engine(job, TeacherSetup(), best, monitor=False)
    engine, change = training.engine, training.change
    student = engine.module.student
    if change is not None:
        with dist.agreed():
            student = change.exported(engine.weights(gradients=False), _some_rows(job))
    card = {"method": dict(job.run.method), "step": best.step, "eval_nll": best.eval_nll}
    card["run"] = job.run.model_dump(mode="json")
    export(student, job.prepared.tokenizer, folder, card=card)
    say(f"exported step {best.step} to {folder}")
    engine.destroy()


def _some_rows(job: Job) -> Batch:
    """A few validation rows."""
    rows = job.prepared.validation
    ids_B = np.arange(min(len(rows), job.run.evaluation.micro_batch), dtype=np.int64)
    return make_batch(rows, job.validation_view, ids_B, np.zeros_like(ids_B))


def evaluate_export(job: Job) -> None:
    """Load the exported folder as a user would and score it; leaves ``scores.json``."""
    path = job.run.out / "scores.json"
    if not dist.broadcast_object(path.exists()):
        _evaluate_export(job, path)
        _free()


def _evaluate_export(job: Job, path: Path) -> None:
    run, precision, ds = job.run, precision_of(job.ds), None
    exported = Model(path=str(run.out / "export"), attention=run.model.attention)
    # Sharded like the student was: a model that needs ZeRO-3 fits no single GPU here either.
    if stage_of(job.ds) == 3:
        ds = teacher_config(run.deepspeed, precision, run, hidden_size(exported, where="export"))
    model = _build(job, exported, ds, where="export")
    model = model.to(job.device) if ds is None else shard_teacher(model, ds)
    scores = _evaluate(job, Objective(model, job.method, None))
    if dist.rank() == 0:
        write_atomic(path, json.dumps(scores, indent=1).encode())
    dist.barrier()


def _build(job: Job, settings: Model, ds: dict[str, Any] | None, where: str) -> PreTrainedModel:
    with dist.agreed():
        return model_of(job.run, settings, where, job.prepared, ds, precision_of(job.ds))


@dataclass(frozen=True)
class _Training:
    """The student in its engine, and what is done to it, or kept of it, beyond the loss."""

    engine: Engine
    change: Change | None
    precision: str
    parameters: dict[str, int]


def _engine(job: Job, setup: TeacherSetup, saved: Saved | None, *, monitor: bool) -> _Training:
    """The student in its engine, at ``saved`` if given."""
    run, ds = job.run, job.ds
    precision, stage = precision_of(ds), stage_of(ds)
    native = saved is None or reshard.is_native(saved, dist.world(), stage, precision)
    if not native:
        with dist.agreed():
            reshard.check(saved, stage, precision)
        if stage:
            ds = {**ds, "checkpoint": {**ds.get("checkpoint", {}), "load_universal": True}}
    student = _build(job, job.student, ds, where="model")
    exported = parameter_count(job.method.exported_config(student.config))
    with dist.agreed(), sharded_construction(ds):
        job.method.check(run, student.config)
        change = job.method.change(student, run) or setup.change
    if run.train.activation_checkpointing:
        checkpoint_activations(student)
    if run.train.compile:
        compile_layers(student)
    trained = sum(full_shape(p).numel() for p in student.parameters())
    objective = Objective(student, job.method, setup.teacher_of(student))
    groups = decay_groups(objective, run.train.weight_decay, run.train.decay_all)
    if change is not None:
        groups = change.groups(groups)
    engine = Engine(objective, groups, ds, monitor=monitor)
    if saved is not None and change is not None:
        change.restore(saved.state[CHANGE])
        change.load(saved.folder)
    if saved is not None and native:
        engine.load(saved.folder.parent, saved.folder.name)
    elif saved is not None:
        _load_converted(engine, saved, stage)
    counts = {"parameters": exported, "trained_parameters": trained}
    return _Training(engine, change, precision, counts)


def _of_progress(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in (CHANGE, RENEWAL)}


def _load_converted(engine: Engine, saved: Saved, stage: int) -> None:
    say(f"converting {saved.folder} (ZeRO-{saved.stage}, {saved.world} ranks)")
    folder = reshard.convert(saved)
    if stage:
        engine.load(folder.parent, folder.name)
    else:
        reshard.load_into_plain(engine, folder)
    reshard.discard(folder)


def _evaluate(job: Job, objective: torch.nn.Module) -> dict[str, Any]:
    """The plain LM loss of the student inside ``objective`` on the validation rows."""
    run, prepared = job.run, job.prepared
    was_training = objective.training
    objective.eval()
    scores = evaluate(
        lambda batch: objective(batch, None),
        prepared.validation,
        job.validation_view,
        limit=run.evaluation.rows,
        micro_batch=run.evaluation.micro_batch,
        device=job.device,
    )
    objective.train(was_training)
    return scores


def _summarise(job: Job, progress: Progress, parameters: dict[str, int], path: Path) -> None:
    best, last = job.checkpoints.best(), job.checkpoints.latest()
    assert last is not None
    peak = max(dist.gather_objects(peak_memory()))
    summary = {
        "steps": progress.step,
        "eval_nll": last.eval_nll,
        "best_step": best.step,
        "best_eval_nll": best.eval_nll,
        **parameters,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(progress.train_seconds, 1e-9),
        "peak_memory_bytes": peak,
        "wall_seconds": progress.wall_seconds,
    }
    if dist.rank() == 0:
        write_atomic(path, json.dumps(summary, indent=1).encode())
    dist.barrier()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


STAGES: dict[str, Callable[[Job], object]] = {
    "data": lambda job: job.view,  # which prepares the rows
    "slice": cut,
    "question": ask,
    "cache": cache,
    "train": train,
    "export": export_best,
    "evaluate": evaluate_export,
}
