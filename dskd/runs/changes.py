"""Settings other than those of an earlier call: which are refused, and how a run goes on by others.

A run that is trained to its end, or stopped before, may get more steps, another rate or schedule.
The steps that are taken stay as they are; the others are taken by the new settings. What was made
of a finished run's last step is made anew; that it was evaluated there, and may have been best,
stays.

``config.yaml`` holds the settings by which what lies in the folder was made. So it is written last:
whenever a job is killed, the next call finds either the old settings with a run that they lead to,
of which some results may be missing, or the new ones with all old results gone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dskd.engine.checkpoints import Checkpoints
from dskd.engine.manifests import name_of
from dskd.engine.row_masks import masks_of
from dskd.engine.stage import Stage
from dskd.errors import CheckpointError, ConfigError
from dskd.methods.base import Method, build_method
from dskd.runs.change_log import changes_of, note
from dskd.runs.history import read_summary
from dskd.runs.stages import stages_of
from dskd.runs.vocabularies import named
from dskd.settings.compare import OF_STEPS, differences
from dskd.settings.folders import folder_of
from dskd.settings.length import is_in_steps, with_steps
from dskd.settings.recipe import SINGLE, Recipe, dump_run, read
from dskd.settings.run import Run
from dskd.system.disk import writing
from dskd.system.files import write_atomic
from dskd.system.log import say


def refuse_changes(recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Refuse settings by which what lies in the runs' folders was not made and cannot go on.

    Raises:
        ConfigError, CheckpointError: names the folder, and the settings or what is missing.
    """
    for name, run in recipe.runs.items():
        stages = stages_of(masks_of(run), methods[name])
        _refuse_other_settings(run, stages)
        before = settings_in(run)
        if before is not None and is_in_steps(before.train) and is_in_steps(run.train):
            _refuse_going_on(recipe, methods, name, before, rows=0)


def write_settings(recipe: Recipe) -> None:
    """Write the settings of each run, but for one with steps that were taken by other settings:
    see :func:`go_on`."""
    for run in recipe.runs.values():
        begun = _taken(run) or folder_of(run).summary.exists()
        if not (begun and is_changed(run)):
            _write(run)


def is_changed(run: Run) -> bool:
    """Whether a run is to go on by other settings than those that lie in its folder."""
    before = settings_in(run)
    return before is not None and bool(changes_of(before, run))


def go_on(recipe: Recipe, methods: Mapping[str, Method], name: str, rows: int) -> None:
    """Have a run go on by its settings if others lie in its folder: see the head of this file.

    Args:
        rows: of its training data.

    Raises:
        ConfigError, CheckpointError: it cannot; nothing is changed.
        DiskError: something cannot be removed or written.
    """
    run = recipe.runs[name]
    before, folder = settings_in(run), folder_of(run)
    if before is None:  # whoever removed it meant it
        return
    longer = _refuse_going_on(recipe, methods, name, before, rows)
    changed, taken = changes_of(before, run), _taken(run)
    # Nothing of the old settings is left where no step is, nor of the new ones where none comes.
    noted = changed if taken and (longer or not folder.summary.exists()) else {}
    if longer:
        _remove_results(run, stages_of(masks_of(run), methods[name]))
    note(folder, before, noted, taken)
    if changed:
        _write(run)
    for setting, (was, now) in noted.items():
        say(f"{run.out}: after step {taken} {setting} is {now} (was {was})")


def settings_in(run: Run) -> Run | None:
    """The settings that lie in a run's folder; None if there are none."""
    path = folder_of(run).config
    return read(path).runs[SINGLE] if path.is_file() else None


def left(run: Run, stages: Sequence[Stage]) -> bool:
    """Whether the run's folder has something that one of the stages leaves."""
    return any(found for s in stages for pattern in s.leaves for found in run.out.glob(pattern))


def _write(run: Run) -> None:
    write_atomic(folder_of(run).config, dump_run(run, here=True).encode(), "the settings")


def _refuse_other_settings(run: Run, stages: Sequence[Stage]) -> None:
    before = settings_in(run)
    if before is None:
        # A store says itself what it belongs to, so one may have been copied here.
        if left(run, [stage for stage in stages if stage.whole is not None]):
            raise ConfigError(
                f"{run.out} holds results, but no {folder_of(run).config.name} that says by which "
                f"settings they were made; choose another `out`, or delete the folder"
            )
        return
    # With other masks, or by another method, it had stages whose files these know nothing of.
    stages = (*stages, *stages_of(masks_of(before), build_method(before.method)))
    if not left(run, stages):
        return  # nothing was made with the other settings yet
    changed = differences(before, run, chosen=left(run, [s for s in stages if s.chosen]))
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{run.out} was started with other settings:\n  {listed}\n"
            f"Set them back, or choose another `out`, or delete the folder"
        )


