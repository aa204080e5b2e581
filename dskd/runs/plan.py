"""Carry out a recipe: its runs in order, each run's stages in order, what is done skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dskd.engine import engine
from dskd.engine.row_masks import masks_of
from dskd.engine.run_config import check_operators, slow_step, student_config, teacher_config
from dskd.engine.stage import Stage, in_order
from dskd.errors import ConfigError
from dskd.methods.base import Method, build_method
from dskd.methods.checks import check_export, validate
from dskd.models.build import check_model, check_random, check_tokenizer, model_fingerprint
from dskd.models.configs import config_at_hand, stored_folder, with_fields
from dskd.narrowing.slice_stage import sliced_config
from dskd.runs.cached_rows import refuse_missing_rows
from dskd.runs.changes import go_on, is_changed, left, refuse_changes, write_settings
from dskd.runs.comparable import groups_of, refuse_incomparable
from dskd.runs.context import RunContext
from dskd.runs.downstream import downstream_section
from dskd.runs.earlier_stages import refuse_missing_stages, refuse_unread
from dskd.runs.history import read_history
from dskd.runs.leftovers import remove_leftovers
from dskd.runs.page import write_page
from dskd.runs.report import ReportSection, print_table, write_report
from dskd.runs.sequences import (
    ScoreMatrix,
    print_sequences,
    sequences_of,
    sequences_section,
)
from dskd.runs.shared_stores import refuse_other_stores
from dskd.runs.stages import STAGES, stages_of
from dskd.runs.vocabularies import (
    exporter,
    models_of,
    refuse_later_exports,
    refuse_vocabularies,
    used_models,
)
from dskd.runs.written_answers import refuse_missing_answers
from dskd.settings.folders import RunFolder, folder_of, source_settings
from dskd.settings.model import Model
from dskd.settings.parsing import line, nearest
from dskd.settings.recipe import SINGLE, Recipe, read
from dskd.settings.run import Run
from dskd.settings.teachers import SelfTeacher, each_teacher
from dskd.system import dist
from dskd.system.device import free_memory
from dskd.system.doing import at_run, at_stage
from dskd.system.files import read_manifest, write_manifest
from dskd.system.locks import alone
from dskd.system.log import say
from dskd.teachers.setup import check_average

CONTROL = "scratch"
"""The run of a recipe, if it has one of this name, that the report measures the others against."""

NOMINAL_HIDDEN = 1024


def check(recipe: Recipe, methods: Mapping[str, Method], *, world: int) -> None:
    """Refuse everything that can be known to be wrong before a process group or a model exists, of
    which there will be ``world`` ranks.

    Raises:
        ConfigError: contradictions among the settings, with the DeepSpeed JSONs, or with the
            settings that a run in progress was started with.
    """
    refuse_unknown_stage(recipe, methods)
    stages = _stages(recipe, methods)
    for name, run in recipe.runs.items():
        prefix = recipe.prefix(name)
        validate(run, methods[name], world=world, prefix=prefix)
        refuse_later_exports(recipe, name)
        refuse_missing_answers(recipe, stages, name)
        refuse_vocabularies(recipe, methods[name], name)
        refuse_other_stores(recipe, methods, name)
        refuse_missing_stages(recipe, methods, name)
        refuse_unread(recipe, methods, name)
        _check_others(recipe, methods, name)
        configs = _deepspeed_configs(run, world)
        _check_student(recipe, methods, name)
        for where, ds in configs:  # after what no machine could do
            check_operators(ds, where, world=world)
        slow = slow_step(configs[0][1])
        if slow is not None:  # on one GPU, or it is refused
            say(f"warning: {run.deepspeed}: {slow}")
    refuse_changes(recipe, methods)


def refuse_unknown_stage(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Refuse an ``until`` that is no stage of any of the runs, and name those that there are."""
    known = _known(recipe, methods)
    for name, run in recipe.runs.items():
        if run.until not in known:
            text = f"{run.until!r} is not one of {', '.join(known)}{nearest(run.until, known)}"
            prefix = recipe.prefix(name)
            raise ConfigError(line("", (prefix, "until") if prefix else ("until",), text))


