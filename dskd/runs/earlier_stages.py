"""Whether what a method reads of other runs is made there, and read where it is made, as far as it
is known beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dskd.engine.row_masks import masks_of
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.runs.stages import stages_of
from dskd.runs.vocabularies import exporter, named
from dskd.settings.examples import ReplayedSource
from dskd.settings.recipe import Recipe


def refuse_missing_stages(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse folders in which no stage of an earlier run leaves what the run's method reads, or
    leaves another kind of it, and other folders in which it is not.

    Raises:
        ConfigError: names the setting and the run, or the folder.
    """
    folders = {os.path.abspath(run.out): other for other, run in recipe.runs.items()}
    earlier = list(recipe.runs)[: list(recipe.runs).index(name)]
    for setting, (folder, stage) in methods[name].earlier_stages().items():
        where = named(recipe, name, f"method.{setting}")
        maker = folders.get(os.path.abspath(folder))
        if maker is None:
            if stage.whole is not None and not (folder / stage.whole).exists():
                raise ConfigError(f"{where}: {folder}: there is no {stage.whole} in it")
        elif maker not in earlier:
            raise ConfigError(f"{where}: {folder} is of no earlier run of the recipe but {maker}")
        else:
            run = recipe.runs[maker]
            stages = stages_of(masks_of(run), methods[maker])
            made = {each.name: each.kind for each in stages if each.wanted(run)}
            if stage.name not in made:
                raise ConfigError(
                    f"{where}: run {maker} has no stage {stage.name}, which its method "
                    f"{methods[maker].kind} does not bring by these settings"
                )
            if made[stage.name] != stage.kind:
                text = f"run {maker} leaves another kind ({made[stage.name]}) than this run's"
                raise ConfigError(f"{where}: {text} ({stage.kind})")


def refuse_unread(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse a run that makes what is for the sake of earlier tasks, starts as the export of a run
    that makes it, too, and has nothing of that: it would only seem to go on from it. Or one whose
    rows of earlier tasks such a run is to write, which has not learnt to.

    Raises:
        ConfigError: names the setting and the other run.
    """
    run, method = recipe.runs[name], methods[name]
    maker = exporter(recipe, run.model.path)
    if maker is None:
        return
    start = f"run {maker}, as whose export this one starts"
    if method.writes_replayed and methods[maker].writes_replayed and not run.data.replayed_domains:
        text = f"none is replayed, but {start}, has a task, and by method rows of it are written"
        raise ConfigError(f"{named(recipe, name, 'data.sources')}: {text}")
    made = recipe.runs[maker].data.questions
    written = any(isinstance(s, ReplayedSource) and s.path is None for s in run.data.sources)
    if written and run.data.memory is None and made is not None and not made.modelling:
        text = f"{start}, is to write rows to replay, but learns none (data.questions.modelling)"
        raise ConfigError(f"{named(recipe, name, 'data.sources')}: {text}")
    theirs = {s.name for s in stages_of(masks_of(recipe.runs[maker]), methods[maker])}
    read = {stage.name for _, stage in method.earlier_stages().values()}
    for stage in method.stages():
        if stage.kind and stage.name in theirs - read:
            text = f"{start}, leaves {stage.name}, of which nothing is read here"
            raise ConfigError(f"{named(recipe, name, 'method')}: {text}")
