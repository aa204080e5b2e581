"""What is done around the steps of a run, to its student or beside it, apart from the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dskd.batch import Batch
from dskd.engine.shards import ParameterShards


class Change:
    """What a run does beyond the loss, to its student or beside it: here nothing.

    One object for a run, made before the student enters its engine. The trainer calls it on every
    rank alike, so it may use collectives; it draws no random numbers and reads no clock.
    """

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's parameter groups, given those of a run without a change.

        A group is ``params`` and what differs for them: ``weight_decay``, ``eps`` ... and
        ``lr_scale``, by which the run's learning rate is multiplied.
        """
        return groups

    def before_micro_batch(self, last: bool) -> None:
        """Before a forward pass; ``last``: the optimiser's step follows its backward pass."""

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """After the last backward pass, before clipping.

        fp16 overflow may still skip the step; it is then tried again with the next batch.

        Args:
            weights: editable; its groups have the learning rates of this step.
            step: completed steps.
            lr: the learning rate of groups without ``lr_scale``.
        """

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """After an optimiser step that was taken, with ``step`` and ``lr`` as before it."""

    def complete(self, step: int) -> bool:
        """Whether the student may be exported after so many steps: until then a checkpoint is no
        candidate for the best."""
        del step
        return True

    def rates(self) -> dict[str, float]:
        """Numbers that the log shows after a step, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights and optimizer, as JSON has it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; called before the weights are loaded."""

    def save(self, folder: Path) -> None:
        """Write into a checkpoint's folder what is too large for :meth:`state` (collective)."""

    def load(self, folder: Path) -> None:
        """Read back what :meth:`save` wrote; called after :meth:`restore` (collective)."""

    def exported(self, weights: ParameterShards, batch: Batch) -> PreTrainedModel:
        """The student that is written out, a plain HuggingFace model (collective).

        Args:
            weights: the trained ones.
            batch: rows on the CPU to try it on.

        Raises:
            DskdError: it is not the student that was trained.
        """
        raise NotImplementedError
