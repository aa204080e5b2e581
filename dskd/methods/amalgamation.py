"""What DFA and CFL share: a student whose hidden states follow those of its teachers, through maps
that are trained beside it and are no part of what is exported.

The maps are a submodule of the student, so that they are sharded, stepped and kept in checkpoints
as its own parameters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dskd.batch import Batch, Panel, Positions
from dskd.engine.hooks import StepHooks
from dskd.engine.shards import ParameterShards
from dskd.engine.stage import StageContext
from dskd.engine.zero import full_shape, gathered, is_sharded
from dskd.errors import ConfigError
from dskd.methods.alignment import LayerRule, aligned_layers
from dskd.methods.panel import AllLogits
from dskd.models.configs import config_at_hand, config_of
from dskd.models.families import COMPANION
from dskd.settings.run import Run
from dskd.settings.teachers import each_teacher, section_name
from dskd.system import dist
from dskd.system.files import fingerprint

_SPREAD = 0.02
"""Standard deviation of the maps' first weights, as in the original; their biases start as 0."""


class Amalgamation(AllLogits):
    """Settings of the methods that align hidden states, and what puts their maps into the student.

    Beside the alignment the student learns from the softmax of all teachers' logits, as by ``vkd``;
    ``temperature``, ``squared``, ``overlap`` and ``weight`` are of that.
    """

    remakes_student: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True

    reconstruction_weight: float = Field(1.0, ge=0)
    """Of the squared error of the teachers' states as decoded again, a mean over real tokens."""
    layers: int | None = Field(None, ge=1)
    """How many of the student's layers are aligned, from the top; null: all."""
    layer_rule: LayerRule = "even"
    """Which of a teacher's layers they follow: ``even``: those at the same share of the depth;
    ``stride``: from the top by ``floor(teacher's / student's)``, for depths that divide, where it
    is the same; ``top``: as many from the top."""
    lr_scale: float = Field(1.0, gt=0)
    """Learning rate of the maps, as a multiple of ``train.lr``. The original's options say 1e-3
    beside 2e-5, which are 50, but its optimiser took 2e-5 and left the maps' weights out."""

    def block(
        self, width: int, teacher_widths: Sequence[int], dtype: torch.dtype | None
    ) -> nn.Module:
        """The maps of one layer; the arguments are those of the blocks in ``alignment.py``."""
        raise NotImplementedError

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """As every method of panels, and refuse teachers whose hidden states are not at hand or not
        of all rows, and layers that do not go together."""
        super().check(run, config)
        kind = getattr(self, "kind", "")
        if run.teacher.scores != "live":
            raise ConfigError(
                f"teacher.scores: {run.teacher.scores}, but method {kind} reads the hidden states "
                f"of its teachers, which are not stored; set it to live"
            )
        for name, member in each_teacher(run.teacher).items():
            if member.domains is not None:
                raise ConfigError(
                    f"{section_name(name)}.domains: {member.domains}, but method {kind} aligns "
                    f"each row with all teachers; leave it out"
                )
            # What an earlier run exports is not there yet; its layers are counted by the hooks.
            known = member.model.path is None or Path(member.model.path).is_dir()
            if config is not None and known:
                found = config_at_hand(member.model, f"{section_name(name)}.model")
                self._layers_of(found.num_hidden_layers, config.num_hidden_layers)

    def hooks(self, student: PreTrainedModel, context: StageContext) -> StepHooks:
        """Put the maps into the student."""
        config, teachers = student.config, each_teacher(context.run.teacher)
        configs = [
            config_of(member.model, where=f"{section_name(name)}.model")
            for name, member in teachers.items()
        ]
        widths = [each.hidden_size for each in configs]
        for each in configs:
            self._layers_of(each.num_hidden_layers, config.num_hidden_layers)
        number = config.num_hidden_layers if self.layers is None else self.layers
        with no_init_weights():  # what torch draws would depend on the device
            blocks = nn.ModuleList(
                self.block(config.hidden_size, widths, student.dtype) for _ in range(number)
            )
        _fill(blocks, context.run.seed)
        student.add_module(COMPANION, blocks)
        return Beside(student, self.lr_scale)

    def aligned(
        self, positions: Positions, panel: Panel
    ) -> tuple[Sequence[nn.Module], list[Tensor], list[list[Tensor]]]:
        """The maps, and the hidden states that each of them is given: the student's, and those of
        all teachers."""
        assert positions.states is not None and panel.states is not None, "no hidden states"
        depth = len(positions.states) - 1
        pairs = [self._layers_of(len(states) - 1, depth) for states in panel.states]
        students = [positions.states[layer] for layer in pairs[0][1]]
        by_teacher = [
            [states[layer] for layer in own]
            for states, (own, _) in zip(panel.states, pairs, strict=True)
        ]
        return positions.companion, students, [list(each) for each in zip(*by_teacher, strict=True)]

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows, and real tokens."""
        return {"rows": float(batch.supervised), "tokens": float(batch.tokens)}

    def _layers_of(self, teacher: int, student: int) -> tuple[list[int], list[int]]:
        return aligned_layers(teacher, student, self.layers, self.layer_rule, "method.layers")


class Beside(StepHooks):
    """A student with maps beside it, which are stepped at a rate of their own and not exported."""

    defines_export = True

    def __init__(self, student: PreTrainedModel, lr_scale: float) -> None:
        self._student = student
        self._lr_scale = lr_scale
        self._looked = False

    @property
    def touches_weights(self) -> bool:
        """Until the first step: what an export could not read is then refused, not in the end."""
        return not self._looked

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Nothing, but that the weights were found."""
        del weights, step, lr
        self._looked = True

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The maps' parameters in groups of their own behind the others; what decays still does."""
        maps = getattr(self._student, COMPANION)
        own = {id(parameter) for parameter in maps.parameters()}
        split = []
        for beside in (False, True):
            for group in groups:
                params = [p for p in group["params"] if (id(p) in own) is beside]
                scale = {"lr_scale": self._lr_scale} if beside else {}
                if params:
                    split.append({**group, **scale, "params": params})
        found = [id(p) for group in split for p in group["params"]]
        trained = {id(p) for p in self._student.parameters() if p.requires_grad}
        assert len(found) == len(set(found)) and set(found) == trained, "in one group each"
        return split

    def exported(self, weights: ParameterShards, batch: Batch) -> PreTrainedModel:
        """The student without the maps, which it has lost from now on."""
        del weights, batch
        delattr(self._student, COMPANION)
        return self._student


def _fill(blocks: nn.Module, seed: int) -> None:
    """Give the maps their first values, each parameter's by the run's seed and its name: the same
    at every ZeRO stage and world size (collective if they are sharded)."""
    for name, parameter in blocks.named_parameters():
        mine = dist.rank() == 0 or not is_sharded(parameter)
        with gathered([parameter], write=True), torch.no_grad():
            if mine:
                parameter.copy_(_first_values(name, full_shape(parameter), seed))


def _first_values(name: str, shape: torch.Size, seed: int) -> Tensor:
    """In fp32 on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    numbers = int(fingerprint([seed, COMPANION, name]), 16) % 2**63
    generator = torch.Generator().manual_seed(numbers)
    return torch.empty(shape).normal_(0.0, _SPREAD, generator=generator)
