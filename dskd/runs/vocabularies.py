"""Whether the models that a run loads speak the vocabulary of its rows, before either is there.

A run may load what an earlier one exports. The token ids of both must mean the same: that follows
from the settings where a tokenizer is yet to be trained, and from the tokenizers themselves where
their folders are at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dskd.data import sources
from dskd.data.tokenizers import load_tokenizer, may_be_trained
from dskd.engine.row_masks import masks_of
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.models.build import check_tokenizer
from dskd.models.configs import check_vocabulary, config_at_hand
from dskd.models.weight_files import folder_at_hand
from dskd.settings.data import (
    Data,
    HubSource,
    PretrainedTokenizer,
    Source,
    TrainedTokenizer,
)
from dskd.settings.examples import QuestionSource, ReplayedSource
from dskd.settings.folders import RunFolder, folder_of
from dskd.settings.model import Model
from dskd.settings.recipe import Recipe
from dskd.settings.run import Run
from dskd.settings.teachers import PanelMember, each_teacher, section_name


def exporter(recipe: Recipe, path: str | None) -> str | None:
    """The run of the recipe whose export lies at ``path``, if any."""
    if path is None:
        return None
    left_by = {os.path.abspath(folder_of(run).export): name for name, run in recipe.runs.items()}
    return left_by.get(os.path.abspath(path))


def models_of(run: Run) -> dict[str, Model]:
    """The models that a run's settings name, by the name of the setting."""
    teachers = {f"{section_name(d)}.model": t.model for d, t in each_teacher(run.teacher).items()}
    models = {"model": run.model, **masks_of(run).models(), **teachers}
    return {name: model for name, model in models.items() if model is not None}


def used_models(run: Run, method: Method) -> dict[str, Model]:
    """Those of :func:`models_of` that the run will load to read its rows: a teacher only if its
    method wants one, and if it has no tokenizer of its own."""
    wanted = method.wants_teacher()
    others = [
        f"{section_name(name)}.model"
        for name, teacher in each_teacher(run.teacher).items()
        if isinstance(teacher, PanelMember) and teacher.own_tokenizer
    ]
    return {
        name: model
        for name, model in models_of(run).items()
        if name not in others and (wanted or not name.startswith("teacher."))
    }


def named(recipe: Recipe, name: str, place: str) -> str:
    """A setting's dotted name in the recipe."""
    prefix = recipe.prefix(name)
    return f"{prefix}.{place}" if prefix else place


def refuse_later_exports(recipe: Recipe, name: str) -> None:
    """Refuse models and a tokenizer that a later run, or the run itself, exports.

    Raises:
        ConfigError: names the setting and that run.
    """
    run, names = recipe.runs[name], list(recipe.runs)
    paths = {f"{place}.path": model.path for place, model in models_of(run).items()}
    if isinstance(run.data.tokenizer, PretrainedTokenizer):
        paths["data.tokenizer.path"] = run.data.tokenizer.path
    for place, path in paths.items():
        maker = exporter(recipe, path)
        if maker is not None and names.index(maker) >= names.index(name):
            which = "this run itself" if maker == name else f"the later run {maker}"
            where = named(recipe, name, place)
            raise ConfigError(f"{where}: {path} is what {which} exports in its end")


@dataclass(frozen=True)
class _Origin:
    """Where the vocabulary of a run's rows comes from.

    Attributes:
        trained: the run whose own text the tokenizer is trained on, or None.
        stored: else the tokenizer that is loaded.
    """

    trained: Run | None = None
    stored: PretrainedTokenizer | None = None


def _origin(recipe: Recipe, run: Run) -> _Origin:
    tokenizer = run.data.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        return _Origin(trained=run)
    maker = exporter(recipe, tokenizer.path)
    return _Origin(stored=tokenizer) if maker is None else _origin(recipe, recipe.runs[maker])


def _at_hand(data: Data, origin: _Origin) -> PreTrainedTokenizerBase | None:
    """The stored tokenizer that the rows will be written in, if it need not be downloaded."""
    if origin.stored is None:
        return None
    folder = _folder(origin.stored.path, origin.stored.revision, "data.tokenizer.path")
    if folder is None:
        return None
    stored = PretrainedTokenizer(kind="pretrained", path=str(folder))
    return load_tokenizer(data.model_copy(update={"tokenizer": stored}), ())


