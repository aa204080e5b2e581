"""CFL: student and teachers are mapped to common features, which are to be alike as sets of rows
(Luo et al. 2019 (IJCAI), "Knowledge Amalgamation from Heterogeneous Networks by Common Feature
Learning")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from dskd.batch import Batch, Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.methods.alignment import CflBlock, LayerRule, cfl_terms
from dskd.methods.amalgamation import Amalgamation
from dskd.methods.base import Method
from dskd.methods.panel import panel_of
from dskd.settings.run import Run


class CommonFeatures(Amalgamation, Method):
    """Vanilla distillation, and at the top layers the maximum mean discrepancy (MMD) of student and
    teachers in common features, from which the teachers' hidden states can be told again."""

    terms: ClassVar[tuple[str, ...]] = ("rows", "groups", "tokens")

    kind: Literal["cfl"] = "cfl"
    layers: int | None = Field(1, ge=1)
    """How many of the student's layers are aligned, from the top, as in the original the last one;
    null: all."""
    layer_rule: LayerRule = "top"
    """Which of a teacher's layers they follow; see :class:`Amalgamation`."""
    mmd_weight: float = Field(1.0, ge=0)
    """Of the MMD, a mean over groups of rows."""
    mmd_rows: int = Field(8, ge=2)
    """Rows of a group: so many that follow each other in the optimiser's batch, which is sorted by
    length; the original's are a whole batch. ``train.micro_batch`` is a multiple of it. The MMD is
    the same at any scale of the features, so where those of a group hardly differ its gradient is
    large."""

    def block(
        self, width: int, teacher_widths: Sequence[int], dtype: torch.dtype | None
    ) -> CflBlock:
        """The maps of a layer."""
        return CflBlock(width, teacher_widths, dtype)

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """As every method that aligns hidden states, and refuse micro-batches that cut a group, and
        a student that has no width to divide by 4."""
        super().check(run, config)
        if run.train.micro_batch % self.mmd_rows:
            raise ConfigError(
                f"train.micro_batch: {run.train.micro_batch} is not a multiple of method.mmd_rows "
                f"{self.mmd_rows}, the rows whose features are compared together"
            )
        if config is not None and config.hidden_size < 4:
            raise ConfigError(
                f"model: its hidden size is {config.hidden_size}, of which method cfl takes a "
                f"quarter; it must be at least 4"
            )

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows, groups of them, and real tokens."""
        groups, rest = divmod(len(batch.lengths_B), self.mmd_rows)
        assert not rest, (len(batch.lengths_B), self.mmd_rows)
        return {**super().counts(batch), "groups": float(groups)}

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The KL summed over the rows, logged as ``kl``; ``mmd`` summed over groups, teachers and
        layers; ``reconstruction`` over real tokens."""
        del step
        panel = panel_of(signal)
        weights = self.model_dump(include={"mmd_weight", "reconstruction_weight"})
        blocks, students, teachers = self.aligned(positions, panel)
        found = cfl_terms(blocks, students, teachers, batch.mask_BT, rows=self.mmd_rows, **weights)
        return {"rows": self.distilled(positions.logits_NV, panel), **found}
