"""The stores of a run whose masking is of hard tokens: one from before training, and, with
``data.masking.refresh``, one more each time so many epochs are over.

The store of refresh index g serves the epochs from ``g * refresh`` on. Its model scores the rows
just before the first optimiser step that reads a row of these epochs, so which store a batch needs
is a function of its place alone. Which model that was, the student of which checkpoint, is part of
a later store's fingerprint and of every checkpoint after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dskd.data.prepared import Prepared
from dskd.data.tokenizers import special_ids
from dskd.engine.checkpoints import Checkpoints
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import stage_of
from dskd.engine.hooks import StepHooks
from dskd.engine.run_config import student_config
from dskd.errors import ConfigError, DiskError, StoreError
from dskd.hardness.question import question
from dskd.hardness.scoring import ScoringView, scoring_view
from dskd.hardness.store import Hardness, hardness_spec, identity
from dskd.models.build import hidden_size, model_fingerprint
from dskd.models.frozen import evaluating, frozen_model
from dskd.settings.data import HardTokens
from dskd.settings.folders import questions_folder, student_settings
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import LiveTeacher
from dskd.stores.fingerprints import prints_of_rows
from dskd.system import dist
from dskd.system.files import fingerprint
from dskd.system.log import say


class Student(NamedTuple):
    """The model of a later store: the student as a checkpoint holds it."""

    step: int
    weights: str
    """Fingerprint of the checkpoint's files."""


