"""A trial: one model, fine-tuned on one task with one rate and one seed, as an ordinary run."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dskd.data.examples import examples
from dskd.data.labelled import LabelSet, label_set
from dskd.downstream.summary import Scored
from dskd.errors import CheckpointError, ConfigError
from dskd.runs.confusion import read_counts
from dskd.runs.history import read_object
from dskd.settings.data import Data
from dskd.settings.downstream import GLUE_TASKS, Downstream, DownstreamTask
from dskd.settings.folders import RunFolder
from dskd.settings.parsing import parse
from dskd.settings.run import Run
from dskd.settings.yaml_tree import Tree, dump
from dskd.system.files import fingerprint, read_manifest, write_atomic, write_manifest

_ENDINGS = ("jsonl", "tsv", "csv")
_PACKED = ("", ".gz", ".zst")
_RESULT = "result.json"
_BEGUN = "begun.json"
_DIVERGED = re.compile(r"^error: step \d+: .*; the last checkpoint is intact$", re.MULTILINE)
_SELECTS = "eval"
HELD_OUT = "holdout"
"""The split of rows that are held out of those to train on."""

_RECIPES: dict[str, Tree] = {
    "plain": {"weight_decay": 0.1, "clip": 1.0},
    "fairseq": {"weight_decay": 0.1, "clip": 0.0, "decay_all": True},
}


@dataclass(frozen=True)
class Splits:
    """The sources of a task's rows: to train on, to select by (None: a part of those, held out),
    and to report besides, by name."""

    train: list[Tree]
    dev: list[Tree] | None
    others: dict[str, list[Tree]]

    @property
    def reported(self) -> list[str]:
        """The names of the splits whose scores are reported, in order; where there is no other, the
        rows that are held out."""
        return [*(("dev",) if self.dev is not None else ()), *self.others] or [HELD_OUT]

    @property
    def selecting(self) -> str:
        """The name of the split that selects."""
        return HELD_OUT if self.dev is None else "dev"


def splits_of(task: DownstreamTask, where: str) -> Splits:
    """The sources of a task.

    Raises:
        ConfigError: a file is missing, or there is no file to select by; names the setting.
    """
    if task.task in GLUE_TASKS:
        of = {"kind": "glue", "task": task.task, "path": task.path}
        of["on_bad_rows"] = task.on_bad_rows
        dev = "dev_matched" if task.task == "mnli" else "dev"
        others = {"mismatched": [of | {"split": "dev_mismatched"}]} if task.task == "mnli" else {}
        found = Splits([of], [of | {"split": dev}], others)
    elif task.train is not None:
        dump_of = task.model_dump(mode="json")
        others = {} if task.test is None else {"test": dump_of["test"]}
        found = Splits(dump_of["train"], dump_of["dev"], others)
    else:
        assert task.path is not None, "else it is refused where the settings are read"
        files = {name: _file(Path(task.path), name) for name in ("train", "dev", "test")}
        if files["train"] is None:
            names = " or ".join(f"train.{ending}" for ending in _ENDINGS)
            raise ConfigError(f"{where}.path: {task.path} has no {names} (maybe .gz or .zst)")
        sources = {name: [_source(task, file)] for name, file in files.items() if file is not None}
        others = {"test": sources["test"]} if "test" in sources else {}
        found = Splits(sources["train"], sources.get("dev"), others)
    if task.holdout is None and found.dev is None:
        raise ConfigError(f"{where}.holdout: missing; there is nothing of dev to select by")
    if task.holdout is None:
        return found
    reported = {} if found.dev is None else {"dev": found.dev}
    return Splits(found.train, None, reported | found.others)


def restricted(task: DownstreamTask, splits: Splits, folder: Path) -> Splits:
    """The splits of a task of some of the classes (``labels``), the others' rows left out of what
    is reported, too: a run leaves them out of its own rows, and refuses them in named sets.

    Args:
        folder: gets a file of the rows of each such split.

    Raises:
        DataError: a label is that of no training row.
    """
    if task.labels is None or not splits.others:
        return splits
    taken = classes_of(task, splits)
    others: dict[str, list[Tree]] = {}
    for name, trees in splits.others.items():
        sources = parse(Data, _rows(task, trees)).labelled_sources
        every = chain.from_iterable(map(examples, sources))
        kept = [example for example in every if taken.takes(example)]
        rows = [{"text": e.text, "pair": e.pair, "label": e.label} for e in kept]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / f"{name}.jsonl", text.encode(), "the rows of some classes")
        about = {"kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "label": "label"}
        others[name] = [about | ({"pair": "pair"} if any(row["pair"] for row in rows) else {})]
    return replace(splits, others=others)


def classes_of(task: DownstreamTask, splits: Splits) -> LabelSet:
    """The classes that a task's training rows have, which are read for it.

    Raises:
        ConfigError, DataError: see :func:`~dskd.data.labelled.label_set`.
    """
    return label_set(parse(Data, _rows(task, splits.train)))


def _rows(task: DownstreamTask, sources: list[Tree]) -> Tree:
    own = {"objective": "classification", "sources": sources}
    return own | {"labels": task.model_dump(mode="json")["labels"]}


def _file(folder: Path, split: str) -> Path | None:
    """The one file of a split, if there is one.

    Raises:
        ConfigError: there are several.
    """
    names = [folder / f"{split}.{ending}{packed}" for ending in _ENDINGS for packed in _PACKED]
    found = [path for path in names if path.is_file()]
    if len(found) > 1:
        raise ConfigError(f"{folder}: which is it, {found[0].name} or {found[1].name}?")
    return found[0] if found else None


def _source(task: DownstreamTask, file: Path) -> Tree:
    kind = next(ending for ending in _ENDINGS if f".{ending}" in file.suffixes)
    column = "target" if task.task == "regression" else "label"
    source = {"kind": kind, "path": str(file), "field": task.text[0], column: task.label}
    source["on_bad_rows"] = task.on_bad_rows
    return source | ({"pair": task.text[1]} if len(task.text) > 1 else {})


@dataclass(frozen=True)
class Trial:
    """One cell of the grid.

    Attributes:
        folder: its own; in it ``result.json``, its log, and while it is trained its run.
        settings: those of its run.
        about: fingerprints of the model and of what the sources hold.
        splits: of its task.
        metrics: what selects, and what is reported besides.
    """

    model: str
    task: str
    lr: float
    seed: int
    folder: Path
    settings: Tree
    about: dict[str, Any]
    splits: Splits
    metrics: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.model}, {self.task}, lr {self.lr:g}, seed {self.seed}"

    @property
    def file(self) -> Path:
        """The settings file of its run."""
        return self.folder / "run.yaml"

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.folder / "log.txt"

    @property
    def run(self) -> RunFolder:
        """The folder of its run."""
        return RunFolder(self.folder / "run")

    @property
    def print(self) -> str:
        """Fingerprint of all that decides its result, wherever files and folders lie."""
        return fingerprint([_elsewhere(self.settings), self.about, self.metrics])

    def result(self) -> Scored | None:
        """What it came to; None if it is not at its end.

        Raises:
            ConfigError: it was made with other settings, another model or other rows.
            CheckpointError: the file is damaged.
        """
        path = self.folder / _RESULT
        if not path.exists():
            return None
        found = read_manifest(path, CheckpointError)
        if found["of"] != self.print:
            raise ConfigError(
                f"{path}: of other settings, rows or another model than now; delete {self.folder} "
                "to repeat it, or choose another `out`"
            )
        reported = {name: _number(value) for name, value in found["reported"].items()}
        return Scored(self.lr, self.seed, _number(found["selecting"]), reported, found["failed"])

    def prepare(self) -> None:
        """Write the settings file of its run, and what that is begun with.

        Raises:
            ConfigError: steps were taken with other settings, another model or other rows. A run
                would go on from them with another length or warm-up, and knows no other weights.
            CheckpointError: the file that says so is damaged.
        """
        begun = self.folder / _BEGUN
        if self.run.checkpoints.exists():
            found = read_manifest(begun, CheckpointError) if begun.exists() else {"of": None}
            if found["of"] != self.print:
                raise ConfigError(
                    f"{self.run.path}: begun with other settings, rows or another model than now; "
                    f"delete {self.folder} to begin anew, or set them back"
                )
        write_manifest(begun, {"of": self.print}, "what a trial is begun with")
        write_atomic(self.file, dump(self.settings).encode())

    def settled(self) -> Run:
        """Its run, for checks; nothing is written.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        return parse(Run, self.settings)

    def diverged(self) -> bool:
        """Whether its process ended because numbers were not finite."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return bool(_DIVERGED.search(text)) and not self.run.scores.exists()

    def finish(self, *, keep: bool) -> None:
        """Write down what its run came to, and remove the run unless it is kept."""
        names = [f"{split}_{name}" for split in self.splits.reported for name in self.metrics]
        if self.diverged():
            reported, selecting, failed = dict.fromkeys(names), None, True
        else:
            scores = read_object(self.run.scores, ())
            reported = {name: _finite(scores[self._key(name)]) for name in names}
            selecting = _finite(scores[f"{_SELECTS}_{self.metrics[0]}"])
            failed = selecting is None or self._constant()
        content = {"of": self.print, "model": self.model, "task": self.task, "lr": self.lr}
        content |= {"seed": self.seed, "selecting": selecting, "reported": reported}
        write_manifest(self.folder / _RESULT, {**content, "failed": failed}, "the result")
        if not keep:
            shutil.rmtree(self.run.path, ignore_errors=True)

    def _key(self, name: str) -> str:
        """What a reported score is called among those of the run."""
        split, metric = name.split("_", maxsplit=1)
        return f"{_SELECTS if split == self.splits.selecting else split}_{metric}"

    def _constant(self) -> bool:
        """Whether the exported classifier says the same of all rows that select."""
        if not self.run.confusion.exists():
            return False  # of numbers a correlation is undefined then
        counts = read_counts(self.run.confusion)
        return len({said for row in counts.rows.values() for said in row}) == 1


def _elsewhere(tree: Any) -> Any:
    """Settings without those that are paths or say only how fast it goes."""
    if isinstance(tree, dict):
        free = {"out", "folder", "path", "micro_batch", "deepspeed"}
        return {name: _elsewhere(value) for name, value in tree.items() if name not in free}
    return [_elsewhere(value) for value in tree] if isinstance(tree, list) else tree


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def settings_of(
    section: Downstream, task: DownstreamTask, splits: Splits, *, model: Path, block_size: int
) -> Tree:
    """The settings of a trial's run, but for its place, rate and seed."""
    selecting, further = task.scores
    data: Tree = {
        "objective": "classification",
        "sources": splits.train,
        "tokenizer": {"kind": "pretrained", "path": str(model)},
        "block_size": block_size,
    }
    if splits.dev is None:
        data["validation_fraction"] = task.holdout
    else:
        data["validation"] = splits.dev
    if task.labels is not None:
        data["labels"] = task.model_dump(mode="json")["labels"]
    sets = {name: {"sources": sources} for name, sources in splits.others.items()}
    size = section.batch if section.micro_batch is None else section.micro_batch
    train = {"epochs": section.epochs, "batch": section.batch, "micro_batch": size}
    train |= {"warmup": section.warmup, "precision": section.precision}
    return {
        "deepspeed": section.deepspeed,
        "method": {"kind": "finetune", "metric": selecting, "further_metrics": list(further)},
        "data": data,
        "model": {"path": str(model)},
        "teacher": None,
        "train": train | _RECIPES[section.recipe],
        "evaluation": {
            "every": "epoch",
            "patience": section.patience,
            "micro_batch": max(size, 32),
            "examples": 0,
            "sets": sets,
        },
        "checkpoint": {"keep": 1},
    }
