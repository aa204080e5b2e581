"""Plain cross entropy: the control that every method is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from transformers import PreTrainedConfig

from dskd.batch import Batch, Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.methods.inheritance_loss import labels_term
from dskd.settings.run import Run


class LanguageModelling(Method):
    """Cross entropy with the labels, of tokens or of classes; no teacher."""

    kind: Literal["lm"] = "lm"
    objectives: ClassVar[frozenset[str]] = frozenset({"masked", "causal", "classification"})

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse rows without a class: there is no cross entropy with a number, or with nothing."""
        del config
        if run.data.objective != "classification":
            return
        if run.data.regression:
            raise ConfigError("method.kind: lm learns classes, but the rows have numbers (target)")
        self.refuse_unlabelled(run)

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The cross entropy summed over the supervised positions, in nats, logged as ``ce``."""
        del signal, batch, step
        return {"tokens": labels_term(positions)}
