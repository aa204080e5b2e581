"""What a training method is: its settings, a pure loss, and what it needs from a teacher.

A method is a frozen section of settings. The step loop, the engine and the data never name one;
they go through :data:`METHODS`, so a new method is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import Batch, Positions, Signal, Term
from dskd.data.views import Reader
from dskd.engine.checkpoints import Selection
from dskd.engine.hooks import StepHooks
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError
from dskd.methods.metrics import LM_LOSS, AnyMetric
from dskd.settings.base import Section
from dskd.settings.parsing import named_object, nearest, parse
from dskd.settings.run import Run

METHODS: dict[str, str] = {
    "ki": "dskd.methods.ki:KnowledgeInheritance",
    "lm": "dskd.methods.lm:LanguageModelling",
    "self_evolution": "dskd.methods.self_evolution:SelfEvolution",
    "wid": "dskd.methods.wid:WeightInheritance",
    "finetune": "dskd.methods.finetune:Finetuning",
    "muki": "dskd.methods.muki:Integration",
    "vkd": "dskd.methods.vkd:VanillaDistillation",
    "uhc": "dskd.methods.uhc:UnifiedClassifiers",
    "dfa": "dskd.methods.dfa:FeatureAlignment",
    "cfl": "dskd.methods.cfl:CommonFeatures",
    "l2kd": "dskd.methods.l2kd:LifelongDistillation",
}
"""Where each kind is found, ``module:Class``; imported when needed, so that a broken one cannot
break the others."""


class Method(Section):
    """Base of the training methods: settings, a pure loss, and what a run does for it besides.

    Attributes:
        terms: names of all terms that :meth:`loss` may return: one for each number that sums are
            divided by.
        kind: the method's name in the settings. A method of this package narrows it to a literal;
            one from elsewhere leaves it alone, since its kind is ``my_package.my_module:MyMethod``.

    A method that wants a teacher has a ``temperature``, at which :meth:`loss` reads the tail mass
    of a top-k teacher.
    """

    terms: ClassVar[tuple[str, ...]] = ("tokens",)
    objectives: ClassVar[frozenset[str]] = frozenset({"masked", "causal"})
    """The values of ``data.objective`` that :meth:`loss` is for."""
    temperature_setting: ClassVar[str] = "temperature"
    """Name of that setting below ``method``, for messages."""
    compares_with_teachers: ClassVar[bool] = False
    """Whether :meth:`metrics` bring :data:`~dskd.methods.metrics.TEACHER_KL`, by which
    ``evaluation.select`` may have a checkpoint selected."""
    remakes_student: ClassVar[bool] = False
    """Whether :meth:`hooks` puts other modules into the student, so that no copy of the model that
    it starts as can follow its weights."""
    reads_states: ClassVar[bool] = False
    """Whether :meth:`loss` reads the hidden states of a panel's teachers."""

    kind: str

    @property
    def writes_replayed(self) -> bool:
        """Whether a stage writes the rows of replayed sources that have no path."""
        return False

    @property
    def reads_memory(self) -> bool:
        """Whether it takes some of the questions of ``data.memory``."""
        return False

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """The weighted sums of one micro-batch, a function of its arguments alone.

        The fused losses of ``dskd.ops`` compute loss and gradient in one visit, so what has one
        denominator is one term, its weights folded in.

        Args:
            positions: the student's supervised positions.
            signal: the teacher's distributions at the same positions; None when
                :meth:`needs_teacher` says no.
            batch: the micro-batch that they come from.
            step: completed optimiser steps.

        Returns:
            By name, a subset of :attr:`terms`: each total is a weighted sum over positions (fp32
            scalar, connected to the student's graph and exactly 0 when there is none); the trainer
            divides it, and the parts it is made of, by the global count of :meth:`counts`.
        """
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each term's sum is divided by once added up over the whole optimiser step: the
        number of supervised positions, unless a method has another.

        Args:
            batch: the micro-batch on the CPU, where counting makes no GPU wait.
        """
        return dict.fromkeys(self.terms, float(batch.supervised))

    def rates(self, step: int) -> dict[str, float]:
        """Numbers beside the terms that the log shows for this step, by name."""
        del step
        return {}

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse settings of the run, or a student, that the method cannot go with.

        Args:
            run: the settings.
            config: the student's; None if it is not known before the run begins. It is then called
                again before the training.

        Raises:
            ConfigError: names the setting.
        """

    def check_teacher_model(self, run: Run, config: PreTrainedConfig, where: str) -> None:
        """Refuse a teacher's model that the method cannot ask what it wants to know; called before
        anything starts, of each one whose config is known by then. A model that an earlier run of
        the recipe exports is known by its settings.

        Args:
            run: the settings.
            config: of the teacher.
            where: the setting of its model.

        Raises:
            ConfigError: names the setting.
        """

    def refuse_unlabelled(self, run: Run) -> None:
        """Refuse rows without a label, for a method that learns from nothing else.

        Raises:
            ConfigError: a source may have some.
        """
        if run.data.may_lack_labels:
            raise ConfigError(
                f"method.kind: {self.kind} needs the label of every row, but a source may have "
                f"rows without (`unlabelled: true`, or neither `label` nor `target`)"
            )

    def exported_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of what is exported in the end, given that of the student before training."""
        return config

    def hooks(self, student: PreTrainedModel, context: StageContext) -> StepHooks | None:
        """Prepare the student, in place, for what the method does around the steps; None: nothing.

        Called once, before the student enters its engine.
        """
        del student, context
        return None

    def metrics(self, context: StageContext) -> tuple[AnyMetric, ...]:
        """What the student is evaluated by, on every set of rows; with the result that
        :meth:`selection` names, or, where that is None, the LM loss: every checkpoint keeps it.

        Called by all ranks before training begins, and again when the export is evaluated.
        """
        del context
        return (LM_LOSS,)

    def evaluation_readers(self, context: StageContext) -> Sequence[Reader]:
        """What adds the columns that :meth:`metrics` read to the batches of validation rows; called
        as they are."""
        del context
        return ()

    def selection(self) -> Selection | None:
        """Which result of the evaluation says that a checkpoint is the best; None: the last one is,
        as it is by any method where the masks of training say so (``RowMasks.selects``).
        ``evaluation.select`` may have it otherwise."""
        return Selection()

    def wants_teacher(self) -> bool:
        """Whether any step needs a teacher."""
        return False

    def needs_teacher(self, step: int) -> bool:
        """Whether the optimiser step after ``step`` completed ones needs the teacher's signal."""
        del step
        return False

    def columns(self) -> frozenset[str]:
        """Names of the columns of a batch that :meth:`loss` and :meth:`counts` read."""
        return frozenset()

    def readers(self, context: StageContext) -> Sequence[Reader]:
        """What adds columns to the batches of training, for the method."""
        del context
        return ()

    def stages(self) -> Sequence[Stage]:
        """What a run by this method must make once, besides what every run makes."""
        return ()

    def earlier_stages(self) -> Mapping[str, tuple[Path, Stage]]:
        """What it reads of other runs: by the setting that names it, the folder of such a run and
        the stage that leaves it there."""
        return {}


def build_method(section: dict[str, Any]) -> Method:
    """The method that a ``method`` section describes.

    ``kind`` is a name of :data:`METHODS`, or ``package.module:Class`` for a method from elsewhere.

    Raises:
        ConfigError: no such kind, or a setting of its is unknown or out of range.
    """
    kind = section.get("kind")
    known = ", ".join(METHODS)
    if not isinstance(kind, str):
        raise ConfigError(f"method.kind: must name a method ({known})")
    if kind not in METHODS and ":" not in kind:
        raise ConfigError(f"method.kind: {kind!r} is not one of {known}{nearest(kind, METHODS)}")
    target = METHODS.get(kind, kind)
    found = named_object(target, "method.kind")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.kind: {target} is no method")
    if found.loss is Method.loss:
        raise ConfigError(f"method.kind: {target} has no loss")
    return parse(found, section, prefix="method")
