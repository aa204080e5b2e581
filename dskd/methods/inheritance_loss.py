"""The loss of Knowledge Inheritance, for every method that inherits from a teacher's distribution.

Qin et al. 2022 (NAACL), "Knowledge Inheritance for Pre-trained Language Models": the loss of a
supervised position is ``(1 - alpha) CE + alpha T^2 KL(teacher || student)``, both distributions of
the KL at temperature T, with an inheritance rate alpha that falls as the student outgrows its
teacher. Another divergence may stand in the place of the KL (setting ``divergence``).
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from dskd.batch import Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.fused.arguments import MIXING, Divergence, TopKMode
from dskd.ops import positions_ce, positions_kd
from dskd.settings.base import Section
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, each_teacher

RateSchedule = Literal["linear", "switch", "constant", "cosine"]


class InheritanceLoss(Section):
    """Cross entropy with the labels and, while alpha lasts, a divergence from the teacher."""

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    """Softens both distributions of the divergence."""
    divergence: Divergence = "forward_kl"
    """Of the student's q from the teacher's p. ``forward_kl``: KL(p || q), as in the paper;
    ``reverse_kl``: KL(q || p); ``mixed``: beta KL(p || q) + (1 - beta) KL(q || p); ``jsd``,
    ``skew_forward_kl``, ``skew_reverse_kl``: from mixtures of p and q by beta (``ops.dense_kd``);
    ``total_variation``: sum |p - q| / 2. A cached teacher gives forward_kl only. Where
    KL(q || p) counts, the student's padding columns beyond the teacher's vocabulary are left out
    of its softmax, the label's too."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Of ``mixed``, ``jsd`` and the skew divergences, see there; the others have none."""
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

    @field_validator("beta")
    @classmethod
    def _has_a_use(cls, beta: float, info: ValidationInfo) -> float:
        divergence = info.data.get("divergence")
        # compared with the default, because settings that are read back (a run's config.yaml)
        # name all of them
        unused = divergence is not None and divergence not in (*MIXING, "mixed")
        if unused and beta != cls.model_fields["beta"].default:
            raise ValueError(f"{beta}, but the divergence {divergence} has no beta; leave it out")
        return beta

    def check_teacher(self, run: Run, section: str) -> None:
        """Refuse a divergence that the run's teacher cannot give.

        Args:
            section: dotted name of this section in the settings, for the message.

        Raises:
            ConfigError: names the setting.
        """
        if self.divergence == "forward_kl" or self.alpha(0) == 0.0:
            return
        if any(isinstance(each, CachedTeacher) for each in each_teacher(run.teacher).values()):
            raise ConfigError(
                f"{section}.divergence: {self.divergence} needs all of a teacher's logits, but a "
                f"cached one keeps its largest only; set it to forward_kl, or use a live teacher"
            )

    def alpha(self, step: int) -> float:
        """Inheritance rate after ``step`` completed optimiser steps."""
        return inheritance_rate(self.schedule, step, self.steps, self.rate)

    def term(self, positions: Positions, signal: Signal | None, step: int) -> Term:
        """``(1 - alpha) CE + alpha T^2 KL``, summed over the supervised positions, in nats.

        Logged as ``ce`` and ``kl``, or the name of the divergence that stands in its place, with
        its factor T^2 (T for total variation); what has weight 0 is not computed.
        """
        alpha, heat = self.alpha(step), self._heat()
        if alpha == 0.0:
            return labels_term(positions)
        assert signal is not None, f"step {step} needs the teacher"
        weight, reverse_weight = alpha * heat, None
        if self.divergence == "mixed":
            weight, reverse_weight = weight * self.beta, weight * (1.0 - self.beta)
        losses = positions_kd(
            positions,
            signal,
            kind=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            mode=self.topk,
            weight=weight,
            reverse_weight=reverse_weight,
            label_weight=1.0 - alpha,
        )
        # of `mixed` alone the losses come with their weights, alpha among them
        unweighted = 1.0 / alpha if self.divergence == "mixed" else heat
        name = "kl" if self.divergence == "forward_kl" else self.divergence
        parts = {name: losses.divergence_N.sum() * unweighted}
        if alpha < 1.0:
            parts["ce"] = losses.label_N.sum()
        return Term(losses.total, parts)

    def _heat(self) -> float:
        """What keeps the divergence's gradient as large, beside the label's, at any temperature."""
        # At a high T, p - q falls as 1/T, and every logit's gradient has a 1/T of its own. The
        # gradient of a divergence that is quadratic where p and q are close (each but one) so falls
        # as 1/T^2 (Hinton et al. 2015, section 2); total variation's, which is linear in p - q, as
        # 1/T.
        return self.temperature if self.divergence == "total_variation" else self.temperature**2


def labels_term(positions: Positions) -> Term:
    """The cross entropy summed over the supervised positions, in nats, logged as ``ce``."""
    losses = positions_ce(positions)
    return Term(losses.total, {"ce": losses.label_N.sum()})


def inheritance_rate(kind: RateSchedule, step: int, end: int, start: float = 1.0) -> float:
    """Weight alpha of the teacher's term after ``step`` completed steps (KI, section 3.2).

    ``linear``: ``start * max(0, 1 - step / end)``; ``cosine``: half a cosine from ``start`` at 0 to
    0 at ``end``; ``switch``: ``start`` before ``end``, 0 from there on; ``constant``: ``start``.
    It never rises with ``step``. ``linear`` and ``cosine`` have an ``end`` of at least 1.
    """
    if kind == "constant":
        return start
    if kind == "switch":
        return start if step < end else 0.0
    assert end >= 1, f"a {kind} inheritance rate needs at least 1 step to fall to 0, not {end}"
    if step >= end:
        return 0.0
    if kind == "linear":
        return start * (1.0 - step / end)
    return start * 0.5 * (1.0 + math.cos(math.pi * step / end))
