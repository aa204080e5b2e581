"""Tokens along several axes: logits [B, T, V] with labels [B, T], as models have them, come to the
row functions as [N, V] and [N], and losses go back as [B, T].

Nothing is copied where the axes are neighbours in memory; ``logits[:, :-1]`` is copied, which
labels that are moved by one, with ``ignore_index`` at the last token, do without.

Shape letters: N tokens, along one axis or several; K kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

from torch import Tensor

from dskd.batch import DenseTeacher, LinearMixture, LinearTeacher, MixedTopK, TopKTeacher
from dskd.fused.arguments import Losses, refuse, tensor

AnyTeacher = TypeVar("AnyTeacher")
AnyWeight = TypeVar("AnyWeight")


class Tokens(NamedTuple):
    """The axes of the tokens; arguments that have one axis of them are passed on as they are.

    Attributes:
        axes: sizes, of all axes but the columns'.
    """

    axes: tuple[int, ...]

    @classmethod
    def of(cls, name: str, values: Tensor) -> Tokens:
        """The tokens of logits or hidden states.

        Raises:
            TypeError, ValueError: it is no tensor, or has no axis of tokens.
        """
        tensor(name, values)
        shape = tuple(values.shape)
        refuse(len(shape) < 2, lambda: f"{name}: must have two axes or more, not shape {shape}")
        return cls(shape[:-1])

    def rows(self, name: str, values: Tensor) -> Tensor:
        """What each token has several of, [N, ...] of [B, T, ...]."""
        tensor(name, values)
        if len(self.axes) == 1:
            return values
        shape = tuple(values.shape)
        refuse(
            shape[:-1] != self.axes, lambda: f"{name}: has shape {shape}, not {self._named('...')}"
        )
        return values.flatten(0, -2)

    def room(self, name: str, values: Tensor | None) -> Tensor | None:
        """The same of a tensor that is to be written into, if there is one."""
        if values is None or len(self.axes) == 1:
            return values
        rows_N = self.rows(name, values)
        refuse(
            rows_N.data_ptr() != values.data_ptr(),
            lambda: f"{name}: its tokens have no common stride in memory; it would be a copy",
        )
        return rows_N

    def each(self, name: str, values: AnyWeight) -> AnyWeight:
        """What each token has one of, [N] of [B, T]; a number, or None, as it is."""
        if len(self.axes) == 1 or not isinstance(values, Tensor):
            return values
        shape = tuple(values.shape)
        refuse(shape != self.axes, lambda: f"{name}: has shape {shape}, not {self._named()}")
        return values.flatten()

    def teacher(self, teacher: AnyTeacher, name: str = "teacher") -> AnyTeacher:
        """A teacher of these tokens. Those of several, each of some of them, stay as they are:
        their places count through all axes."""
        if isinstance(teacher, DenseTeacher):
            return replace(teacher, logits_NV=self.rows(name, teacher.logits_NV))
        if isinstance(teacher, LinearTeacher):
            return replace(teacher, hidden_NE=self.rows(f"{name}'s hidden", teacher.hidden_NE))
        if isinstance(teacher, TopKTeacher):
            tails = {t: self.each(f"{name}'s tail", x) for t, x in teacher.tail_N.items()}
            ids_NK = self.rows(f"{name}'s ids", teacher.ids_NK)
            logprobs_NK = self.rows(f"{name}'s logprobs", teacher.logprobs_NK)
            return replace(teacher, ids_NK=ids_NK, logprobs_NK=logprobs_NK, tail_N=tails)
        if isinstance(teacher, LinearMixture | MixedTopK):
            parts = [self.teacher(x, f"teachers[{k}]") for k, x in enumerate(teacher.parts)]
            return replace(teacher, parts=parts)
        return teacher

    def back(self, teacher: TopKTeacher) -> TopKTeacher:
        """A teacher of [N] tokens along the axes that they came with."""
        if len(self.axes) == 1:
            return teacher
        tails = {t: x.unflatten(0, self.axes) for t, x in teacher.tail_N.items()}
        kept = (x.unflatten(0, self.axes) for x in (teacher.ids_NK, teacher.logprobs_NK))
        return TopKTeacher(*kept, tails)

    def losses(self, losses: Losses) -> Losses:
        """Losses of each token along the axes that the tokens came with."""
        if len(self.axes) == 1:
            return losses
        total, *each = losses
        count = losses.divergence_N.shape
        return Losses(total, *(x.unflatten(0, self.axes) if x.shape == count else x for x in each))

    def _named(self, *more: str) -> str:
        return f"[{', '.join([*map(str, self.axes), *more])}]"
