"""Carry out a recipe: its runs in order, each run's stages in order, what is done skipped.

A run's folder::

    config.yaml    the resolved settings          inputs.json   fingerprints of data and models
    sliced/        the model a sliced student starts as
    questions/     how hard the model found each token (questions-epoch-N/: the student, later)
    cache/         the teacher's top-k logits
    train/         metrics, checkpoints, summary  export/       a HuggingFace folder
    scores.json    the exported model's evaluation
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from dskd.engine import engine
from dskd.engine.run_config import student_config, teacher_config
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.models.build import check_random, check_shape, config_of, model_fingerprint, with_fields
from dskd.models.reading import folder_at_hand
from dskd.narrowing.slice_stage import sliced_config
from dskd.runs.context import Job
from dskd.runs.report import print_table, write_report
from dskd.runs.stages import STAGES
from dskd.settings.checks import validate
from dskd.settings.compare import differences
from dskd.settings.data import HardTokens
from dskd.settings.folders import source_settings
from dskd.settings.model import Model
from dskd.settings.recipe import Recipe, dump, read
from dskd.settings.run import Run
from dskd.settings.teachers import SelfTeacher
from dskd.system import dist
from dskd.system.files import read_manifest, write_atomic, write_manifest
from dskd.system.locks import alone
from dskd.system.log import say
from dskd.teachers.setup import check_average, each_teacher

CONTROL = "scratch"
"""The run of a recipe, if it has one of this name, that the report measures the others against."""

NOMINAL_HIDDEN = 1024

_MADE = ("sliced", "questions", "questions-epoch-*", "cache", "train", "export")
"""Folders that depend on the settings."""

_MASKED = ("cache", "train", "export")
"""Those that depend on which of the tokens asked about are masked."""

_LEFT = {
    "slice": "sliced",
    "train": "train/summary.json",
    "export": "export",
    "evaluate": "scores.json",
}
"""What a stage leaves in the run's folder when it is whole."""


def check(recipe: Recipe, methods: Mapping[str, Method], *, world: int) -> None:
    """Refuse everything that can be known to be wrong before a process group or a model exists.

    Raises:
        ConfigError: contradictions among the settings, with the DeepSpeed JSONs, or with the
            settings that a run in progress was started with.
    """
    for name, run in recipe.runs.items():
        prefix = _prefix(recipe, name)
        validate(run, world, methods[name], prefix)
        for place, model in _models(run).items():
            where = f"{prefix}.{place}" if prefix else place
            _refuse_later_export(recipe, name, model, where)
            if model.path is None:
                data = {"objective": run.data.objective, "block_size": run.data.block_size}
                check_random(model, **data, where=where)
        # The hidden size only sets buckets; a model that an earlier run will export has none yet.
        student_config(run, NOMINAL_HIDDEN, world=world)
        _check_student(recipe, methods, name)
        itself = [run.teacher] if isinstance(run.teacher, SelfTeacher) else []
        for teacher in (*each_teacher(run).values(), *itself):
            if teacher.deepspeed is not None:
                ds, precision = teacher.deepspeed, teacher.precision
                teacher_config(ds, precision, run, NOMINAL_HIDDEN, world=world)
        _refuse_other_settings(run)


def _prefix(recipe: Recipe, name: str) -> str:
    """Dotted name of a run of a recipe of several."""
    return f"runs.{name}" if len(recipe.runs) > 1 else ""


