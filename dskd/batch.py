"""What flows through a training step: Batch -> Signal -> Positions -> Terms.

Shape letters: B rows of a micro-batch, T tokens of a row, N supervised positions of the micro-batch
(row-major order over ``labels_BT != IGNORE``), V vocabulary, D and E hidden sizes of student and
teacher, K kept logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

IGNORE = -100
"""Label of a position that is not supervised."""
UNLABELLED = -1
"""Label of a supervised position whose class is not known: a teacher may teach there."""
HOST = "host."
"""Beginning of the names of columns that are for the host: of what is counted."""
TARGETS = "targets"
"""Column of a batch of rows for regression, float32 [B]: the number of each row. Labels are then 0
or, where there is no number (nan), ``UNLABELLED``."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one rank, made by :meth:`of` on the CPU.

    What is counted stays on the CPU, wherever the batch is moved: a number that is read from a GPU
    waits for all the work before it.

    Attributes:
        row_ids_B: int64 on the CPU, stable ids of the rows in the prepared data.
        domains_B: int64 on the CPU, index of each row's domain.
        lengths_B: int64 on the CPU, real tokens of each row.
        counts_B: int64 on the CPU, supervised positions of each row.
        ids_BT: int64 input tokens (after masking, for masked LMs), right-padded.
        mask_BT: int64, 1 on real tokens and 0 on padding.
        labels_BT: int64, aligned with the logits of the same position (already shifted for causal
            LMs); ``IGNORE`` where the position is not supervised.
        positions_N: int64, where the supervised positions are in the flattened [B * T].
        labels_N: int64, their labels.
        types_BT: int64, 1 on the tokens of a row's second text and 0 elsewhere; None: no row has a
            second text that its tokenizer marks so.
        columns: further tensors by name, whose first axis is B or N as their reader says
            (:class:`dskd.data.views.Reader`, which has the name as a constant beside it). Those
            whose name begins with :data:`HOST` stay on the CPU.
    """

    row_ids_B: Tensor
    domains_B: Tensor
    lengths_B: Tensor
    counts_B: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    positions_N: Tensor
    labels_N: Tensor
    types_BT: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        *,
        row_ids_B: Tensor,
        domains_B: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        labels_BT: Tensor,
        types_BT: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """The batch of some tensors on the CPU; the positions and what is counted are found here.

        The arguments are the attributes of the same names.
        """
        supervised_BT = labels_BT != IGNORE
        positions_N = supervised_BT.flatten().nonzero().squeeze(1)
        counts_B = supervised_BT.sum(1)
        columns = {} if columns is None else columns
        for name, column in columns.items():
            assert len(column) in (len(counts_B), len(positions_N)), (name, column.shape)
        return Batch(
            row_ids_B=row_ids_B,
            domains_B=domains_B,
            lengths_B=mask_BT.sum(1),
            counts_B=counts_B,
            ids_BT=ids_BT,
            mask_BT=mask_BT,
            labels_BT=labels_BT,
            positions_N=positions_N,
            labels_N=labels_BT.flatten().index_select(0, positions_N),
            types_BT=types_BT,
            columns=columns,
        )

    @property
    def supervised(self) -> int:
        """Number of supervised positions."""
        return int(self.counts_B.sum())

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.lengths_B.sum())

    @property
    def supervised_BT(self) -> Tensor:
        """Bool, the positions that carry a label. Not to index by on a GPU, which waits for the
        number of trues: that is what ``positions_N`` is for."""
        return self.labels_BT != IGNORE

    def to(self, device: torch.device) -> Batch:
        """The batch with what a model reads on ``device`` (asynchronous copies from pinned
        memory)."""
        return self._copied(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch with what a model reads in page-locked memory."""
        return self._copied(Tensor.pin_memory)

    def select(self, rows_S: Tensor) -> Batch:
        """The sub-batch, of a batch on the CPU, of the rows with the given indices (``columns`` are
        not carried)."""
        return Batch.of(
            row_ids_B=self.row_ids_B[rows_S],
            domains_B=self.domains_B[rows_S],
            ids_BT=self.ids_BT[rows_S],
            mask_BT=self.mask_BT[rows_S],
            labels_BT=self.labels_BT[rows_S],
            types_BT=None if self.types_BT is None else self.types_BT[rows_S],
        )

    def repeated(self, count: int) -> Batch:
        """The batch ``count`` times, one copy behind the other, where it is; nothing is waited for.

        ``columns`` go with it, which are of rows or of positions all the same.
        """

        def again(tensor: Tensor) -> Tensor:
            return tensor.repeat(count, *[1] * (tensor.dim() - 1))

        starts_K1 = torch.arange(count, device=self.positions_N.device)[:, None]
        return replace(
            self._copied(again),
            row_ids_B=again(self.row_ids_B),
            domains_B=again(self.domains_B),
            lengths_B=again(self.lengths_B),
            counts_B=again(self.counts_B),
            positions_N=(self.positions_N + starts_K1 * self.ids_BT.numel()).flatten(),
        )

    def _copied(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            ids_BT=copy(self.ids_BT),
            mask_BT=copy(self.mask_BT),
            labels_BT=copy(self.labels_BT),
            positions_N=copy(self.positions_N),
            labels_N=copy(self.labels_N),
            types_BT=None if self.types_BT is None else copy(self.types_BT),
            columns={
                name: column if name.startswith(HOST) else copy(column)
                for name, column in self.columns.items()
            },
        )


