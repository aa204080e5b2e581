"""Knowledge Inheritance: a small teacher's distribution helps a larger student at first.

Qin et al. 2022 (NAACL); the loss is in :mod:`dskd.methods.inheritance_loss`.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from dskd.batch import Batch, Positions, Signal, Term
from dskd.methods.base import Method
from dskd.methods.inheritance_loss import InheritanceLoss
from dskd.settings.run import Run


class KnowledgeInheritance(InheritanceLoss, Method):
    """Cross entropy with the labels and, while alpha lasts, a divergence from the teacher."""

    kind: Literal["ki"] = "ki"

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse a divergence that the teacher cannot give."""
        del config
        self.check_teacher(run, "method")

    def rates(self, step: int) -> dict[str, float]:
        """The inheritance rate of this step, logged as ``alpha``."""
        return {"alpha": self.alpha(step)}

    def wants_teacher(self) -> bool:
        """Whether alpha is ever above 0 (it never rises, so the first step tells)."""
        return self.needs_teacher(0)

    def needs_teacher(self, step: int) -> bool:
        """Whether alpha is above 0 at ``step``; the teacher is not run otherwise."""
        return self.alpha(step) > 0.0

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """One term over the supervised positions, see :meth:`InheritanceLoss.term`."""
        del batch
        return {"tokens": self.term(positions, signal, step)}