def _check_student(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse a student that its method, its rows or its slice cannot go with, as far as its config
    is known."""
    run, prefix = recipe.runs[name], _prefix(recipe, name)
    try:
        config = _starts_as(recipe, methods, name)
        if config is not None:
            check_shape(config, run.data.objective, run.data.block_size, "model")
        methods[name].check(run, config)
        check_average(run, methods[name])
    except ConfigError as problem:
        raise ConfigError(f"{prefix}.{problem}" if prefix else str(problem)) from problem


def _starts_as(recipe: Recipe, methods: Mapping[str, Method], name: str) -> PreTrainedConfig | None:
    """The config of a run's student before training; None if it is still to be downloaded.

    What an earlier run of the recipe will export may not be there yet, but its settings say it.
    """
    run = recipe.runs[name]
    source, maker = source_settings(run), _exporter(recipe, run.model)
    if maker is not None:
        config = _starts_as(recipe, methods, maker)
        if config is not None:
            exported = methods[maker].exported_config(config)
            config = with_fields(exported, source.config, "model")
    elif source.path is None:
        config = config_of(source, where="model")
    elif (folder := folder_at_hand(source.path, source.revision)) is not None:
        config = config_of(source.model_copy(update={"path": str(folder)}), where="model")
    else:
        config = None
    if config is None or run.model.slice is None:
        return config
    return sliced_config(config, run.model)


def _exporter(recipe: Recipe, model: Model) -> str | None:
    """The run of the recipe whose export a model is loaded from, if any."""
    if model.path is None:
        return None
    left_by = {os.path.abspath(run.out / "export"): name for name, run in recipe.runs.items()}
    return left_by.get(os.path.abspath(model.path))


def _refuse_later_export(recipe: Recipe, name: str, model: Model, where: str) -> None:
    maker, names = _exporter(recipe, model), list(recipe.runs)
    if maker is not None and names.index(maker) >= names.index(name):
        which = "this run itself" if maker == name else f"the later run {maker}"
        raise ConfigError(f"{where}.path: {model.path} is what {which} exports in its end")


def is_done(recipe: Recipe) -> bool:
    """Whether every run has left what its last stage leaves."""
    return all(
        run.until in _LEFT and (run.out / _LEFT[run.until]).exists() for run in recipe.runs.values()
    )


def execute(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Carry out what is not done yet; then print the table and write ``report.html``."""
    device = engine.start()
    with alone(recipe.out):
        dist.on_rank0(lambda: _write_settings(recipe))
        for name, run in recipe.runs.items():
            say(f"== {name}: {run.method['kind']}, {run.out}")
            job = Job(run, methods[name], device)
            for stage, work in STAGES.items():
                work(job)
                if stage == "data":
                    dist.on_rank0(lambda job=job: _check_inputs(recipe, methods, job))
                if stage == run.until:
                    break
        dist.on_rank0(lambda: report(recipe))
    engine.stop()


def report(recipe: Recipe) -> None:
    """Print the table of the trained runs and write ``report.html`` beside them."""
    runs: dict[str, Path] = {
        name: run.out for name, run in recipe.runs.items() if (run.out / _LEFT["train"]).exists()
    }
    if not runs:
        return
    control = CONTROL if CONTROL in runs else None
    print_table(runs, control)
    print(f"report: {write_report(runs, recipe.out, control)}", flush=True)


def _write_settings(recipe: Recipe) -> None:
    for run in recipe.runs.values():
        write_atomic(run.out / "config.yaml", dump(run).encode())


def _refuse_other_settings(run: Run) -> None:
    path = run.out / "config.yaml"
    if not (_has(run, _MADE) and path.is_file()):
        return  # nothing was made with the other settings yet
    changed = differences(read(path).runs["run"], run, chosen=_has(run, _MASKED))
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{run.out} was started with other settings:\n  {listed}\n"
            f"Set them back, or choose another `out`, or delete the folder"
        )


def _has(run: Run, names: Iterable[str]) -> bool:
    """Whether the run's folder has one of these, which may be patterns."""
    return any(found for name in names for found in run.out.glob(name))


def _check_inputs(recipe: Recipe, methods: Mapping[str, Method], job: Job) -> None:
    """What can be told only now, and must be before hours go into it: the run's models are here,
    downloaded for their fingerprints if need be, and with them the sizes of every run's student
    that starts as one of them."""
    now = {"data": job.prepared.fingerprint, "masking": job.view.fingerprint}
    for name, model in _models(job.run).items():
        now[name] = model_fingerprint(model, seed=job.run.seed, where=name)
    for name in recipe.runs:
        _check_student(recipe, methods, name)
    _refuse_other_inputs(job.run, now)


def _refuse_other_inputs(run: Run, now: dict[str, str]) -> None:
    """Compare the fingerprints of the run's data and models with those it was started with."""
    path = run.out / "inputs.json"
    if not path.exists():
        write_manifest(path, now)
        return
    before = read_manifest(path, ConfigError)
    if isinstance(run.data.masking, HardTokens) and not _has(run, _MASKED):
        before["masking"] = now["masking"]  # what was asked has fingerprints of its own
        write_manifest(path, before)
    for name, print_now in now.items():
        if print_now != before.get(name):
            raise ConfigError(
                f"{run.out}: {name} changed since the run was started; choose another `out`, or "
                f"delete the folder"
            )


def _models(run: Run) -> dict[str, Model]:
    models = {"model": run.model}
    if isinstance(run.data.masking, HardTokens) and run.data.masking.model is not None:
        models["data.masking.model"] = run.data.masking.model
    for domain, teacher in each_teacher(run).items():
        if teacher.model is not None:
            models["teacher.model" if domain is None else f"teacher.domains.{domain}.model"] = (
                teacher.model
            )
    return models