def _deepspeed_configs(run: Run, world: int) -> list[tuple[str, dict[str, Any]]]:
    """The filled configs of the student and of its teachers, by the names of their JSONs."""
    # The hidden size only sets buckets; a model that an earlier run will export has none yet.
    options = {"hidden": NOMINAL_HIDDEN, "world": world}
    found = [(run.deepspeed, student_config(run, **options))]
    itself = [run.teacher] if isinstance(run.teacher, SelfTeacher) else []
    for teacher in (*each_teacher(run.teacher).values(), *itself):
        if teacher.deepspeed is not None:
            ds = teacher_config(teacher.deepspeed, teacher.precision, run, **options)
            found.append((teacher.deepspeed, ds))
    return found


def _rows_of(run: Run) -> dict[str, Any]:
    """What a model of a run must be able to read."""
    return {"objective": run.data.objective, "block_size": run.data.block_size}


def _check_others(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse models beside a run's student that do not go with its rows, and teachers that do not
    with its method, as far as their configs are known."""
    run, prefix = recipe.runs[name], recipe.prefix(name)
    for place, model in models_of(run).items():
        if place == "model":  # which is looked at with its slice and its method
            continue
        where = f"{prefix}.{place}" if prefix else place
        if model.path is None:
            check_random(model, **_rows_of(run), where=where)
        config = _loaded(recipe, methods, model, where)
        if config is None:
            continue
        if model.path is not None:
            check_model(config, model, **_rows_of(run), where=where)
        if place.startswith("teacher."):
            methods[name].check_teacher_model(run, config, where)


def _check_student(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse a student that its method, its rows or its slice cannot go with, as far as its config
    is known."""
    run, prefix = recipe.runs[name], recipe.prefix(name)
    try:
        config = _starts_as(recipe, methods, name)
        if config is not None:
            check_model(config, run.model, **_rows_of(run), where="model", trained=True)
        methods[name].check(run, config)
        check_average(run, methods[name])
        check_export(run, methods[name])
    except ConfigError as problem:
        raise ConfigError(f"{prefix}.{problem}" if prefix else str(problem)) from problem


def _starts_as(recipe: Recipe, methods: Mapping[str, Method], name: str) -> PreTrainedConfig | None:
    """The config of a run's student before training; None if it is still to be downloaded.

    What an earlier run of the recipe will export may not be there yet, but its settings say it.
    """
    run = recipe.runs[name]
    config = _loaded(recipe, methods, source_settings(run), "model")
    if config is None or run.model.slice is None:
        return config
    return sliced_config(config, run.model)


def _loaded(
    recipe: Recipe, methods: Mapping[str, Method], model: Model, where: str
) -> PreTrainedConfig | None:
    """The config of a model, which an earlier run may export; None if it is to be downloaded."""
    maker = exporter(recipe, model.path)
    if maker is None:
        return config_at_hand(model, where)
    config = _starts_as(recipe, methods, maker)
    if config is None:
        return None
    return with_fields(methods[maker].exported_config(config), model.config, where)


def is_done(recipe: Recipe, methods: Mapping[str, Method]) -> bool:
    """Whether every run has left what its stages leave, as far as the last one says so."""
    for name, stages in _stages(recipe, methods).items():
        run = recipe.runs[name]
        if is_changed(run):
            return False
        wholes = [run.out / s.whole for s in stages if s.whole is not None and s.wanted(run)]
        if stages[-1].whole is None or not all(whole.exists() for whole in wholes):
            return False
    return True


def _known(recipe: Recipe, methods: Mapping[str, Method]) -> dict[str, Stage]:
    """The stages of all runs by name, in order as far as each run has them."""
    brought = [
        stage
        for name, run in recipe.runs.items()
        for stage in stages_of(masks_of(run), methods[name])
        if stage.before is not None
    ]
    return {s.name: s for s in in_order(STAGES, list({s.name: s for s in brought}.values()))}


def _stages(recipe: Recipe, methods: Mapping[str, Method]) -> dict[str, tuple[Stage, ...]]:
    """What each run carries out."""
    known = _known(recipe, methods)
    return {
        name: _to_do(stages_of(masks_of(run), methods[name]), run.until, known)
        for name, run in recipe.runs.items()
    }


def _to_do(stages: Sequence[Stage], until: str, known: Mapping[str, Stage]) -> tuple[Stage, ...]:
    """The stages of a run up to the last one that its settings want. That may be one that only
    other runs of the recipe have (``known``: those of all): this one ends where it would be."""
    names = [stage.name for stage in stages]
    end = names.index(until) + 1 if until in names else names.index(known[until].before)
    return tuple(stages[:end])


def execute(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Carry out what is not done yet; then print the table and write ``report.html``."""
    device = engine.start(max(run.ranks_timeout for run in recipe.runs.values()))
    known = _known(recipe, methods)
    with alone(recipe.out):
        remove_leftovers(recipe)
        # Another job may have worked here while this one waited.
        dist.on_rank0(lambda: refuse_changes(recipe, methods))
        dist.on_rank0(lambda: write_settings(recipe))
        counted: dict[str, Run] = {}  # with their lengths in steps
        for name, run in recipe.runs.items():
            say(f"== {name}: {run.method['kind']}, {run.out}")
            at_run()
            context = RunContext(run, methods[name], device, tuple(recipe.runs.values()))
            for stage in _to_do(stages_of(context.masks, context.method), run.until, known):
                at_stage(stage.name)
                stage.run(context)
                free_memory()
                if stage.name == "data":
                    counted[name] = context.run
                    known_runs = Recipe(recipe.out, recipe.runs | counted)
                    # As soon as the rows are there, before hours go into what may not fit them.
                    dist.on_rank0(lambda r=known_runs, c=context: _check_inputs(r, methods, c))
                    rows = len(context.prepared.train)
                    dist.on_rank0(lambda n=name, r=rows: go_on(recipe, methods, n, r))
        dist.on_rank0(lambda: report(recipe, methods))
    engine.stop()


def report(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Print the table of the trained runs and write ``report.html`` beside them.

    The runs of a recipe need not be comparable (a teacher of one domain, a student of several), and
    are carried out all the same: those that may be compared are shown together, the others apart,
    with the reason and without a ratio between them.
    """
    runs = {n: run.out for n, run in recipe.runs.items() if folder_of(run).summary.exists()}
    if not runs:
        return
    control = CONTROL if CONTROL in runs else None
    sections = _sections((recipe.runs[name], methods[name]) for name in runs)
    path = _show(runs, recipe.out, control, sections, sequences_of(recipe.runs))
    print(f"report: {path}", flush=True)


def report_downstream(recipe: Recipe) -> Path:
    """Write ``report.html`` with what models score on tasks: beside the runs of a recipe as
    :func:`report` does, or alone."""
    runs = {n: run.out for n, run in recipe.runs.items() if folder_of(run).summary.exists()}
    if not runs:
        return write_page(RunFolder(recipe.out).report, [downstream_section(recipe.out)])
    control = CONTROL if CONTROL in runs else None
    read_back = _read_back(runs)
    sequences = sequences_of(read_back)
    return _page(runs, recipe.out, control, _sections_of(read_back), sequences)


def report_folders(runs: Mapping[str, Path], folder: Path, control: str | None) -> Path:
    """Print the table of the runs in these folders and write ``folder/report.html``, as
    :func:`~dskd.runs.report.write_report` does.

    Who names runs side by side wants them compared, unless some are of one sequence, so:

    Raises:
        ConfigError: two of them cannot be, and none are in sequence.
    """
    if len(runs) > 1 and not sequences_of(_read_back(runs)):
        refuse_incomparable(runs)
    return report_recipe(runs, folder, control)


def report_recipe(runs: Mapping[str, Path], folder: Path, control: str | None) -> Path:
    """As :func:`report_folders`, of runs that need not be comparable, which are shown as
    :func:`report` does."""
    for path in runs.values():
        read_history(path)  # what is missing or damaged is named before anything is printed
    read_back = _read_back(runs)
    return _show(runs, folder, control, _sections_of(read_back), sequences_of(read_back))


def _read_back(runs: Mapping[str, Path]) -> dict[str, Run]:
    """The settings of the runs in these folders."""
    return {name: read(RunFolder(path).config).runs[SINGLE] for name, path in runs.items()}


def _show(
    runs: Mapping[str, Path],
    folder: Path,
    control: str | None,
    sections: list[ReportSection],
    sequences: list[list[ScoreMatrix]],
) -> Path:
    print_table(runs, control, groups_of(runs, control))
    print_sequences(sequences)
    return _page(runs, folder, control, sections, sequences)


def _page(
    runs: Mapping[str, Path],
    folder: Path,
    control: str | None,
    sections: list[ReportSection],
    sequences: list[list[ScoreMatrix]],
) -> Path:
    """Write ``report.html``, first what is of all runs together."""
    beside = dict.fromkeys(place for path in runs.values() for place in (path, path.parent))
    parts = [sequences_section(sequences), *map(downstream_section, beside)]
    groups = groups_of(runs, control)
    return write_report(
        runs, folder, control, sections, groups, first="\n".join(filter(None, parts))
    )


def _sections_of(read_back: Mapping[str, Run]) -> list[ReportSection]:
    return _sections((run, build_method(run.method)) for run in read_back.values())


def _sections(runs: Iterable[tuple[Run, Method]]) -> list[ReportSection]:
    """What the stages of the runs show, each stage once."""
    stages = {
        stage.name: stage for run, method in runs for stage in stages_of(masks_of(run), method)
    }
    return [stage.report for stage in stages.values() if stage.report is not None]


def _check_inputs(recipe: Recipe, methods: Mapping[str, Method], context: RunContext) -> None:
    """Refuse, before hours go into it, what shows only when a run's rows and models are here: other
    inputs than it was started with, and sizes of every run's student that starts as one of the
    models, which are downloaded for their fingerprints if need be."""
    run, path = context.run, context.folder.inputs
    now = {"data": context.prepared.fingerprint, "masking": context.view.fingerprint}
    now |= context.further_fingerprints
    for name, model in models_of(run).items():
        now[name] = model_fingerprint(model, seed=run.seed, where=name)
    for name, model in used_models(run, context.method).items():
        folder = stored_folder(model, name)
        if folder is not None:
            check_tokenizer(context.prepared.tokenizer, folder, model, f"{name}.path")
    for name in recipe.runs:
        _check_student(recipe, methods, name)
        prefix = recipe.prefix(name)
        validate(recipe.runs[name], methods[name], world=dist.world(), prefix=prefix)
    refuse_missing_rows(context)
    if not path.exists():
        write_manifest(path, now)
        return
    before = read_manifest(path, ConfigError)
    stages = [stage for stage in stages_of(context.masks, context.method) if stage.chosen]
    # Masks with a stage of their own choose from what it makes, until something depends on them.
    if context.masks.stages() and not left(run, stages):
        before["masking"] = now["masking"]  # a store made for them has fingerprints of its own
        write_manifest(path, before)
    for name, print_now in now.items():
        if print_now != before.get(name):
            raise ConfigError(
                f"{run.out}: {name} changed since the run was started; choose another `out`, or "
                f"delete the folder"
            )
