"""The stores of a run whose masking is of hard tokens: one from before training, and, with
``data.masking.refresh``, one more each time so many epochs are over.

Generation g answers for the epochs from ``g * refresh`` on. Its model is asked just before the
first optimiser step that reads a row of these epochs, so which store a batch needs is a function of
its place alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dskd import dist
from dskd.batch import Batch, Rows
from dskd.checks import questions_folder
from dskd.data.blocks import Prepared
from dskd.data.scoring import ScoringView, scoring_view
from dskd.ds_config import precision_of
from dskd.engine import stage_of
from dskd.errors import ConfigError
from dskd.files import fingerprint
from dskd.hardness import Hardness, hardness_spec, identity
from dskd.hardware import student_config
from dskd.inheritance import frozen_model, prints_of_rows
from dskd.log import say
from dskd.models.build import hidden_size, model_fingerprint
from dskd.models.families import rows_of
from dskd.question import ask, question
from dskd.settings import HardTokens, LiveTeacher, Model, Run
from dskd.sliced import student_settings


class Generations:
    """Makes, opens and hands out the stores; called with a generation it is the reader of one.

    Args:
        run: its masking is of hard tokens.
        prepared: the rows.
        device: where the models are.

    Raises:
        ConfigError: an optimiser step may read rows of more than two generations, or the masking
            does not fit the tokenizer.
    """

    def __init__(self, run: Run, prepared: Prepared, device: torch.device) -> None:
        masking = run.data.masking
        assert isinstance(masking, HardTokens), masking
        self._run, self._masking, self._prepared, self._device = run, masking, prepared, device
        self._view: ScoringView = scoring_view(run.data, prepared.tokenizer, run.seed)
        self._prints = {**prints_of_rows(run, prepared), "scoring": self._view.fingerprint}
        self._prints["model"] = dist.on_rank0(self._model_print)
        self._opened: dict[int, Hardness] = {}
        rows = len(prepared.train)
        if masking.refresh is not None and run.train.batch > masking.refresh * rows:
            raise ConfigError(
                f"data.masking.refresh: {masking.refresh} epochs of {rows} rows are less than "
                f"train.batch, {run.train.batch}"
            )

    def __call__(self, generation: int) -> Hardness:
        """The opened store of a generation."""
        return self._opened[generation]

    @property
    def fingerprint(self) -> str:
        """Of the first store, which need not be there yet; the later ones follow from the run."""
        spec = hardness_spec(self._masking, self._prepared.train, self._view, self._prints)
        return identity(spec)

    def first(self) -> None:
        """Ask the model that the settings name, unless that is done, and open its store
        (collective).

        Raises:
            StoreError: the store belongs to another model, tokenizer, blocking or corpus.
        """
        if 0 in self._opened:
            return
        question(
            self._masking,
            self._asked,
            self._prepared,
            self._view,
            self._folder(0),
            fingerprints=self._prints,
            device=self._device,
        )
        self._open(0, self._prints)

    def begin(self, position: int) -> None:
        """Open what the optimiser batches from ``position`` on need of stores that exist already:
        those made for the batches before it (collective)."""
        made = self._needed(position - 1) if position else 0
        for generation in range(self._oldest(position), made + 1):
            if generation not in self._opened:
                self._open(generation, self._prints_after(generation))

    def due(self, position: int) -> bool:
        """Whether the batch at ``position`` needs a store that is not open yet."""
        return self._needed(position) not in self._opened

    def renew(self, position: int, student: nn.Module) -> None:
        """Ask the student, for the batch at ``position`` and those after it (collective).

        What an interrupted call of it left is gone on with, so the student must be the same.
        """
        generation = self._needed(position)
        prints = self._prints_after(generation)
        was_training = student.training
        student.eval()
        ask(
            self._masking,
            lambda batch: self._answer(student, batch),
            self._prepared,
            self._view,
            self._folder(generation),
            fingerprints=prints,
        )
        student.train(was_training)
        self._open(generation, prints)
        for old in [g for g in self._opened if g < self._oldest(position)]:
            del self._opened[old]

    def _answer(self, student: nn.Module, batch: Batch) -> Rows:
        return rows_of(student, batch.to(self._device))

    def _open(self, generation: int, prints: dict[str, str]) -> None:
        with dist.agreed():
            share = (dist.rank(), dist.world())
            self._opened[generation] = Hardness(self._folder(generation), prints, share)

    def _needed(self, position: int) -> int:
        """The newest generation that the batch at ``position`` reads."""
        return self._of_row((position + 1) * self._run.train.batch - 1)

    def _oldest(self, position: int) -> int:
        return self._of_row(position * self._run.train.batch)

    def _of_row(self, place: int) -> int:
        """The generation of a place in the stream of rows."""
        refresh = self._masking.refresh
        return 0 if refresh is None else place // len(self._prepared.train) // refresh

    def _folder(self, generation: int) -> Path:
        if generation == 0:
            return questions_folder(self._run)
        assert self._masking.refresh is not None
        return self._run.out / f"questions-epoch-{generation * self._masking.refresh:05d}"

    def _prints_after(self, generation: int) -> dict[str, str]:
        """Fingerprints of a generation's store: a later one's student is what the run made of the
        first model, and the folder is the run's own."""
        if generation == 0:
            return self._prints
        return {**self._prints, "model": fingerprint([self._prints["model"], generation])}

    def _model_print(self) -> str:
        model, where = self._named()
        weights = model_fingerprint(model, seed=self._run.seed, where=where)
        cut = None if model.slice is None else model.slice.model_dump(mode="json")
        return fingerprint([weights, cut, precision_of(self._ds(hidden=1))])

    def _asked(self) -> nn.Module:
        """The model of the first store, sharded by ZeRO-3 if the student is."""
        model, where = self._named()
        if model.slice is not None:
            model = student_settings(self._run)
        ds = self._ds(hidden_size(model, where=where))
        sharded = self._run.deepspeed if stage_of(ds) == 3 else None
        frozen = LiveTeacher(model=model, deepspeed=sharded, precision=precision_of(ds))
        return frozen_model(self._run, frozen, model, where, self._prepared, self._device)

    def _named(self) -> tuple[Model, str]:
        own = self._masking.model
        return (self._run.model, "model") if own is None else (own, "data.masking.model")

    def _ds(self, hidden: int) -> dict[str, Any]:
        return student_config(self._run, hidden)


class Renewal:
    """What the trainer calls between two steps when the hard tokens are to be found anew."""

    def __init__(self, generations: Generations, student: Callable[[], nn.Module]) -> None:
        self._generations = generations
        self._student = student

    def due(self, position: int) -> bool:
        """Whether the batch at ``position`` waits for it."""
        return self._generations.due(position)

    def __call__(self, position: int) -> None:
        """Ask the student (collective)."""
        self._generations.renew(position, self._student())
        say(f"asked the student for the hard tokens of the coming epochs (batch {position})")
