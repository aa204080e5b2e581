"""The stages of every run: data, slice, cache, train, export, evaluate. Those that a method or its
masks bring come between them (``engine/stage.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dskd.batch import Batch
from dskd.data.loader import Loader, make_batch
from dskd.data.padding import padding_lines
from dskd.engine.checkpoints import Saved
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import shard_teacher, stage_of
from dskd.engine.manifests import Progress
from dskd.engine.row_masks import RowMasks
from dskd.engine.run_config import teacher_config
from dskd.engine.stage import Stage, in_order
from dskd.methods.base import Method
from dskd.methods.metrics import AnyMetric
from dskd.models.configs import hidden_size
from dskd.models.writing import export
from dskd.narrowing.slice_stage import make_slice
from dskd.ops import implementation
from dskd.runs import about, comparable
from dskd.runs.answers import answer_scores
from dskd.runs.by_domain import by_domain_section
from dskd.runs.cached_rows import caches_of, rows_to_capture
from dskd.runs.card import card_of
from dskd.runs.change_log import changes_section
from dskd.runs.confusion import Confusion, confusion_section
from dskd.runs.context import RunContext, say_read
from dskd.runs.examples import examples_section, write_examples
from dskd.runs.named_sets import evaluation_sets
from dskd.runs.report import scores_section
from dskd.runs.student import build_student, student_to_export, student_to_train
from dskd.settings.folders import RunFolder
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import domain_of
from dskd.stores.fingerprints import expected
from dskd.system import dist
from dskd.system.device import free_memory
from dskd.system.files import write_atomic
from dskd.system.log import Metrics, reset_peak_memory, say, used_memory
from dskd.teachers.capture import capture
from dskd.teachers.setup import TeacherSetup, frozen, set_up
from dskd.training.evaluation import VALIDATION, EvaluationSet, Scores, by_key, evaluate
from dskd.training.objective import Objective
from dskd.training.trainer import Trainer


def prepare_rows(context: RunContext) -> None:
    """Prepare all rows, those of named sets and of the memory, too, say what was read for them, and
    make the view of the training rows. Of packed rows it is said how much padding they need."""
    folder = context.prepared.folder
    dist.on_rank0(lambda: say_read(folder))
    dist.on_rank0(lambda: _say_padding(context))
    _ = context.view, context.further_fingerprints


def _say_padding(context: RunContext) -> None:
    run, rows = context.given, context.prepared.train
    if run.data.packed:
        lengths_R = rows.lengths_B(np.arange(len(rows)))
        for line in padding_lines(lengths_R, run.data, run.train.micro_batch):
            say(line)


def cache(context: RunContext) -> None:
    """Capture the top-k logits of every cached teacher whose model the settings name."""
    if not context.method.wants_teacher():
        return
    run, prepared = context.run, context.prepared
    for domain, teacher, folder, where in caches_of(run):
        if teacher.model is None:
            continue
        own = domain_of(domain)
        capture(
            teacher,
            lambda domain=domain: frozen(run, domain, prepared, context.device),
            prepared,
            context.view,
            folder,
            fingerprints=expected(run, teacher, prepared, context.view, where),
            domain=None if own is None else prepared.domains.index(own),
            wanted_DR=rows_to_capture(context, folder),
            device=context.device,
            verify=run.until == "cache",  # else training opens it
            run=run.out,
        )
        free_memory()  # before the next teacher


def _sliced(run: Run) -> bool:
    return run.model.slice is not None


def slice_student(context: RunContext) -> None:
    """Write the folder that a sliced student starts from."""
    folder = context.folder.sliced
    if _sliced(context.run) and not dist.broadcast_object(folder.exists()):
        make_slice(context.run, context.prepared.tokenizer)
        say(f"cut {context.run.model.path} to {folder}")


def train(context: RunContext) -> None:
    """Train the student, from its newest checkpoint if there is one; leaves ``summary.json``."""
    if dist.broadcast_object(context.folder.summary.exists()):
        return
    run, prepared = context.run, context.prepared
    reset_peak_memory()
    checkpoints = context.checkpoints
    saved = checkpoints.latest()
    scores_of = _evaluator(context)  # first of all: what it reads may be damaged
    setup = TeacherSetup()
    if context.method.wants_teacher():
        setup = set_up(run, context.method.temperature, prepared, context.view, context.device)
    student = student_to_train(context, setup, saved)
    engine, hooks = student.engine, student.hooks
    progress = Progress(**saved.state["progress"]) if saved else Progress()
    if saved:
        say(f"going on from step {progress.step} ({saved.folder})")
    hooks.begin(progress.position)  # before the loader, which makes its first batch at once
    loader = Loader(
        prepared.train,
        setup.view or context.view,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        seed=run.seed,
        readers=(*context.readers, *setup.readers),
        # The last step's batch is the last that a cache need have the rows of.
        ready=lambda position: position < run.train.steps and not hooks.waits(position),
        position=progress.position,
        device=context.device,
    )
    trainer = Trainer(
        run=run,
        precision=student.precision,
        method=context.method,
        hooks=hooks,
        engine=engine,
        loader=loader,
        evaluate=lambda: scores_of(student.objective),
        scored=context.scored,
        checkpoints=checkpoints,
        metrics=Metrics(context.folder.metrics, progress.step),
        progress=progress,
    )
    say(f"losses by {implementation(context.device)}, weights in {student.precision}")
    try:
        trainer.train()
    finally:
        loader.close()
    _summarise(context, progress, student.parameters)
    engine.destroy()


def export_best(context: RunContext) -> None:
    """Write the best checkpoint as a HuggingFace folder, ``export/``."""
    folder = context.folder.export
    if dist.broadcast_object(folder.exists()):
        return
    best = context.checkpoints.best()
    student = student_to_export(context, best)
    engine, hooks = student.engine, student.hooks
    model = student.objective.student
    if hooks.defines_export:
        with dist.agreed():
            model = hooks.exported(engine.weights(gradients=False), _some_rows(context))
    masters = None
    if context.run.checkpoint.export == "fp32" and student.precision != "fp32":
        masters = engine.weights(gradients=False).whole
    export(model, context.prepared.tokenizer, folder, card=card_of(context, best), masters=masters)
    say(f"exported step {best.step} to {folder}")
    engine.destroy()


def _some_rows(context: RunContext) -> Batch:
    """A few validation rows."""
    rows = context.prepared.validation
    ids_B = np.arange(min(len(rows), context.run.evaluation.micro_batch), dtype=np.int64)
    return make_batch(rows, context.validation_view, ids_B, np.zeros_like(ids_B))


def evaluate_export(context: RunContext) -> None:
    """Load the exported folder as a user would and score it; leaves ``scores.json``."""
    if dist.broadcast_object(context.folder.scores.exists()):
        return
    run, precision, ds = context.run, precision_of(context.ds), None
    exported = Model(path=str(context.folder.export), attention=run.model.attention)
    # Sharded like the student was: a model that needs ZeRO-3 fits no single GPU here either.
    if stage_of(context.ds) == 3:
        ds = teacher_config(run.deepspeed, precision, run, hidden_size(exported, where="export"))
    whole = context.device if ds is None else None
    model = build_student(context, exported, ds, where="export", device=whole)
    model = model.to(context.device) if ds is None else shard_teacher(model, ds)
    confusion = Confusion(context.prepared.classes) if context.prepared.classes else None
    more = () if confusion is None else (confusion.metric,)
    objective = Objective(model, context.method, None)
    scores = _evaluator(context, *more)(objective)
    scores |= answer_scores(context, model)
    write_examples(context, model, objective)
    with dist.agreed():
        if confusion is not None and dist.rank() == 0:
            confusion.write(context.folder.confusion)
    _write(context.folder.scores, by_key(scores))


def _evaluator(context: RunContext, *more: AnyMetric) -> Callable[[Objective], Scores]:
    """What finds the method's metrics of the student inside an objective on the validation rows,
    there also ``more``, and on named sets (collective, as its calls are)."""
    settings, rows = context.run.evaluation, context.prepared.validation
    view, readers = context.validation_view, context.method.evaluation_readers(context)
    by_domain = {"domains": context.prepared.domains, "text": rows.text}
    sets = [EvaluationSet(VALIDATION, rows, view, settings.rows, readers, more, **by_domain)]
    sets += evaluation_sets(context)
    how = {"micro_batch": settings.micro_batch, "device": context.device}
    metrics = context.method.metrics(context)
    return lambda objective: evaluate(objective, sets, metrics, **how)


def _evaluation_section(runs: Mapping[str, RunFolder]) -> str:
    """What the evaluations of the exported models say."""
    sections = (scores_section, by_domain_section, confusion_section, examples_section)
    return "\n".join(filter(None, (section(runs) for section in sections)))


def _value(saved: Saved) -> float | None:
    """What a checkpoint was evaluated at, if it was."""
    return None if saved.score is None else saved.score.value


def _summarise(context: RunContext, progress: Progress, parameters: dict[str, int]) -> None:
    best, last, scored = context.checkpoints.best(), context.checkpoints.latest(), context.scored
    assert last is not None
    used = dist.gather_objects(used_memory())
    basis = comparable.basis(context)
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
        **{name: max(rank[name] for rank in used) for name in used[0]},
        "wall_seconds": progress.wall_seconds,
        comparable.KEY: basis,
        about.KEY: about.about_run(context, basis["rows"]),
    }
    _write(context.folder.summary, summary)


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, for all ranks."""
    with dist.agreed():
        if dist.rank() == 0:
            write_atomic(path, json.dumps(values, indent=1).encode(), "the results")


STAGES = (
    Stage("data", prepare_rows),
    Stage("slice", slice_student, None, ("sliced",), "sliced", _sliced, chosen=False),
    Stage("cache", cache, leaves=("cache",)),
    Stage("train", train, leaves=("train",), whole="train/summary.json", report=changes_section),
    Stage("export", export_best, leaves=("export",), whole="export"),
    Stage(
        "evaluate",
        evaluate_export,
        leaves=("answers", "confusion.json", "examples.json"),
        whole="scores.json",
        report=_evaluation_section,
    ),
)
"""The core's, in order."""


def stages_of(masks: RowMasks, method: Method) -> tuple[Stage, ...]:
    """All stages of a run, in order. Where they are carried out, ``masks`` are those of the run's
    context, for what the masks' own stage makes is kept there."""
    return in_order(STAGES, (*masks.stages(), *method.stages()))