class LogitMap(NamedTuple):
    """How a model turns its last linear map's output x into logits.

    ``z = scale * x``, and with a ``softcap`` c > 0 (Gemma) ``z = c tanh(scale * x / c)``.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def of(self, outputs: Tensor) -> Tensor:
        """The logits, of the same type; what is -inf, masked, stays so. The argument itself if
        logits are what it is."""
        if self.scale != 1.0:
            outputs = outputs * self.scale
        if not self.softcap:
            return outputs
        capped = torch.tanh(outputs / self.softcap) * self.softcap
        return torch.where(outputs == -math.inf, outputs, capped)


SAME = LogitMap()
"""Logits are what the last linear map puts out."""

Use = Callable[[Tensor, Tensor, Tensor | None], Any]
"""What is done with ``(hidden_ND, weight_VD, bias_V)`` in the place of a matrix product."""


class Projection(Protocol):
    """A model's last linear map, from hidden states to logits.

    It is a module: called, it runs its hooks, by which ZeRO-3 puts its weights together for the
    time of the call. So a loss that multiplies by them itself has to be handed in.

    What the model then does to its output to make logits is left to whoever calls it:
    :func:`logit_map`.
    """

    def __call__(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Its output [N, V], or what ``use`` makes of the hidden states, the weight and the
        bias."""
        ...


def logit_map(projection: Projection) -> LogitMap:
    """How a model turns its projection's output into logits: the projection's ``map``, if it has
    one."""
    return getattr(projection, "map", SAME)


@dataclass(frozen=True)
class Positions:
    """The supervised positions of a model's forward pass, up to its last linear map.

    ``logits_NV`` is computed on first use and kept; a fused loss goes through ``projection``
    instead and never makes it.

    Attributes:
        states: the hidden states of all tokens [B, T, D], of the embeddings and behind each layer,
            the last one as the head reads it; None: nobody asked for them.
        companion: what a method trains beside the student; its modules are to be called, as the
            projection is.
        routers: of each layer with experts (E) the logits [B * T, E] of its router for all tokens;
            None: nobody asked for them.
    """

    hidden_ND: Tensor
    projection: Projection
    labels_N: Tensor
    states: Sequence[Tensor] | None = None
    companion: nn.Module | None = None
    routers: Sequence[Tensor] | None = None

    @cached_property
    def logits_NV(self) -> Tensor:
        """Student logits [N, V] in the model's dtype, V its own (maybe padded) vocabulary."""
        return logit_map(self.projection).of(self.projection(self.hidden_ND))


@dataclass(frozen=True)
class ProjectedTeacher:
    """A teacher's hidden states [N, E] and its last linear map, which is not applied yet.

    ``vocabulary`` is the number of real tokens; the projection may have padding columns beyond.
    """

    hidden_NE: Tensor
    projection: Projection
    vocabulary: int


