"""What a store cost to make, kept beside it: ``cost.json``. So is what prepared rows cost.

A store may be made by several runs, each of which adds the rows that it reads, and in several
calls. So the cost is kept by run, as the way from the store to the run's folder (``..``), which
stays right where a recipe's folder is moved. It is added to after each round of shards: a killed
call loses its last round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dskd.errors import StoreError
from dskd.stores.sweep import Work
from dskd.system.files import read_record, write_manifest

FILE = "cost.json"
_Count = Annotated[int, Field(ge=0)]


class Cost(BaseModel):
    """What was spent.

    Attributes:
        seconds: on the clock, loading the model included.
        rows: that the model read, each once for each draw.
        tokens: of these rows.
        passes: of the model over batches of them, on all ranks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seconds: float = Field(0.0, ge=0)
    rows: _Count = 0
    tokens: _Count = 0
    passes: _Count = 0

    def __add__(self, other: Cost) -> Cost:
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in Cost.model_fields)
        return Cost(**{name: mine + theirs for name, mine, theirs in pairs})


class Costs(BaseModel):
    """What a store cost each of the runs that made it, by the way to the run's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    by: dict[str, Cost] = {}

    @property
    def total(self) -> Cost:
        """What it cost all of them."""
        return total(self.by.values())


def total(costs: Iterable[Cost]) -> Cost:
    """Several costs as one."""
    return sum(costs, Cost())


def read_costs(folder: Path) -> Costs | None:
    """What the store in a folder cost; None if that was not written down.

    Raises:
        StoreError: the file is damaged.
    """
    path = folder / FILE
    return read_record(path, Costs, StoreError) if path.exists() else None


def way_to(run: Path, folder: Path) -> str:
    """By which name a run's cost is kept in a store's folder."""
    return Path(os.path.relpath(run, folder)).as_posix()


def note(folder: Path, run: Path, spent: Cost) -> None:
    """Add to what a run has spent on what lies in a folder; one process at a time.

    Raises:
        StoreError: what was written down before is damaged.
        DiskError: it cannot be written.
    """
    by, name = (read_costs(folder) or Costs()).by, way_to(run, folder)
    costs = Costs(by={**by, name: by.get(name, Cost()) + spent})
    write_manifest(folder / FILE, costs.model_dump(), "what was spent")


class Meter:
    """Adds up what one call of a run spends on a store, from now on.

    Args:
        folder: of the store.
        run: the run's folder.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self._folder = folder
        self._run = run
        self._since = time.monotonic()

    def add(self, work: Work) -> None:
        """Write down a round, on rank 0; as :func:`note`."""
        now = time.monotonic()
        spent = Cost(seconds=now - self._since, **work._asdict())
        self._since = now
        note(self._folder, self._run, spent)
