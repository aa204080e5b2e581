"""What folders on the command line hold: runs, and what each is called in a report; a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dskd.errors import CheckpointError, ConfigError
from dskd.settings.data import Data
from dskd.settings.folders import RunFolder
from dskd.settings.recipe import SINGLE, read


def runs_in(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs in the folders, by name: a folder is a run's, or a recipe's that holds those of
    several, of which the trained ones count.

    A run is called as its folder is; those of the same name by as much of their paths as tells them
    apart.

    Raises:
        ConfigError: a run is given twice.
        CheckpointError: none of a recipe's runs is trained.
    """
    found = [
        run for folder in folders for run in ([folder] if is_run(folder) else _trained(folder))
    ]
    parts = [run.resolve().parts for run in found]
    for index, run in enumerate(found):
        if parts[index] in parts[:index]:
            raise ConfigError(f"report: {run} is given twice")
    return dict(zip(map("/".join, _ends(parts)), found, strict=True))


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of nothing: it holds no runs."""
    return RunFolder(folder).config.is_file() or not _runs_below(folder)


def model_at(path: Path, command: str) -> tuple[Path, Data | None]:
    """The folder of the model that a run has exported, or that lies at ``path`` itself, and, of a
    run, the settings of its data.

    Raises:
        ConfigError: there is none; the message names the command.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        if not (path / "config.json").is_file():
            text = "is the folder of no run (config.yaml) and no model"
            raise ConfigError(f"{command}: {path} {text}")
        return path, None
    if not run.export.is_dir():
        raise ConfigError(
            f"{command}: {path} has no export/ yet; train it with until=export or later"
        )
    return run.export, read(run.config).runs[SINGLE].data


def _runs_below(folder: Path) -> list[Path]:
    """The folders of runs that lie in that of a recipe."""
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def _trained(folder: Path) -> list[Path]:
    runs = _runs_below(folder)
    trained = [run for run in runs if RunFolder(run).summary.is_file()]
    if not trained:
        names = ", ".join(run.name for run in runs)
        raise CheckpointError(f"{folder}: none of its runs is trained to its end: {names}")
    return trained


def _ends(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The shortest end of each path that none of the others has; no two are the same."""
    ends = []
    for path in paths:
        length = 1
        while sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        ends.append(path[-length:])
    return ends
