"""Settings of ``downstream``: models that are fine-tuned on tasks, over a grid of rates and seeds.

The section stands beside ``base`` and ``runs`` of a recipe, or with ``out`` alone in a file of its
own, and is carried out by ``dskd downstream FILE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from dskd.settings.base import RunPath, Section
from dskd.settings.data import Source
from dskd.settings.labels import GlueTask, Labels
from dskd.settings.parsing import Problem
from dskd.settings.run import Warmup
from dskd.settings.teachers import Precision
from dskd.settings.yaml_tree import Tree

GLUE_TASKS: tuple[str, ...] = get_args(GlueTask)

TaskKind = Literal[GlueTask, "classification", "regression", "minimal_pairs"]

GLUE_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cola": ("matthews", ()),
    "mrpc": ("accuracy_and_f1", ("accuracy", "f1")),
    "qqp": ("accuracy_and_f1", ("accuracy", "f1")),
    "stsb": ("pearson_and_spearman", ("pearson", "spearman")),
}
"""What selects and is one number of a task of GLUE, and what is shown besides; of the others it is
the accuracy."""


def default_metric(task: str) -> str:
    """What selects, and is one number of a task of this kind, where nothing is said."""
    default = "pearson_and_spearman" if task == "regression" else "accuracy"
    own, _ = GLUE_METRICS.get(task, (default, ()))
    return own


_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class DownstreamTask(Section):
    """A task that models are fine-tuned on, or scored on as they are."""

    task: TaskKind
    """A task of GLUE; ``classification`` or ``regression`` on files of one's own; or
    ``minimal_pairs``, without any training."""
    name: str | None = None
    """What it is called; null: as ``task`` is."""
    path: Annotated[str | None, RunPath()] = None
    """The task's folder of GLUE's download; a folder with one file ``train`` and maybe ``dev`` and
    ``test`` (``.jsonl``, ``.tsv`` or ``.csv``, maybe ``.gz`` or ``.zst``); or a file of pairs."""
    train: list[Source] | None = Field(None, min_length=1)
    """In the place of ``path``: sources of the rows to train on, as of ``data.sources`` (of
    ``datasets``, too), which say themselves what their columns are."""
    dev: list[Source] | None = Field(None, min_length=1)
    """Beside ``train``: those that select."""
    test: list[Source] | None = Field(None, min_length=1)
    """Beside ``train``: those that are reported."""
    text: list[str] = Field(default_factory=lambda: ["text"], min_length=1, max_length=2)
    """The columns or keys of one text, or two; of files of one's own."""
    label: str = "label"
    """That of the class, or the number; of files of one's own."""
    labels: Labels | None = None
    """The classes that are taken, as of ``data.labels``."""
    metric: str | None = None
    """What selects the epoch and the rate, and is reported; null: GLUE's own, or the accuracy, or
    the mean of Pearson and Spearman."""
    further_metrics: list[str] = Field(default_factory=list)
    """More that are reported."""
    holdout: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows, by a hash of their texts, that selects in the place of the
    ``dev`` file, which is then reported alone; needed where there is no such file."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row with an empty text: as of a source."""
    within_word: bool = False
    """Of minimal pairs: see ``dskd pairs --within-word``."""

    @property
    def own_name(self) -> str:
        """What it is called."""
        return self.task if self.name is None else self.name

    @property
    def trains(self) -> bool:
        """Whether models are fine-tuned on it."""
        return self.task != "minimal_pairs"

    @property
    def scores(self) -> tuple[str, tuple[str, ...]]:
        """The metric that selects, and those that are reported besides."""
        _, further = GLUE_METRICS.get(self.task, ("", ()))
        selecting = default_metric(self.task) if self.metric is None else self.metric
        names = dict.fromkeys([*further, *self.further_metrics])
        return selecting, tuple(name for name in names if name != selecting)


class DownstreamModel(Section):
    """A model that is compared."""

    path: Annotated[str, RunPath("export")]
    """A folder with a model and its tokenizer, or a hub id; ``run:NAME`` is the export of a run of
    the file."""
    random: bool = False
    """Give it random weights: the twin that any pretraining must beat."""


