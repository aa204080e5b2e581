"""Settings of the teachers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

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


class CachedRows(Section):
    """How much of the stream of training rows, in the order of the run's seed, a cache holds: one
    of the two."""

    epochs: int | None = Field(None, ge=1)
    """So many epochs; as many as the masks have draws (a causal LM: 1) are all that there are, for
    runs of any length and seed."""
    rows: int | None = Field(None, ge=1)
    """So many rows from the beginning."""

    @model_validator(mode="after")
    def _one(self) -> CachedRows:
        if (self.epochs is None) == (self.rows is None):
            raise ValueError("either epochs or rows")
        return self


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
    cache: Annotated[CachedRows | None, FREE] = None
    """The rows that are captured; null: those that this run reads, and others of its recipe from
    the same folder. What a longer run reads besides is captured when it goes on."""
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


class PanelMember(LiveTeacher):
    """One teacher of a panel. What is below its model is of a classifier, which has classes of its
    own."""

    model: Model
    labels: list[str] | None = None
    """Names of its classes, in the order of its logits; null: as its model's config names them."""
    own_tokenizer: bool = False
    """It reads the rows' text in the tokens of its model's folder, not in those of the student;
    where scores are stored."""
    domains: list[str] | None = Field(None, min_length=1)
    """It is asked about the rows of these domains only; null: of all."""


def _kind_of(member: Any) -> str:
    """The kind of a teacher of a panel, which is live where it does not say."""
    return member.get("kind", "live") if isinstance(member, dict) else member.kind


AnyMember = Annotated[
    Annotated[PanelMember, Tag("live")] | Annotated[CachedTeacher, Tag("cached")],
    Discriminator(_kind_of),
]

CONFIDENT = ("confidence_soft", "confidence_hard")
"""Rules of a mixture that ask how sure each teacher is."""


