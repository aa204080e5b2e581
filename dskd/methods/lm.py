"""Plain language modelling: the control that every method is compared with."""

from __future__ import annotations

from typing import Literal

from dskd.batch import Batch, Rows, Signal, Term
from dskd.losses import cross_entropy
from dskd.method import Method


class LanguageModelling(Method):
    """Cross entropy with the labels, no teacher."""

    kind: Literal["lm"] = "lm"

    def loss(self, rows: Rows, signal: Signal | None, batch: Batch, step: int) -> dict[str, Term]:
        """``ce``: the cross entropy summed over the supervised positions, in nats."""
        del signal, batch, step
        return {"ce": Term(1.0, cross_entropy(rows.logits_NV, rows.labels_N))}