class HardnessStores(StepHooks):
    """Makes, opens and hands out the stores; called with a refresh index it is the reader of one.

    As the hooks of training it has the student score the rows anew between two steps, where the
    next batch cannot be made before.

    Attributes:
        student: the one under training; it may be in its engine by the time it scores.

    Raises:
        ConfigError: an optimiser step may read rows of more than two stores, or the masking
            does not fit the tokenizer.
    """

    def __init__(
        self, run: Run, prepared: Prepared, device: torch.device, checkpoints: Checkpoints
    ) -> None:
        masking = run.data.masking
        assert isinstance(masking, HardTokens), masking
        self._run, self._masking, self._prepared, self._device = run, masking, prepared, device
        self._checkpoints = checkpoints
        self.student: nn.Module | None = None
        self._opened: dict[int, Hardness] = {}
        self._students: dict[int, Student] = {}
        with dist.agreed():
            self._refuse_short_epochs()
            self._view: ScoringView = scoring_view(run.data, prepared.tokenizer, run.seed)
            self._prints = {**prints_of_rows(run, prepared), "scoring": self._view.fingerprint}
        self._prints["precision"] = precision_of(student_config(run, hidden=1))
        self._prints["model"] = dist.on_rank0(self._model_print)

    def __call__(self, refresh_index: int) -> Hardness:
        """The opened store of a refresh index."""
        return self._opened[refresh_index]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the first store, which need not exist yet; later ones follow from it."""
        spec = hardness_spec(self._masking, self._prepared.train, self._view, self._prints)
        return identity(spec)

    def first(self, position: int) -> None:
        """Let the model that the settings name score the rows, unless that is done, and open its
        store; nothing if no optimiser batch from ``position`` on reads it (collective).

        Raises:
            StoreError: the store belongs to another model, tokenizer, blocking or corpus.
        """
        if 0 in self._opened or self._oldest(position) > 0:
            return
        self._question(0, self._first_model)

    def begin(self, position: int) -> None:
        """Open what the optimiser batches from ``position`` on need of stores that exist already:
        those made for the batches before it (collective). At 0, the stores of an earlier student
        are removed.

        Raises:
            StoreError: one is missing, damaged or of another student; the message says what can be
                done.
        """
        if position == 0:
            self._remove(self._run.out.glob("questions-epoch-*"))
        made = self._needed(position - 1) if position else 0
        for refresh_index in range(self._oldest(position), made + 1):
            if refresh_index not in self._opened:
                mend = self._way_back(refresh_index) if refresh_index else None
                self._open(refresh_index, mend=mend)

    def state(self) -> dict[str, Any]:
        """Which student scored for each later store, as JSON values."""
        return {str(g): list(student) for g, student in self._students.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self._students = {int(g): Student(*student) for g, student in state.items()}

    def waits(self, position: int) -> bool:
        """Whether the batch at ``position`` needs a store that is not open yet."""
        return self._needed(position) not in self._opened

    def prepare(self, position: int, step: int, stop: Callable[[], bool]) -> None:
        """Let the student score, for the batch at ``position`` and those after it (collective).

        What an interrupted call of it left is gone on with if it is of the same student, and
        removed if not.

        Raises:
            Stopped: ``stop`` returned true on one of the ranks.
        """
        refresh_index = self._needed(position)
        files = self._checkpoints.manifests()[step]["files"] if step else None
        self._students[refresh_index] = Student(step, fingerprint(files))
        try:
            scored = self._score(refresh_index, stop)
        except DiskError:  # what is there is whole
            raise
        except StoreError as problem:  # of another student, or damaged: the right one is here
            folder = questions_folder(self._run, refresh_index)
            say(f"question: {folder} is made anew, it cannot be used: {problem}")
            self._remove([folder])
            scored = self._score(refresh_index, stop)
        for old in [g for g in self._opened if g < self._oldest(position)]:
            del self._opened[old]
        self._remove_unread()
        if scored:
            say(f"the student scored the rows for the epochs to come (batch {position})")

    def _score(self, refresh_index: int, stop: Callable[[], bool]) -> bool:
        """:meth:`_question` of the student as it is."""
        student = self.student
        assert student is not None
        with evaluating(student):
            return self._question(refresh_index, lambda: student, stop)

    def _question(
        self,
        refresh_index: int,
        model: Callable[[], nn.Module],
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Let a model score the rows and open the store; whether anything of it was missing."""
        scored = question(
            self._masking,
            model,
            self._prepared,
            self._view,
            questions_folder(self._run, refresh_index),
            fingerprints=self._prints_of(refresh_index),
            device=self._device,
            stop=stop,
        )
        self._open(refresh_index)
        return scored

    def _open(self, refresh_index: int, mend: str | None = None) -> None:
        """Verify a store; find the quantile here, not in the loader's thread when it is due."""
        masking, prepared = self._masking, self._prepared
        folder = questions_folder(self._run, refresh_index)
        with dist.agreed():
            share = (dist.rank(), dist.world())
            try:
                opened = Hardness(folder, self._prints_of(refresh_index), share, mend=mend)
            except StoreError as problem:
                if mend is None or mend in str(problem):
                    raise
                raise StoreError(f"{problem}; {mend}") from problem
        if masking.metric == "quantile":
            special_V = special_ids(prepared.tokenizer)
            hardest = masking.quantile
            cut = dist.on_rank0(lambda: opened.quantile(hardest, prepared.train, special_V))
            opened.quantiles[hardest] = cut
            say(f"{folder}: hard is an NLL above {cut:.4g} nats, the hardest {hardest:g} of tokens")
        self._opened[refresh_index] = opened

    def _way_back(self, refresh_index: int) -> str:
        """How a later store can be had again: by the student that scored the rows."""
        step, folder = self._students[refresh_index].step, self._checkpoints.folder
        earlier = [kept for kept in self._checkpoints.manifests() if kept <= step]
        if earlier:
            return (
                f"it holds the scores of the student after step {step}: to score again, delete the "
                f"checkpoints after step {max(earlier)} in {folder}"
            )
        return (
            f"it holds the scores of the student after step {step}, of which no checkpoint is left;"
            f" to train again from the beginning, delete {folder.parent}"
        )

    def _remove_unread(self) -> None:
        """Remove the later stores that no batch after the oldest checkpoint reads."""
        saved = [m["state"]["progress"] for m in self._checkpoints.manifests().values()]
        oldest = self._oldest(min((progress["position"] for progress in saved), default=0))
        unread = [g for g in self._students if 0 < g < oldest]
        self._remove(questions_folder(self._run, refresh_index) for refresh_index in unread)

    def _remove(self, folders: Iterable[Path]) -> None:
        with dist.agreed():
            for folder in folders if dist.rank() == 0 else ():
                if folder.exists():
                    shutil.rmtree(folder)

    def _refuse_short_epochs(self) -> None:
        refresh, batch = self._masking.refresh, self._run.train.batch
        rows = len(self._prepared.train)
        if refresh is not None and batch > refresh * rows:
            raise ConfigError(
                f"data.masking.refresh: {refresh} epochs of {rows} rows are less than "
                f"train.batch, {batch}"
            )

    def _needed(self, position: int) -> int:
        """The newest refresh index that the batch at ``position`` reads."""
        return self._of_row((position + 1) * self._run.train.batch - 1)

    def _oldest(self, position: int) -> int:
        return self._of_row(position * self._run.train.batch)

    def _of_row(self, place: int) -> int:
        """The refresh index of a place in the stream of rows."""
        refresh = self._masking.refresh
        return 0 if refresh is None else place // len(self._prepared.train) // refresh

    def _prints_of(self, refresh_index: int) -> dict[str, str]:
        """Fingerprints of the store of a refresh index."""
        if refresh_index == 0:
            return self._prints
        model = fingerprint([self._prints["model"], *self._students[refresh_index]])
        return {**self._prints, "model": model}

    def _model_print(self) -> str:
        model, where = self._named()
        weights = model_fingerprint(model, seed=self._run.seed, where=where)
        cut = None if model.slice is None else model.slice.model_dump(mode="json")
        return fingerprint([weights, cut])

    def _first_model(self) -> nn.Module:
        """The model of the first store, sharded by ZeRO-3 if the student is."""
        model, where = self._named()
        if model.slice is not None:
            model = student_settings(self._run)
        ds = student_config(self._run, hidden_size(model, where=where))
        sharded = self._run.deepspeed if stage_of(ds) == 3 else None
        frozen = LiveTeacher(model=model, deepspeed=sharded, precision=precision_of(ds))
        return frozen_model(self._run, frozen, model, where, self._prepared, self._device)

    def _named(self) -> tuple[Model, str]:
        own = self._masking.model
        return (self._run.model, "model") if own is None else (own, "data.masking.model")
