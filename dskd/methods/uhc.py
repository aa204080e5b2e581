"""Unifying heterogeneous classifiers: within each teacher's classes the student says what that
teacher says (Vongkulbhisal et al. 2019, CVPR)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dskd.batch import Panel, Term
from dskd.methods.base import Method
from dskd.methods.integration import uhc_term
from dskd.methods.panel import PanelMethod


class UnifiedClassifiers(PanelMethod, Method):
    """The KL of the student within each teacher's classes, summed over the teachers."""

    kind: Literal["uhc"] = "uhc"
    squared: bool = True
    """Whether T^2 multiplies the KL."""

    def distilled(self, student_NC: Tensor, panel: Panel) -> Term:
        """The KL within each teacher's classes, summed over the teachers."""
        settings = self.model_dump(include={"temperature", "squared", "weight"})
        return uhc_term(student_NC, panel, **settings)
