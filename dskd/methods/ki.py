"""Knowledge Inheritance: a small teacher's distribution helps a larger student at first.

Qin et al. 2022 (NAACL), "Knowledge Inheritance for Pre-trained Language Models": the loss of a
supervised position is ``(1 - alpha) CE + alpha T^2 KL(teacher || student)``, both distributions of
the KL at temperature T, with an inheritance rate alpha that falls as the student outgrows its
teacher.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from dskd.batch import Batch, Rows, Signal, Term, TopK
from dskd.losses import TopKMode, cross_entropy, cross_entropy_and_kl, kl, topk_kl
from dskd.method import Method
from dskd.schedule import RateSchedule, inheritance_rate


class KnowledgeInheritance(Method):
    """Cross entropy with the labels and, while alpha lasts, KL from the teacher."""

    terms: ClassVar[tuple[str, ...]] = ("ce", "kl")

    kind: Literal["ki"] = "ki"
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

    def rates(self, step: int) -> dict[str, float]:
        """``alpha``."""
        return {"alpha": self.alpha(step)}

    def wants_teacher(self) -> bool:
        """Whether alpha is ever above 0 (it never rises, so the first step tells)."""
        return self.needs_teacher(0)

    def needs_teacher(self, step: int) -> bool:
        """Whether alpha is above 0 at ``step``; the teacher is not run otherwise."""
        return self.alpha(step) > 0.0

    def loss(self, rows: Rows, signal: Signal | None, batch: Batch, step: int) -> dict[str, Term]:
        """``ce`` and ``kl`` (T^2 times the KL), summed over the supervised positions, in nats.

        A term whose weight is 0 is neither computed nor returned.
        """
        del batch
        alpha, student_NV, labels_N = self.alpha(step), rows.logits_NV, rows.labels_N
        if alpha == 0.0:
            return {"ce": Term(1.0, cross_entropy(student_NV, labels_N))}
        assert signal is not None, f"step {step} needs the teacher"
        if alpha == 1.0:
            return {"kl": Term(1.0, self._divergence(student_NV, signal))}
        ce, divergence = cross_entropy_and_kl(
            student_NV, labels_N, signal, self.temperature, self.topk
        )
        return {"ce": Term(1.0 - alpha, ce), "kl": Term(alpha, divergence)}

    def _divergence(self, student_NV: Tensor, signal: Signal) -> Tensor:
        if isinstance(signal, TopK):
            return topk_kl(student_NV, signal, self.temperature, self.topk)
        return kl(student_NV, signal.logits_NV, self.temperature)
