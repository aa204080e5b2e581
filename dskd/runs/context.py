"""One run being carried out: what its stages need, made when it is first used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dskd.data.prepared import (
    Prepared,
    RowSet,
    open_further,
    open_prepared,
    prepare,
    prepare_further,
    what_was_read,
)
from dskd.data.views import Reader, View, at_random, view_for
from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.row_masks import RowMasks, masks_of
from dskd.engine.run_config import student_config
from dskd.methods.base import Method
from dskd.methods.checks import score_of, selection_of
from dskd.methods.metrics import has_labels
from dskd.models.build import parameter_count
from dskd.models.configs import config_of, with_classes
from dskd.runs.named_sets import read_further
from dskd.settings.data import Source
from dskd.settings.folders import RunFolder, data_settings, folder_of, student_settings
from dskd.settings.length import is_in_steps, with_steps
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.stores.cost import Cost, note, read_costs
from dskd.system import dist
from dskd.system.files import fingerprint
from dskd.system.log import say

EVALUATION_SEED = 0  # of the validation masks: the same for every run and seed


def _verified(folder: Path) -> Path:
    """A folder of further rows, once all its bytes are looked at and what it holds is said."""
    open_further(folder)
    say_read(folder)
    return folder


def say_read(folder: Path) -> None:
    """Print what a folder of rows holds; letters that the terminal has not as question marks."""
    letters = sys.stdout.encoding or "utf-8"
    for line in what_was_read(folder):
        say(line.encode(letters, "replace").decode(letters))


@dataclass(frozen=True)
class RunContext:
    """One run being carried out; the :class:`~dskd.engine.stage.StageContext` of its stages.

    Attributes:
        given: the settings as they are written.
        beside: those of the recipe's other runs, which may read what this one makes.
    """

    given: Run
    method: Method
    device: torch.device
    beside: Sequence[Run] = ()

    @cached_property
    def run(self) -> Run:
        """The settings with the length of the run in steps; where that depends on the rows,
        collective where it is first used, as ``prepared`` is."""
        if is_in_steps(self.given.train):
            return self.given
        return with_steps(self.given, len(self.prepared.train))

    @property
    def folder(self) -> RunFolder:
        """What the run writes, and where."""
        return folder_of(self.given)

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared rows; rank 0 builds and verifies them while the others wait."""
        folder = dist.on_rank0(self._prepare)
        return open_prepared(folder, verify=False)

    def _prepare(self) -> Path:
        """The folder of the rows, all of which are verified."""

        def made(folder: Path, seconds: float) -> None:
            note(folder, self.given.out, Cost(seconds=seconds))

        folder = prepare(data_settings(self.given), made=made)
        read_costs(folder)  # the summary needs it, after all the training
        return open_prepared(folder).folder

    def rows_of(self, sources: Sequence[Source]) -> RowSet:
        """All rows of other sources, with the tokenizer, classes and domains of ``prepared``;
        prepared as they are, and read once."""
        key = fingerprint([source.model_dump(mode="json") for source in sources])
        if key not in self._further:
            data, beside = self.given.data, self.prepared
            folder = dist.on_rank0(lambda: _verified(prepare_further(data, sources, beside)))
            self._further[key] = open_further(folder, verify=False)
        return self._further[key]

    @cached_property
    def _further(self) -> dict[str, RowSet]:
        """What :meth:`rows_of` has read."""
        return {}

    @cached_property
    def further_fingerprints(self) -> dict[str, str]:
        """Of the named sets and of ``data.memory``, by the names of their settings; collective
        where it is first used, which finds what is wrong with them."""
        return read_further(self)

    @cached_property
    def masks(self) -> RowMasks:
        """How training rows are masked, and what the run does for that."""
        return masks_of(self.given)

    @cached_property
    def view(self) -> View:
        """What training rows look like; collective where it is first used, as ``prepared`` is."""
        return self.masks.view(self)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """What adds columns to the batches of training, for the masks and for the method."""
        return (*self.masks.readers(self), *self.method.readers(self))

    @property
    def validation_view(self) -> View:
        """How validation rows are masked, whatever the masks of training are: at random."""
        data = self.run.data
        data = data.model_copy(update={"masking": at_random(data.masking)})
        with dist.agreed():
            return view_for(data, self.prepared.tokenizer, EVALUATION_SEED)

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        selection = selection_of(self.given, self.method, self.masks)
        return Checkpoints(self.folder.checkpoints, self.given.checkpoint.keep, selection)

    @property
    def scored(self) -> Selection:
        """Which result of the evaluation a checkpoint keeps, whether or not it selects one;
        collective as ``prepared`` is."""
        labelled = not self.method.compares_with_teachers or has_labels(self.given, self.prepared)
        return score_of(self.given, self.method, labelled=labelled) or Selection()

    @property
    def position(self) -> int:
        """Optimiser batches read until the newest checkpoint, 0 if there is none; collective."""
        manifests = self.checkpoints.manifests()
        return manifests[max(manifests)]["state"]["progress"]["position"] if manifests else 0

    @cached_property
    def ds(self) -> dict[str, Any]:
        """The student's DeepSpeed config without ``auto``."""
        prepared = self.prepared
        config = config_of(self.student, where="model", tokenizer=prepared.tokenizer)
        if prepared.classes is not None:
            config = with_classes(config, prepared.classes, prepared.tokenizer)
        count = parameter_count(config, "model", self.run.data.objective)
        return student_config(self.run, config.hidden_size, parameters=count)

    @property
    def student(self) -> Model:
        """The model that the student starts as; what is sliced for it is there since that stage."""
        return student_settings(self.run)
