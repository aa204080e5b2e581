"""Whether an earlier run of a recipe writes the answers that a later one is to learn, before either
is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dskd.engine.stage import Stage
from dskd.errors import ConfigError
from dskd.runs.vocabularies import named
from dskd.settings.data import Data, Source
from dskd.settings.examples import QuestionSource, ReplayedSource
from dskd.settings.folders import folder_of
from dskd.settings.recipe import Recipe
from dskd.settings.sets import named_sources


def refuse_missing_answers(
    recipe: Recipe, stages: Mapping[str, Sequence[Stage]], name: str
) -> None:
    """Refuse questions of a run that are another's with its model's answers, if by its settings
    that one writes none before and none are there, or if of those alone no row could be held out.

    Args:
        stages: what each run of the recipe carries out.

    Raises:
        ConfigError: names the setting and the other run.
    """
    run, runs = recipe.runs[name], list(recipe.runs)
    data = run.data
    written = {os.path.abspath(folder_of(other).distilled): n for n, other in recipe.runs.items()}
    groups = {"sources": data.sources, "validation": data.validation, "memory": data.memory}
    sources = [
        (f"data.{group}.{index}", source)
        for group, found in groups.items()
        for index, source in enumerate(found or ())
    ]
    for place, source in (*sources, *named_sources(run.evaluation.sets)):
        maker = _maker(written, source)
        if maker is None:
            continue
        file, where = folder_of(recipe.runs[maker]).distilled, named(recipe, name, f"{place}.path")
        if runs.index(maker) >= runs.index(name):
            which = "this run itself" if maker == name else f"the later run {maker}"
            raise ConfigError(f"{where}: {file} is what {which} writes in its end")
        if not file.exists() and not any(s.whole == file.name for s in stages[maker]):
            text = f"by its settings run {maker} writes no answers of its model"
            raise ConfigError(f"{where}: {text} ({file.name})")
    if data.validation is None:
        own = [s for s in data.sources if not isinstance(s, ReplayedSource)]
        makers = [_maker(written, source) for source in own]
        if all(maker and _holds_out(recipe.runs[maker].data, data) for maker in makers):
            where = named(recipe, name, "data.validation")
            text = f"run {makers[0]} holds out rows by itself, and its answers are to the others"
            raise ConfigError(f"{where}: missing; {text}, so that none is left to hold out")


def _maker(written: Mapping[str, str], source: Source) -> str | None:
    """The run whose model's answers a source is."""
    asked = isinstance(source, QuestionSource)
    return written.get(os.path.abspath(source.path)) if asked else None


def _holds_out(theirs: Data, own: Data) -> bool:
    """Whether of the questions that a run learnt another one holds out none: both by the same hash
    of their texts."""
    return theirs.validation is None and theirs.validation_fraction >= own.validation_fraction
