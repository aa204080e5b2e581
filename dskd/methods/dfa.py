"""DFA: the student's hidden states follow a common code of all teachers' (Shen et al. 2019 (AAAI),
"Amalgamating Knowledge towards Comprehensive Classification")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dskd.batch import Batch, Positions, Signal, Term
from dskd.methods.alignment import DfaBlock, dfa_term
from dskd.methods.amalgamation import Amalgamation
from dskd.methods.base import Method
from dskd.methods.panel import panel_of


class FeatureAlignment(Amalgamation, Method):
    """Vanilla distillation, and at each layer the squared error from a linear code of the teachers'
    hidden states, which is trained to tell these states again."""

    terms: ClassVar[tuple[str, ...]] = ("rows", "tokens")

    kind: Literal["dfa"] = "dfa"
    align_weight: float = Field(1.0, ge=0)
    """Of the student's squared error from the teachers' code, a mean over real tokens."""

    def block(
        self, width: int, teacher_widths: Sequence[int], dtype: torch.dtype | None
    ) -> DfaBlock:
        """The three linear maps of a layer."""
        return DfaBlock(width, teacher_widths, dtype)

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The KL summed over the rows, logged as ``kl``; ``align`` and ``reconstruction`` summed
        over real tokens."""
        del step
        panel = panel_of(signal)
        weights = self.model_dump(include={"align_weight", "reconstruction_weight"})
        blocks, students, teachers = self.aligned(positions, panel)
        return {
            "rows": self.distilled(positions.logits_NV, panel),
            "tokens": dfa_term(blocks, students, teachers, batch.mask_BT, **weights),
        }
