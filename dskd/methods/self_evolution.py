"""Self-Evolution: a trained LM goes on training on what it finds hard, by targets of its own.

Zhong et al. 2023 (Findings of ACL), "Self-Evolution Learning for Discriminative Language Model
Pretraining". The hard tokens are masked (``data.masking.kind: hard_tokens``). At each of them the
target is ``q = (1 - lambda) onehot + lambda r``, r the student's own distribution where it sees the
row without masks (``teacher.kind: self``): "token-specific label smoothing". The tokens it is sure
of keep nearly their label, hard ones get softer targets.

With H the entropy, ``CE(q, p) = (1 - lambda) CE + lambda KL(r || p) + lambda H(r)``. No gradient
flows into r, so the last part has none, and is left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig

from dskd.batch import Batch, Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.fused.arguments import TokenWeight
from dskd.hardness.masks import HARD_LABELS
from dskd.methods.base import Method
from dskd.ops import positions_ce, positions_kd
from dskd.settings.data import HardTokens
from dskd.settings.run import Run
from dskd.settings.teachers import SelfTeacher


class SelfEvolution(Method):
    """Cross entropy with labels that the student's own distribution smooths.

    The last checkpoint is exported, in every run alike: with hard tokens masked, the validation
    loss (of random masks) rises while what is trained gets better, so it must select nothing.
    """

    temperature: ClassVar[float] = 1.0

    kind: Literal["self_evolution"] = "self_evolution"
    smoothing: float = Field(0.1, ge=0, le=1)
    """lambda, the weight of the student's own distribution; 0: plain labels, no teacher."""
    normalise: Literal["masked", "tokens"] = "masked"
    """What the sums are divided by: the predicted tokens (the sum of their weights), or, as in the
    original code, all tokens that are not padding."""
    hard_weight: float = Field(1.0, gt=0)
    """Of causal LMs, which have no masks: weight of the hard tokens, the others having 1."""

    def wants_teacher(self) -> bool:
        """Whether targets are smoothed."""
        return self.smoothing > 0.0

    def needs_teacher(self, step: int) -> bool:
        """In every step, if targets are smoothed."""
        del step
        return self.wants_teacher()

    def selection(self) -> None:
        """No result selects a checkpoint: the last one is exported."""
        return

    def columns(self) -> frozenset[str]:
        """Which labels are hard, where these have a weight of their own."""
        return frozenset() if self.hard_weight == 1.0 else frozenset({HARD_LABELS})

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse another teacher than the student, and weights without hard tokens to weigh."""
        del config
        if self.wants_teacher() and not isinstance(run.teacher, SelfTeacher):
            kind = "none" if run.teacher is None else run.teacher.kind
            raise ConfigError(
                f"teacher.kind: {kind}, but by method self_evolution the student teaches itself; "
                f"set it to self (or method.smoothing to 0)"
            )
        if not self.columns():
            return
        if run.data.objective != "causal":
            raise ConfigError(
                f"method.hard_weight: {self.hard_weight} is for causal LMs; of a masked LM, "
                f"data.masking selects the hard tokens, and all have one weight"
            )
        if not isinstance(run.data.masking, HardTokens):
            raise ConfigError(
                f"data.masking.kind: {run.data.masking.kind}, but method.hard_weight "
                f"{self.hard_weight} needs hard_tokens"
            )

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """``w ((1 - lambda) CE + lambda KL(r || p))``, summed over the supervised positions, nats.

        Logged as ``ce`` and ``kl``, each with its w; what has weight 0 is left out.
        """
        weight, smoothing = self._weight(batch), self.smoothing
        if smoothing == 0.0:
            losses = positions_ce(positions, weight)
            return {"tokens": Term(losses.total, {"ce": _sum(losses.label_N, weight)})}
        assert signal is not None, f"step {step} needs the teacher"
        losses = positions_kd(
            positions,
            signal,
            temperature=self.temperature,
            weight=smoothing * weight,
            label_weight=(1.0 - smoothing) * weight,
        )
        parts = {"kl": _sum(losses.divergence_N, weight)}
        if smoothing < 1.0:
            parts["ce"] = _sum(losses.label_N, weight)
        return {"tokens": Term(losses.total, parts)}

    def counts(self, batch: Batch) -> dict[str, float]:
        """The tokens, or the weights of the supervised positions in their sum, as ``normalise``
        has it."""
        if self.normalise == "tokens":
            return {"tokens": float(batch.tokens)}
        weight = self._weight(batch)
        if isinstance(weight, Tensor):
            return {"tokens": weight.double().sum().item()}
        return super().counts(batch)

    def _weight(self, batch: Batch) -> TokenWeight:
        """The weight of every supervised position: one number, or fp32 [N]."""
        if not self.columns():
            return 1.0
        return 1.0 + (self.hard_weight - 1.0) * batch.columns[HARD_LABELS]


def _sum(values_N: Tensor, weight: TokenWeight) -> Tensor:
    return (values_N * weight).sum()
