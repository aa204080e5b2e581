"""What a measured case is held to: the truth in float64, and the floor of bytes and products.

Shape letters: N tokens, C of them in a chunk, V columns, D hidden size, R compared rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from launch.bench.peers import Head, Outcome
from launch.bench.timing import relative_error

COMPARED = 64
"""Rows of a gradient that are compared."""
CHUNK = 1 << 25
"""Logits of a chunk."""

PerToken = Callable[[Tensor, slice], Tensor]
"""Loss of each token [C] from the student's logits [C, V] in float64, of a slice of the tokens."""


@dataclass(frozen=True)
class Truth:
    """The loss over all tokens and some rows of each gradient.

    ``compute`` takes them from float64, ``pick`` takes the same rows of a variant's gradients.
    """

    compute: Callable[[], Outcome]
    pick: Callable[[Outcome], tuple[Tensor, ...]]

    def errors(self, outcome: Outcome, expected: Outcome) -> tuple[float, float]:
        """Relative errors of the loss and, the largest, of the gradients."""
        gradients = zip(self.pick(outcome), expected.gradients, strict=True)
        return (
            relative_error(outcome.loss, expected.loss),
            max(relative_error(found, known) for found, known in gradients),
        )


def stream(total: int, *, reads: int, device: torch.device) -> Callable[[], Tensor]:
    """Move as many bytes: one or two matrices read, one written."""
    each = total // (reads + 1) // 2
    into, *given = (
        torch.randn(each, dtype=torch.bfloat16, device=device) for _ in range(reads + 1)
    )
    if reads == 1:
        return partial(into.copy_, given[0])
    return partial(torch.add, *given, out=into)


def products(head: Head) -> Callable[[], object]:
    """The head's products alone, all logits at once: three of the student, one of the teacher."""
    student, teacher = (head.hidden_ND, head.weight_VD), (head.teacher_NE, head.teacher_VE)
    logits_NV = torch.mm(student[0], student[1].t())
    into_ND, into_VD = (torch.empty_like(matrix) for matrix in student)

    def multiply() -> None:
        for hidden, weight in (student,) if teacher[0] is None else (student, teacher):
            torch.mm(hidden, weight.t(), out=logits_NV)
        torch.mm(logits_NV, student[1], out=into_ND)
        torch.mm(logits_NV.t(), student[0], out=into_VD)

    return multiply


def through_logits(student_NV: Tensor, per_token: PerToken) -> Truth:
    """The truth about a loss of logits."""
    picked_R = _some(len(student_NV), student_NV.device)

    def compute() -> Outcome:
        total, rows = 0.0, []
        for slice_, logits_CV, grad_CV, loss in _chunks(student_NV, lambda x: x, per_token):
            del logits_CV
            total = total + loss
            inside = (picked_R >= slice_.start) & (picked_R < slice_.stop)
            rows.append(grad_CV[picked_R[inside] - slice_.start])
        return Outcome(total, (torch.cat(rows),))

    return Truth(compute, lambda outcome: (outcome.gradients[0][picked_R],))


def through_head(head: Head, per_token: PerToken) -> Truth:
    """The truth about a loss through the head."""
    columns = len(head.weight_VD)
    tokens_R = _some(len(head.hidden_ND), head.hidden_ND.device)
    columns_R = _some(columns, head.hidden_ND.device)

    def compute() -> Outcome:
        weight_VD = head.weight_VD.double()
        total, rows = 0.0, []
        into_RD = weight_VD.new_zeros(len(columns_R), weight_VD.shape[1])
        for slice_, hidden_CD, grad_CV, loss in _chunks(
            head.hidden_ND, lambda x: x @ weight_VD.t(), per_token, columns
        ):
            total = total + loss
            into_RD += grad_CV[:, columns_R].t() @ hidden_CD
            inside = (tokens_R >= slice_.start) & (tokens_R < slice_.stop)
            rows.append(grad_CV[tokens_R[inside] - slice_.start] @ weight_VD)
        return Outcome(total, (torch.cat(rows), into_RD))

    return Truth(
        compute,
        lambda outcome: (outcome.gradients[0][tokens_R], outcome.gradients[1][columns_R]),
    )


def _chunks(
    inputs: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    per_token: PerToken,
    columns: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Slice, inputs, gradient of the logits and sum of the losses of every chunk, in float64."""
    tokens = len(inputs)
    size = max(1, CHUNK // (columns or inputs.shape[1]))
    for begin in range(0, tokens, size):
        slice_ = slice(begin, min(begin + size, tokens))
        inputs_C = inputs[slice_].double()
        logits_CV = logits_of(inputs_C).requires_grad_()
        loss = per_token(logits_CV, slice_).sum() / tokens
        loss.backward()
        yield slice_, inputs_C, logits_CV.grad, loss.detach()


def _some(count: int, device: torch.device) -> Tensor:
    """Evenly spread indices, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, COMPARED), device=device).long().unique()
