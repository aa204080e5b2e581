"""What a run does around its steps, to its student or beside it, apart from the loss.

A run has several such parts: its method's (which may put other modules into the student), its
teacher's (an average of the student's weights), its data's (masks that follow the student). Each is
a :class:`StepHooks`; a :class:`HookChain` makes one of them, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from dskd.batch import Batch, Loss, LossCounts
from dskd.engine.shards import ParameterShards

_FOLDER = "hooks"
"""Where a checkpoint keeps what the hooks write, a folder for each name."""


class Probe(Protocol):
    """Gradients of batches of one's own, which no optimiser step follows."""

    def __call__(
        self, batches: Sequence[Batch], loss: Loss | None = None, counts: LossCounts | None = None
    ) -> ParameterShards:
        """The gradient of a loss, of one effective batch over all ranks (collective).

        Its pieces are those of a step: in the dtype that DeepSpeed sums in, and times fp16's loss
        scale, the same for all gradients of a step. They hold until the next call or the end of
        :meth:`StepHooks.before_passes`, whichever comes first: copy what is to be kept.

        Args:
            batches: this rank's micro-batches, on the CPU; as many on every rank.
            loss: None: the method's at this step. Any other gets no teacher's signal.
            counts: what the terms of ``loss`` are divided by, once added up over all ranks and
                micro-batches; None: the method's counts, where the terms have the same names.
        """
        ...


class StepHooks:
    """What is done around the steps of a run: here nothing.

    One object for a run, made before the student enters its engine. The trainer calls it on every
    rank alike, so it may use collectives; it draws no random numbers and reads no clock.
    """

    defines_export: bool = False
    """Whether :meth:`exported` makes the model that is written out; if not, it is the student."""

    @property
    def touches_weights(self) -> bool:
        """Whether :meth:`before_step` or :meth:`after_step` does anything. Only then are the shards
        looked up: that takes time, and the shards of some of DeepSpeed's optimizers are not
        known."""
        own = type(self)
        before, after = StepHooks.before_step, StepHooks.after_step
        return own.before_step is not before or own.after_step is not after

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's parameter groups, given those of a run without these hooks.

        A group is ``params`` and what differs for them: ``weight_decay``, ``eps`` ... and
        ``lr_scale``, by which the run's learning rate is multiplied.
        """
        return groups

    def begin(self, position: int) -> None:
        """Before the first batch is made, once :meth:`restore` and :meth:`load` are done.

        Args:
            position: of that batch, 0 in a new run.
        """

    def waits(self, position: int) -> bool:
        """Whether the batch at ``position`` cannot be made before :meth:`prepare` is called; a
        function of the position and of what was prepared before."""
        del position
        return False

    def prepare(self, position: int, step: int, stop: Callable[[], bool]) -> None:
        """Do what the batch at ``position`` waits for; called where :meth:`waits` is true only.

        The student is that of a checkpoint, so that after an interruption it is repeated exactly.

        Args:
            position: of the batch.
            step: completed steps, those of the newest checkpoint (0: there need not be one).
            stop: whether a signal came, on this rank.

        Raises:
            dskd.stores.sweep.Stopped: a signal came on one of the ranks; raised on all of them.
        """

    def before_passes(self, probe: Probe, step: int) -> None:
        """Before a step's own forward passes.

        Args:
            probe: gradients of other batches; what it computed last is forgotten afterwards.
            step: completed steps.
        """

    def before_micro_batch(self, last: bool) -> None:
        """Before a forward pass, of a step or of a probe; ``last``: its backward pass completes the
        gradient."""

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

    def evaluated(self, score: float) -> None:
        """After an evaluation of a complete student; ``score`` is what selects checkpoints, the
        same on every rank."""

    def over(self) -> bool:
        """Whether training shall end here, before the run's last step; the same on every rank."""
        return False

    def rates(self) -> dict[str, float | Tensor]:
        """Numbers that the log shows after a step, by name; as scalars on the device, where they
        are computed there, which are read when the next step is queued."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights and optimizer, as JSON has it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; called before the weights are loaded."""

    def save(self, folder: Path) -> None:
        """Write what is too large for :meth:`state` (collective).

        Args:
            folder: in a checkpoint, of these hooks alone; made by the hooks that write into it.
        """

    def load(self, folder: Path) -> None:
        """Read back what :meth:`save` wrote; called after :meth:`restore` (collective)."""

    def exported(self, weights: ParameterShards, batch: Batch) -> PreTrainedModel:
        """The model that is written out, a plain HuggingFace one (collective); called where
        :attr:`defines_export` is true only.

        Args:
            weights: the trained ones.
            batch: rows on the CPU to try it on.

        Raises:
            DskdError: it is not the student that was trained.
        """
        raise NotImplementedError


