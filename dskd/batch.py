"""What flows through a training step: Batch -> Signal -> Rows -> Terms.

Shape letters: B rows of a micro-batch, T tokens of a row, N supervised positions of the micro-batch
(row-major order over ``labels_BT != IGNORE``), V vocabulary, D and E hidden sizes of student and
teacher, K kept logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not supervised."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one rank.

    Attributes:
        row_ids_B: int64, stable ids of the rows in the prepared data.
        domains_B: int64, index of each row's domain.
        ids_BT: int64 input tokens (after masking, for masked LMs), right-padded.
        mask_BT: int64, 1 on real tokens and 0 on padding.
        labels_BT: int64, aligned with the logits of the same position (already shifted for causal
            LMs); ``IGNORE`` where the position is not supervised.
        extra: further tensors by name, whose first axis is B or N as their maker says.
    """

    row_ids_B: Tensor
    domains_B: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def supervised_BT(self) -> Tensor:
        """Bool, the positions that carry a label."""
        return self.labels_BT != IGNORE

    def supervised(self) -> Tensor:
        """Number of supervised positions, a float64 scalar (sums over ranks pass 2^24)."""
        return self.supervised_BT.sum().to(torch.float64)

    @property
    def labels_N(self) -> Tensor:
        """The labels of the supervised positions, in Rows order."""
        return self.labels_BT[self.supervised_BT]

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on ``device`` (asynchronous copies from pinned memory)."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "extra"
        }
        extra = {k: v.to(device, non_blocking=True) for k, v in self.extra.items()}
        return replace(self, **moved, extra=extra)

    def select(self, rows_S: Tensor) -> Batch:
        """The sub-batch of the rows with the given indices (``extra`` is not carried)."""
        return Batch(
            row_ids_B=self.row_ids_B[rows_S],
            domains_B=self.domains_B[rows_S],
            ids_BT=self.ids_BT[rows_S],
            mask_BT=self.mask_BT[rows_S],
            labels_BT=self.labels_BT[rows_S],
        )


Use = Callable[[Tensor, Tensor, Tensor | None], Any]
"""What is done with ``(hidden_ND, weight_VD, bias_V)`` in the place of a matrix product."""


class Projection(Protocol):
    """A model's last linear map, from hidden states to logits.

    It is a module: called, it runs its hooks, by which ZeRO-3 puts its weights together for the
    time of the call. So a loss that multiplies by them itself has to be handed in.
    """

    def __call__(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits [N, V], or what ``use`` makes of the hidden states, the weight and the bias."""
        ...


@dataclass(frozen=True)
class Rows:
    """The supervised positions of a student's forward pass, up to its last linear map.

    ``logits_NV`` is computed on first use and kept; a fused loss goes through ``projection``
    instead and never makes it.
    """

    hidden_ND: Tensor
    projection: Projection
    labels_N: Tensor

    @cached_property
    def logits_NV(self) -> Tensor:
        """Student logits [N, V] in the model's dtype, V its own (maybe padded) vocabulary."""
        return self.projection(self.hidden_ND)


@dataclass(frozen=True)
class ProjectedTeacher:
    """A teacher's hidden states [N, E] and its last linear map, which is not applied yet.

    ``vocabulary`` is the number of real tokens; the projection may have padding columns beyond.
    """

    hidden_NE: Tensor
    projection: Projection
    vocabulary: int

    @cached_property
    def logits_NV(self) -> Tensor:
        """Teacher logits [N, vocabulary], without gradient."""
        with torch.no_grad():
            return self.projection(self.hidden_NE)[:, : self.vocabulary]


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher's hidden states [N, E], and weight [V, E] and bias [V] of its last linear map.

    What a :class:`ProjectedTeacher` is inside of its projection, where the weights are together:
    the logits are made chunk by chunk.
    """

    hidden_NE: Tensor
    weight_VE: Tensor
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher's full logits [N, V], V the shared real vocabulary (no padding columns)."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher's K largest log-probabilities and the exact mass of everything else.

    Attributes:
        ids_NK: int32 or int64 token ids, negative on unused slots.
        logprobs_NK: log-probabilities at temperature 1 over the whole vocabulary; -inf on unused
            slots.
        tail_N: by temperature T: ``logsumexp(logprob_v / T)`` over the tokens v that are not kept;
            -inf when all are kept. So ``q_v(T) = exp(logprob_v / T - lse(T))`` with
            ``lse(T) = logaddexp(logsumexp(logprobs_NK / T), tail_N[T])``, and no tail mass is ever
            computed as ``1 - sum``.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Mapping[float, Tensor]


Signal = ProjectedTeacher | DenseTeacher | TopKTeacher
"""What a teacher gives for the supervised positions of a batch."""


class Term(NamedTuple):
    """What the positions under one denominator contribute to the loss.

    Attributes:
        total: the weighted SUM over the positions of this micro-batch, an fp32 scalar (float64 for
            float64 logits) with a gradient; the trainer divides it by the global count.
        parts: unweighted SUMs by name, without gradient, for the log.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
