"""What ``compare.py`` compares: the JSON beside a recipe, and the trials that come of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from dskd.settings.base import Section
from dskd.settings.data import HardTokens
from dskd.settings.yaml_tree import Tree, merge, overlay
from dskd.tasks.metrics import METRICS, MetricName

LOSS, HARD, RANDOM = "loss", "hard tokens", "random tokens"
"""What a language model is scored by, in nats a masked token: the loss of random masks alone, or
those of hard tokens and of random ones."""
FIXED = (
    "train.steps", "train.epochs", "train.lr", "train.warmup", "seed", "evaluation.every",
    "checkpoint.every", "method", "base", "runs",
)  # fmt: skip
"""Settings of the trials' own, which an override of all runs would silently replace."""


class Contrast(Section):
    """Ways that the table compares with others: better than them or not."""

    better: list[str]
    """Each of these is compared with each of ``than`` and of the plan's ``longer``."""
    than: list[str]


class Reading(Section):
    """A line of the table about what a run leaves anyway."""

    run: str
    file: str = "scores.json"
    """In the run's folder."""
    scores: dict[str, str]
    """Keys of the file, inner ones behind a dot, by the columns that they stand in."""


class Plan(Section):
    """What is compared of a recipe. A way is a run of the recipe."""

    about: str
    """What the scores are: the head of the table."""
    origin: str | None = None
    """The run that the ways start from or learn from; it is carried out once."""
    upstream: list[str] = Field(default_factory=list)
    """Runs that the ways learn from of which each seed has its own, in order."""
    continued: bool = False
    """Whether every way trains the origin on, so that the drop from its loss is shown."""
    metrics: list[MetricName] = Field(default_factory=list)
    """What classifiers are scored by; the first one chooses the rates and is claimed about. Empty:
    the models are language models."""
    hard: HardTokens | None = None
    """Also score on the tokens of the validation rows that the origin finds hard by this."""
    rates: dict[str, list[float]] = Field(default_factory=dict)
    """Peak learning rates of each way, fixed before any of them runs; empty: the recipe's."""
    budget: str | None = None
    """The way whose FLOPs the ``longer`` ones get; with it the table shows costs."""
    longer: list[str] = Field(default_factory=list)
    """The ways that are also run at the FLOPs of ``budget``."""
    readings: dict[str, Reading] = Field(default_factory=dict)
    """Further lines of the table by their names; they stand first."""
    claims: list[Contrast]

    @model_validator(mode="after")
    def _has_an_origin_if_needed(self) -> Plan:
        for name in ("continued", "hard", "budget"):
            if getattr(self, name) and self.origin is None:
                raise ValueError(f"{name}: there is no origin")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """What the models are scored by."""
        if self.metrics:
            return tuple(self.metrics)
        return (LOSS,) if self.hard is None else (HARD, RANDOM)

    @property
    def claimed(self) -> tuple[str, ...]:
        """The scores by which ways are compared."""
        return self.scores[:1] if self.metrics else self.scores

    @property
    def higher_is_better(self) -> bool:
        """The direction of ``claimed``."""
        return bool(self.metrics) and METRICS[self.metrics[0]].higher_is_better


class Trial(NamedTuple):
    """A way, run with one learning rate and seed; None: as in the recipe."""

    way: str
    lr: float | None
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """Of its run: letters, digits and dashes."""
        rate = "" if self.lr is None else f"-{self.lr * 1e4:g}e-4"
        steps = "" if self.steps is None else f"-{self.steps}steps"
        return f"{self.way}{rate}-seed{self.seed}{steps}"

    def settings(self, own: Tree, upstream: Collection[str] = ()) -> Tree:
        """Those of its run, given the way's; ``run:NAME`` of an upstream one is that of its
        seed."""
        own = merge(_of_seed(own, self.seed, upstream), {"seed": self.seed})
        if self.lr is not None:
            own = merge(own, {"train": {"lr": self.lr}})
        if self.steps is not None:
            # the same share of warm-up, and one checkpoint, as the recipe's steps have
            own = merge(own, {"train": {"steps": self.steps, "warmup": self.steps // 20}})
            every = {"every": self.steps}
            own = merge(own, {"evaluation": every, "checkpoint": every})
        return own


def _of_seed(value: Any, seed: int, upstream: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _of_seed(inner, seed, upstream) for key, inner in value.items()}
    if isinstance(value, list):
        return [_of_seed(inner, seed, upstream) for inner in value]
    if isinstance(value, str) and value.startswith("run:") and value[4:] in upstream:
        return f"run:{Trial(value[4:], None, seed).name}"
    return value


def refused(overrides: Iterable[str]) -> list[str]:
    """Those of ``FIXED`` that overrides reach."""
    tree, found = overlay(overrides), []
    for name in FIXED:
        node: Any = tree
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found.append(name)
    return found