class HookChain(StepHooks):
    """Several hooks as one, each called in turn.

    Args:
        hooks: by name, in the order in which they are called; a checkpoint keeps the state of each
            under its name. At most one of them defines the exported model.
    """

    def __init__(self, hooks: Mapping[str, StepHooks]) -> None:
        self._hooks = dict(hooks)
        exporting = [name for name, each in self._hooks.items() if each.defines_export]
        assert len(exporting) <= 1, f"several hooks define the exported model: {exporting}"
        self._exporting = self._hooks[exporting[0]] if exporting else None
        self.defines_export = self._exporting is not None

    @property
    def touches_weights(self) -> bool:
        """Whether any of the hooks does."""
        return any(each.touches_weights for each in self._hooks.values())

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups as each of the hooks leaves them to the next."""
        for each in self._hooks.values():
            groups = each.groups(groups)
        return groups

    def begin(self, position: int) -> None:
        """Let each of them begin."""
        for each in self._hooks.values():
            each.begin(position)

    def waits(self, position: int) -> bool:
        """Whether the batch waits for any of them."""
        return any(each.waits(position) for each in self._hooks.values())

    def prepare(self, position: int, step: int, stop: Callable[[], bool]) -> None:
        """Let those that the batch waits for prepare it."""
        for each in self._hooks.values():
            if each.waits(position):
                each.prepare(position, step, stop)

    def before_passes(self, probe: Probe, step: int) -> None:
        """Call each of the hooks in turn."""
        for each in self._hooks.values():
            each.before_passes(probe, step)

    def before_micro_batch(self, last: bool) -> None:
        """Call each of the hooks in turn."""
        for each in self._hooks.values():
            each.before_micro_batch(last)

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Call each of the hooks in turn, seeing the edits of those before it."""
        for each in self._hooks.values():
            each.before_step(weights, step, lr)

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Call each of the hooks in turn, seeing the edits of those before it."""
        for each in self._hooks.values():
            each.after_step(weights, step, lr)

    def complete(self, step: int) -> bool:
        """Whether the student is complete to all of them."""
        return all(each.complete(step) for each in self._hooks.values())

    def evaluated(self, score: float) -> None:
        """Tell each of them."""
        for each in self._hooks.values():
            each.evaluated(score)

    def over(self) -> bool:
        """Whether any of them ends the training."""
        return any(each.over() for each in self._hooks.values())

    def rates(self) -> dict[str, float | Tensor]:
        """The numbers of all; no two give one of the same name."""
        found: dict[str, float | Tensor] = {}
        for name, each in self._hooks.items():
            rates = each.rates()
            assert not found.keys() & rates.keys(), f"{name}: {found.keys() & rates.keys()} twice"
            found |= rates
        return found

    def state(self) -> dict[str, Any]:
        """Each one's state by its name."""
        return {name: each.state() for name, each in self._hooks.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Each from what stands under its name; what is of hooks that are not here is left alone,
        for an export needs the method's only."""
        for name, each in self._hooks.items():
            each.restore(state[name])

    def save(self, folder: Path) -> None:
        """Each into a folder of its name in the checkpoint ``folder``."""
        for name, each in self._hooks.items():
            each.save(folder / _FOLDER / name)

    def load(self, folder: Path) -> None:
        """Each from its folder in the checkpoint ``folder``."""
        for name, each in self._hooks.items():
            each.load(folder / _FOLDER / name)

    def exported(self, weights: ParameterShards, batch: Batch) -> PreTrainedModel:
        """The model by those hooks that define it."""
        assert self._exporting is not None, "none of the hooks defines the exported model"
        return self._exporting.exported(weights, batch)