def _folder(path: str, revision: str | None, where: str) -> Path | None:
    """The folder of a stored tokenizer, unless it is still to be downloaded: a config may have come
    alone."""
    folder = folder_at_hand(path, revision, where)
    if folder is None or Path(path).is_dir():
        return folder
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).is_file() for name in names) else None


def refuse_vocabularies(recipe: Recipe, method: Method, name: str) -> None:
    """Refuse a run whose models surely speak another vocabulary than its rows, or were trained on
    another objective.

    Raises:
        ConfigError: names the setting, and the other run or the folder; also what is wrong with a
            tokenizer that is at hand.
    """
    run = recipe.runs[name]
    origin = _origin(recipe, run)
    try:
        tokenizer = _at_hand(run.data, origin)
        for place, model in used_models(run, method).items():
            maker = exporter(recipe, model.path)
            if maker is not None:
                _refuse_other_run(recipe, run, maker, place, tokenizer)
                _refuse_lacking_tokens(recipe, run, maker, place, model)
            elif model.path is not None:
                _refuse_folder(run, model, place, origin, tokenizer)
    except ConfigError as problem:
        raise ConfigError(named(recipe, name, str(problem))) from problem


def _refuse_other_run(
    recipe: Recipe, run: Run, maker: str, place: str, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Refuse the model that the earlier run ``maker`` will export, whose folder need not exist.

    ``tokenizer`` is this run's, if it is at hand.
    """
    made = recipe.runs[maker]
    theirs_of, own_of = made.data.objective, run.data.objective
    encoder = place == "model" and own_of == "classification"  # which gets a head of its own
    if theirs_of != own_of and not encoder:
        what = "a classifier" if theirs_of == "classification" else f"a {theirs_of} LM"
        raise ConfigError(f"{place}.path: run {maker} trains {what}, data.objective is {own_of}")
    own, theirs = _origin(recipe, run), _origin(recipe, made)
    why = _other_vocabulary(own, theirs)
    if why:
        raise ConfigError(
            f"{place}.path: run {maker} has another tokenizer than this run ({why}); set "
            f"data.tokenizer: {{kind: pretrained, path: 'run:{maker}'}}"
        )
    if tokenizer is None or theirs.stored is None or own.stored == theirs.stored:
        return
    folder = _folder(theirs.stored.path, theirs.stored.revision, f"{place}.path")
    if folder is not None:
        # Its run puts its own tokens behind what lies there.
        as_stored = Model(new_tokens=bool(made.data.question_tokens))
        _compare(tokenizer, folder, as_stored, f"{place}.path")


def _refuse_lacking_tokens(recipe: Recipe, run: Run, maker: str, place: str, model: Model) -> None:
    """Refuse the model that the earlier run ``maker`` will export, if surely it has no embeddings
    for the special tokens of this run's rows and gets none."""
    made = recipe.runs[maker]
    has = _special_tokens(recipe, made)
    lacking = [token for token in run.data.question_tokens if token not in has]
    if lacking and not model.new_tokens and _origin(recipe, made).trained is not None:
        raise ConfigError(
            f"{place}.path: run {maker} has no token {lacking[0]} (data.questions); a student gets "
            "embeddings for such tokens by model.new_tokens: true"
        )


def _special_tokens(recipe: Recipe, run: Run) -> set[str]:
    """The special tokens of questions that a run's tokenizer has by the settings of the recipe."""
    tokenizer, found = run.data.tokenizer, set(run.data.question_tokens)
    if isinstance(tokenizer, PretrainedTokenizer):
        maker = exporter(recipe, tokenizer.path)
        if maker is not None:
            found |= _special_tokens(recipe, recipe.runs[maker])
    return found


def _other_vocabulary(own: _Origin, theirs: _Origin) -> str:
    """Why two runs surely have other vocabularies, as far as settings say it."""
    if own.trained is not None and theirs.trained is not None:
        return ", ".join(_training(own.trained.data, theirs.trained.data))
    for trained, stored in ((own.trained, theirs.stored), (theirs.trained, own.stored)):
        if trained is None or stored is None:
            continue
        found = _at_hand(trained.data, _Origin(stored=stored))
        settings = trained.data.tokenizer
        assert isinstance(settings, TrainedTokenizer)
        if found is not None and not may_be_trained(found, settings):
            return f"one is trained, the other is {stored.path}"
    return ""


def other_tokenizer(recipe: Recipe, a: Run, b: Run) -> str:
    """Why the rows of two runs are surely in other vocabularies, as far as settings say it."""
    return _other_vocabulary(_origin(recipe, a), _origin(recipe, b))


def _training(a: Data, b: Data) -> Iterator[str]:
    """The settings by which two tokenizers are trained that differ."""
    if a.tokenizer != b.tokenizer:
        yield "data.tokenizer.vocab_size"
    if a.question_tokens != b.question_tokens:
        yield "data.questions"
    yield from other_documents(a, b)


def other_documents(a: Data, b: Data) -> Iterator[str]:
    """The settings by which the training documents of two runs differ."""
    if not _same_sources(a.sources, b.sources):
        yield "data.sources"
    if (a.validation is None) != (b.validation is None):
        yield "data.validation"
    elif a.validation is None and a.validation_fraction != b.validation_fraction:
        yield "data.validation_fraction"


def _same_sources(a: list[Source], b: list[Source]) -> bool:
    return len(a) == len(b) and all(map(_same_source, a, b))


def _same_source(a: Source, b: Source) -> bool:
    """Whether two sources hold the same text; where it lies does not matter."""
    if a == b:
        return True
    if _is_to_come(a) or _is_to_come(b):
        return False
    if isinstance(a, HubSource) or isinstance(b, HubSource) or a.kind != b.kind:
        return False
    if a.model_dump(exclude={"path", "domain"}) != b.model_dump(exclude={"path", "domain"}):
        return False
    return sources.content_hash(a) == sources.content_hash(b)


def _is_to_come(source: Source) -> bool:
    """Whether a run has yet to write a source: replayed rows of its own, or answers."""
    if isinstance(source, ReplayedSource):
        return source.path is None
    path = Path(source.path) if isinstance(source, QuestionSource) else None
    return path is not None and path == RunFolder(path.parent).distilled and not path.exists()


def _refuse_folder(
    run: Run,
    model: Model,
    place: str,
    origin: _Origin,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse a stored model whose folder is at hand and has another tokenizer than the rows."""
    folder = _folder(str(model.path), model.revision, f"{place}.path")
    if folder is None:
        return
    if tokenizer is not None:
        _compare(tokenizer, folder, model, f"{place}.path")
        config = config_at_hand(model.model_copy(update={"slice": None, "config": {}}), place)
        if config is not None and not model.new_tokens:
            check_vocabulary(config, tokenizer, place)
    elif origin.trained is not None:
        _refuse_untrainable(run, origin.trained, model, folder, place)


def _compare(tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Model, where: str) -> None:
    """:func:`~dskd.models.build.check_tokenizer`, whose message begins with the setting."""
    try:
        check_tokenizer(tokenizer, folder, settings, where)
    except ConfigError as problem:
        text = str(problem)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from problem


def _refuse_untrainable(run: Run, trained: Run, model: Model, folder: Path, place: str) -> None:
    stored = PretrainedTokenizer(kind="pretrained", path=str(folder))
    data = run.data.model_copy(update={"tokenizer": stored})
    try:
        found = load_tokenizer(data, ())
    except ConfigError as problem:
        raise ConfigError(f"{place}.path: its tokenizer cannot be used: {problem}") from problem
    settings = trained.data.tokenizer
    assert isinstance(settings, TrainedTokenizer)
    if not may_be_trained(found, settings):
        raise ConfigError(
            f"{place}.path: {model.path} has a tokenizer of its own, which data.tokenizer (kind "
            f"trained, on data.sources) cannot become; set data.tokenizer: {{kind: pretrained, "
            f"path: {model.path}}}, and name a teacher of that vocabulary where the method has one"
        )
