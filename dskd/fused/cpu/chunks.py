"""Chunks of rows for the closed forms on a CPU: cutting, reading, exponentials, writing.

The rows of a chunk and the scratch for them stay in the caches: only the first pass over them goes
to memory. A chunk is computed in one of two ways:

* plain: ``exp`` of the logits as they are, which saves finding and subtracting each row's largest.
  Right whenever a row's sum of exponentials is a moderate number, as a trained model's is;
* shifted: of the logits less their row's largest, ``-inf`` being made a huge negative number, so
  that no difference of two logits is NaN. Once a chunk has needed it, all later ones do it.

Shape letters: N rows, C of them in a chunk, V columns, K columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dskd.fused.arguments import wide

ChunkRows: TypeAlias = "slice | Tensor"
"""The rows of a chunk: neighbours as a slice (indexing is a view), others by number (a copy)."""

GradientTerm: TypeAlias = tuple[Tensor, Tensor]
"""A matrix [C, <= V] and what its rows are multiplied by [C, 1]."""

ScaleAndCap: TypeAlias = tuple[float, float]
"""Scale and softcap (0: none) of logits, see :func:`dskd.fused.reference.mapped`."""

LOWEST = -1e30
"""Stands for the logit of a token without probability: ``-inf - -inf`` would be NaN."""
MASKED = LOWEST / 10
"""Below this a shifted logit is such a token's."""

_MODERATE = (1e-6, 1e18)
"""Sums of exponentials between these keep clear of the ends of fp32, and so do their squares."""
_SAMPLE = 61
"""Of the first chunk, every 61st column is looked at for logits whose exponential underflows."""
_UNDERFLOW = -80.0
"""Close to where that is in fp32: from -87 on, MKL's ``exp`` takes 100 times as long."""


@dataclass
class Chunk:
    """What is known of a chunk of rows before its gradient is written.

    Attributes:
        totals: sums of exponentials [C, 1], which must be moderate for plain to be right.
        losses: per-token losses [C, 1], which must be finite for that.
        terms: the gradient is the sum of ``matrix * column`` over these, [C, <= V] and [C, 1]; the
            first matrix covers all columns.
        steps: what is added at some columns, ids and addends [C, K].
    """

    totals: list[Tensor]
    losses: list[Tensor]
    terms: list[GradientTerm]
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def moderate(self) -> bool:
        """Whether the sums without a shift by the maximum neither overflowed nor vanished."""
        low, high = _MODERATE
        # on the host: the numbers are few, and a tensor operation costs more than all of them
        totals = [x for total in self.totals for x in total.flatten().tolist()]
        losses = [x for loss in self.losses for x in loss.flatten().tolist()]
        within = not totals or (low < min(totals) and max(totals) < high)
        return within and math.isfinite(sum(totals) + sum(losses))

    def write(self, grad_NV: Tensor, rows: ChunkRows, slope_CV: Tensor | None) -> None:
        """Put the gradient (times ``slope_CV``, if any) into its rows; uses up the terms."""
        (matrix_CV, column_C1), *others = self.terms
        direct = isinstance(rows, slice) and grad_NV.dtype == matrix_CV.dtype
        sum_CV = torch.mul(matrix_CV, column_C1, out=grad_NV[rows] if direct else matrix_CV)
        for matrix, column_C1 in others:
            sum_CV[:, : matrix.shape[1]].addcmul_(matrix, column_C1)
        for ids_CK, addends_CK in self.steps:
            sum_CV.scatter_add_(1, ids_CK, addends_CK)
        if slope_CV is not None:
            sum_CV.mul_(slope_CV)
        if not direct:
            grad_NV[rows] = sum_CV.to(grad_NV.dtype)


class Labels:
    """Labels and their weights; a label without a weight may be anything, and stands for column 0.

    Attributes:
        ids_N1, weight_N1: [N, 1].
        unweighted_N1: bool.
    """

    def __init__(self, labels_N: Tensor, weight_N: Tensor) -> None:
        self.weight_N1 = weight_N[:, None]
        self.unweighted_N1 = self.weight_N1 == 0
        self.ids_N1 = torch.where(self.unweighted_N1, 0, labels_N[:, None])


class ChunkSoftmax(NamedTuple):
    """A chunk, its exponentials at the temperature, their sums, and the labels' logits.

    With kept logits [C, K], which are apart, these are struck out of the exponentials.
    """

    rows: ChunkRows
    shifted: bool
    chunk_CV: Tensor
    exps_CV: Tensor
    total_C1: Tensor
    label_C1: Tensor
    ids_CK: Tensor | None = None
    kept_CK: Tensor | None = None