@dataclass(frozen=True)
class ProjectedTeachers:
    """Several teachers of one vocabulary, each of some of the N supervised positions.

    Attributes:
        parts: in an order that is the same on every rank; one may teach no position.
        places_N: int64, which positions the rows of the parts are, one part's after the other's.
    """

    parts: Sequence[ProjectedTeacher]
    places_N: Tensor


@dataclass(frozen=True)
class MixtureRule:
    """How much each of several teachers of one vocabulary says about a position.

    Teacher i's share is proportional to ``weights[i] * exp(confidence_i / sharpness)``, and the
    shares of a position sum to 1. A teacher's confidence is ``1 - H / ln V``, 0 to 1: H the entropy
    of its distribution at temperature 1, V the size of the vocabulary (as MUKI, Li et al. 2022,
    weighs classifiers).

    Attributes:
        weights: of each teacher, at least 0, not all 0. Nothing that a teacher of weight 0 says
            counts.
        sharpness: infinite: the weights alone are the shares; 0: all is the surest teacher's, of
            equally sure ones the first's, whatever the weights are that are not 0.
    """

    weights: tuple[float, ...]
    sharpness: float = math.inf


@dataclass(frozen=True)
class MixedTeachers:
    """Several teachers of one vocabulary, each of all N positions, whose distributions are mixed:
    ``q = sum_i share_i softmax(logits_i / T)``."""

    parts: Sequence[ProjectedTeacher]
    rule: MixtureRule


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
class LinearTeachers:
    """What :class:`ProjectedTeachers` are inside of all their projections.

    ``maps`` are the logit maps of the parts; None: logits are what the linear maps put out.
    """

    parts: Sequence[LinearTeacher]
    places_N: Tensor
    maps: Sequence[LogitMap] | None = None


@dataclass(frozen=True)
class LinearMixture:
    """What :class:`MixedTeachers` are inside of all their projections; ``maps`` as above."""

    parts: Sequence[LinearTeacher]
    rule: MixtureRule
    maps: Sequence[LogitMap] | None = None


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher's full logits [N, V], V the shared real vocabulary (no padding columns)."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher's K largest log-probabilities and the exact mass of everything else.

    :func:`dskd.ops.topk_teacher` makes one of logits.

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


@dataclass(frozen=True)
class MixedTopK:
    """Several top-k teachers of one vocabulary, each of all N positions, whose distributions are
    mixed (:func:`dskd.fused.mixed_topk.mixed_topk`).

    Attributes:
        parts: they have a tail at the temperature of the loss and, where confidences count, at 1.
        rule: confidences are of what is known: of the kept tokens, and all others as one.
        vocabulary: number of real tokens.
    """

    parts: Sequence[TopKTeacher]
    rule: MixtureRule
    vocabulary: int


@dataclass(frozen=True)
class Panel:
    """Several teachers, each of classes of its own, asked about the same supervised positions.

    Attributes:
        logits: of each teacher [N, C_i], by a pass without dropout; at least two classes.
        maps: of each int64 [C_i], on the same device: its classes as columns of the student's
            logits, each another one. Two teachers may have a class in common.
        confidence_Nn: how sure each of the n teachers is, 0 to 1, where that was found beforehand;
            None: as its logits say.
        present_Nn: bool, which teachers are heard about a position, at least one; None: all of
            them. What the others' logits and confidence are does not count.
        states: of each teacher the hidden states of all tokens, as of :class:`Positions`; None: the
            method does not read them.
    """

    logits: Sequence[Tensor]
    maps: Sequence[Tensor]
    confidence_Nn: Tensor | None = None
    present_Nn: Tensor | None = None
    states: Sequence[Sequence[Tensor]] | None = None


Signal = (
    ProjectedTeacher
    | ProjectedTeachers
    | MixedTeachers
    | DenseTeacher
    | TopKTeacher
    | MixedTopK
    | Panel
)
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


Loss = Callable[[Positions, Signal | None, Batch, int], Mapping[str, Term]]
"""``loss(positions, signal, batch, step)``: the terms of one micro-batch by name; ``signal`` is the
teacher's at the same positions (None: there is none), ``step`` the completed optimiser steps."""

LossCounts = Callable[[Batch], Mapping[str, float]]
"""``counts(batch)``: what each term's sum is divided by, once added up over an optimiser step."""
