"""The grid of ``downstream``: tasks x rates x seeds x models, each trial a run of its own process.

Everything is written below ``out/downstream``: ``MODEL/TASK/LR-SEED/`` for each trial with its
``result.json``, which is whole or absent, so that a stopped grid goes on with the trials that are
missing; and below names that no model has the prepared rows, the files of tasks of some classes,
and twins with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

from dskd.data.sources import content_hash
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.tokenizers import tokenizer_fingerprint
from dskd.downstream.processes import Child, default_jobs, run_all
from dskd.downstream.summary import LEAST, comparisons, glue_average, summary
from dskd.downstream.trials import (
    Splits,
    Trial,
    classes_of,
    restricted,
    settings_of,
    splits_of,
)
from dskd.errors import CheckpointError, ConfigError, DskdError
from dskd.methods.base import build_method
from dskd.models.build import build, model_fingerprint
from dskd.models.configs import config_of, stored_folder
from dskd.models.families import is_causal, longest_row
from dskd.models.initial import initialise
from dskd.models.writing import export
from dskd.runs.plan import check
from dskd.settings.checks import check_settings
from dskd.settings.data import Source
from dskd.settings.downstream import (
    GLUE_TASKS,
    Downstream,
    DownstreamModel,
    DownstreamTask,
    default_metric,
)
from dskd.settings.model import Model
from dskd.settings.parsing import nearest
from dskd.settings.recipe import SINGLE, Recipe
from dskd.settings.run import Run
from dskd.system.files import file_hash, fingerprint, read_manifest, write_manifest
from dskd.system.log import say
from dskd.tasks.metrics import METRICS, MetricName

_TWIN_SEED = 0


class Grid:
    """The section ``downstream`` of a recipe, below its folder.

    Raises:
        ConfigError: a model or a file is missing, a metric is unknown, or a trial's run is refused;
            before anything is trained.
    """

    def __init__(self, section: Downstream, out: Path) -> None:
        self.section = section
        self.folder = out / "downstream"
        self._where = {
            task.own_name: f"downstream.tasks.{n}" for n, task in enumerate(section.tasks)
        }
        self._refuse()
        self.models = {name: self._model(name, of) for name, of in section.models.items()}
        self._prints = {name: _model_prints(path) for name, path in self.models.items()}
        self.trials = [trial for task in self._trained for trial in self._trials_of(task)]
        self._check_runs()

    @property
    def _trained(self) -> list[DownstreamTask]:
        return [task for task in self.section.tasks if task.trains]

    @property
    def _asked(self) -> list[DownstreamTask]:
        return [task for task in self.section.tasks if not task.trains]

    def carry_out(self) -> dict[str, Any]:
        """Do what is not done yet; everything that is known then."""
        # Pairs first: they are quick, and what is wrong with a file is found before any training.
        children = [*self._pair_children()]
        children += [self._child(trial) for trial in self.trials if trial.result() is None]
        done = len(self.trials) + len(self.models) * len(self._asked) - len(children)
        say(f"downstream: {len(children)} trials to do, {done} done: {self.folder}")
        gone = sum(t.result() is not None and not t.run.path.exists() for t in self.trials)
        if self.section.keep and gone:
            say(f"downstream.keep: of {gone} trials that are done no run was kept, nor is one made")
        run_all(children, self.section.jobs or default_jobs(), say)
        return self.result()

    def result(self) -> dict[str, Any]:
        """What all trials come to; every one is at its end."""
        tasks = {task.own_name: self._told(task) for task in self._trained}
        return {
            "models": {name: str(path) for name, path in self.models.items()},
            "tasks": tasks,
            "pairs": {task.own_name: self._pairs_told(task) for task in self._asked},
            "glue": self._glue(tasks),
        }

    # ---- before anything is trained --------------------------------------------------------------

    def _refuse(self) -> None:
        if "=" in str(self.folder):  # the trials' files would be read as settings
            raise ConfigError(f"out: {self.folder.parent}: a name without = , please")
        for task in self._trained:
            names = [*([task.metric] if task.metric else []), *task.further_metrics]
            for name in names:
                if name not in get_args(MetricName):
                    known = ", ".join(METRICS)
                    text = f"{name!r} is not one of {known}{nearest(name, METRICS)}"
                    raise ConfigError(f"{self._where[task.own_name]}: {text}")
        for task in self._asked:
            if not Path(task.path or "").is_file():
                raise ConfigError(f"{self._where[task.own_name]}.path: {task.path}: no such file")
        several = len(self.section.models) > 1 and len(self.section.seeds) >= LEAST
        if several and self._trained and find_spec("scipy") is None:
            text = "intervals of differences need scipy: pip install 'dskd[tasks]'"
            raise ConfigError(f"downstream.seeds: {text}, or fewer than {LEAST} seeds")

    def _model(self, name: str, of: DownstreamModel) -> Path:
        """The folder of a model, that of its twin with random weights being made here."""
        path, where = Path(of.path), f"downstream.models.{name}"
        if not path.exists() and of.path.count("/") < 2:  # maybe a hub id
            path = stored_folder(Model(path=of.path), where) or path
        if not (path / "config.json").is_file():
            raise ConfigError(f"{where}.path: {path} is no folder of a model; is its run finished?")
        if not of.random:
            return path
        twin = self.folder / "_random" / name
        before = {"of": _model_prints(path)}
        about = twin.with_name(f"{name}.json")
        if twin.is_dir() and about.exists():
            if read_manifest(about, CheckpointError) != before:
                raise ConfigError(f"{twin}: of another model than {path} is now; delete {twin}")
            return twin
        tokenizer = stored_tokenizer(str(path), where)
        named = Model(path=str(path))
        causal = is_causal(config_of(named, where=where).model_type)
        rows = {"objective": "causal" if causal else "masked", "block_size": 1}
        how = {"seed": _TWIN_SEED, "ds": None, "dtype": torch.float32, "where": where}
        model = build(named, tokenizer, **rows, **how)
        initialise(model, _TWIN_SEED)
        export(model, tokenizer, twin, card={"title": "Random weights"})
        write_manifest(about, before)
        return twin

    def _trials_of(self, task: DownstreamTask) -> Iterator[Trial]:
        where = self._where[task.own_name]
        splits = splits_of(task, where)
        selecting, further = task.scores
        try:
            _refuse_binary((selecting, *further), task, splits)
            splits = restricted(task, splits, self.folder / "_files" / task.own_name)
        except DskdError as problem:
            raise type(problem)(f"{where}: {problem}") from problem
        for name, path in self.models.items():
            tree = settings_of(
                self.section, task, splits, model=path, block_size=self._block_size(name, path)
            )
            about: dict[str, Any] | None = None
            for lr, seed in product(self.section.lr, self.section.seeds):
                folder = self.folder / name / task.own_name / f"{lr:g}-{seed}"
                own = {
                    **tree,
                    "out": str(folder / "run"),
                    "seed": seed,
                    "data": tree["data"] | {"folder": str(self.folder / "_rows")},
                    "train": tree["train"] | {"lr": lr},
                }
                trial = Trial(
                    model=name,
                    task=task.own_name,
                    lr=lr,
                    seed=seed,
                    folder=folder,
                    settings=own,
                    about=about or {},
                    splits=splits,
                    metrics=(selecting, *further),
                )
                if about is None:
                    about = {"model": self._prints[name], "rows": _contents(trial.settled())}
                yield replace(trial, about=about)

    def _block_size(self, name: str, path: Path) -> int:
        where = f"downstream.models.{name}"
        positions = longest_row(config_of(Model(path=str(path)), where=where))
        if positions < self.section.max_length:
            say(f"{where}: rows of at most {positions} tokens, as it has no more positions")
        return min(positions, self.section.max_length)

    def _check_runs(self) -> None:
        """Refuse what a trial's run would refuse, of one trial of each model and task."""
        seen = set()
        for trial in self.trials:
            if (trial.model, trial.task) in seen:
                continue
            seen.add((trial.model, trial.task))
            recipe = Recipe(trial.run.path, {SINGLE: trial.settled()})
            try:
                check_settings(recipe, 1)
                methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
                check(recipe, methods, world=1)
            except DskdError as problem:
                text = f"{self._where[trial.task]} ({trial.task}, {trial.model}): {problem}"
                raise type(problem)(text) from problem

    # ---- the processes ---------------------------------------------------------------------------

    def _child(self, trial: Trial) -> Child:
        trial.prepare()
        return Child(
            name=trial.name,
            words=["-m", "dskd.train", str(trial.file)],
            log=trial.log,
            done=partial(trial.finish, keep=self.section.keep),
            survives=trial.diverged,
        )

    def _pair_children(self) -> Iterator[Child]:
        for task, name in product(self._asked, self.models):
            if self._pairs(task, name) is not None:
                continue
            folder = self._pairs_folder(task, name)
            scores = folder / "scores.json"
            words = ["-m", "dskd.cli", "pairs", str(self.models[name]), str(task.path), str(scores)]
            yield Child(
                name=f"{name}, {task.own_name}",
                words=[*words, *(["--within-word"] if task.within_word else [])],
                log=folder / "log.txt",
                done=partial(self._keep_pairs, task, name),
            )

    # ---- the scores ------------------------------------------------------------------------------

    def _told(self, task: DownstreamTask) -> dict[str, Any]:
        """What a task's trials come to."""
        own = [trial for trial in self.trials if trial.task == task.own_name]
        metric, _ = task.scores
        higher, splits = METRICS[metric].higher_is_better, own[0].splits
        models = {}
        for name in self.models:
            scored = [trial.result() for trial in own if trial.model == name]
            models[name] = summary([each for each in scored if each is not None], higher=higher)
        headline = f"{_headline(splits)}_{metric}"
        return {
            "task": task.task,
            "metric": metric,
            "higher_is_better": higher,
            "selected_on": splits.selecting,
            "headline": headline,
            "models": models,
            "comparisons": comparisons(models, headline),
        }

    def _pairs_folder(self, task: DownstreamTask, model: str) -> Path:
        return self.folder / model / task.own_name

    def _pairs_print(self, task: DownstreamTask, model: str) -> str:
        return fingerprint([self._prints[model], file_hash(Path(str(task.path))), task.within_word])

    def _keep_pairs(self, task: DownstreamTask, model: str) -> None:
        folder = self._pairs_folder(task, model)
        found = json.loads((folder / "scores.json").read_text())
        content = {"of": self._pairs_print(task, model), "scores": found}
        write_manifest(folder / "result.json", content, "the result")

    def _pairs(self, task: DownstreamTask, model: str) -> dict[str, Any] | None:
        """What a model's scores of pairs are; None if that is still to come."""
        path = self._pairs_folder(task, model) / "result.json"
        if not path.exists():
            return None
        found = read_manifest(path, CheckpointError)
        if found["of"] != self._pairs_print(task, model):
            raise ConfigError(f"{path}: of another model, file or setting than now; delete it")
        return found["scores"]

    def _pairs_told(self, task: DownstreamTask) -> dict[str, Any]:
        return {name: self._pairs(task, name) for name in self.models}

    def _glue(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """The average of GLUE of each model, and over how many tasks, if they are all there, each
        once, of all classes, and by GLUE's own metric."""
        own = [task for task in self._trained if task.task in GLUE_TASKS and task.labels is None]
        own = [task for task in own if task.scores[0] == default_metric(task.task)]
        kinds = [task.task for task in own]
        counted = {task.task: task.own_name for task in own if kinds.count(task.task) == 1}
        found = {}
        for name in self.models:
            numbers = {kind: _one_number(tasks[own], name) for kind, own in counted.items()}
            average = glue_average(numbers)
            if average is not None:
                found[name] = {"over": average[0], "average": average[1]}
        return found


def _refuse_binary(metrics: Sequence[str], task: DownstreamTask, splits: Splits) -> None:
    """Refuse a metric of two classes on rows of more, which their runs would once they are read."""
    binary = [name for name in metrics if METRICS[name].binary]
    if binary and task.task not in ("regression", "stsb"):  # of which they are refused anyway
        count = len(classes_of(task, splits).classes)
        if count != 2:
            raise ConfigError(f"{binary[0]} is of two classes, but the rows have {count}")


def _one_number(told: Mapping[str, Any], model: str) -> float:
    """A task of GLUE in one number: of MNLI the mean of its two files."""
    scores, metric = told["models"][model]["scores"], told["metric"]
    names = ("dev", "mismatched") if told["task"] == "mnli" else ("dev",)
    means = [scores[f"{name}_{metric}"]["mean"] for name in names]
    return sum(means) / len(means)


def _headline(splits: Splits) -> str:
    """The split that models are compared on: one that did not select, if there is one."""
    return "test" if "test" in splits.others else splits.reported[0]


def _model_prints(path: Path) -> list[str]:
    where = str(path)
    tokenizer = stored_tokenizer(where, where)
    named = Model(path=where)
    return [model_fingerprint(named, seed=0, where=where), tokenizer_fingerprint(tokenizer)]


def _contents(run: Run) -> list[str]:
    """Of what all sources of a run hold, hashes; of remote ones, which only reading tells, what the
    settings say."""
    sets: list[Sequence[Source]] = [own.sources for own in run.evaluation.sets.values()]
    every = [run.data.sources, run.data.validation or [], *sets]
    return [content_hash(s) or s.model_dump_json() for sources in every for s in sources]
