"""Plain language modelling: the control that every method is compared with."""

from __future__ import annotations

from typing import Literal

from dskd.batch import Batch, Positions, Signal, Term
from dskd.methods.base import Method
from dskd.methods.inheritance_loss import labels_term


class LanguageModelling(Method):
    """Cross entropy with the labels, no teacher."""

    kind: Literal["lm"] = "lm"

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The cross entropy summed over the supervised positions, in nats, logged as ``ce``."""
        del signal, batch, step
        return {"tokens": labels_term(positions)}
