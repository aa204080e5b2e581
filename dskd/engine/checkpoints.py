"""Training checkpoints that are whole or absent.

A checkpoint is written under a hidden temporary name, every file is flushed and hashed, a manifest
with sizes and hashes is added, and only then the folder gets its name ``step-00000100``. A kill at
any moment leaves the previous checkpoint as the newest. On load every file is checked first.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.engine.manifests import FORMAT, MANIFEST, Score, check_manifest, name_of, score_of
from dskd.errors import CheckpointError
from dskd.system import dist
from dskd.system.disk import writing
from dskd.system.doing import saved
from dskd.system.files import file_hash, read_manifest, sync_to_disk, write_manifest
from dskd.system.log import say

WHAT = "the checkpoint"
"""What messages call what is written here."""
_TEMPORARY = ".saving-"


@dataclass(frozen=True)
class Selection:
    """Which result of a run's evaluations compares its checkpoints, and in which direction.

    Attributes:
        metric: its key, ``<set>_<metric>``.
        higher_is_better: its direction.
        undefined: what stands for it where it is nan, which no checkpoint is kept with; None: a run
            whose metric is nan has gone wrong.
    """

    metric: str = "eval_nll"
    higher_is_better: bool = False
    undefined: float | None = None

    def score(self, value: float) -> Score:
        """The score that a value of the metric is."""
        return Score(self.metric, value, self.higher_is_better)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk.

    Attributes:
        step: completed optimiser steps.
        world, stage, precision: how it was sharded, and in which number format it was trained.
        score: None where the student was not evaluated, or is no candidate for the best.
        state: ``progress``, where training is, and ``hooks``, the state of each by its name.
    """

    folder: Path
    step: int
    world: int
    stage: int
    precision: str
    score: Score | None
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks.

    Args:
        folder: where they live, on a file system all nodes share.
        keep: how many of the newest to keep; the best one is kept besides.
        selection: by which score one is the best; None: the newest is.
    """

    def __init__(self, folder: Path, keep: int, selection: Selection | None) -> None:
        self.folder = folder
        self._keep = keep
        self._selection = selection

    def clean(self) -> None:
        """Remove what an interrupted save or conversion left behind."""
        with dist.agreed():
            for leftover in self.folder.glob(".*-step-*") if dist.rank() == 0 else ():
                shutil.rmtree(leftover)

    def begin(self, step: int) -> str:
        """The temporary tag under :attr:`folder` that the engine writes into."""
        with dist.agreed(), writing(WHAT, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return f"{_TEMPORARY}{name_of(step)}"

    def abandon(self, step: int) -> None:
        """Remove what was written since :meth:`begin`: all ranks know that it cannot be whole."""
        if dist.rank() == 0:
            shutil.rmtree(self.folder / f"{_TEMPORARY}{name_of(step)}", ignore_errors=True)
        dist.barrier()  # a rank that ends takes the others with it

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Hash and flush what the engine wrote after :meth:`begin`, then give it its name.

        ``about`` holds ``world``, ``stage``, ``precision``, ``score`` and ``state``, see
        :class:`Saved`.

        Raises:
            DiskError: a rank cannot write; on all of them.
        """
        dist.barrier()
        temporary = self.folder / f"{_TEMPORARY}{name_of(step)}"
        # A file system of many nodes may show each only what it wrote itself yet.
        names = sorted({n for part in dist.gather_objects(_names(temporary)) for n in part})
        mine = {}
        with dist.agreed(), writing(WHAT, temporary):
            mine = {name: _seal(temporary / name) for name in names[dist.rank() :: dist.world()]}
        files = {k: v for part in dist.gather_objects(mine) for k, v in sorted(part.items())}
        with dist.agreed():
            if dist.rank() == 0:
                content = {"format": FORMAT, "step": step, **about, "files": files}
                write_manifest(temporary / MANIFEST, content, WHAT)
                final = self.folder / name_of(step)
                with writing(WHAT, final):
                    temporary.rename(final)
                    sync_to_disk(self.folder)
                self._prune()
        saved(self.folder / name_of(step))

    def latest(self) -> Saved | None:
        """The newest checkpoint, checked whole; None if there is none.

        Raises:
            CheckpointError: it is damaged; the message names the file and what can be done.
        """
        names = dist.broadcast_object(self._listed())
        if not names:
            return None
        newest = self._open(names[-1])
        saved(newest.folder)
        return newest

    def best(self) -> Saved:
        """The kept checkpoint with the best score (the first of equals), checked; the newest where
        no score selects or none has one."""
        return self._open(dist.on_rank0(self._best_name))

    def steps(self) -> list[int]:
        """Of which steps there are checkpoints, as this rank alone sees it, unchecked."""
        numbers = [name.removeprefix("step-") for name in self._listed()]
        return [int(number) for number in numbers if number.isdecimal()]

    def manifests(self) -> dict[int, dict[str, Any]]:
        """What the manifest of each checkpoint says, by step; a damaged one is left out, and no
        other file is looked at."""

        def read() -> dict[int, dict[str, Any]]:
            found = {}
            for name in self._listed():
                with suppress(CheckpointError):
                    manifest = self._manifest(name)
                    found[manifest["step"]] = manifest
            return found

        return dist.on_rank0(read)

    def _listed(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("step-*") if p.is_dir())

    def _best_name(self) -> str:
        names = self._listed()
        if not names:
            raise CheckpointError(f"{self.folder}: no checkpoint is left to export; train again")
        selection = self._selection
        if selection is None:
            return names[-1]
        scores = {name: score_of(self._manifest(name)) for name in names}
        # How bad each is; min takes the first of equals, as an end by patience counts them.
        sign = -1.0 if selection.higher_is_better else 1.0
        losses = {name: sign * score.value for name, score in scores.items() if score}
        return min(losses, key=losses.__getitem__) if losses else names[-1]

    def _manifest(self, name: str) -> dict[str, Any]:
        path = self.folder / name / MANIFEST
        manifest = read_manifest(path, CheckpointError)
        check_manifest(manifest, path)
        return manifest

    def _open(self, name: str) -> Saved:
        folder = self.folder / name
        with dist.agreed():
            try:
                manifest = self._manifest(name)
                self._verify(name, manifest["files"])
            except CheckpointError as error:
                text = f"{error}; to go on from the checkpoint before it, delete {folder}"
                raise CheckpointError(text) from error
        about = {k: manifest[k] for k in ("step", "world", "stage", "precision", "state")}
        return Saved(folder=folder, score=score_of(manifest), **about)

    def _verify(self, name: str, files: dict[str, Any]) -> None:
        """Check this rank's share of the files against the manifest."""
        for file in sorted(files)[dist.rank() :: dist.world()]:
            path = self.folder / name / file
            if not path.is_file():
                raise CheckpointError(f"{path}: missing")
            if path.stat().st_size != files[file]["bytes"]:
                raise CheckpointError(f"{path}: truncated or grown, its size is not as saved")
            if file_hash(path) != files[file]["xxh3"]:
                raise CheckpointError(f"{path}: damaged, its checksum is not as saved")

    def _prune(self) -> None:
        names = self._listed()
        try:
            kept = {*names[-self._keep :], self._best_name()}
        except CheckpointError as problem:
            say(f"no checkpoint is removed: {problem}")
            return
        for name in names:
            if name not in kept:
                # Renamed first: a kill inside rmtree must not leave half a checkpoint so named.
                doomed = self.folder / f".dead-{name}"
                (self.folder / name).rename(doomed)
                shutil.rmtree(doomed)


def _names(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to disk; its size and hash."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
