"""The loss of Knowledge Inheritance, for every method that inherits from a teacher's distribution.

Qin et al. 2022 (NAACL), "Knowledge Inheritance for Pre-trained Language Models": the loss of a
supervised position is ``(1 - alpha) CE + alpha T^2 KL(teacher || student)``, both distributions of
the KL at temperature T, with an inheritance rate alpha that falls as the student outgrows its
teacher.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from dskd.batch import Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.fused.reference import TopKMode
from dskd.ops import rows_ce, rows_kd
from dskd.settings.base import Section

RateSchedule = Literal["linear", "switch", "constant", "cosine"]


class Inherited(Section):
    """Cross entropy with the labels and, while alpha lasts, KL from the teacher."""

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    """Softens both distributions of the KL."""
    rate: float = Field(1.0, ge=0, le=1)
    """Inheritance rate alpha of the first step (of every step, for ``constant``)."""
    schedule: RateSchedule = "linear"
    """How alpha falls: ``linear`` or ``cosine`` to 0 at ``steps``, ``switch``: to 0 at once there,
    ``constant``: never."""
    steps: int = Field(0, ge=0, validate_default=True)
    """Completed optimiser steps at which alpha reaches 0; ``constant`` has no such step."""
    topk: TopKMode = "tail"
    """What a top-k teacher's dropped tokens count as: ``tail``: one bucket with their exact mass;
    ``renormalised``: impossible (the kept ones are scaled up to 1); ``truncated``: they are left
    out of the student's distribution as well."""

    @field_validator("steps")
    @classmethod
    def _falls_to_zero(cls, steps: int, info: ValidationInfo) -> int:
        schedule = info.data.get("schedule")
        if schedule not in (None, "constant") and steps < 1:
            raise ValueError(
                f"the {schedule} schedule needs the step at which the inheritance rate reaches 0, "
                f"at least 1"
            )
        return steps

    def alpha(self, step: int) -> float:
        """Inheritance rate after ``step`` completed optimiser steps."""
        return inheritance_rate(self.schedule, step, self.steps, self.rate)

    def term(self, rows: Positions, signal: Signal | None, step: int) -> Term:
        """``(1 - alpha) CE + alpha T^2 KL``, summed over the supervised positions, in nats.

        Logged as ``ce`` and ``kl`` (with its T^2); what has weight 0 is not computed.
        """
        alpha, heat = self.alpha(step), self.temperature**2
        if alpha == 0.0:
            return labels_term(rows)
        assert signal is not None, f"step {step} needs the teacher"
        losses = rows_kd(
            rows,
            signal,
            temperature=self.temperature,
            mode=self.topk,
            weight=alpha * heat,
            label_weight=1.0 - alpha,
        )
        parts = {"kl": losses.divergence_N.sum() * heat}
        if alpha < 1.0:
            parts["ce"] = losses.label_N.sum()
        return Term(losses.total, parts)


def labels_term(rows: Positions) -> Term:
    """The cross entropy summed over the supervised positions, in nats, logged as ``ce``."""
    losses = rows_ce(rows)
    return Term(losses.total, {"ce": losses.label_N.sum()})


def inheritance_rate(kind: RateSchedule, step: int, end: int, start: float = 1.0) -> float:
    """Weight alpha of the teacher's term after ``step`` completed steps (KI, section 3.2).

    ``linear``: ``start * max(0, 1 - step / end)``; ``cosine``: half a cosine from ``start`` at 0 to
    0 at ``end``; ``switch``: ``start`` before ``end``, 0 from there on; ``constant``: ``start``.
    It never rises with ``step``.

    Raises:
        ConfigError: ``linear`` or ``cosine`` without an ``end`` to fall towards.
    """
    if kind == "constant":
        return start
    if kind == "switch":
        return start if step < end else 0.0
    if end < 1:
        raise ConfigError(
            f"a {kind} inheritance rate needs at least 1 step to fall to 0, not {end}"
        )
    if step >= end:
        return 0.0
    if kind == "linear":
        return start * (1.0 - step / end)
    return start * 0.5 * (1.0 + math.cos(math.pi * step / end))
