"""Settings of the teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dskd.settings.base import FREE, RunPath, Section
from dskd.settings.model import Model

Precision = Literal["auto", "fp32", "bf16", "fp16"]


TINY = {
    "model_type": "roberta",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


class LiveTeacher(Section):
    """A frozen model run on every batch."""

    kind: Literal["live"] = "live"
    model: Model = Model(config=TINY)
    deepspeed: Annotated[str | None, RunPath(), FREE] = None
    """DeepSpeed JSON (ZeRO-3, with or without offload) that shards the teacher; null: a replica
    on every rank."""
    precision: Precision = "auto"


class CachedTeacher(Section):
    """Top-k logits captured beforehand; captured by this run when ``path`` does not exist yet."""

    kind: Literal["cached"]
    path: Annotated[Path | None, RunPath("cache")] = None
    """The cache's folder; null: ``<out>/cache``."""
    model: Model | None = None
    """The model to capture from; null: the cache must exist."""
    deepspeed: Annotated[str | None, RunPath(), FREE] = None
    """As for a live teacher, used by the capture."""
    precision: Precision = "auto"
    k: int = Field(32, ge=1)
    """Logits kept per position when capturing."""
    use_k: int | None = Field(None, ge=1)
    """Logits used per position in training; null: all that are kept."""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [2.0], min_length=1
    )
    """Temperatures whose tail mass is stored."""
    values: Literal["fp16", "fp32"] = "fp16"
    """Storage type of the log-probabilities."""
    rows_per_shard: Annotated[int, FREE] = Field(1024, ge=1)
    micro_batch: Annotated[int, FREE] = Field(16, ge=1)
    """Rows of a capture batch per rank."""


class RoutedTeacher(Section):
    """One teacher per domain; each row is taught by its own domain's teacher."""

    kind: Literal["routed"]
    domains: dict[str, Annotated[LiveTeacher | CachedTeacher, Field(discriminator="kind")]] = Field(
        min_length=1
    )


class SelfTeacher(Section):
    """The student itself, shown the rows without masks (method ``self_evolution``). As any teacher,
    it is not made where the method wants none."""

    kind: Literal["self"]
    weights: Literal["current", "frozen", "average"] = "current"
    """``current``: as they are at that step, as in the original code (masked LMs only); ``frozen``:
    as the run began; ``average``: their exponential moving average."""
    decay: float = Field(0.999, ge=0, lt=1)
    """Factor of the average."""
    deepspeed: Annotated[str | None, RunPath(), FREE] = None
    """As for a live teacher; of the frozen copy."""
    precision: Precision = "auto"
    """Of the frozen copy."""


AnyTeacher = Annotated[
    LiveTeacher | CachedTeacher | RoutedTeacher | SelfTeacher, Field(discriminator="kind")
]


def each_teacher(teacher: AnyTeacher | None) -> dict[str | None, LiveTeacher | CachedTeacher]:
    """The teachers that have a model of their own, by domain; a single one has the domain None."""
    if isinstance(teacher, RoutedTeacher):
        return dict(teacher.domains)
    return {None: teacher} if isinstance(teacher, LiveTeacher | CachedTeacher) else {}


def section_name(domain: str | None) -> str:
    """Dotted name of a teacher's section, for messages."""
    return "teacher" if domain is None else f"teacher.domains.{domain}"
