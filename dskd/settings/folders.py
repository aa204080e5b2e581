"""The folders and files of a run, each named once, and what is in another place if settings say so.

A run's folder::

    config.yaml    the resolved settings          inputs.json   fingerprints of data and models
    history.jsonl  what was changed on the way: rates, the length (if anything was)
    sliced/        the model that a sliced student starts as
    questions/     how hard each token was (questions-epoch-N/: for the student, later)
    replay/        rows of earlier tasks, as the model writes them that the student starts as
    cache/         the teacher's top-k logits, or a panel's scores
    train/         metrics, checkpoints, summary  export/       a HuggingFace model
    importance/    how much the exported model's task needs each weight
    distilled.jsonl  the training questions with the exported model's answers
    scores.json    the exported model's evaluation (confusion.json: of classes, which for which)
    examples.json  how it goes on with some validation rows, or what it fills in there
    answers/       what it answers to the questions of named sets, one file a set
"""

from __future__ import annotations

from pathlib import Path

from dskd.settings.data import Data, HardTokens
from dskd.settings.examples import ReplayedSource
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, PanelTeacher, RoutedTeacher


class RunFolder:
    """The folder of one run, and the names of what the core writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.inputs = path / "inputs.json"
        self.history = path / "history.jsonl"
        self.sliced = path / "sliced"
        self.replay = path / "replay"  # in it a file of each earlier task
        self.cache = path / "cache"  # below it by domain or name of several teachers
        self.train = path / "train"
        self.metrics = self.train / "metrics.jsonl"  # a line for each logged step and evaluation
        self.checkpoints = self.train / "checkpoints"
        self.summary = self.train / "summary.json"
        self.export = path / "export"
        self.distilled = path / "distilled.jsonl"
        self.scores = path / "scores.json"
        self.confusion = path / "confusion.json"  # of an exported classifier
        self.examples = path / "examples.json"
        self.answers = path / "answers"
        self.report = path / "report.html"  # compares the runs whose settings lie below


def folder_of(run: Run) -> RunFolder:
    """The folder that a run writes to."""
    return RunFolder(run.out)


def cache_folder(run: Run, domain: str | None = None) -> Path:
    """Where a run's cached teacher (``domain``'s, if routed) keeps its logits, or a teacher of a
    panel its logits or scores; for None the folder of the whole panel."""
    if isinstance(run.teacher, PanelTeacher):
        panel = folder_of(run).cache if run.teacher.path is None else run.teacher.path
        member = run.teacher.teachers.get(domain)
        if isinstance(member, CachedTeacher) and member.path is not None:
            return member.path
        return panel if domain is None else panel / domain
    teacher = run.teacher.domains[domain] if isinstance(run.teacher, RoutedTeacher) else run.teacher
    if teacher.path is not None:
        return teacher.path
    cache = folder_of(run).cache
    return cache if domain is None else cache / domain


def questions_folder(run: Run, refresh_index: int = 0) -> Path:
    """Where a run whose masking is of hard tokens keeps the model's scores from before training, or
    the student's after ``refresh_index`` times ``refresh`` epochs."""
    masking = run.data.masking
    assert isinstance(masking, HardTokens), masking
    if refresh_index:
        assert masking.refresh is not None, refresh_index
        return run.out / f"questions-epoch-{refresh_index * masking.refresh:05d}"
    return run.out / "questions" if masking.store is None else masking.store


def replay_file(run: Run, domain: str) -> Path:
    """Where the rows of an earlier task lie that the run's method has had written."""
    return folder_of(run).replay / f"{domain}.jsonl"


def data_settings(run: Run) -> Data:
    """The data of a run, where each replayed source has its path."""
    sources = [
        source.model_copy(update={"path": str(replay_file(run, source.domain))})
        if isinstance(source, ReplayedSource) and source.path is None
        else source
        for source in run.data.sources
    ]
    return run.data.model_copy(update={"sources": sources})


def student_settings(run: Run) -> Model:
    """The model to build as the run's student: ``run.model``, or what is left of it."""
    if run.model.slice is None:
        return run.model
    own = {"path": str(folder_of(run).sliced), "revision": None, "slice": None}
    return run.model.model_copy(update=own)


def source_settings(run: Run) -> Model:
    """The model that the student is, or is cut from; ``config`` is of the student itself."""
    if run.model.slice is None:
        return run.model
    return run.model.model_copy(update={"config": {}, "slice": None})
