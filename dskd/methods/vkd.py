"""Vanilla distillation from several teachers: the logits of all of them together are one
classifier's (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", of their
concatenation)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dskd.batch import Panel, Term
from dskd.methods.base import Method
from dskd.methods.integration import Overlap, vkd_term
from dskd.methods.panel import PanelMethod


class VanillaDistillation(PanelMethod, Method):
    """The KL of the student from the softmax of all teachers' logits."""

    kind: Literal["vkd"] = "vkd"
    squared: bool = True
    """Whether T^2 multiplies the KL."""
    overlap: Overlap = "logsumexp"
    """What a class gets that several teachers have: the log of the summed exponentials of their
    logits, or their ``mean``."""

    def distilled(self, student_NC: Tensor, panel: Panel) -> Term:
        """The KL from all logits together."""
        settings = self.model_dump(include={"temperature", "squared", "overlap", "weight"})
        return vkd_term(student_NC, panel, **settings)
