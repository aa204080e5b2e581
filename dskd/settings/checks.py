"""Checks across settings, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dskd.errors import ConfigError
from dskd.settings.data import Masking
from dskd.settings.folders import cache_folder
from dskd.settings.model import Model
from dskd.settings.parsing import line, nearest
from dskd.settings.recipe import Recipe
from dskd.settings.run import Run
from dskd.settings.teachers import (
    CachedTeacher,
    RoutedTeacher,
    SelfTeacher,
    each_teacher,
    section_name,
)

Problems = Iterator[tuple[str, str]]
"""Dotted names of settings, and what is wrong with them."""


def problems_of(run: Run, world: int) -> Problems:
    """Contradictions among the settings of a run on ``world`` ranks, whatever its method."""
    yield from _train(run, world)
    yield from _data(run)
    yield from model_problems("model", run.model)
    yield from _teachers(run)


def check_settings(recipe: Recipe, world: int) -> None:
    """Refuse contradictions among the settings of each run, as far as they show without its method.

    Args:
        recipe: the runs.
        world: number of ranks.

    Raises:
        ConfigError: all of the first run that has any, one a line.
    """
    for name, run in recipe.runs.items():
        refuse_problems(problems_of(run, world), recipe.prefix(name))


def refuse_problems(problems: Problems, prefix: str) -> None:
    """Raise what was found, one a line, as a ``ConfigError``; ``prefix`` is the dotted name of the
    run in its recipe, put before the names."""
    above = (prefix,) if prefix else ()
    lines = [line("", (*above, place), text) for place, text in problems]
    if lines:
        raise ConfigError("\n".join(lines))


def _train(run: Run, world: int) -> Problems:
    train = run.train
    step = train.micro_batch * world
    if train.batch % step:
        below, above = train.batch // step * step, -(-train.batch // step) * step
        near = f"{below} or {above}" if below else str(above)
        ranks = f"{world} rank" + "s" * (world > 1)
        product = f"train.micro_batch {train.micro_batch} x {ranks} = {step}"
        text = f"{train.batch} is not a multiple of {product}; the nearest that are: {near}"
        yield "train.batch", text
    if train.warmup > train.steps:
        yield "train.warmup", f"{train.warmup} is more than train.steps {train.steps}"
    if train.end_lr > train.lr:
        yield "train.end_lr", f"{train.end_lr} is more than train.lr {train.lr}"


def _data(run: Run) -> Problems:
    masking = run.data.masking
    if masking.keep + masking.random > 1:
        text = f"{masking.keep} and data.masking.random {masking.random} together exceed 1"
        yield "data.masking.keep", text
    if isinstance(masking, Masking) and masking.whole_word and masking.sampler == "fairseq":
        yield "data.masking.whole_word", "the fairseq sampler selects tokens, not words"


def model_problems(name: str, model: Model) -> Problems:
    """What contradicts itself in the section ``name`` of a model."""
    if model.path is None and "model_type" not in model.config:
        text = f"missing; name a model type to build at random, or set {name}.path"
        yield f"{name}.config.model_type", text
    if model.slice is not None and name != "model":
        yield f"{name}.slice", "only the student can be cut (model.slice)"
    elif model.slice is not None and model.path is None:
        yield f"{name}.slice", f"needs {name}.path, the model that it is cut from"


def _teachers(run: Run) -> Problems:
    for domain, teacher in each_teacher(run.teacher).items():
        name = section_name(domain)
        if teacher.model is not None:
            yield from model_problems(f"{name}.model", teacher.model)
        if isinstance(teacher, CachedTeacher):
            temperatures, use_k = teacher.temperatures, teacher.use_k
            if teacher.model is None and teacher.path is None:
                yield f"{name}.model", f"missing; name a model to capture from, or {name}.path"
            if len(set(temperatures)) < len(temperatures):
                yield f"{name}.temperatures", f"{temperatures} has one twice"
            if teacher.model is not None and use_k is not None and use_k > teacher.k:
                yield f"{name}.use_k", f"{use_k} is more than {name}.k {teacher.k}"
    if isinstance(run.teacher, RoutedTeacher):
        yield from _routes(run, run.teacher)
    if isinstance(run.teacher, SelfTeacher) and run.teacher.weights != "frozen":
        weights = run.teacher.weights
        if run.teacher.deepspeed is not None:
            text = f"{run.teacher.deepspeed} shards a frozen copy, but teacher.weights is {weights}"
            yield "teacher.deepspeed", text
        if run.teacher.precision != "auto":
            text = f"is of a frozen copy; with teacher.weights {weights} it is the student's"
            yield "teacher.precision", text


def _routes(run: Run, teacher: RoutedTeacher) -> Problems:
    kinds = {domain: t.kind for domain, t in teacher.domains.items()}
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{domain} {kind}" for domain, kind in kinds.items())
        yield "teacher.domains", f"all must be live or all cached, but: {each}"
    domains = dict.fromkeys(source.domain for source in run.data.sources)
    for domain in kinds:
        if domain not in domains:
            text = f"no source has this domain{nearest(domain, domains)}"
            yield f"teacher.domains.{domain}", text
    for domain in domains:
        if domain not in kinds:
            yield "teacher.domains", f"no teacher for the domain {domain!r} of data.sources"
    folders: dict[Path, str] = {}
    for domain, kind in kinds.items():
        if kind == "cached":
            other = folders.setdefault(cache_folder(run, domain), domain)
            if other != domain:
                yield f"teacher.domains.{domain}.path", f"the same folder as that of {other!r}"
