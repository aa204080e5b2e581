"""What a run writes down about itself in its summary, for readers of a report: on what data it was
trained and evaluated, by which versions, on what machine, and how its time was spent."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dskd import __version__
from dskd.errors import CheckpointError
from dskd.runs.cached_rows import caches_of
from dskd.runs.card import as_shared
from dskd.runs.context import RunContext
from dskd.settings.folders import RunFolder
from dskd.settings.run import Run
from dskd.stores.cost import Cost, read_costs, total, way_to
from dskd.stores.manifest import read_spec
from dskd.system import dist
from dskd.system.device import on_gpu

KEY = "about"
"""Where a summary keeps it."""
LIBRARIES = ("torch", "deepspeed", "transformers")
_Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataOf(_Record):
    """The data of a run.

    Attributes:
        sources: of the training rows, a text each.
        validation: of the validation rows, if they have sources of their own; else they are held
            out of the others.
        rows, tokens: to train on.
        held_out: rows to validate on; ``evaluated``: those of them that are looked at.
        fingerprint: of all rows, as prepared.
        evaluation: of the validation rows that are looked at, wherever they come from.
    """

    sources: list[str]
    validation: list[str]
    rows: _Count
    tokens: _Count
    held_out: _Count
    evaluated: _Count
    fingerprint: str
    evaluation: str


class Spent(_Record):
    """Time on the clock.

    Attributes:
        own: of this run's calls.
        shared: of other runs, for what this one found made.
    """

    own: float = Field(ge=0)
    shared: float = Field(ge=0)


class Capture(_Record):
    """What the caches of a run hold and what they cost, whoever filled them."""

    seconds: Spent
    rows: _Count
    tokens: _Count
    passes: _Count
    bytes: _Count


class About(_Record):
    """What a run says about itself.

    Attributes:
        ended: date of the end of its training, of the last call if it was lengthened; and so are
            the versions, the device and the number of ranks.
        preparing: of the rows; None: not known, they were prepared by an earlier dskd.
        capture: None: it has no cache, or it is not known what it cost.
    """

    ended: str
    python: str
    dskd: str
    libraries: dict[str, str]
    device: str
    ranks: _Count
    data: DataOf
    preparing: Spent | None
    capture: Capture | None


def about_run(context: RunContext, evaluation: str) -> dict[str, Any]:
    """What a run that has been trained says about itself (collective).

    Args:
        evaluation: fingerprint of the validation rows that are looked at.

    Raises:
        StoreError: what was written down about a cache is damaged.
    """
    made = dist.on_rank0(
        lambda: About(
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            python=platform.python_version(),
            dskd=__version__,
            libraries={name: version(name) for name in LIBRARIES},
            device=_device(),
            ranks=dist.world(),
            data=_data(context, evaluation),
            preparing=_preparing(context),
            capture=_capture(context),
        )
    )
    return made.model_dump()


def read_about(folder: Path, summary: dict[str, Any]) -> About | None:
    """What the summary in a run's folder says of it; None: it is of an earlier dskd.

    Raises:
        CheckpointError: it is damaged.
    """
    if KEY not in summary:
        return None
    try:
        return About.model_validate(summary[KEY])
    except ValidationError as problem:
        place = ".".join(map(str, (KEY, *problem.errors()[0]["loc"])))
        path = RunFolder(folder).summary
        raise CheckpointError(f"{path}: damaged, '{place}' is not as dskd writes it") from problem


def _device() -> str:
    return torch.cuda.get_device_name() if on_gpu() else f"CPU ({platform.machine()})"


def _data(context: RunContext, evaluation: str) -> DataOf:
    data, prepared = context.run.data, context.prepared
    held_out, limit = len(prepared.validation), context.run.evaluation.rows
    return DataOf(
        sources=list(_texts(context.run, data.sources)),
        validation=list(_texts(context.run, data.validation or [])),
        rows=len(prepared.train),
        tokens=prepared.train.tokens,
        held_out=held_out,
        evaluated=held_out if limit is None else min(limit, held_out),
        fingerprint=prepared.fingerprint,
        evaluation=evaluation,
    )


def _texts(run: Run, sources: Sequence[Any]) -> Iterator[str]:
    """Each source as others may read it: its domain, its kind, and where it lies."""
    for source in sources:
        of = as_shared(source.model_dump(mode="json"), run)
        parts = [of["kind"], *(str(of[n]) for n in ("path", "config", "split") if of.get(n))]
        if of.get("documents"):
            parts.append(f"({of['documents']:,} documents)")
        yield f"{of['domain']}: {' '.join(parts)}"


def _preparing(context: RunContext) -> Spent | None:
    costs = read_costs(context.prepared.folder)
    if costs is None:
        return None
    return _spent(costs.by, way_to(context.run.out, context.prepared.folder))


def _capture(context: RunContext) -> Capture | None:
    if not context.method.wants_teacher():
        return None
    own, shared, found, nbytes = 0.0, 0.0, [], 0
    for cache in caches_of(context.run):
        costs = read_costs(cache.folder)
        if costs is None:
            return None
        spent = _spent(costs.by, way_to(context.run.out, cache.folder))
        own, shared = own + spent.own, shared + spent.shared
        found.append(costs.total)
        nbytes += sum(record.nbytes for record in read_spec(cache.folder)[1] or [])
    if not found:
        return None
    whole = total(found)
    counts = {name: getattr(whole, name) for name in ("rows", "tokens", "passes")}
    return Capture(seconds=Spent(own=own, shared=shared), bytes=nbytes, **counts)


def _spent(by: dict[str, Cost], own: str) -> Spent:
    """The time of a run, and that of others."""
    others = total(cost for run, cost in by.items() if run != own)
    return Spent(own=by.get(own, Cost()).seconds, shared=others.seconds)
