"""Which training rows a cache holds: those that the runs read that name it.

A run reads the first ``train.steps`` times ``train.batch`` rows of a stream that its seed decides
(``data/loader.py``): less than an epoch, or masks that no epoch comes to, need not be captured. A
run that is lengthened reads more, which are captured before it goes on. ``teacher.cache`` says
otherwise: for runs of other recipes, or for steps to come, while the teacher is still at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd.data.loader import rows_taken
from dskd.engine.ds_config import precision_of
from dskd.engine.run_config import student_config
from dskd.errors import ConfigError
from dskd.runs.context import RunContext
from dskd.settings.folders import cache_folder
from dskd.settings.length import with_steps
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, domain_of, each_teacher, section_name
from dskd.stores.cost import read_costs
from dskd.stores.manifest import MANIFEST, read_spec
from dskd.stores.store import lacking


class CacheOf(NamedTuple):
    """A cache of a run.

    Attributes:
        name: of its teacher, as by ``each_teacher``.
        where: that teacher's setting, for messages.
    """

    name: str | None
    teacher: CachedTeacher
    folder: Path
    where: str


def caches_of(run: Run) -> list[CacheOf]:
    """The caches that a run reads, if its method wants its teacher."""
    return [
        CacheOf(name, teacher, cache_folder(run, name), section_name(name))
        for name, teacher in each_teacher(run.teacher).items()
        if isinstance(teacher, CachedTeacher)
    ]


def rows_to_capture(context: RunContext, folder: Path) -> NDArray[np.bool_]:
    """The rows that the runs of a recipe ask of a cache, bool [draws, rows]; those of other domains
    among them (collective as ``prepared`` is)."""
    rows, draws = len(context.prepared.train), context.view.draws
    assert draws is not None, "RowMasks.problems refuses it by name"
    wanted_DR = np.zeros((draws, rows), bool)
    for run, cache in _readers(context, folder):
        count = _asked(cache.teacher, rows) or _read(run, rows, draws)
        wanted_DR |= rows_taken(rows, run.seed, count, draws)
    return wanted_DR


def refuse_missing_rows(context: RunContext) -> None:
    """Refuse a run that would read rows which its caches do not hold and it does not capture.

    Raises:
        ConfigError: names the setting, and how many there are.
        StoreError: a cache is damaged.
    """
    if not context.method.wants_teacher():
        return
    rows, draws = len(context.prepared.train), context.view.draws
    if draws is None:
        return  # refused otherwise
    read_DR = rows_taken(rows, context.run.seed, _read(context.run, rows, draws), draws)
    for cache in caches_of(context.run):
        read_costs(cache.folder)  # the summary needs it, after all the training
        asked = _asked(cache.teacher, rows)
        if cache.teacher.model is None:
            _refuse_lacking(context, cache, read_DR)
        elif asked is not None:
            captured_DR = rows_taken(rows, context.run.seed, asked, draws)
            if missing := int((read_DR & ~captured_DR).sum()):
                raise ConfigError(
                    f"{cache.where}.cache: {asked:,} rows, but the run reads {missing:,} others; "
                    f"leave it out, so that all are captured that are read"
                )


def _refuse_lacking(context: RunContext, cache: CacheOf, read_DR: NDArray[np.bool_]) -> None:
    """Refuse a cache of before that lacks rows, which this run does not capture."""
    if not (cache.folder / MANIFEST).exists():
        return  # refused otherwise
    spec, records = read_spec(cache.folder)
    if records is None or (spec.draws, spec.rows) != read_DR.shape:
        return
    train, own = context.prepared.train, domain_of(cache.name)
    if own is not None:
        index = context.prepared.domains.index(own)
        read_DR = read_DR & (train.domains_B(np.arange(len(train))) == index)
    if missing := lacking(cache.folder, spec, records, read_DR):
        raise ConfigError(
            f"{cache.where}.path: {cache.folder} lacks {missing:,} of the {int(read_DR.sum()):,} "
            f"rows that the run reads; name the model that it was captured from "
            f"({cache.where}.model), so that they are added, or capture it with "
            f"{cache.where}.cache.epochs"
        )


def _readers(context: RunContext, folder: Path) -> Iterator[tuple[Run, CacheOf]]:
    """The run and those of its recipe that read a cache, with their lengths in steps."""
    rows = len(context.prepared.train)
    others = [run for run in context.beside if run.out != context.run.out]
    for run in (context.run, *others):
        for cache in caches_of(run):
            if os.path.abspath(cache.folder) == os.path.abspath(folder):
                yield with_steps(run, rows), cache


def _asked(teacher: CachedTeacher, rows: int) -> int | None:
    """How many rows of the stream the settings ask for; None: those that are read."""
    if teacher.cache is None:
        return None
    return teacher.cache.rows or teacher.cache.epochs * rows


def _read(run: Run, rows: int, draws: int) -> int:
    """How many rows of the stream a run reads, its length in steps."""
    if precision_of(student_config(run, hidden=1)) == "fp16":
        return draws * rows  # a step that overflow skips is taken again, by the rows that follow
    return run.train.steps * run.train.batch
