"""Settings from YAML and the command line: read, check, write, compare.

A settings file holds one run (the sections of ``dskd.settings.run.Run``), or a recipe of several::

    base: {out: runs/demo, data: {...}}    # what the runs share
    runs:
      teacher: {model: {...}}              # each is base with its own settings merged in
      student: {teacher: {kind: live, model: {path: "run:teacher"}}}

A run of a recipe writes to ``<base out>/<name>``. ``run:NAME`` stands for what an earlier run
leaves: its export as the ``path`` of a model or tokenizer, its cache as that of a cached teacher,
the ``store`` of its hard tokens, its model's answers as that of questions. Below ``method``, whose
settings are known to its class alone, any string that is exactly that stands for the run's folder.
Overrides are ``a.b=value`` (all runs) and ``runs.NAME.a.b=value`` (one); the command line wins.
Every mistake of a file is reported at once, by the dotted name that an override would use.

``downstream``, beside the runs or alone with ``out``, says what ``dskd downstream`` does with
models (``downstream.py``).

Tasks that are learnt one after the other are written as such (``tasks``, ``sequences``,
``teachers``: ``sequence.py``) and read as the runs that learn them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dskd.errors import ConfigError
from dskd.settings import sequence, yaml_tree
from dskd.settings.base import RunPath
from dskd.settings.data import HardTokens
from dskd.settings.downstream import Downstream, downstream_problems
from dskd.settings.folders import RunFolder, cache_folder, questions_folder
from dskd.settings.parsing import (
    Problem,
    build_section,
    line,
    member,
    nearest,
    section_of,
    show,
    with_kinds,
)
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, PanelTeacher, each_teacher
from dskd.settings.yaml_tree import SettingName, Tree

_RUN = "[A-Za-z0-9][A-Za-z0-9_-]*"  # name of a run
_NAME, _PATH = 255, 4095  # bytes of a file's name, and of a whole path (Linux)

SINGLE = "run"
"""Name of the only run of a file that is no recipe."""


@dataclass(frozen=True)
class Recipe:
    """Runs by name, in the order in which they run, and the folder that holds them."""

    out: Path
    runs: dict[str, Run]
    downstream: Downstream | None = None
    """What ``dskd downstream`` does with their models, if anything."""

    def prefix(self, name: str) -> str:
        """Dotted name, in messages, of one of the runs; empty for that of a file of one."""
        return "" if name == SINGLE else f"runs.{name}"


def read(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a settings file (None: all defaults, the toy run) and lay the overrides on it.

    Raises:
        ConfigError: the file cannot be read, or every mistake in it, one a line.
    """
    where = "" if path is None else str(path)
    content = {} if path is None else yaml_tree.load(Path(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected settings (name: value), found {show(content)}")
    over = yaml_tree.overlay(overrides)
    tasks, tasks_over = content.pop("downstream", None), over.pop("downstream", {})
    if tasks is None and not tasks_over:
        return _read_runs(content, over, where)
    alone = where and content.keys() <= {"out"}  # for models that no run here makes
    recipe = _without_runs(content, over, where) if alone else _read_runs(content, over, where)
    return replace(recipe, downstream=_downstream(recipe, tasks, tasks_over, where))


def _without_runs(content: Tree, over: Tree, where: str) -> Recipe:
    """A file that says nothing of runs, but where to write."""
    reader = _Reader(where)
    out = over.get("out", content.get("out"))
    if not isinstance(out, str):
        reader.add(("out",), f"missing, or no text: {show(out)}; the folder to write to", over=over)
    for name in over.keys() - {"out"}:
        reader.add((name,), "no such setting: the file has downstream and out only", over=over)
    reader.finish(())
    return Recipe(Path(os.path.expanduser(out)), {})


def _downstream(recipe: Recipe, tree: Any, over: Any, where: str) -> Downstream:
    """The section ``downstream`` beside some runs.

    Raises:
        ConfigError: every mistake in it, one a line.
    """
    reader, problems = _Reader(where, dict(recipe.runs)), []
    merged = yaml_tree.merge(_mapping(tree), over)
    resolved = reader._resolve(Downstream, merged, ("downstream",), problems)
    section, more = build_section(Downstream, resolved)
    if section is not None:
        more = [*more, *downstream_problems(section)]
    if "downstream" in recipe.runs:
        text = "its folder is that of the section downstream; give the run another name"
        reader.add(("runs", "downstream"), text)
    for place, text in [*problems, *((("downstream", *place), text) for place, text in more)]:
        reader.add(place, text, over={"downstream": over})
    reader.finish(())
    assert section is not None, "else there is a problem"
    return section


def _read_runs(content: Tree, over: Tree, where: str) -> Recipe:
    """The runs of a file."""
    if content.keys() & {"runs", "base", *sequence.SECTIONS}:
        return _read_recipe(content, over, where)
    if "runs" in over:
        name = where or "the toy run"
        raise ConfigError(f"command line: runs: {name} is a single run, not a recipe of several")
    reader = _Reader(where)
    reader.run(SINGLE, content, over)
    runs = reader.finish([SINGLE])
    return Recipe(runs[SINGLE].out, runs)


def dump_run(run: Run, *, here: bool = False) -> str:
    """The whole of a run's settings as YAML; :func:`read` gives the same run back.

    ``here``: for a file that lies in the run's folder, wherever that is moved.
    """
    tree = run.model_dump(mode="json")
    return yaml_tree.dump(tree | {"out": None} if here else tree)


def _read_recipe(content: Tree, over: Tree, where: str) -> Recipe:
    if content.keys() & {*sequence.SECTIONS}:
        content, over = sequence.written_out(content, over, where)
    reader = _Reader(where)
    base, runs = _mapping(content.get("base")), content.get("runs")
    own_over = over.pop("runs", {})
    for key in [key for key in content if key not in ("base", "runs")]:
        reader.add((key,), "a recipe has only base and runs at its top; does it belong into base?")
    if not isinstance(base, dict) or not isinstance(runs, dict) or not runs:
        raise ConfigError(line(where, (), "a recipe needs base: {...} and runs: {name: {...}}"))
    if not isinstance(own_over, dict):
        raise ConfigError("command line: runs: write runs.NAME.a.b=value")
    for name in [name for name in own_over if name not in runs]:
        reader.add(("runs", name), "no such run" + nearest(name, runs), over={"runs": own_over})
    base = with_kinds(Run, base)
    out = over.get("out", base.get("out", str(Run.model_fields["out"].default)))
    usable = not isinstance(out, str) or not any(_unusable(os.path.expanduser(out), ("out",)))
    for name, own in runs.items():
        layers = (_mapping(own), own_over.get(name, {}))
        if not re.fullmatch(_RUN, name):
            reader.add(("runs", name), "the name of a run is made of letters, digits, _ and -")
        if not all(isinstance(layer, dict) for layer in layers):
            reader.add(("runs", name), "expected settings (name: value)")
            continue
        if any("out" in layer for layer in layers):
            reader.add(
                ("runs", name, "out"), "a run of a recipe writes to <out>/<name>; set base.out"
            )
        # A folder that no run can use is named as it was written, once for all of them.
        place = os.path.join(out, name) if isinstance(out, str) and usable else out
        reader.run(name, yaml_tree.merge(base, layers[0]), yaml_tree.merge(over, layers[1]), place)
    return Recipe(Path(os.path.expanduser(out)), reader.finish(runs))


def _mapping(value: Any) -> Any:
    """The settings below a name of the file, where none is a way to write no settings."""
    return {} if value is None else value


@dataclass
class _Reader:
    """Builds the runs of a file one after the other and gathers what is wrong with them."""

    where: str
    built: dict[str, Run | None] = field(default_factory=dict)
    reads_scores: bool = False  # whether the teacher of the run that is built is a panel
    problems: dict[str, list[tuple[str, SettingName, str]]] = field(default_factory=dict)

    def add(
        self, place: SettingName, text: str, name: str = "", over: Mapping[str, Any] | None = None
    ) -> None:
        """Note a problem of the run ``name`` (none: of the file); ``over`` is its overlay."""
        origin = "command line" if yaml_tree.covers(over or {}, place) else self.where
        self.problems.setdefault(name, []).append((origin, place, text))

    def run(self, name: str, tree: Tree, over: Tree, out: Any = None) -> None:
        """Build the run ``name``, written to the folder ``out`` if that is given."""
        tree = with_kinds(Run, tree)
        tree = yaml_tree.merge(tree if self.where else _with_defaults(Run(), tree, over), over)
        tree = with_kinds(Run, tree)  # again: which settings are paths depends on the kinds
        problems: list[Problem] = []
        if self.where:  # nothing of the toy is laid under a file
            tree = {"teacher": None, **tree}
            problems += _missing(tree)
        elif _leaves_toys_vocabulary(tree):
            tree, wrong = _without_toys_teacher(tree)
            problems += wrong
        if self.where and out is None and tree.get("out", "") is None:
            out = str(Path(self.where).parent)
        teacher = tree.get("teacher")
        self.reads_scores = isinstance(teacher, dict) and teacher.get("kind") == "panel"
        resolved = self._resolve(Run, tree if out is None else tree | {"out": out}, (), problems)
        run, more = build_section(Run, resolved)
        for place, text in problems + more:
            self.add(place, text, name, over)
        self.built[name] = run

    def finish(self, names: Collection[str]) -> dict[str, Run]:
        """The runs, if nothing is wrong; a problem that all runs share is named once."""
        lines = dict.fromkeys(line(*problem) for problem in self.problems.pop("", []))
        for name, problems in self.problems.items():
            for origin, place, text in problems:
                shared = all((origin, place, text) in self.problems.get(n, []) for n in names)
                above = () if shared else ("runs", name)
                lines[line(origin, (*above, *place), text)] = None
        if lines:
            raise ConfigError("\n".join(lines))
        return {name: run for name, run in self.built.items() if run is not None}

    def _resolve(
        self, annotation: Any, tree: Any, place: SettingName, problems: list[Problem]
    ) -> Any:
        """``tree`` with ``~/`` and ``run:NAME`` replaced in the fields that are paths."""
        if isinstance(tree, list):
            entry = member(annotation, 0)
            return [
                self._resolve(entry, value, (*place, str(index)), problems)
                for index, value in enumerate(tree)
            ]
        if not isinstance(tree, dict):
            return tree
        section, resolved = section_of(annotation, tree), {}
        for name, value in tree.items():
            here = (*place, name)
            info = None if section is None else section.model_fields.get(name)
            marks = [] if info is None else [m for m in info.metadata if isinstance(m, RunPath)]
            if here == ("method",):
                resolved[name] = self._with_folders(value, here, problems)
            elif marks and isinstance(value, str):
                resolved[name] = self._folder(marks[0], value, here, problems)
            else:
                inner = member(annotation, name) if info is None else info.annotation
                resolved[name] = self._resolve(inner, value, here, problems)
        return resolved

    def _with_folders(self, tree: Any, place: SettingName, problems: list[Problem]) -> Any:
        """``tree``, of a section whose class is not known yet, with the folder of an earlier run in
        the place of every ``run:NAME``."""
        if isinstance(tree, list):
            named = {str(index): value for index, value in enumerate(tree)}
            return [*self._with_folders(named, place, problems).values()]
        if isinstance(tree, dict):
            return {
                name: self._with_folders(value, (*place, name), problems)
                for name, value in tree.items()
            }
        if not (isinstance(tree, str) and re.fullmatch(f"run:{_RUN}", tree)):
            return tree
        try:
            run = self._earlier(tree.removeprefix("run:"))
        except ConfigError as problem:
            problems.append((place, str(problem)))
            return tree
        return tree if run is None else str(run.out)

    def _folder(
        self, mark: RunPath, value: str, place: SettingName, problems: list[Problem]
    ) -> str:
        if value.startswith("run:"):
            try:
                return self._left_by(value.removeprefix("run:"), mark.output, place)
            except ConfigError as problem:
                problems.append((place, str(problem)))
        value = os.path.expanduser(value) if value.startswith("~/") else value
        problems += [(place, text) for text in _unusable(value, place)]
        return value

    def _left_by(self, name: str, output: str | None, place: SettingName) -> str:
        """The folder of what the run ``name`` leaves, for the setting at ``place``."""
        if output is None:
            raise ConfigError(f"'run:{name}' stands for nothing that a run leaves; give a path")
        run = self._earlier(name)
        if run is None:  # what is wrong with it is among the problems already
            return f"run:{name}"
        if output == "export":
            return str(RunFolder(run.out).export)
        if output == "distilled":
            return str(RunFolder(run.out).distilled)
        if output == "store":
            if not isinstance(run.data.masking, HardTokens):
                raise ConfigError(f"'run:{name}' has no store, its masking is not of hard tokens")
            return str(questions_folder(run))
        if place == ("teacher", "path") and self.reads_scores:
            of_classifiers = isinstance(run.teacher, PanelTeacher) and run.teacher.mixture is None
            if not of_classifiers:
                text = "has no cache of scores, its teacher is not a panel of classifiers"
                raise ConfigError(f"'run:{name}' {text}")
            return str(cache_folder(run))
        teachers = each_teacher(run.teacher)
        several = place[:1] == ("teacher",) and place[1] in ("domains", "teachers")
        domain = place[2] if several and None not in teachers else None
        if not isinstance(teachers.get(domain), CachedTeacher):
            raise ConfigError(f"'run:{name}' has no cache, its teacher is not a cached one")
        return str(cache_folder(run, domain))

    def _earlier(self, name: str) -> Run | None:
        """The run ``name`` of those before this one; None if its settings are wrong."""
        if name not in self.built:
            earlier = ", ".join(self.built) or "none"
            near = nearest(name, self.built)
            raise ConfigError(f"'run:{name}' names no earlier run{near}; earlier ones: {earlier}")
        return self.built[name]


def _unusable(path: str, place: SettingName) -> Iterator[str]:
    """What no file system or not DeepSpeed can do with a path."""
    longest = max(len(os.fsencode(part)) for part in path.split(os.sep))
    if longest > _NAME:
        yield f"{show(path)} has a name of {longest} bytes; file systems take {_NAME}"
    if len(os.fsencode(path)) > _PATH:
        yield f"{show(path)} has {len(os.fsencode(path))} bytes; file systems take {_PATH}"
    if place == ("out",) and set(path) & set("*?["):
        yield f"{path!r}: DeepSpeed reads checkpoints by patterns; without * ? and [, please"


def _missing(tree: Tree) -> Iterator[Problem]:
    """What the settings of a run from a file must name, and do not."""
    for name in ("method", "model"):
        if name not in tree:
            yield (name,), "missing; a settings file names its own"
    data = tree.get("data", {})
    if isinstance(data, dict) and "sources" not in data:
        yield ("data", "sources"), "missing; a settings file names its own"
    teachers = {("teacher",): tree["teacher"]}
    if isinstance(tree["teacher"], dict) and isinstance(tree["teacher"].get("domains"), dict):
        domains = tree["teacher"]["domains"]
        teachers |= {("teacher", "domains", domain): of for domain, of in domains.items()}
    for place, teacher in teachers.items():
        live = isinstance(teacher, dict) and teacher.get("kind", "live") == "live"
        if live and "model" not in teacher:
            yield (*place, "model"), "missing; a live teacher is some model"


def _leaves_toys_vocabulary(tree: Tree) -> bool:
    """Whether settings without a file start from a stored model with a tokenizer of its own."""
    nodes = [tree.get(name) for name in ("model", "data")]
    model, data = [node if isinstance(node, dict) else {} for node in nodes]
    tokenizer = data.get("tokenizer")
    kind = tokenizer.get("kind") if isinstance(tokenizer, dict) else None
    return model.get("path") is not None and kind == "pretrained"


def _without_toys_teacher(tree: Tree) -> tuple[Tree, list[Problem]]:
    """``tree`` without the toy's teacher, which knows none of the stored model's tokens; a problem
    where the method is the toy's, which cannot do without, or where settings are of that teacher.
    """
    given = tree.get("teacher", {})
    own = {"model", "path", "domains"}  # which say what another teacher is
    if not isinstance(given, dict) or given.get("kind", "live") != "live" or own & given.keys():
        return tree, []
    toy, method = Run().method, tree.get("method", {})
    if given or not isinstance(method, dict) or method.get("kind", toy["kind"]) == toy["kind"]:
        path = show(tree["model"]["path"])
        text = f"the toy's has another vocabulary than model.path {path}; name one that has it"
        return tree, [(("teacher",), f"{text} (teacher.model.path), or a method without: lm")]
    return {**tree, "teacher": None}, []


def _with_defaults(default: BaseModel, tree: Tree, over: Tree) -> Tree:
    """``tree`` with the default of each free mapping that ``over`` reaches into and it leaves out,
    so that ``method.temperature=3`` changes the toy's method and does not replace it."""
    filled = dict(tree)
    for name in over.keys() & type(default).model_fields.keys() - tree.keys():
        inner = getattr(default, name)
        if isinstance(inner, dict):
            filled[name] = inner
        elif isinstance(inner, BaseModel) and isinstance(over[name], dict):
            filled[name] = _with_defaults(inner, {}, over[name])
    return filled
