"""One run being carried out: what all its stages need, made when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.data.views import Reader, View, at_random, view_for
from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.run_config import student_config
from dskd.hardness.masks import HardCausalView, hard_view
from dskd.hardness.refresh import HardnessStores
from dskd.methods.base import Method
from dskd.models.build import hidden_size
from dskd.settings.checks import evaluation_selects
from dskd.settings.data import HardTokens
from dskd.settings.folders import student_settings
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.system import dist

EVALUATION_SEED = 0  # of the validation masks: the same for every run and seed


@dataclass(frozen=True)
class Job:
    """One run being carried out, and what all its stages need."""

    run: Run
    method: Method
    device: torch.device

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared rows; rank 0 builds and verifies them while the others wait."""
        folder = dist.on_rank0(lambda: open_prepared(prepare(self.run.data)).folder)
        return open_prepared(folder, verify=False)

    @cached_property
    def view(self) -> View:
        """How training rows are masked; collective where it is first used, as ``prepared`` is."""
        data, prepared, hard = self.run.data, self.prepared, self.hardness
        with dist.agreed():
            if hard is None:
                return view_for(data, prepared.tokenizer, self.run.seed)
            return hard_view(
                data,
                prepared.tokenizer,
                self.run.seed,
                hard,
                scores=hard.fingerprint,
                rowset=prepared.train,
            )

    @property
    def readers(self) -> tuple[Reader, ...]:
        """What is read beside the view: of a causal LM, which labels are hard."""
        return (self.view.read_hard,) if isinstance(self.view, HardCausalView) else ()

    @cached_property
    def hardness(self) -> HardnessStores | None:
        """The stores of hard tokens; None where the masking is random. Collective, as above."""
        if not isinstance(self.run.data.masking, HardTokens):
            return None
        return HardnessStores(self.run, self.prepared, self.device, self.checkpoints)

    @property
    def validation_view(self) -> View:
        """How validation rows are masked, whatever the masks of training are: at random."""
        data = self.run.data
        data = data.model_copy(update={"masking": at_random(data.masking)})
        return view_for(data, self.prepared.tokenizer, EVALUATION_SEED)

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        folder = self.run.out / "train" / "checkpoints"
        selects = evaluation_selects(self.run, self.method)
        selection = self.method.selection() if selects else None
        return Checkpoints(folder, self.run.checkpoint.keep, selection)

    @property
    def scored(self) -> Selection:
        """Which result of the evaluation a checkpoint keeps, whether or not it selects one."""
        return self.method.selection() or Selection()

    @property
    def position(self) -> int:
        """Optimiser batches read until the newest checkpoint, 0 if there is none; collective."""
        manifests = self.checkpoints.manifests()
        return manifests[max(manifests)]["state"]["progress"]["position"] if manifests else 0

    @cached_property
    def ds(self) -> dict[str, Any]:
        """The student's DeepSpeed config without ``auto``."""
        return student_config(self.run, hidden_size(self.student, where="model"))

    @property
    def student(self) -> Model:
        """The model that the student starts as; what is sliced for it is there since that stage."""
        return student_settings(self.run)