class Downstream(Section):
    """Tasks x rates x seeds x models; each trial is a run of ``method: finetune``."""

    models: dict[str, DownstreamModel] = Field(min_length=1)
    """By name; the differences of each two of them are reported, seed by seed."""
    tasks: list[DownstreamTask] = Field(min_length=1)
    lr: list[float] = Field(default_factory=lambda: [1e-5, 2e-5, 3e-5], min_length=1)
    """Peak rates. Of each model and task the one is chosen whose mean score over all seeds is the
    best, the smaller one of equals. Small models need larger rates than base ones."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2, 3, 4], min_length=1)
    batch: int = Field(16, ge=1)
    """Rows of a step."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows of a forward pass; null: ``batch``."""
    epochs: float = Field(10, gt=0)
    patience: int | None = Field(3, ge=1)
    """Epochs without a better score after which a trial ends; null: it takes them all."""
    warmup: Warmup = 0.06
    max_length: int = Field(128, ge=8)
    """Most tokens of a row; a model of fewer positions takes as many as it has, and it is said."""
    recipe: Literal["plain", "fairseq"] = "plain"
    """``plain``: weight decay 0.1 but on biases and norms, gradients clipped at 1; ``fairseq``: as
    its recipes for RoBERTa: decay of all weights, and no clipping."""
    deepspeed: str = "zero0"
    """As of a run; a trial has one rank."""
    precision: Precision = "auto"
    jobs: int | None = Field(None, ge=1)
    """Trials at a time; null: one, or one a GPU."""
    keep: bool = False
    """Keep each trial's run, with its exported model."""


def downstream_problems(section: Downstream) -> Iterator[Problem]:
    """What contradicts itself in the section."""
    for name in section.models:
        if not re.fullmatch(_NAME, name):
            yield ("models", name), "a name is made of letters, digits, . _ and -, at most 64"
    rates = [f"{lr:g}" for lr in section.lr]  # six digits, as their folders are called
    for setting, values in (("lr", rates), ("seeds", section.seeds)):
        if len(set(values)) < len(values):
            yield (setting,), f"{getattr(section, setting)} has one twice"
    if any(not 0 < lr < 1 for lr in section.lr):
        yield ("lr",), f"{section.lr}: rates are above 0 and below 1"
    if any(seed < 0 for seed in section.seeds):
        yield ("seeds",), f"{section.seeds}: seeds are 0 or more"
    size = section.micro_batch
    if size is not None and section.batch % size:
        yield ("batch",), f"{section.batch} is not a multiple of micro_batch {size}"
    names = [task.own_name for task in section.tasks]
    for n, task in enumerate(section.tasks):
        place = ("tasks", str(n))
        if not re.fullmatch(_NAME, task.own_name):
            yield (*place, "name"), "a name is made of letters, digits, . _ and -, at most 64"
        elif task.own_name in names[:n]:
            yield (*place, "name"), f"another task is called {task.own_name}"
        for setting, text in _places(task):
            yield (*place, setting), text
        for setting in _idle(task):
            yield (*place, setting), f"plays no part in a task of kind {task.task}; leave it out"


def _places(task: DownstreamTask) -> Iterator[tuple[str, str]]:
    """What is wrong with where its rows lie."""
    if task.train is None:
        if task.path is None:
            yield "path", "missing"
        for name in ("dev", "test"):
            if getattr(task, name) is not None:
                yield name, "is beside train only"
    elif task.path is not None:
        yield "path", "beside train; one of the two"


def _idle(task: DownstreamTask) -> Iterator[str]:
    """Settings that are given and play no part in a task of this kind."""
    return (name for name in _without_part(task) if name in task.model_fields_set)


def _without_part(task: DownstreamTask) -> Iterator[str]:
    """Settings that play no part in a task of this kind."""
    of = {"within_word": not task.trains}
    own_files = task.task in ("classification", "regression")
    of |= dict.fromkeys(("text", "label"), own_files and task.train is None)
    of |= dict.fromkeys(("train", "dev", "test"), own_files)
    of |= dict.fromkeys(("metric", "further_metrics", "holdout"), task.trains)
    of["on_bad_rows"] = task.trains and task.train is None
    of["labels"] = task.trains and task.task not in ("regression", "stsb")
    return (name for name, used in of.items() if not used)


def downstream_tree(section: Downstream) -> Tree:
    """The section with its defaults, as a file may have it: of each task what plays a part."""
    tree = section.model_dump(mode="json")
    for task, own in zip(section.tasks, tree["tasks"], strict=True):
        for name in _without_part(task):
            del own[name]
    return tree