class Logits:
    """A matrix of logits, read by chunks in the arithmetic's dtype.

    Attributes:
        over: a chunk times ``over`` is the mapped logits divided by the temperature.
        unit: a chunk times ``unit`` is the mapped logits.
        columns: V.
    """

    def __init__(
        self, logits_NV: Tensor, mapping: ScaleAndCap, temperature: float, dtype: torch.dtype
    ) -> None:
        scale, self._softcap = mapping
        self._logits_NV, self._dtype = logits_NV, dtype
        self.columns = logits_NV.shape[1]
        self.unit = self._softcap or scale
        self.over = self.unit / temperature
        self._inner = scale / self.unit

    def read(self, rows: ChunkRows, shifted: bool) -> Tensor:
        """A chunk [C, V], less each row's largest if ``shifted``; may be a view of the logits."""
        chunk_CV = self._logits_NV[rows].to(self._dtype)
        if self._softcap:
            chunk_CV = self._tanh(chunk_CV)
        if not shifted:
            return chunk_CV
        peak_C1 = chunk_CV.amax(1, keepdim=True).clamp_(min=LOWEST)
        return (chunk_CV - peak_C1).clamp_(min=LOWEST)

    def slope(self, rows: ChunkRows) -> Tensor | None:
        """Derivative of what :meth:`read` gives by the logits; None where that is 1."""
        if not self._softcap:
            return None
        tanh_CV = self._tanh(self._logits_NV[rows].to(self._dtype))
        F.threshold_(tanh_CV, -2.0, 0.0)  # a masked logit is not mapped
        return tanh_CV.square_().neg_().add_(1.0).mul_(self._inner)

    def _tanh(self, chunk_CV: Tensor) -> Tensor:
        tanh_CV = torch.mul(chunk_CV, self._inner).tanh_()
        if chunk_CV.amin() == -torch.inf:  # stays masked
            tanh_CV.masked_fill_(chunk_CV == -torch.inf, -torch.inf)
        return tanh_CV

    def underflows(self, rows: ChunkRows) -> bool:
        """Whether a sample of these rows' logits has one whose exponential underflows."""
        sample = self.read(rows, False)[:, ::_SAMPLE]
        return bool((sample.amin() * self.over) < _UNDERFLOW)


def weighted_rows(*weights: Tensor | None) -> Tensor:
    """Rows that have some weight: the others are left alone."""
    (first_N, *others_N) = (weight_N != 0 for weight_N in weights if weight_N is not None)
    for other_N in others_N:
        first_N.logical_or_(other_N)
    return first_N


def by_chunks(
    weighted_N: Tensor,
    step: int,
    logits: list[Logits],
    compute: Callable[[ChunkRows, bool], Chunk],
    losses: list[Tensor],
    grad_NV: Tensor | None,
) -> None:
    """Fill the losses [N] and the gradient by ``compute(rows, shifted)`` of chunks of rows.

    Chunks are of ``step`` weighted rows; the gradient of the others is 0, and their losses stay as
    they are. A chunk may be computed twice, so ``compute`` leaves its inputs as they are.
    ``logits`` are what is read, the student's first.
    """
    if grad_NV is not None and not weighted_N.all():
        grad_NV[~weighted_N] = 0.0
    shifted: bool | None = None
    for rows in _cut(weighted_N, step):
        if shifted is None:
            shifted = any(each.underflows(rows) for each in logits)
        chunk = compute(rows, shifted)
        if not shifted and not chunk.moderate():
            shifted = True
            chunk = compute(rows, shifted)
        for loss_N, loss_C1 in zip(losses, chunk.losses, strict=True):
            loss_N[rows] = loss_C1[:, 0]
        if grad_NV is not None:
            chunk.write(grad_NV, rows, logits[0].slope(rows))


