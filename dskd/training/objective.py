"""The module DeepSpeed wraps: teacher, student and loss in one forward.

The loss is computed inside the wrapped forward because a head used outside it has no weights under
ZeRO-3. The teacher is held outside module registration, so that it never enters the student's
partitions or checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dskd.batch import Batch, Loss, Positions, Signal, Term
from dskd.methods.base import Method
from dskd.methods.metrics import AnyMetric, ValueMetric
from dskd.models.balance import BALANCE, balance_of
from dskd.models.families import positions_of
from dskd.teachers.teacher import Teacher


class Objective(nn.Module):
    """Student and method; a call returns the loss terms of one micro-batch: the method's, and
    beside them the balance of a mixture's experts (``models/balance.py``), whatever the method.

    Raises:
        ConfigError: the student's config has a balance loss that is none.
    """

    def __init__(self, student: nn.Module, method: Method, teacher: Teacher | None) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self._unregistered = (teacher,)
        self._balance = balance_of(student.config)

    def forward(self, batch: Batch, step: int, loss: Loss | None = None) -> dict[str, Term]:
        """Terms of a loss on the student's supervised positions, by name.

        Args:
            batch: B rows, on the student's device.
            step: completed optimiser steps.
            loss: None: the method's, which gets the teacher's signal where it needs it at
                ``step``; any other gets None, and has no balance beside it.
        """
        (teacher,) = self._unregistered
        signal = None
        if loss is None and teacher is not None and self.method.needs_teacher(step):
            signal = teacher(batch)
        balance = self._balance if loss is None else None
        chosen = self.method.loss if loss is None else loss
        positions = positions_of(self.student, batch, routers=balance is not None)
        terms = dict(chosen(positions, signal, batch, step))
        return terms if balance is None else terms | {BALANCE: balance.term(positions, batch)}

    def counts(self, batch: Batch) -> dict[str, float]:
        """What the sum of each term is divided by (:meth:`~dskd.methods.base.Method.counts`)."""
        counts = self.method.counts(batch)
        return counts if self._balance is None else counts | {BALANCE: float(batch.supervised)}

    def forward_evaluation(self, batch: Batch, metrics: Sequence[AnyMetric]) -> list[Tensor]:
        """The sums or values of each metric at the student's supervised positions, float64;
        ``batch`` is on the student's device."""

        def loss(
            positions: Positions, signal: Signal | None, batch: Batch, step: int
        ) -> dict[str, Term]:
            del signal, step
            found = [
                metric.values(positions, batch)
                if isinstance(metric, ValueMetric)
                else metric.sums(positions, batch)
                for metric in metrics
            ]
            return {str(n): Term(each, {}) for n, each in enumerate(found)}

        # By a call of the module, not of its parts: ZeRO-3 begins its record of which parameters
        # follow each other in a hook of the module that it wraps.
        terms = self(batch, 0, loss)
        return [terms[str(n)].total for n in range(len(metrics))]
