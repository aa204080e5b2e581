"""Whether what a method reads of other runs is made there, as far as it is known beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dskd.engine.row_masks import masks_of
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.runs.stages import stages_of
from dskd.runs.vocabularies import named
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
