"""The folders of a run, and what a run starts from: every path that it writes is named here."""

from __future__ import annotations

from pathlib import Path

from dskd.settings.data import HardTokens
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import RoutedTeacher


def cache_folder(run: Run, domain: str | None = None) -> Path:
    """Where a run's cached teacher (``domain``'s, if routed) keeps its logits."""
    teacher = run.teacher.domains[domain] if isinstance(run.teacher, RoutedTeacher) else run.teacher
    if teacher.path is not None:
        return teacher.path
    return run.out / "cache" if domain is None else run.out / "cache" / domain


def questions_folder(run: Run, refresh_index: int = 0) -> Path:
    """Where a run whose masking is of hard tokens keeps the model's scores from before training, or
    the student's after ``refresh_index`` times ``refresh`` epochs."""
    masking = run.data.masking
    assert isinstance(masking, HardTokens), masking
    if refresh_index:
        assert masking.refresh is not None, refresh_index
        return run.out / f"questions-epoch-{refresh_index * masking.refresh:05d}"
    return run.out / "questions" if masking.store is None else masking.store


def sliced_folder(run: Run) -> Path:
    """Where a run keeps the model that its student starts as."""
    return run.out / "sliced"


def student_settings(run: Run) -> Model:
    """The model to build as the run's student: ``run.model``, or what is left of it."""
    if run.model.slice is None:
        return run.model
    own = {"path": str(sliced_folder(run)), "revision": None, "slice": None}
    return run.model.model_copy(update=own)


def source_settings(run: Run) -> Model:
    """The model that the student is, or is cut from; ``config`` is of the student itself."""
    if run.model.slice is None:
        return run.model
    return run.model.model_copy(update={"config": {}, "slice": None})
