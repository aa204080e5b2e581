"""Weight-Inherited Distillation: a teacher's layers grow narrow while they train.

Wu et al. 2024 (Findings of NAACL), "Weight-Inherited Distillation for Task-Agnostic BERT
Compression": the student starts as its teacher. Every linear map gets trainable matrices around it
("compactors"), which start as identity; step by step units of width are chosen whose rows or
columns go to zero; what is left is merged into a dense model of the student's sizes. The loss is
plain language modelling; a distribution may be inherited beside the weights.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import Batch, Positions, Signal, Term
from dskd.engine.ds_config import optimizer_device
from dskd.engine.ds_edits import check_adam, check_edits, check_unscaled, is_adam
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards
from dskd.engine.stage import StageContext
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.methods.inheritance_loss import InheritanceLoss, labels_term
from dskd.narrowing.insert import Surgery, insert
from dskd.narrowing.layouts import layout_of, widths_of
from dskd.narrowing.merge import checked_merge
from dskd.narrowing.narrow import narrowed_config
from dskd.narrowing.rule import Rule
from dskd.narrowing.rules import Annealed, Original
from dskd.narrowing.units import Ranking, Units, original_end, ramp_end, spread
from dskd.narrowing.widths import Cut, RuleName, Strategy, Target, Widths, cuts, student_widths
from dskd.settings.run import Run
from dskd.settings.teachers import SelfTeacher
from dskd.system.log import say

_TRIAL_TOKENS = 512
"""Tokens that an exported model is compared with the trained one on, on a CPU."""


class WeightInheritance(Method):
    """Language modelling by a student that is its teacher, made narrower in training."""

    kind: Literal["wid"] = "wid"
    temperature_setting = "inherit.temperature"
    remakes_student: ClassVar[bool] = True
    hidden_size: int = Field(ge=1)
    """Width of the student; ``run.model`` is the teacher that it starts as."""
    strategy: Strategy = "dim"
    """How attention gets narrower: ``dim``: narrower heads; ``head``: fewer. Families with rotary
    positions always lose whole groups of heads."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width of its feed-forward parts; null: in proportion to ``hidden_size``."""
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    """With ``heads``, how many heads remain; null: in proportion, or as ``strategy`` says."""
    rule: RuleName = "annealed"
    """How removed units go to zero. ``annealed``: along a schedule, to exactly zero, for good;
    ``original``: pulled through Adam's moments, as the paper's code does, and near zero in the end
    if the steps suffice, without which nothing is exported; the pull is part of the gradient, so
    also of the norm ``|g|`` in the log."""
    every: int = Field(500, ge=1)
    """Steps between two choices of units to remove."""
    ramp: int = Field(16, ge=1)
    """Number of such choices until all are removed (rule annealed)."""
    anneal: int = Field(500, ge=1)
    """Steps in which a removed unit goes to zero (rule annealed)."""
    penalty: float = Field(20.0, gt=0)
    """Strength of the pull (rule original), beside which the loss's share of ``|g|`` is small."""
    ranking: Ranking | None = None
    """What is removed first: what has the smallest norms in all compactors of the ``group``, or in
    the ``original``'s one; null: the original's with rule original, else the group's."""
    norms: Literal["huggingface", "uer"] = "huggingface"
    """LayerNorm while training (rule original). ``huggingface``: the family's own, ``(x - mean) /
    sqrt(variance + eps)``; ``uer``: of the paper's code, ``(x - mean) / (deviation + 1e-6)`` with
    n - 1 in the deviation, for its very trajectory: a BERT of n = 768 then starts off its teacher
    by 0.07 % in every norm. The export has HuggingFace's, its weights times sqrt((n - 1) / n)."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of the compactors; it follows the schedule of ``train.lr``."""
    compact: bool = True
    """Compute without the removed units once they are zero; false: to the end with all (rule
    annealed)."""
    inherit: InheritanceLoss | None = None
    """Loss with a teacher's distribution, as of method ki; null: cross entropy with the labels."""

    @property
    def temperature(self) -> float:
        """The temperature of the inherited distribution."""
        assert self.inherit is not None, "the method wants no teacher"
        return self.inherit.temperature

    def wants_teacher(self) -> bool:
        """Whether a distribution is inherited."""
        return self.needs_teacher(0)

    def needs_teacher(self, step: int) -> bool:
        """Whether the inherited distribution has a weight at ``step``."""
        return self.inherit is not None and self.inherit.alpha(step) > 0.0

    def rates(self, step: int) -> dict[str, float]:
        """``alpha`` where a distribution is inherited."""
        return {} if self.inherit is None else {"alpha": self.inherit.alpha(step)}

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """Cross entropy, or the loss of Knowledge Inheritance where ``inherit`` is set."""
        del batch
        if self.inherit is None:
            return {"tokens": labels_term(positions)}
        return {"tokens": self.inherit.term(positions, signal, step)}

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse what the change of the weights cannot go with, and sizes that the student's
        family, strategy and rule cannot reach, or not in the run's steps."""
        train = run.train
        if run.model.path is None:
            raise ConfigError("method.kind: wid needs model.path, the teacher that it starts from")
        if train.lr == 0:
            raise ConfigError("train.lr: 0, but method.lr follows its schedule; it must be above 0")
        if train.compile:
            raise ConfigError("train.compile: layers that method wid changes cannot be compiled")
        self._check_rule()
        if self.norms == "uer" and config is not None and hasattr(config, "rms_norm_eps"):
            raise ConfigError(
                f"method.norms: uer is a LayerNorm, and a model of type {config.model_type} has "
                f"RMSNorm; leave it out"
            )
        if self.inherit is not None:
            self.inherit.check_teacher(run, "method.inherit")
        itself = isinstance(run.teacher, SelfTeacher) and run.teacher.weights == "current"
        if itself and self.wants_teacher():
            raise ConfigError(
                "teacher.weights: current, but by method wid the student would learn from itself "
                "while it shrinks; frozen is the model that it shrinks from"
            )
        check_edits(run, "method wid")
        if self.rule == "original":
            check_unscaled(run, "rule original")
            check_adam(run, "rule original")
            if train.clip:  # the penalty is part of the gradient, and far larger
                raise ConfigError(
                    f"train.clip: {train.clip} would clip the penalty of method.rule original "
                    f"together with the gradient; it must be 0"
                )
        if train.steps is not None:  # else when the rows are counted
            self._check_length(train.steps, config)

    def _check_rule(self) -> None:
        """Refuse settings of the other rule only, unless at their defaults, as ``dskd settings``
        prints them."""
        others = {"annealed": ("penalty", "norms"), "original": ("ramp", "anneal", "compact")}
        for name in others[self.rule]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"method.{name}: of no use to rule {self.rule}; leave it out")

    def _check_length(self, steps: int, config: PreTrainedConfig | None) -> None:
        """Refuse a run that ends before the last units are removed."""
        last = self._last_step(config)
        if last <= steps:
            return
        how, what = "", "removed"
        if self.rule == "annealed":
            how, what = f" (with ramp {self.ramp} and anneal {self.anneal})", "zero"
        raise ConfigError(
            f"method.every: {self.every}{how} is too long: the last units are {what} after step "
            f"{last}, train.steps is {steps}"
        )

    def hooks(self, student: PreTrainedModel, context: StageContext) -> StepHooks:
        """Put compactors into the student."""
        goals = self._cuts(student.config)
        surgery = insert(student, "unbiased" if self.norms == "uer" else "biased")
        units = {
            name: Units(goals[name[0]], group.members, group.ranking, group.part, group.vectors)
            for name, group in surgery.groups.items()
        }
        return Narrowing(self, context.run, surgery, units)

    def exported_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of the narrowed student that is exported."""
        return narrowed_config(config, self._widths(config))

    def _widths(self, config: PreTrainedConfig) -> Widths:
        target = Target(**self.model_dump(include={field.name for field in fields(Target)}))
        return student_widths(widths_of(config), target, layout_of(config).demands)

    def _cuts(self, config: PreTrainedConfig) -> dict[str, Cut]:
        """What each kind of group loses."""
        teacher, student = widths_of(config), self._widths(config)
        return cuts(teacher, student, self.strategy, self.rule, layout_of(config).demands)

    def _last_step(self, config: PreTrainedConfig | None) -> int:
        """How many steps it takes until all units are removed, and zero by the annealed rule.

        Where the config is not known: as far as the settings say it, so 0 or a whole ramp.
        """
        goals = [] if config is None else list(self._cuts(config).values())
        if self.rule == "original":
            return max((original_end(goal, self.every) for goal in goals), default=0)
        ends = [ramp_end(goal, self.every, self.ramp) for goal in goals]
        last = self.every * self.ramp if config is None else max(ends)
        return last + self.anneal - 1 if last else 0


class Narrowing(StepHooks):
    """A student on its way from its teacher's widths to its own."""

    defines_export = True

    def __init__(
        self, method: WeightInheritance, run: Run, surgery: Surgery, units: dict[str, Units]
    ) -> None:
        self._method = method
        self._surgery = surgery
        self._names = {id(p): name for name, p in surgery.model.named_parameters()}
        self._compactors = {member.name for group in units.values() for member in group.members}
        self._scale = method.lr / run.train.lr
        self._compactor_decay = run.train.weight_decay * self._scale
        self._rule = _rule_of(method, units, run.train.eps)
        self._offloaded = optimizer_device(run.deepspeed) != "none"
        self._stays = is_adam(run)
        self._compacted = False
        self._weights: ParameterShards | None = None

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A last group for the compactors, which do not decay: away from identity is their way.

        The original decays all matrices after the step, compactors towards 0 and not identity, so
        there no group decays in the optimizer.
        """
        rest, compactors = [], []
        for group in groups:
            compactors += [p for p in group["params"] if self._names[id(p)] in self._compactors]
            others = [p for p in group["params"] if self._names[id(p)] not in self._compactors]
            if others:
                rest.append({**group, "params": others})
        rest.append({"params": compactors, "weight_decay": 0.0, "lr_scale": self._scale})
        if isinstance(self._rule, Original):
            for group in rest[:-1]:
                decay, group["weight_decay"] = group["weight_decay"], 0.0
                for parameter in group["params"]:
                    self._rule.decay[self._names[id(parameter)]] = decay
            self._rule.decay |= dict.fromkeys(self._compactors, self._compactor_decay)
        return rest

    def before_micro_batch(self, last: bool) -> None:
        """Merged weights add their gradients up until the last micro-batch of a step.

        Not with an offloaded optimizer: for a parameter without gradient in the first micro-batch
        ZeRO-2 then goes on adding to the gradient of the step before.
        """
        self._surgery.merging.last = last or self._offloaded

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Choose what is removed, where it is time, and edit gradients and moments."""
        del lr
        if self._rule.before_step(weights, step):
            self._surgery.mask(self._rule.keep)

    def after_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Take removed entries further to zero; leave them out once they are there."""
        if self._moves(step):
            self._rule.after_step(weights, step, lr)
            weights.publish()
        self._weights = weights
        self._surgery.merging.forget()
        if self._method.compact and not self._compacted and self._rule.settled(step + 1):
            self._compact()

    def _moves(self, step: int) -> bool:
        """Whether the rule has weights to change after the step that follows ``step`` others."""
        if self._method.rule == "original":
            return True
        begun = any(not keep_U.all() for keep_U in self._rule.keep.values())
        # Adam leaves alone what has no gradient and moments of 0; others may remember more.
        return begun and not (self._stays and self._rule.settled(step))

    def _compact(self) -> None:
        self._surgery.compact(self._rule.keep)
        self._compacted = True

    def complete(self, step: int) -> bool:
        """Whether all units that shall go are removed, and zero or near enough."""
        assert self._weights is not None, "no step was taken yet"
        return self._rule.complete(step, self._weights)

    def rates(self) -> dict[str, float | Tensor]:
        """``hidden``: width that is kept; ``kept``: share of all units; ``removed``: their norm."""
        assert self._weights is not None, "no step was taken yet"
        keep = self._rule.keep
        sizes = sum(len(keep_U) for keep_U in keep.values())
        width = self._surgery.model.config.hidden_size
        return {
            "hidden": int(spread(keep["R"], width).sum()),
            "kept": sum(self._rule.kept().values()) / sizes,
            "removed": self._rule.removed_norm(self._weights),
        }

    def state(self) -> dict[str, Any]:
        """The rule's, and whether the student is compacted."""
        return {"rule": self._rule.state(), "compacted": self._compacted}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the masks, or the compaction, of a checkpoint back."""
        self._rule.restore(state["rule"])
        if state["compacted"]:
            self._compact()
        else:
            self._surgery.mask(self._rule.keep)

    def exported(self, weights: ParameterShards, batch: Batch) -> PreTrainedModel:
        """The dense student, merged from fp32 and rounded to the dtype that it was trained in.

        On the CPU of rank 0, as is the fp32 copy of the student that it is compared with; without
        values on the other ranks.

        Raises:
            DskdError: its logits are not the student's. The original's removed units only come near
                zero, so there they are set to zero for the comparison, and must have been near.
        """
        rows = max(1, _TRIAL_TOKENS // batch.ids_BT.shape[1])
        merged, exact = checked_merge(
            self._surgery,
            self._rule.keep,
            weights.whole,
            batch.select(torch.arange(min(rows, len(batch.ids_BT)))),
            soft=self._method.rule == "annealed",
        )
        say(
            f"merged: logits within {exact.hard:.1e} of the student's with removed units at 0, "
            f"within {exact.soft:.1e} as it is; largest removed norm {exact.removed:.1e}"
        )
        return merged


def _rule_of(method: WeightInheritance, units: dict[str, Units], eps: float) -> Rule:
    if method.rule == "annealed":
        own = {"ramp": method.ramp, "anneal": method.anneal}
        return Annealed(units, every=method.every, ranking=method.ranking or "group", **own)
    own = {"penalty": method.penalty, "eps": eps, "decay": {}}
    return Original(units, every=method.every, ranking=method.ranking or "original", **own)
