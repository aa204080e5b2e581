"""Whether an earlier run of a recipe writes the answers that a later one is to learn, before either
is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dskd.engine.stage import Stage
from dskd.errors import ConfigError
from dskd.runs.vocabularies import named
from dskd.settings.examples import QuestionSource
from dskd.settings.folders import folder_of
from dskd.settings.recipe import Recipe


def refuse_missing_answers(
    recipe: Recipe, stages: Mapping[str, Sequence[Stage]], name: str
) -> None:
    """Refuse questions of a run that are another's with its model's answers, if by its settings
    that one writes none before.

    Args:
        stages: what each run of the recipe carries out.

    Raises:
        ConfigError: names the setting and the other run.
    """
    data, runs = recipe.runs[name].data, list(recipe.runs)
    written = {os.path.abspath(folder_of(run).distilled): n for n, run in recipe.runs.items()}
    groups = {"sources": data.sources, "validation": data.validation, "memory": data.memory}
    for group, found in groups.items():
        for index, source in enumerate(found or ()):
            if not isinstance(source, QuestionSource):
                continue
            maker = written.get(os.path.abspath(source.path))
            if maker is None:
                continue
            place = folder_of(recipe.runs[maker]).distilled
            where = named(recipe, name, f"data.{group}.{index}.path")
            if runs.index(maker) >= runs.index(name):
                which = "this run itself" if maker == name else f"the later run {maker}"
                raise ConfigError(f"{where}: {source.path} is what {which} writes in its end")
            if not any(stage.whole == place.name for stage in stages[maker]):
                text = f"by its settings run {maker} writes no answers of its model"
                raise ConfigError(f"{where}: {text} ({place.name})")
