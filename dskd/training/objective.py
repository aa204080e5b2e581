"""The module DeepSpeed wraps: teacher, student and loss in one forward.

The loss is computed inside the wrapped forward because a head used outside it has no weights under
ZeRO-3. The teacher is held outside module registration, so that it never enters the student's
partitions or checkpoints.
"""

from __future__ import annotations

from torch import nn

from dskd.batch import Batch, Term
from dskd.methods.base import Method
from dskd.models.families import rows_of
from dskd.ops import positions_ce
from dskd.teachers.teacher import Teacher


class Objective(nn.Module):
    """Student and method; ``forward(batch, step)`` returns the terms of one micro-batch."""

    def __init__(self, student: nn.Module, method: Method, teacher: Teacher | None) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self._unregistered = (teacher,)

    def forward(self, batch: Batch, step: int | None) -> dict[str, Term]:
        """Terms of the method at ``step``; with step None the plain LM loss (evaluation)."""
        (teacher,) = self._unregistered
        if step is None:
            return {"nll": Term(positions_ce(rows_of(self.student, batch)).total, {})}
        signal = None
        if teacher is not None and self.method.needs_teacher(step):
            signal = teacher(batch)
        return self.method.loss(rows_of(self.student, batch), signal, batch, step)