class Mixture(Section):
    """How much each language model of a panel says about a token; their distributions are mixed.

    How sure one is of a token is ``1 - H / ln V``, 0 to 1: H the entropy of its distribution at
    temperature 1, of a cached one's kept tokens and all others as one; V the vocabulary.
    """

    rule: Literal["uniform", "fixed", "confidence_soft", "confidence_hard"]
    """``uniform``: all as much; ``fixed``: as ``weights`` say; ``confidence_soft``: by the softmax
    of how sure they are over ``sharpness``; ``confidence_hard``: the surest alone."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(None, validate_default=True)
    """Of ``fixed``: a number for each teacher, by name; only their ratios count."""
    sharpness: float = Field(0.2, gt=0)
    """Of ``confidence_soft``: at 0.2, one that is wholly sure says 148 times as much as one that
    knows nothing."""

    @field_validator("weights")
    @classmethod
    def _are_of_fixed(
        cls, weights: dict[str, float] | None, info: ValidationInfo
    ) -> dict[str, float] | None:
        rule = info.data.get("rule")
        if weights is not None and rule not in (None, "fixed"):
            raise ValueError(f"of the rule fixed, but the rule is {rule}; leave them out")
        if weights is None and rule == "fixed":
            raise ValueError("missing; the rule fixed needs a number for each teacher")
        if weights is not None and not any(weights.values()):
            raise ValueError(f"{weights}: one must be more than 0")
        return weights

    @field_validator("sharpness")
    @classmethod
    def _is_of_soft(cls, sharpness: float, info: ValidationInfo) -> float:
        rule = info.data.get("rule")
        if rule not in (None, "confidence_soft") and sharpness != 0.2:
            raise ValueError(f"{sharpness}, but the rule {rule} has none; leave it out")
        return sharpness


class PanelTeacher(Section):
    """Several teachers of every row together: classifiers, each of some of the student's classes,
    or language models of the student's vocabulary, whose distributions are mixed.

    What comes after ``mixture`` is of classifiers alone.
    """

    kind: Literal["panel"]
    teachers: dict[str, AnyMember] = Field(min_length=1)
    """By name, which is that of a folder, too; language models all live or all cached."""
    mixture: Mixture | None = None
    """Of language models, which need one; how classifiers are mixed is the method's."""
    scores: Literal["stored", "live"] = "stored"
    """``stored``: each teacher is asked about every row once, before training; ``live``: about each
    batch. About validation rows it is asked once, either way."""
    path: Annotated[Path | None, RunPath("cache")] = None
    """Folder of the stored scores, which this run fills as far as it is not; ``run:NAME`` is that
    of another run of the recipe; null: ``<out>/cache``."""
    confidence: Annotated[str, RunPath()] = "passes"
    """How sure a teacher is of a row: ``passes``: by the entropy of its mean distribution over
    ``passes`` passes with dropout; ``logits``: of its distribution without, at the method's
    temperature; or a ``.npy`` file [training rows, teachers] of numbers from 0 to 1
    (validation rows, which it is not of, are judged by the passes that are stored of them)."""
    passes: int = Field(16, ge=1)
    """Passes with dropout of each row (1: a single one without), where scores are stored or
    ``confidence`` is of them."""
    dropout: float | None = Field(None, gt=0, lt=1)
    """Probability of all dropouts in these passes; null: the models' own."""
    micro_batch: Annotated[int, FREE] = Field(16, ge=1)
    """Rows scored at a time, per rank."""
    at_once: Annotated[int, FREE] = Field(16, ge=1)
    """Most passes of a row in one forward pass, which then has so many times its rows."""
    rows_per_shard: Annotated[int, FREE] = Field(4096, ge=1)

    @property
    def asks_passes(self) -> bool:
        """Whether a teacher makes all its ``passes``; if not, a single one."""
        return self.scores == "stored" or self.confidence != "logits"

    @field_validator("teachers")
    @classmethod
    def _names_are_of_folders(cls, teachers: dict[str, AnyMember]) -> dict[str, AnyMember]:
        for name in teachers:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r}: a name is made of letters, digits, _ and -")
        return teachers

    @field_validator("confidence")
    @classmethod
    def _is_found_somehow(cls, confidence: str) -> str:
        if confidence not in ("passes", "logits") and not confidence.endswith(".npy"):
            raise ValueError(f"{confidence!r} is not one of passes, logits, or the path of a .npy")
        return confidence

    @field_validator("passes", "dropout")
    @classmethod
    def _has_a_use(cls, value: float | None, info: ValidationInfo) -> float | None:
        # compared with the default, because settings that are read back name all of them
        if value == cls.model_fields[info.field_name].default:
            return value
        if (info.data.get("scores"), info.data.get("confidence")) == ("live", "logits"):
            raise ValueError(f"{value}, but live teachers make one pass for confidence logits")
        if info.field_name == "dropout" and info.data.get("passes") == 1:
            raise ValueError(f"{value}, but a single pass has no dropout")
        return value


AnyTeacher = Annotated[
    LiveTeacher | CachedTeacher | RoutedTeacher | SelfTeacher | PanelTeacher,
    Field(discriminator="kind"),
]


class MemberName(str):
    """The name of a teacher of a panel, where others have a domain."""


def each_teacher(teacher: AnyTeacher | None) -> dict[str | None, LiveTeacher | CachedTeacher]:
    """The teachers that have a model of their own, by domain; a single one has the domain None,
    those of a panel have their :class:`MemberName` instead."""
    if isinstance(teacher, RoutedTeacher):
        return dict(teacher.domains)
    if isinstance(teacher, PanelTeacher):
        return {MemberName(name): member for name, member in teacher.teachers.items()}
    return {None: teacher} if isinstance(teacher, LiveTeacher | CachedTeacher) else {}


def section_name(domain: str | None) -> str:
    """Dotted name of a teacher's section, for messages; ``domain`` is a key of
    :func:`each_teacher`."""
    if isinstance(domain, MemberName):
        return f"teacher.teachers.{domain}"
    return "teacher" if domain is None else f"teacher.domains.{domain}"


def domain_of(name: str | None) -> str | None:
    """The domain of a key of :func:`each_teacher`; None: all rows, as those of a panel teach."""
    return None if isinstance(name, MemberName) else name
