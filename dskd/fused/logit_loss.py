"""The losses of a matrix of logits: which one, over some of its rows, and as an operator over all.

Shape letters: N tokens, C of them in a chunk, V student columns, W teacher columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import Losses
from dskd.fused.backend import row_functions
from dskd.fused.gradients import operator, total_of
from dskd.fused.per_token import TokenWeights

NO_BETA = 0.0
"""The ``beta`` of forms that have none."""


class LossForm(NamedTuple):
    """Which loss: what of a teacher there is, the divergence, the weights of all tokens.

    Attributes:
        form: ``dense``, ``linear``, ``mixed``, ``topk``, or ``label``: cross entropy alone.
        teacher: its logits; or hidden states, weight and bias (empty: none) of each teacher, of
            tokens of its own (``linear``) or of all tokens (``mixed``); or ids, log-probabilities
            and maybe tail; or nothing.
        weights: of every token; a token's label.
        kind: the divergence, or the mode of a top-k teacher.
        beta, temperature: see :func:`dskd.fused.dense.dense_kd`.
        maps: scale and softcap of the student's logits, and of the teacher's; then those of each of
            several teachers that are not alike, whose logits get them as they are made.
        mixture: of the form ``mixed``: the rule's sharpness and its weights.
    """

    form: str
    teacher: list[Tensor]
    weights: TokenWeights
    kind: str
    beta: float
    temperature: float
    maps: list[float]
    mixture: Sequence[float] | None = None

    def rows(
        self,
        rows: slice,
        logits_CV: Tensor,
        grad_CV: Tensor | None,
        teacher_CW: Tensor | None = None,
    ) -> tuple:
        """Divergence [C] and label loss [C] or None of some tokens, their gradient in ``grad_CV``.

        ``teacher_CW``: the logits of the forms ``linear`` and ``mixed``. The student's of form
        ``topk`` are used up.
        """
        weight_C, reverse_C, labels_C, label_C = self._weights(rows)
        options = {"student_map": tuple(self.maps[:2]), "grad_NV": grad_CV}
        if self.form == "label":
            functions = row_functions("label", logits_CV)
            losses_C = functions.label_rows(logits_CV, labels_C, label_C, **options)
            return torch.zeros_like(losses_C), losses_C
        options |= {"temperature": self.temperature}
        if self.form == "topk":
            functions = row_functions("topk", logits_CV)
            ids_CK, logprobs_CK, *tail = (tensor[rows] for tensor in self.teacher)
            kept = (ids_CK, logprobs_CK, tail[0] if tail else None)
            options |= {"mode": self.kind}
            return functions.topk_rows(logits_CV, *kept, labels_C, weight_C, label_C, **options)
        teacher_CW = self.teacher[0][rows] if teacher_CW is None else teacher_CW
        weights = (labels_C, weight_C, reverse_C, label_C)
        options |= {"kind": self.kind, "beta": self.beta, "teacher_map": tuple(self.maps[2:4])}
        return row_functions("dense", logits_CV).dense_rows(
            logits_CV, teacher_CW, *weights, **options
        )

    def total(self, divergence_N: Tensor, label_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum, and the losses it is made of."""
        weight_N = self.weights.divergence_N
        if self.kind == "mixed":  # whose divergence has its weights in it
            weight_N = torch.ones_like(weight_N)
        labelled = self.weights.label_N is not None
        return total_of(divergence_N, weight_N, label_N if labelled else None, self.weights.label_N)

    def _weights(self, rows: slice) -> list[Tensor | None]:
        return [None if vector is None else vector[rows] for vector in self.weights]


def logit_loss(student_NV: Tensor, loss: LossForm, out: Tensor | None) -> Losses:
    """A loss of checked arguments with its gradient: to autograd, or into ``out``."""
    weight_N, reverse_N, labels_N, label_weight_N = loss.weights
    how = (loss.kind, loss.beta, loss.temperature, loss.maps)
    rest = (reverse_N, labels_N, loss.form, loss.teacher, *how)
    return _operator(student_NV, (weight_N, label_weight_N, *rest), out)


def _rows(
    student_NV: Tensor,
    weight_N: Tensor,
    label_weight_N: Tensor | None,
    reverse_N: Tensor | None,
    labels_N: Tensor | None,
    form: str,
    teacher: list[Tensor],
    *kind: str | float | list[float] | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence [N] and label loss [N] or [0]; the gradient into the last argument."""
    *kind, grad_NV = kind
    weights = TokenWeights(weight_N, reverse_N, labels_N, label_weight_N)
    loss = LossForm(form, teacher, weights, *kind)
    if form == "topk":
        # its rows use up the logits that they are given: let these be the gradient's room, where it
        # holds every logit as it is
        if grad_NV is None or not _holds(grad_NV.dtype, student_NV.dtype):
            student_NV = student_NV.clone(memory_format=torch.contiguous_format)
        else:
            student_NV = grad_NV.copy_(student_NV)
    return loss.total(*loss.rows(slice(None), student_NV, grad_NV))


def _holds(wider: torch.dtype, dtype: torch.dtype) -> bool:
    return torch.promote_types(wider, dtype) == wider


_operator = operator(
    "logit_loss",
    "Tensor? reverse, Tensor? labels, str form, Tensor[] teacher, str kind, float beta, "
    "float temperature, float[] maps",
    _rows,
)