def _refuse_going_on(
    recipe: Recipe, methods: Mapping[str, Method], name: str, before: Run, rows: int
) -> bool:
    """Refuse what cannot change any step of a run; whether a finished run is to be lengthened.

    Args:
        before: the settings that lie in its folder.
        rows: of its training data; of no matter where all lengths are in steps.
    """
    now, folder = recipe.runs[name], folder_of(recipe.runs[name])
    names = sorted(changes_of(before, now).keys() & {*OF_STEPS})
    counted_before, counted = with_steps(before, rows), with_steps(now, rows)
    taken, finished = _taken(now), folder.summary.exists()
    # Epochs that are as many steps as before are no change.
    changed = changes_of(counted_before, counted).keys() & {*OF_STEPS}
    if not changed or not (taken or finished):
        return False
    old, new = counted_before.train, counted.train
    if finished:
        there, taken = taken, read_summary(now.out)["steps"]
        if taken < old.steps:
            raise ConfigError(
                f"{now.out}: training ended by itself after step {taken}, before train.steps "
                f"{old.steps}; it takes no more; choose another `out`"
            )
    if new.steps <= taken:
        raise ConfigError(
            f"{now.out} has taken {taken} steps, which {', '.join(names)} cannot change "
            f"any more; set train.steps to more than {taken}, or set the others back"
        )
    if not finished:
        return False
    if there != taken:
        raise CheckpointError(
            f"{folder.checkpoints / name_of(taken)}: the last checkpoint is gone, so the run "
            f"cannot be lengthened; choose another `out`"
        )
    _refuse_readers(recipe, methods, name)
    return True


def _taken(run: Run) -> int:
    """The step of a run's newest checkpoint, 0 if there is none."""
    return max(Checkpoints(folder_of(run).checkpoints, 1, None).steps(), default=0)


def _refuse_readers(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse to make the results of a run anew from which another run of the recipe has made its
    own."""
    made = _after_training(stages_of(masks_of(recipe.runs[name]), methods[name]))
    for other, run in recipe.runs.items():
        if other == name or not left(run, stages_of(masks_of(run), methods[other])):
            continue
        for place, path in _paths(run):
            if _is_of(path, recipe.runs[name].out, made):
                raise ConfigError(
                    f"{named(recipe, other, place)}: {path} is to be made anew, as run {name} goes "
                    f"on by other settings, and {run.out} holds what was made of it; delete that "
                    f"folder, so that it is made anew, too, or choose another `out`"
                )


def _paths(run: Run) -> Iterator[tuple[str, str]]:
    """Settings that may be paths of what another run makes. A tokenizer is none: no training
    changes it."""
    tree = run.model_dump(mode="json")
    tree["out"] = tree["data"]["tokenizer"] = tree["data"]["folder"] = None
    yield from _texts(tree, "")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value:
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else key)


def _is_of(path: str, out: Path, made: Sequence[Stage]) -> bool:
    """Whether a path is a run's folder, or leads to what some of its stages leave there."""
    first, *_ = Path(os.path.relpath(path, out)).parts or (".",)
    return first == "." or any(
        fnmatch(first, Path(pattern).parts[0]) for stage in made for pattern in _patterns(stage)
    )


def _after_training(stages: Sequence[Stage]) -> Sequence[Stage]:
    return stages[[stage.name for stage in stages].index("train") + 1 :]


def _patterns(stage: Stage) -> list[str]:
    """Of all that a stage leaves, first what says that it is whole."""
    return [*([] if stage.whole is None else [stage.whole]), *stage.leaves]


def _remove_results(run: Run, stages: Sequence[Stage]) -> None:
    """Remove what was made of a run's last step: the last stage's results first, so that none ever
    lie there without what they were made of; the summary last, without which it is not finished."""
    for stage in reversed(_after_training(stages)):
        for pattern in _patterns(stage):
            for path in list(run.out.glob(pattern)):
                _remove(path)
    _remove(folder_of(run).summary)


def _remove(path: Path) -> None:
    with writing("what is made anew", path):
        if path.is_dir():
            # Renamed first: a kill inside rmtree must not leave half a folder so named.
            doomed = path.with_name(f".{path.name}.gone")
            path.rename(doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink()