def rows_per_chunk(buffers: int, columns: int, on_cpu: bool) -> int:
    """As many as keep the buffers in the caches, and make an operation worth its start.

    Several threads meet at the end of each operation, and wait long for one another on a busy
    machine: they get fewer and larger ones.
    """
    elements = 1 << 26
    if on_cpu:
        elements = 1 << 21 if torch.get_num_threads() == 1 else 1 << 22
    return max(1, elements // (buffers * columns))


def scratch(buffers: int, logits_NV: Tensor) -> Tensor:
    """Buffers [C, V] of the arithmetic's dtype for the largest chunk: C is its size."""
    rows = rows_per_chunk(buffers, logits_NV.shape[1], logits_NV.device.type == "cpu")
    shape = (buffers, max(1, min(rows, len(logits_NV))), logits_NV.shape[1])
    return logits_NV.new_empty(shape, dtype=wide(logits_NV.dtype))


def filled(scratch_BCV: Tensor, rows: ChunkRows) -> tuple[Tensor, ...]:
    """The part of the buffers that the rows of a chunk fill, one view a buffer."""
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return scratch_BCV[:, :count].unbind()


def _cut(weighted_N: Tensor, step: int) -> Iterator[ChunkRows]:
    for part in weighted_N.nonzero().flatten().split(step):
        if len(part):
            first, beyond = part[0].item(), part[-1].item() + 1
            yield slice(first, beyond) if beyond - first == len(part) else part


def exponentials(
    chunk_CV: Tensor, factor: float, shifted: bool, out: Tensor, struck_CK: Tensor | None = None
) -> Tensor:
    """Fill ``out`` with ``exp(factor * chunk)``, struck-out ids at 0; returns its sums [C, 1]."""
    if factor != 1.0:
        chunk_CV = torch.mul(chunk_CV, factor, out=out)
    if shifted:
        lowest = math.log(torch.finfo(out.dtype).tiny) + 1.0
        torch.clamp(chunk_CV, min=lowest, out=out).exp_()
        # what was clamped has no probability at all
        F.threshold_(out, math.exp(lowest + 1e-2), 0.0)
    else:
        torch.exp(chunk_CV, out=out)
    if struck_CK is not None:
        out.scatter_(1, struck_CK, 0.0)
    return out.sum(1, keepdim=True)


def unweighted(terms: list[GradientTerm], loss_C1: Tensor, none_C1: Tensor) -> list[GradientTerm]:
    """The terms, and the loss in place, at 0 in some rows: 0 times what is there may be NaN.

    The first matrix, exponentials of the student, stays as it is, for the label's gradient.
    """
    if not none_C1.any():
        return terms
    loss_C1.masked_fill_(none_C1, 0.0)
    for matrix, _ in terms[1:]:
        matrix.masked_fill_(none_C1, 0.0)
    return [(matrix, column_C1.masked_fill(none_C1, 0.0)) for matrix, column_C1 in terms]


def add_label(
    chunk: Chunk, logits: Logits, softmax: ChunkSoftmax, labels: Labels, spare_CV: Tensor
) -> None:
    """Add the cross entropy at temperature 1, as the chunk's next loss, and its gradient.

    ``softmax`` was read from ``logits`` and has the matrix of the chunk's first term; kept ids have
    the first step. Exponentials at 1 come from those at 1 or 2 without computing any.
    """
    exps_CV, total_C1 = softmax.exps_CV, softmax.total_C1
    if logits.unit == 2.0 * logits.over:  # exp(x) = exp(x / 2)^2
        exps_CV = torch.mul(exps_CV, exps_CV, out=spare_CV)
        total_C1 = exps_CV.sum(1, keepdim=True)
    elif logits.unit != logits.over:
        exps_CV = spare_CV
        total_C1 = exponentials(
            softmax.chunk_CV, logits.unit, softmax.shifted, exps_CV, softmax.ids_CK
        )
    slope_C1, log_z_C1 = labels.weight_N1[softmax.rows] * logits.unit, total_C1.log()
    if softmax.kept_CK is not None:
        kept_CK = softmax.kept_CK * logits.unit
        log_z_C1 = torch.logaddexp(log_z_C1, kept_CK.logsumexp(1, keepdim=True))
        chunk.steps[0][1].addcmul_(slope_C1, kept_CK.sub_(log_z_C1).exp_())
    column_C1 = slope_C1 * (-log_z_C1).exp_()
    if exps_CV is softmax.exps_CV:
        chunk.terms[0] = (exps_CV, chunk.terms[0][1] + column_C1)
    else:
        chunk.terms.append((exps_CV, column_C1))
        chunk.totals.append(total_C1)
    chunk.steps.append((labels.ids_N1[softmax.rows], -slope_C1))
    loss_C1 = log_z_C1 - softmax.label_C1 * logits.unit
    if softmax.shifted:
        loss_C1.masked_fill_(softmax.label_C1 < MASKED, torch.inf)
        loss_C1.masked_fill_(log_z_C1 == -torch.inf, torch.nan)  # without a softmax
    chunk.losses.append(loss_C1.masked_fill_(labels.unweighted_N1[softmax.rows], 0.0))
