"""Checks across settings, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dskd.errors import ConfigError
from dskd.fused.topk_teacher import MOST_KEPT
from dskd.settings.data import (
    BuiltinSource,
    Data,
    FairseqSource,
    Masking,
    Source,
    TrainedTokenizer,
)
from dskd.settings.examples import QuestionSource, ReplayedSource, SquadSource
from dskd.settings.folders import cache_folder
from dskd.settings.labels import Columns, CsvSource, GlueSource, LabelPart, TsvSource
from dskd.settings.model import Model
from dskd.settings.parsing import line, nearest
from dskd.settings.recipe import Recipe
from dskd.settings.run import Run
from dskd.settings.sets import named_sources, set_problems
from dskd.settings.teachers import (
    CONFIDENT,
    CachedTeacher,
    PanelMember,
    PanelTeacher,
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
    yield from _labels(run)
    yield from _questions(run)
    yield from set_problems(run.evaluation.sets, run.data)
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
    if not recipe.runs:
        raise ConfigError("no run is in the file; `dskd downstream FILE` is for it")
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
    if train.steps is None and train.epochs is None:
        yield "train.steps", "missing; say how long to train, by train.steps or train.epochs"
    elif train.steps is not None and train.epochs is not None:
        text = f"{train.epochs:g}, but train.steps is {train.steps}; set one of them to null"
        yield "train.epochs", text
    if train.steps is not None and train.warmup > train.steps:
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
    if isinstance(run.data.tokenizer, TrainedTokenizer):
        for name, source in (*_named_sources(run.data), *named_sources(run.evaluation.sets)):
            if isinstance(source, FairseqSource):
                text = f"trained, but {name} is of tokens that its dict.txt numbers; pretrained,"
                yield "data.tokenizer.kind", f"{text} with the path of that vocabulary's tokenizer"
                break


def _labels(run: Run) -> Problems:
    """What does not go with labelled rows, or with others."""
    data, labels = run.data, run.data.labels
    named = [*_named_sources(data), *named_sources(run.evaluation.sets)]
    if data.objective != "classification":
        if labels is not None:
            yield "data.labels", f"of data.objective classification, not {data.objective}"
        for name, source in named:
            yield from _unused_columns(name, source, data.objective)
        return
    for name, source in named:
        yield from _columns(name, source, data)
    if isinstance(labels, LabelPart) and labels.part >= labels.of:
        yield "data.labels.part", f"{labels.part}, but counted from 0 there are {labels.of}"
    if isinstance(labels, list) and len(labels) < 2:
        yield "data.labels", f"{labels}: there is nothing to tell apart; name at least 2 classes"
    if isinstance(labels, list) and len(set(labels)) < len(labels):
        yield "data.labels", f"{labels} has one twice"
    if labels is not None and data.regression:
        yield "data.labels", "the rows have numbers (target), no classes"
    if not data.labelled_sources and not isinstance(labels, list):
        yield "data.labels", "missing; no source has labels (label: COLUMN), so name the classes"
    for name, idle in (("masking", "no token is masked"), ("packing", "a row is one example")):
        if getattr(data, name) != getattr(Data(objective=data.objective), name):
            yield f"data.{name}", f"{idle} with data.objective classification; leave it out"
    if run.model.slice is not None:
        yield "model.slice", "cuts language models; data.objective is classification"


def _named_sources(data: Data) -> list[tuple[str, Source]]:
    """All sources of the rows by the names of their settings."""
    named = [(f"data.sources.{n}", source) for n, source in enumerate(data.sources)]
    return named + [(f"data.validation.{n}", s) for n, s in enumerate(data.validation or [])]


def _questions(run: Run) -> Problems:
    """What does not go with rows of questions, or with others."""
    data, of = run.data, run.data.questions
    sources = [*_named_sources(data), *named_sources(run.evaluation.sets)]
    sources += [(f"data.memory.{n}", source) for n, source in enumerate(data.memory or [])]
    kinds = QuestionSource | SquadSource | ReplayedSource
    asked = [name for name, s in sources if isinstance(s, kinds)]
    if of is None:
        for name in asked:
            yield f"{name}.kind", "its questions need data.questions (`data.questions: {}`)"
        return
    if data.objective != "causal":
        text = f"{data.objective}, but rows of questions (data.questions) are for a causal LM"
        yield "data.objective", text
    for name, source in sources:
        if name not in asked:
            text = f"{source.kind} has no questions; data.questions takes questions and squad"
            yield f"{name}.kind", text
        elif of.task_tokens and source.domain not in of.task_tokens:
            near = nearest(source.domain, of.task_tokens)
            text = f"no token for the domain {source.domain!r} of {name}{near}"
            yield "data.questions.task_tokens", text
    yield from _replayed(run)
    if of.answer_token in of.tokens[1:] or of.answer_token in of.task_tokens.values():
        yield "data.questions.answer_token", f"{of.answer_token} is the token of a task, too"
    if of.room > data.block_size - 2:
        text = f"{of.room} leaves no token for a question in data.block_size {data.block_size}"
        yield "data.questions.room", text
    if data.masking.kind != "random":
        text = f"{data.masking.kind}, but of a question only the answer is learnt"
        yield "data.masking.kind", text
    if data.packing != Data(objective=data.objective, questions=of).packing:
        yield "data.packing", "a row is one question (data.questions); leave it out"
    for domain, teacher in each_teacher(run.teacher).items() if of.modelling else ():
        if isinstance(teacher, CachedTeacher):
            text = "a cached teacher has one view of a row; data.questions.modelling makes two"
            yield f"{section_name(domain)}.kind", text


def _replayed(run: Run) -> Problems:
    """What does not go with rows of earlier tasks that a model wrote."""
    data = run.data
    named = {f"data.sources.{n}": source for n, source in enumerate(data.sources)}
    for name, source in (*_named_sources(data), *named_sources(run.evaluation.sets)):
        if name not in named and isinstance(source, ReplayedSource):
            text = "replayed, but on rows that a model wrote no other is evaluated"
            yield f"{name}.kind", text
    replayed = {n: s for n, s in named.items() if isinstance(s, ReplayedSource)}
    if not replayed:
        return
    if len(replayed) == len(named):
        yield "data.sources", "all are replayed; rows of a new task are missing"
    of_domain = {s.domain: name for name, s in named.items() if name not in replayed}
    for name, source in replayed.items():
        other = of_domain.setdefault(source.domain, name)
        if other != name:
            what = "replayed already" if other in replayed else "new"
            yield f"{name}.domain", f"{source.domain!r} is {what} by {other}; one of the two"
        if source.path is None and ("/" in source.domain or source.domain in ("", ".", "..")):
            text = f"{source.domain!r} is no name of a file, as which the rows are written"
            yield f"{name}.domain", text
    if isinstance(data.tokenizer, TrainedTokenizer):
        text = f"trained, but {next(iter(replayed))} is in the tokens of a model that is there"
        yield "data.tokenizer.kind", f"{text}; pretrained, with the path of its tokenizer"


def _unused_columns(name: str, source: Source, objective: str) -> Problems:
    if isinstance(source, CsvSource | TsvSource | GlueSource):
        text = f"{source.kind} is for data.objective classification, not {objective}"
        yield f"{name}.kind", f"{text}; of text, jsonl, or datasets with path: csv"
        return
    fields = type(source).model_fields
    for field in ("pair", "label", "target", "unlabelled"):
        if field in fields and getattr(source, field) != fields[field].default:
            yield f"{name}.{field}", f"of data.objective classification, not {objective}"


def _columns(name: str, source: Source, data: Data) -> Problems:
    named = isinstance(source, BuiltinSource) and source.labelled  # its columns have fixed names
    if not named and not isinstance(source, Columns | GlueSource):
        text = (
            f"{source.kind} has no labels; one of csv, tsv, jsonl, datasets, glue, or builtin with"
        )
        yield f"{name}.kind", f"{text} `label: module`, or another data.objective"
        return
    target = getattr(source, "target", None)
    if isinstance(source, GlueSource):
        yield from _glue(name, source)
    if source.label is not None and target is not None:
        yield f"{name}.target", f"a row has a class (label: {source.label}) or a number, not both"
    elif source.label is not None and data.regression:
        yield f"{name}.label", "a class, but other sources have numbers (target); one of the two"
    elif target is not None and not data.regression:
        yield f"{name}.target", "a number, but data.sources have classes (label); one of the two"
    given = [getattr(source, field, None) for field in ("field", "pair", "label", "target")]
    columns = [column for column in given if column is not None]
    for column in {c for c in columns if columns.count(c) > 1}:
        yield name, f"the column {column!r} is named for two things"
    if isinstance(source, CsvSource | TsvSource) and source.columns is not None:
        for column in columns:
            if source.columns.count(column) != 1:
                what = "missing" if column not in source.columns else "there more than once"
                yield f"{name}.columns", f"{column!r} is {what}, but a row has it once"


def _glue(name: str, source: GlueSource) -> Problems:
    own = ["dev_matched", "dev_mismatched"] if source.task == "mnli" else ["dev"]
    if source.split not in ("train", *own):
        yield f"{name}.split", f"{source.split}, but {source.task} has train, {', '.join(own)}"


def model_problems(name: str, model: Model) -> Problems:
    """What contradicts itself in the section ``name`` of a model."""
    if model.path is None and "model_type" not in model.config:
        text = f"missing; name a model type to build at random, or set {name}.path"
        yield f"{name}.config.model_type", text
    if model.new_tokens and name != "model":
        yield f"{name}.new_tokens", "only the student gets new embeddings (model.new_tokens)"
    elif model.new_tokens and model.path is None:
        yield f"{name}.new_tokens", f"of a model with {name}.path; a random one has all tokens"
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
            if teacher.model is None and teacher.cache is not None:
                text = f"is of a capture, but no model is named to capture from ({name}.model)"
                yield f"{name}.cache", text
            if len(set(temperatures)) < len(temperatures):
                yield f"{name}.temperatures", f"{temperatures} has one twice"
            if teacher.model is not None and use_k is not None and use_k > teacher.k:
                yield f"{name}.use_k", f"{use_k} is more than {name}.k {teacher.k}"
    if isinstance(run.teacher, RoutedTeacher):
        yield from _routes(run, run.teacher)
    if isinstance(run.teacher, PanelTeacher):
        panel = _classifiers if run.data.objective == "classification" else _language_models
        yield from panel(run, run.teacher)
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
    yield from _shared_folders(run)


def _classifiers(run: Run, panel: PanelTeacher) -> Problems:
    """What does not go with a panel of classifiers."""
    if panel.mixture is not None:
        text = f"of language models, but data.objective is {run.data.objective}; leave it out"
        yield "teacher.mixture", text
    for name, member in panel.teachers.items():
        if member.kind == "cached":
            text = "cached, which keeps a language model's logits; leave it out: teacher.scores"
            yield f"teacher.teachers.{name}.kind", f"{text} stored keeps a classifier's"
    members = {n: m for n, m in panel.teachers.items() if isinstance(m, PanelMember)}
    heard = [getattr(member, "domains", None) for member in panel.teachers.values()]
    for domain in dict.fromkeys(source.domain for _, source in _named_sources(run.data)):
        if not any(domains is None or domain in domains for domains in heard):
            yield "teacher.teachers", f"none is asked about the domain {domain!r} of data.sources"
    classes = run.data.labels
    for name, member in members.items() if isinstance(classes, list) else ():
        for label in member.labels or ():
            if label not in classes:
                text = f"{label!r} is not one of data.labels{nearest(label, classes)}"
                yield f"teacher.teachers.{name}.labels", text


def _language_models(run: Run, panel: PanelTeacher) -> Problems:
    """What does not go with a panel of language models, which are mixed."""
    settings = [("teacher", name, panel) for name in PanelTeacher.model_fields]
    settings = [each for each in settings if each[1] not in ("kind", "teachers", "mixture")]
    for name, member in panel.teachers.items():
        if isinstance(member, PanelMember):
            own = ("labels", "own_tokenizer", "domains")
            settings += [(f"teacher.teachers.{name}", field, member) for field in own]
    for where, field, section in settings:
        if getattr(section, field) != type(section).model_fields[field].default:
            text = f"of a panel of classifiers, but data.objective is {run.data.objective}"
            yield f"{where}.{field}", text
    kinds = {name: member.kind for name, member in panel.teachers.items()}
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        yield "teacher.teachers", f"all must be live or all cached, but: {each}"
    yield from _shared_folders(run)
    yield from _union(run, panel)
    if panel.mixture is None:
        text = "missing; say how much each language model says, as {rule: confidence_soft}"
        yield "teacher.mixture", text
        return
    weights = panel.mixture.weights
    for name in weights or ():
        if name not in kinds:
            text = f"no teacher has this name{nearest(name, kinds)}"
            yield f"teacher.mixture.weights.{name}", text
    for name in kinds if weights is not None else ():
        if name not in weights:
            yield "teacher.mixture.weights", f"no number for the teacher {name!r}"
    for name, member in panel.teachers.items():
        confident = panel.mixture.rule in CONFIDENT and member.kind == "cached"
        if confident and 1.0 not in member.temperatures:
            text = f"{member.temperatures} has no 1.0, at which the rule {panel.mixture.rule} asks"
            yield f"teacher.teachers.{name}.temperatures", f"{text} how sure a teacher is; add it"


def _union(run: Run, panel: PanelTeacher) -> Problems:
    """More tokens that cached teachers may keep of a position together than the kernels take, as
    far as the settings tell: of a cache that is there already without ``use_k`` they do not."""
    tokenizer = run.data.tokenizer
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size <= MOST_KEPT:
        return
    cached = {name: m for name, m in panel.teachers.items() if isinstance(m, CachedTeacher)}
    kept: dict[str, int] = {}
    for name, member in cached.items():
        where = f"teacher.teachers.{name}"
        if member.use_k is not None:
            kept[f"{where}.use_k"] = member.use_k
        elif member.model is not None:
            kept[f"{where}.k"] = member.k
    if sum(kept.values()) > MOST_KEPT:
        parts = " + ".join(f"{name} {value}" for name, value in kept.items())
        text = f"{parts} may be more than the {MOST_KEPT} tokens of a position that are mixed"
        yield "teacher.teachers", f"{text}; set smaller ones"


def _shared_folders(run: Run) -> Problems:
    """Caches of several teachers in one folder."""
    folders: dict[Path, str] = {}
    for name, teacher in each_teacher(run.teacher).items():
        if isinstance(teacher, CachedTeacher):
            other = folders.setdefault(cache_folder(run, name), name)
            if other != name:
                yield f"{section_name(name)}.path", f"the same folder as that of {str(other)!r}"
