"""Fine-tuning on labelled rows: the plain way, by which teachers of other methods are trained, too.

A row has one supervised position, where its head reads, so its loss is that position's: the cross
entropy with its class, or the squared error of its number.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from dskd.batch import TARGETS, Batch, Positions, Signal, Term
from dskd.methods.base import Method
from dskd.methods.inheritance_loss import labels_term
from dskd.methods.metrics import RowScores
from dskd.settings.run import Run


class Finetuning(RowScores, Method):
    """Cross entropy with the rows' classes or squared error of their numbers, no teacher."""

    terms: ClassVar[tuple[str, ...]] = ("rows",)
    objectives: ClassVar[frozenset[str]] = frozenset({"classification"})

    kind: Literal["finetune"] = "finetune"

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse metrics of other labels or without their library, and rows without a label."""
        del config
        self.check_metrics(run)
        self.refuse_unlabelled(run)

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The rows' losses in their sum, logged as ``ce`` (nats) or ``se``."""
        del signal, step
        targets_B = batch.columns.get(TARGETS)
        if targets_B is None:
            return {"rows": labels_term(positions)}
        found_B = positions.logits_NV[:, 0]
        wide = torch.promote_types(found_B.dtype, torch.float32)
        total = (found_B.to(wide) - targets_B).square().sum()
        return {"rows": Term(total, {"se": total.detach()})}
