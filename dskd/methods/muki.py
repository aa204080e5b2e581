"""MUKI: which of several teachers knows a text is judged by how sure each of them is.

Li et al. 2022 (Findings of EMNLP), "From Mimicking to Integrating: Knowledge Integration for
Pre-Trained Language Models". No text needs a label. The golden distribution over all classes is
approximated by ``q = sum_i alpha_i P_i``, P_i a teacher's distribution over its own classes and 0
elsewhere, alpha_i of its confidence ``1 - H / ln M`` (of the mean of several passes with dropout,
or of a single one). A text about which the two surest teachers are equally sure counts for little
(the margin).

Shape letters: N supervised positions, n teachers, C the student's classes, M those of one teacher.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from transformers import PreTrainedConfig

from dskd.batch import Batch, Panel, Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.methods.integration import (
    confidences,
    divergence,
    heat,
    integrated,
    margin,
    teacher_weights,
)
from dskd.methods.panel import PanelMethod, panel_of
from dskd.settings.run import Run
from dskd.stores.uncertainty import PANEL_CONFIDENCE, PANEL_PRESENT


class Integration(PanelMethod, Method):
    """The KL of the student from the teachers' distributions as their confidences mix them."""

    terms: ClassVar[tuple[str, ...]] = ("rows", "margins")
    weighs_teachers: ClassVar[bool] = True

    kind: Literal["muki"] = "muki"
    choice: Literal["hard", "soft"] = "hard"
    """``hard``: the surest teacher says all; ``soft``: each by the softmax of its confidence."""
    sharpness: float = Field(0.2, gt=0)
    """By which the confidences of a ``soft`` choice are divided first."""
    margin: bool = True
    """Whether a row counts by how much the surest teacher is surer than the next."""
    normalise: Literal["none", "batch_mean"] = "none"
    """What margins are divided by: ``none``: nothing, as in the original; ``batch_mean``: their
    mean over the step's rows, so that the loss is as large as without."""
    squared: bool = False
    """Whether T^2 multiplies the KL."""

    @field_validator("sharpness")
    @classmethod
    def _has_a_use(cls, sharpness: float, info: ValidationInfo) -> float:
        unused = info.data.get("choice") == "hard"
        if unused and sharpness != cls.model_fields["sharpness"].default:
            raise ValueError(f"{sharpness}, but a hard choice has no sharpness; leave it out")
        return sharpness

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """As every method of panels, and refuse to normalise margins that are not known before the
        first pass of a step, or none at all."""
        super().check(run, config)
        if self.normalise == "none":
            return
        if not self.margin:
            raise ConfigError("method.normalise: batch_mean, but method.margin is false")
        live = run.teacher.scores == "live" and run.teacher.confidence == "passes"
        if live or run.teacher.confidence == "logits":
            raise ConfigError(
                "method.normalise: batch_mean needs the confidences of all rows of a step before "
                "its first pass; set teacher.scores to stored and teacher.confidence to passes, or "
                "to a file"
            )

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows; and the sum of their margins, where the loss is divided by it."""
        counts = {"rows": float(batch.supervised)}
        if self.normalise == "batch_mean":
            columns = batch.columns
            margin_N = margin(columns[PANEL_CONFIDENCE], columns.get(PANEL_PRESENT))
            counts["margins"] = float(margin_N.double().sum())
        return counts

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The weighted KL summed over the rows; logged are ``kl``, unweighted, and ``margin``."""
        del batch, step
        term = self.distilled(positions.logits_NV, panel_of(signal))
        if self.normalise == "none":
            return {"rows": term}
        logged = Term(torch.zeros_like(term.total), term.parts)
        return {"rows": logged, "margins": Term(term.total, {})}

    def distilled(self, student_NC: Tensor, panel: Panel) -> Term:
        """The KL from the integrated distribution, weighted by the margins if they are to be."""
        return muki_term(
            student_NC,
            panel,
            hard=self.choice == "hard",
            by_margin=self.margin,
            sharpness=self.sharpness,
            temperature=self.temperature,
            squared=self.squared,
            weight=self.weight,
        )


def muki_term(
    student_NC: Tensor,
    panel: Panel,
    *,
    hard: bool,
    by_margin: bool,
    sharpness: float = 0.2,
    temperature: float = 1.0,
    squared: bool = False,
    weight: float = 1.0,
) -> Term:
    """``KL(q || softmax(student / T))``, each position's times its margin or 1.

    To be divided by the number of positions or, to normalise the margins, by their sum. The
    gradient of a position's logits is ``weight * m * (p - q) / T``.

    Args:
        student_NC: the student's logits.
        panel: the teachers at the same positions.
        hard: see :func:`teacher_weights`, as is ``sharpness`` (tau; 0.2 in the original).
        by_margin: whether positions count by their margin.
        temperature: T, of the student, of the teachers' distributions and, where the panel brings
            no confidences, of these.
        squared: whether T^2 multiplies the KL; not in the original.
        weight: of the term.
    """
    confidence_Nn = confidences(panel, temperature)
    alpha_Nn = teacher_weights(confidence_Nn, panel.present_Nn, hard=hard, sharpness=sharpness)
    target_NC = integrated(panel, alpha_Nn, student_NC.shape[1], temperature)
    kl_N = divergence(target_NC, student_NC, temperature) * heat(temperature, squared)
    parts = {"kl": kl_N.detach().sum()}
    if by_margin:
        margin_N = margin(confidence_Nn, panel.present_Nn)
        kl_N = margin_N * kl_N
        parts["margin"] = margin_N.sum()
    return Term(weight * kl_N.sum(), parts)
