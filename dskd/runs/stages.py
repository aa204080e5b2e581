"""The stages of a run: data, slice, question, cache, train, export, evaluate. Each leaves an
artefact that, whole, says that it is done; each reads only what earlier ones left."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dskd.batch import Batch
from dskd.data.loader import Loader, make_batch
from dskd.engine.checkpoints import Saved
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import shard_teacher, stage_of
from dskd.engine.run_config import teacher_config
from dskd.models.build import hidden_size
from dskd.models.writing import export
from dskd.narrowing.slice_stage import make_slice
from dskd.ops import implementation
from dskd.runs.context import Job
from dskd.runs.student import build_student, student_to_export, student_to_train
from dskd.settings.folders import cache_folder, folder_of
from dskd.settings.model import Model
from dskd.settings.teachers import CachedTeacher
from dskd.stores.fingerprints import expected
from dskd.system import dist
from dskd.system.files import write_atomic
from dskd.system.log import Metrics, peak_memory, reset_peak_memory, say
from dskd.teachers.capture import capture
from dskd.teachers.setup import TeacherSetup, each_teacher, frozen, set_up
from dskd.training.evaluation import EvaluationSet, Scores, by_key, evaluate
from dskd.training.objective import Objective
from dskd.training.trainer import Progress, Trainer


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
    folder = folder_of(job.run).sliced
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
    student = student_to_train(job, setup, saved)
    engine, hooks = student.engine, student.hooks
    progress = Progress(**saved.state["progress"]) if saved else Progress()
    if saved:
        say(f"going on from step {progress.step} ({saved.folder})")
    hooks.begin(progress.position)  # before the loader, which makes its first batch at once
    loader = Loader(
        prepared.train,
        setup.view or job.view,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        seed=run.seed,
        readers=(*job.readers, *setup.readers),
        ready=lambda position: not hooks.waits(position),
        position=progress.position,
        pin=job.device.type == "cuda",
    )
    trainer = Trainer(
        run=run,
        precision=student.precision,
        method=job.method,
        hooks=hooks,
        engine=engine,
        loader=loader,
        evaluate=lambda: _evaluate(job, student.objective),
        scored=job.scored,
        checkpoints=checkpoints,
        metrics=Metrics(run.out / "train" / "metrics.jsonl", progress.step),
        progress=progress,
    )
    say(f"losses by {implementation(job.device)}, weights in {student.precision}")
    try:
        trainer.train()
    finally:
        loader.close()
    _summarise(job, progress, student.parameters, summary)
    engine.destroy()


def export_best(job: Job) -> None:
    """Write the best checkpoint as a HuggingFace folder, ``export/``."""
    folder = job.run.out / "export"
    if not dist.broadcast_object(folder.exists()):
        _export(job, folder)
        _free()


def _export(job: Job, folder: Path) -> None:
    best = job.checkpoints.best()
    student = student_to_export(job, best)
    engine, hooks = student.engine, student.hooks
    model = student.objective.student
    if hooks.defines_export:
        with dist.agreed():
            model = hooks.exported(engine.weights(gradients=False), _some_rows(job))
    card = {
        "method": dict(job.run.method),
        "step": best.step,
        job.scored.metric: _value(best),
        "run": job.run.model_dump(mode="json"),
    }
    export(model, job.prepared.tokenizer, folder, card=card)
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
    model = build_student(job, exported, ds, where="export")
    model = model.to(job.device) if ds is None else shard_teacher(model, ds)
    scores = by_key(_evaluate(job, Objective(model, job.method, None)))
    if dist.rank() == 0:
        write_atomic(path, json.dumps(scores, indent=1).encode())
    dist.barrier()


def _evaluate(job: Job, objective: Objective) -> Scores:
    """The method's metrics of the student inside ``objective`` on the validation rows."""
    run = job.run
    validation = EvaluationSet(
        "eval", job.prepared.validation, job.validation_view, run.evaluation.rows
    )
    return evaluate(
        objective,
        [validation],
        job.method.metrics(),
        micro_batch=run.evaluation.micro_batch,
        device=job.device,
    )


def _value(saved: Saved) -> float | None:
    """What a checkpoint was evaluated at, if it was."""
    return None if saved.score is None else saved.score.value


def _summarise(job: Job, progress: Progress, parameters: dict[str, int], path: Path) -> None:
    best, last, scored = job.checkpoints.best(), job.checkpoints.latest(), job.scored
    assert last is not None
    peak = max(dist.gather_objects(peak_memory()))
    summary = {
        "steps": progress.step,
        "metric": scored.metric,
        "higher_is_better": scored.higher_is_better,
        scored.metric: _value(last),
        "best_step": best.step,
        f"best_{scored.metric}": _value(best),
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
