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

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedConfig

from dskd import dist, engine
from dskd.checks import validate
from dskd.config import Recipe, differences, dump, read
from dskd.errors import ConfigError
from dskd.files import read_manifest, write_atomic, write_manifest
from dskd.hardware import student_config, teacher_config
from dskd.inheritance import check_average, each_teacher
from dskd.job import Job
from dskd.log import say
from dskd.method import Method
from dskd.models.build import check_random, config_of, model_fingerprint
from dskd.report import print_table, write_report
from dskd.settings import HardTokens, Model, Run, SelfTeacher
from dskd.sliced import sliced_config, source_settings
from dskd.stages import STAGES

CONTROL = "scratch"
"""The run of a recipe, if it has one of this name, that the report measures the others against."""

NOMINAL_HIDDEN = 1024

_MADE = ("sliced", "questions", "cache", "train", "export")
"""Folders that depend on the settings."""

_LEFT = {"train": "train/summary.json", "export": "export", "evaluate": "scores.json"}
"""What a stage leaves in the run's folder when it is whole."""


def check(recipe: Recipe, methods: Mapping[str, Method], *, world: int) -> None:
    """Refuse everything that can be known to be wrong before a process group or a model exists.

    Raises:
        ConfigError: contradictions among the settings, with the DeepSpeed JSONs, or with the
            settings that a run in progress was started with.
    """
    for name, run in recipe.runs.items():
        prefix = f"runs.{name}" if len(recipe.runs) > 1 else ""
        validate(run, world, methods[name], prefix)
        for place, model in _models(run).items():
            if model.path is None:
                where = f"{prefix}.{place}" if prefix else place
                data = {"objective": run.data.objective, "block_size": run.data.block_size}
                check_random(model, **data, where=where)
        # The hidden size only sets buckets; a model that an earlier run will export has none yet.
        student_config(run, NOMINAL_HIDDEN, world=world)
        try:
            methods[name].check(run, _starts_as(recipe, methods, run))
            check_average(run, methods[name])
        except ConfigError as problem:
            raise ConfigError(f"{prefix}.{problem}" if prefix else str(problem)) from problem
        itself = [run.teacher] if isinstance(run.teacher, SelfTeacher) else []
        for teacher in (*each_teacher(run).values(), *itself):
            if teacher.deepspeed is not None:
                ds, precision = teacher.deepspeed, teacher.precision
                teacher_config(ds, precision, run, NOMINAL_HIDDEN, world=world)
        _refuse_other_settings(run)


def _starts_as(recipe: Recipe, methods: Mapping[str, Method], run: Run) -> PreTrainedConfig | None:
    """The config of a run's student before training; None if it is still to be downloaded.

    What an earlier run of the recipe will export may not be there yet, but its settings say it.
    """
    model = run.model
    left_by = {str(earlier.out / "export"): name for name, earlier in recipe.runs.items()}
    if model.path in left_by:
        name = left_by[model.path]
        config = _starts_as(recipe, methods, recipe.runs[name])
        config = None if config is None else methods[name].exported_config(config)
    elif model.path is None or Path(model.path).is_dir():
        config = config_of(source_settings(run), where="model")
    else:
        config = None
    if config is None or model.slice is None:
        return config
    return sliced_config(config, model.slice)


def is_done(recipe: Recipe) -> bool:
    """Whether every run has left what its last stage leaves."""
    return all(
        run.until in _LEFT and (run.out / _LEFT[run.until]).exists() for run in recipe.runs.values()
    )


def execute(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Carry out what is not done yet; then print the table and write ``report.html``."""
    device = engine.start()
    with _alone(recipe.out):
        dist.on_rank0(lambda: _write_settings(recipe))
        for name, run in recipe.runs.items():
            say(f"== {name}: {run.method['kind']}, {run.out}")
            job = Job(run, methods[name], device)
            for stage, work in STAGES.items():
                work(job)
                if stage == "data":
                    dist.on_rank0(lambda job=job: _refuse_other_inputs(job))
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; wait while another job works in it. A killed job leaves no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        dist.on_rank0(lambda: _lock(handle, folder))
        yield
        dist.barrier()


def _lock(handle: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting: another job is at work in {folder}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as problem:
        say(f"{folder}: its file system has no locks ({problem}); start one job at a time")


def _write_settings(recipe: Recipe) -> None:
    for run in recipe.runs.values():
        write_atomic(run.out / "config.yaml", dump(run).encode())


def _refuse_other_settings(run: Run) -> None:
    path = run.out / "config.yaml"
    begun = any((run.out / name).exists() for name in _MADE)
    if not (begun and path.is_file()):
        return  # nothing was made with the other settings yet
    changed = differences(read(path).runs["run"], run)
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{run.out} was started with other settings:\n  {listed}\n"
            f"Set them back, or choose another `out`, or delete the folder"
        )


def _refuse_other_inputs(job: Job) -> None:
    """Compare the fingerprints of the run's data and models with those it was started with."""
    run, path = job.run, job.run.out / "inputs.json"
    now = {"data": job.prepared.fingerprint, "masking": job.view.fingerprint}
    for name, model in _models(run).items():
        now[name] = model_fingerprint(model, seed=run.seed, where=name)
    if not path.exists():
        write_manifest(path, now)
        return
    before = read_manifest(path, ConfigError)
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
