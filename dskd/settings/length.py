"""How long a run is: epochs and shares as steps, once the number of its training rows is known."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from dskd.settings.run import Run, Train


def is_in_steps(train: Train) -> bool:
    """Whether the length and the warm-up are given in steps, so that no row has to be counted."""
    return train.steps is not None and not 0 < train.warmup < 1


def with_steps(run: Run, rows: int) -> Run:
    """The run with its length and its warm-up in steps.

    Args:
        run: its length is given in one way, as ``settings/checks.py`` has it.
        rows: of the training data.
    """
    train = run.train
    steps, warmup = train.steps, train.warmup
    if steps is None:
        steps = ceil(_as_written(train.epochs) * rows / train.batch)
    if 0 < warmup < 1:
        warmup = ceil(_as_written(warmup) * steps)
    lengths = {"steps": steps, "epochs": None, "warmup": warmup}
    return run.model_copy(update={"train": train.model_copy(update=lengths)})


def ends_epoch(step: int, batch: int, rows: int) -> bool:
    """Whether an epoch of the rows ends in optimiser step ``step``, counted from 1."""
    return step * batch // rows > (step - 1) * batch // rows


def _as_written(number: float) -> Fraction:
    """The decimal that a user wrote: 0.1 as a float is more than a tenth, and of 30 steps more
    than 3."""
    return Fraction(repr(number))
