"""Checks across settings, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from dskd.errors import ConfigError
from dskd.settings.data import HardTokens
from dskd.settings.folders import cache_folder
from dskd.settings.model import Model
from dskd.settings.parsing import line, nearest
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, LiveTeacher, RoutedTeacher, SelfTeacher

Problems = Iterator[tuple[str, str]]
"""Dotted names of settings, and what is wrong with them."""


class Method(Protocol):
    """What the checks need of a method; ``temperature`` only if it wants a teacher."""

    kind: str
    temperature: float
    temperature_setting: str
    selects: bool

    def wants_teacher(self) -> bool:
        """Whether any step of the run uses a teacher."""
        ...

    def weighs_hard_tokens(self) -> bool:
        """Whether the loss reads which labels are hard."""
        ...


def evaluation_selects(run: Run, method: Method) -> bool:
    """Whether the validation loss says which checkpoint of a run is the best.

    Not where the method says no, nor where hard tokens are masked: the validation rows are masked
    at random, and their loss rises while that of hard tokens falls.
    """
    masks_hard = run.data.objective == "masked" and isinstance(run.data.masking, HardTokens)
    return method.selects and not masks_hard


def validate(run: Run, world: int, method: Method | None = None, prefix: str = "") -> None:
    """Refuse settings that contradict each other.

    Args:
        run: the settings.
        world: number of ranks.
        method: the run's method object, for the checks that need it.
        prefix: dotted name of the run in its recipe, put before the names in messages.

    Raises:
        ConfigError: every contradiction, one a line.
    """
    problems = [*_train(run, world), *_data(run), *_models(run), *_teachers(run)]
    if method is not None:
        problems += [*_selection(run, method), *_method(run, method)]
    if problems:
        above = (prefix,) if prefix else ()
        raise ConfigError("\n".join(line("", (*above, place), text) for place, text in problems))


def _train(run: Run, world: int) -> Problems:
    train = run.train
    step = train.micro_batch * world
    if train.batch % step:
        below, above = train.batch // step * step, -(-train.batch // step) * step
        near = f"{below} or {above}" if below else str(above)
        ranks = f"{world} rank" + "s" * (world > 1)
        yield (
            "train.batch",
            f"{train.batch} is not a multiple of train.micro_batch {train.micro_batch} x {ranks}"
            f" = {step}; the nearest that are: {near}",
        )
    if train.warmup > train.steps:
        yield "train.warmup", f"{train.warmup} is more than train.steps {train.steps}"
    if train.end_lr > train.lr:
        yield "train.end_lr", f"{train.end_lr} is more than train.lr {train.lr}"


def _data(run: Run) -> Problems:
    masking = run.data.masking
    if masking.keep + masking.random > 1:
        yield (
            "data.masking.keep",
            f"{masking.keep} and data.masking.random {masking.random} together exceed 1",
        )
    if isinstance(masking, HardTokens):
        yield from _hard_tokens(masking, run.data.objective)
    elif masking.whole_word and masking.sampler == "fairseq":
        yield "data.masking.whole_word", "the fairseq sampler selects tokens, not words"


def _hard_tokens(masking: HardTokens, objective: str) -> Problems:
    place = "data.masking"
    if masking.refresh is not None and masking.draws is not None:
        yield f"{place}.draws", f"{place}.refresh changes the masks, so they cannot repeat"
    if objective == "causal":
        yield from _idle_without_masks(masking)
        return
    least = masking.probability if masking.least is None else masking.least
    most = masking.probability if masking.most is None else masking.most
    if masking.sampler == "counter" and least > most:
        unset = {"least": masking.least, "most": masking.most}
        null = " and ".join(f"{place}.{name}" for name, value in unset.items() if value is None)
        why = f" ({place}.probability, for want of {null})" if null else ""
        yield f"{place}.least", f"{least} is more than {place}.most {most}{why}"
    if masking.sampler == "original":
        for name, paper in (("metric", "confidence"), ("shown", "token")):
            if (value := getattr(masking, name)) != paper:
                yield f"{place}.{name}", f"{value}, but {place}.sampler original knows only {paper}"
        for name in ("least", "most"):
            if getattr(masking, name) is not None:
                yield f"{place}.{name}", f"{place}.sampler original has no bounds; leave it null"
        if masking.replacement != "bert":
            text = f"{masking.replacement}, but {place}.sampler original replaces in its own way"
            yield f"{place}.replacement", text


def _idle_without_masks(masking: HardTokens) -> Problems:
    """What of a causal LM's hard tokens is set to no avail. Compared with the defaults, because
    settings that are read back (a run's config.yaml) name all of them."""
    for name in ("probability", "keep", "random", "shown", "least", "replacement", "sampler"):
        value = getattr(masking, name)
        if value != HardTokens.model_fields[name].default:
            yield f"data.masking.{name}", f"{value}, but a causal LM has no masks; leave it out"


def _models(run: Run) -> Problems:
    for name, model in _named_models(run):
        if model.path is None and "model_type" not in model.config:
            yield (
                f"{name}.config.model_type",
                f"missing; name a model type to build at random, or set {name}.path",
            )
        if model.slice is not None and name != "model":
            yield f"{name}.slice", "only the student can be cut (model.slice)"
        elif model.slice is not None and model.path is None:
            yield f"{name}.slice", f"needs {name}.path, the model that it is cut from"


def _named_models(run: Run) -> Iterator[tuple[str, Model]]:
    yield "model", run.model
    masking = run.data.masking
    if isinstance(masking, HardTokens) and masking.model is not None:
        yield "data.masking.model", masking.model
    for name, teacher in _each_teacher(run):
        if teacher.model is not None:
            yield f"{name}.model", teacher.model


def _each_teacher(run: Run) -> Iterator[tuple[str, LiveTeacher | CachedTeacher]]:
    """Name of the section and the teacher: every one of a routed teacher, or the only one; none for
    a student that teaches itself."""
    if isinstance(run.teacher, RoutedTeacher):
        for domain, teacher in run.teacher.domains.items():
            yield f"teacher.domains.{domain}", teacher
    elif run.teacher is not None and not isinstance(run.teacher, SelfTeacher):
        yield "teacher", run.teacher


def _teachers(run: Run) -> Problems:
    for name, teacher in _each_teacher(run):
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
            near = nearest(domain, domains)
            yield f"teacher.domains.{domain}", f"no source has this domain{near}"
    for domain in domains:
        if domain not in kinds:
            yield "teacher.domains", f"no teacher for the domain {domain!r} of data.sources"
    folders: dict[Path, str] = {}
    for domain, kind in kinds.items():
        if kind == "cached":
            other = folders.setdefault(cache_folder(run, domain), domain)
            if other != domain:
                yield f"teacher.domains.{domain}.path", f"the same folder as that of {other!r}"


def _selection(run: Run, method: Method) -> Problems:
    if run.checkpoint.every % run.evaluation.every and evaluation_selects(run, method):
        yield (
            "checkpoint.every",
            f"{run.checkpoint.every} is not a multiple of evaluation.every {run.evaluation.every};"
            " the best checkpoint is chosen by its evaluation",
        )


def _method(run: Run, method: Method) -> Problems:
    causal = run.data.objective == "causal"
    if causal and isinstance(run.data.masking, HardTokens) and not method.weighs_hard_tokens():
        yield (
            "data.masking.kind",
            f"hard_tokens, but a causal LM has no masks, and method {method.kind} as set here gives"
            " hard tokens no weight of their own (self_evolution's hard_weight does)",
        )
    if not method.wants_teacher():
        return
    if run.teacher is None:
        yield "teacher", f"the method {method.kind} needs one"
    if causal and isinstance(run.teacher, SelfTeacher) and run.teacher.weights == "current":
        yield (
            "teacher.weights",
            "current, but a causal LM always sees its rows without masks, so its own distribution"
            " has nothing to teach it; use frozen or average",
        )
    caches = {n: t for n, t in _each_teacher(run) if isinstance(t, CachedTeacher)}
    for name, teacher in caches.items():
        if method.temperature not in teacher.temperatures:
            stored = ", ".join(map(str, teacher.temperatures))
            yield (
                f"method.{method.temperature_setting}",
                f"{method.temperature} is not in {name}.temperatures: {stored}",
            )
    hard = run.data.masking if isinstance(run.data.masking, HardTokens) else None
    if caches and hard is not None and causal:
        yield (
            "teacher.kind",
            "cached, but a causal LM is to weigh hard tokens; use a live teacher",
        )
    elif caches and hard is not None and hard.refresh is not None:
        yield (
            "data.masking.refresh",
            f"{hard.refresh}, but a cached teacher holds all masks beforehand; use a live one, or"
            " leave it null",
        )
    elif caches and run.data.objective == "masked" and run.data.masking.draws is None:
        yield (
            "data.masking.draws",
            "missing; a cached teacher holds so many masks of each row (epoch e uses e % draws)",
        )
