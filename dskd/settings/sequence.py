"""A stream of tasks in a recipe, written out as the ordinary runs that learn them one by one.

Beside ``base`` (and ``runs``, which come after) such a recipe has::

    tasks:      # in the order in which they are learnt
      woz: {sources: [...], validation: [...], test: {sources: [...], metric: em}}
      sst: ...
    sequences:  # ways to learn them
      lll: {earlier: replayed, teacher: true, method: {word_kd: true, replay: {}}}
      gem: {earlier: memory, later: {method: {memories: {kind: gem}}, train: {clip: 0}}}
    teachers: {train: {epochs: 9}}

A task is of one domain, that of its name. Each sequence becomes a run a task, which starts as the
export of the run before; those of the first sequence are named ``TASK``, of others
``SEQUENCE-TASK``. What a sequence has besides the fields of :class:`_Sequence` are settings of all
its runs; ``run:previous`` in them is the run before, null in the first. ``teachers`` are settings
of the runs ``TASK-teacher``, which learn a task alone, once for all sequences that ask for them.
Here it is only settled which run learns and starts from what: the rest is the method's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from dskd.errors import ConfigError
from dskd.settings.base import Section
from dskd.settings.parsing import build_section, line, nearest, with_kinds
from dskd.settings.run import Run
from dskd.settings.yaml_tree import SettingName, Tree, covers, merge

SECTIONS = ("tasks", "sequences", "teachers")
"""What a recipe of tasks has at its top besides ``base`` and ``runs``."""
PREVIOUS = "run:previous"

_GIVEN = {
    ("data", "sources"): "tasks.NAME.sources",
    ("data", "validation"): "tasks.NAME.validation",
    ("data", "memory"): "sequences.NAME.earlier",
    ("evaluation", "sets"): "tasks.NAME.test",
}
"""Settings that are written here, and where they come from."""
_TOKENIZER = ("data", "tokenizer")
_OF_ALL = {("out",): "base.out", _TOKENIZER: "base.data.tokenizer"}
"""Settings that all runs share, and where they are set."""
_KEPT = ("attention", "trust_remote_code")
"""Settings of a model that also hold where a run starts as the run before."""


class _Task(Section):
    """One task; sources without a domain are of the task's."""

    sources: list[dict[str, Any]] = Field(min_length=1)
    """What is learnt."""
    validation: list[dict[str, Any]] | None = Field(None, min_length=1)
    """As ``data.validation``."""
    test: dict[str, Any]
    """As an entry of ``evaluation.sets``: what every model of a sequence is scored on."""


class _Sequence(Section):
    """A way to learn the tasks: what its runs read of them."""

    order: list[str] | None = Field(None, min_length=1)
    """The tasks in the order in which they are learnt; null: as they are written."""
    together: bool = False
    """Learn them all in one run, which has the sequence's name."""
    earlier: Literal["none", "replayed", "memory", "real"] = "none"
    """What a run has of earlier tasks: nothing; rows of sources of kind ``replayed``; their own
    rows as ``data.memory``; or both, of which the method makes its replayed rows."""
    teacher: bool = False
    """Whether the run ``TASK-teacher`` is the live teacher of that which learns the task; what else
    the settings say of a live teacher (``precision``, ``deepspeed``) holds for it."""
    distilled: bool = False
    """Learn a task's questions as its teacher answered them."""
    later: dict[str, Any] = Field(default_factory=dict)
    """Settings of all its runs but the first, which has no earlier task."""


def written_out(content: Tree, over: Tree, where: str) -> tuple[Tree, Tree]:
    """A recipe's content with runs in the place of its tasks, and what is left of the overrides.

    Args:
        content: the recipe's; it is not changed.
        over: the overrides. Those of tasks, sequences and teachers are laid on them; those of
            ``model`` and ``data.tokenizer`` are about the first runs, where a model that comes
            from a run before is not meant.
        where: the file, for messages.

    Raises:
        ConfigError: every mistake in tasks, sequences and teachers, one a line.
    """
    above, left = _split(over, lambda place: place[0] in SECTIONS)
    first, left = _split(left, lambda place: place[0] == "model" or place == _TOKENIZER)
    tree = {name: content[name] for name in SECTIONS if name in content}
    expansion = _Expansion(where, above, first)
    runs = expansion.runs(content, merge(tree, above), left)
    if expansion.problems:
        raise ConfigError("\n".join(dict.fromkeys(expansion.problems)))
    base = content.get("base") or {}
    rest = {name: value for name, value in content.items() if name not in SECTIONS}
    return {**rest, "base": {n: base[n] for n in ("out",) if n in base}, "runs": runs}, left


class _Expansion:
    """Makes the runs and gathers what is wrong.

    Args:
        where: the recipe's file.
        above: the overrides of tasks, sequences and teachers, to tell where a mistake comes from.
        first: the overrides of what the first runs start from.
    """

    def __init__(self, where: str, above: Tree, first: Tree) -> None:
        self.problems: list[str] = []
        self._where, self._above, self._first = where, above, first
        self._base: Tree = {}
        self._tasks: dict[str, _Task] = {}
        self._made: Tree = {}
        self._taught: set[str] = set()
        self._ordinary: Tree = {}

    def runs(self, content: Tree, tree: Tree, left: Tree) -> Tree:
        """The recipe's runs, whole, in their order; the ordinary ones are the last.

        Args:
            tree: ``content``'s tasks, sequences and teachers, overrides laid on them.
            left: the overrides of all runs.
        """
        self._refuse_given((), left, _GIVEN, origin="command line")
        base = self._settings(("base",), content.get("base"))
        self._refuse_given(("base",), base, _GIVEN)
        self._base = {n: v for n, v in with_kinds(Run, base).items() if n != "out"}
        ordinary = content.get("runs")
        self._ordinary = {} if ordinary is None else ordinary
        if not isinstance(self._ordinary, dict):
            self._add(("runs",), "expected runs (name: settings)")
            self._ordinary = {}
        self._tasks = self._read_tasks(tree.get("tasks"))
        sequences = self._sequences(tree.get("sequences"))
        teacher = self._teachers(tree, sequences)
        if self.problems:
            return {}
        for name, (sequence, own) in sequences.items():
            order = sequence.order or list(self._tasks)
            prefix = f"{name}-" if self._made else ""
            for place, task in enumerate(order):
                if sequence.teacher or sequence.distilled:
                    self._teacher(task, teacher)
                if not sequence.together:
                    self._one(name, sequence, own, order[: place + 1], prefix)
            if sequence.together:
                self._together(name, sequence, own, order)
        for name, own in self._ordinary.items():
            self._refuse_previous(("runs", name), own)
            self._made[name] = self._beside({} if own is None else own)
        return self._made

    # ---- what is read --------------------------------------------------------------------------

    def _read_tasks(self, tree: Any) -> dict[str, _Task]:
        found = {}
        for name, own in self._named("tasks", tree, "the tasks, by name").items():
            task = self._section(_Task, ("tasks", name), own)
            if task is None:
                continue
            if not isinstance(task.test.get("sources"), list) or not task.test["sources"]:
                text = "missing; what the models of a sequence are scored on"
                self._add(("tasks", name, "test", "sources"), text)
                continue
            self._refuse_previous(("tasks", name), own)
            test = {**task.test, "sources": self._of(name, task.test["sources"], "test.sources")}
            validation = task.validation
            found[name] = _Task(
                sources=self._of(name, task.sources, "sources"),
                validation=validation and self._of(name, validation, "validation"),
                test=test,
            )
        return found

    def _of(self, task: str, sources: list[Tree], name: str) -> list[Tree]:
        """The sources of a task, each with its domain."""
        for index, source in enumerate(sources):
            place = ("tasks", task, *name.split("."), str(index))
            if not isinstance(source, dict):
                self._add(place, "expected settings (name: value)")
            elif source.get("domain", task) != task:
                text = f"{source['domain']!r}, but the rows of a task are of the domain of its name"
                self._add((*place, "domain"), text)
        return [{**s, "domain": task} if isinstance(s, dict) else s for s in sources]

    def _sequences(self, tree: Any) -> dict[str, tuple[_Sequence, Tree]]:
        """Each sequence and the settings of its runs."""
        fields, found = _Sequence.model_fields, {}
        for name, own in self._named("sequences", tree, "ways to learn the tasks, by name").items():
            place = ("sequences", name)
            settings = self._settings(place, own)
            reads = {key: settings.pop(key) for key in fields if key in settings}
            sequence = self._section(_Sequence, place, reads)
            self._refuse_others(place, settings, fields)
            if sequence is not None:
                self._refuse_later((*place, "later"), sequence)
            if name in self._tasks:
                self._add(place, "a task has this name, too")
            if sequence is not None and self._fits(place, sequence, settings):
                found[name] = sequence, settings
        return found

    def _fits(self, place: SettingName, sequence: _Sequence, settings: Tree) -> bool:
        """Whether nothing is wrong with a sequence's tasks and with what it reads of them."""
        before, tasks = len(self.problems), self._tasks
        order = sequence.order or list(tasks)
        for name in [name for name in order if name not in tasks]:
            self._add((*place, "order"), f"no task is named {name!r}{nearest(name, tasks)}")
        if len(set(order)) < len(order):
            twice = next(name for name in order if order.count(name) > 1)
            self._add((*place, "order"), f"{twice!r} is named twice")
        if sequence.together:
            if sequence.earlier != "none":
                text = f"{sequence.earlier}, but with `together` no task is earlier"
                self._add((*place, "earlier"), text)
            if sequence.teacher:
                text = "with `together` there is one run, and a teacher knows one task"
                self._add((*place, "teacher"), text)
            if sequence.later:
                self._add((*place, "later"), "with `together` there is one run, the first")
            self._refuse_previous(place, settings)
            some = [name for name in order if name in tasks and tasks[name].validation]
            for name in order if some else ():
                if name in tasks and name not in some:
                    text = f"missing; {'.'.join(place)} learns it with {some[0]}, which has one"
                    self._add(("tasks", name, "validation"), text)
        return len(self.problems) == before

    def _teachers(self, tree: Tree, sequences: dict[str, tuple[_Sequence, Tree]]) -> Tree:
        """The settings of the teachers' runs."""
        asked = {
            name: "teacher" if sequence.teacher else "distilled"
            for name, (sequence, _) in sequences.items()
            if sequence.teacher or sequence.distilled
        }
        if "teachers" not in tree:
            for name, key in asked.items():
                text = "true, but the recipe has no `teachers: {...}`, the settings of their runs"
                self._add(("sequences", name, key), text)
            return {}
        if not asked:
            text = "no sequence has `teacher: true` or `distilled: true`"
            self._add(("teachers",), text)
        own = self._settings(("teachers",), tree["teachers"])
        self._refuse_others(("teachers",), own)
        self._refuse_previous(("teachers",), own)
        return own

    # ---- the runs ------------------------------------------------------------------------------

    def _teacher(self, task: str, own: Tree) -> None:
        """The run of a task's teacher, if it is not there yet."""
        name, of = f"{task}-teacher", self._tasks[task]
        if name not in self._taught:
            self._taught.add(name)
            data = {"sources": of.sources, "validation": of.validation}
            self._make(name, ("tasks", task), self._started(own), data, {task: of.test})

    def _one(
        self, name: str, sequence: _Sequence, own: Tree, so_far: list[str], prefix: str
    ) -> None:
        """The run of a sequence that learns the last of the tasks ``so_far``."""
        *earlier, task = so_far
        tasks = self._tasks
        previous = f"run:{prefix}{earlier[-1]}" if earlier else None
        settings = merge(own, sequence.later) if earlier else own
        tree = _with_previous(self._started(settings), previous)
        if previous is not None:
            model = tree.get("model", {})
            tree["model"] = {"path": previous} | {n: model[n] for n in _KEPT if n in model}
        if sequence.teacher:
            tree["teacher"] = _taught_by(f"run:{task}-teacher", tree.get("teacher"))
        data = {"sources": _learnt(task, tasks, sequence), "validation": tasks[task].validation}
        if sequence.earlier in ("replayed", "real"):
            data["sources"] += [{"kind": "replayed", "domain": each} for each in earlier]
        if sequence.earlier in ("memory", "real") and earlier:
            data["memory"] = [source for each in earlier for source in tasks[each].sources]
        self._make(f"{prefix}{task}", ("sequences", name), tree, data, self._tests)

    def _together(self, name: str, sequence: _Sequence, own: Tree, order: list[str]) -> None:
        """The run that learns all tasks of a sequence."""
        tasks = self._tasks
        held_out = [s for task in order for s in tasks[task].validation or ()]
        data = {
            "sources": [s for task in order for s in _learnt(task, tasks, sequence)],
            "validation": held_out or None,
        }
        self._make(name, ("sequences", name), self._started(own), data, self._tests)

    def _beside(self, own: Any) -> Any:
        """An ordinary run."""
        if not isinstance(own, dict):
            return own  # which is refused as by any recipe
        tree = self._started({})
        tree = merge({**tree, "data": self._data(tree.get("data", {}))}, own)
        data = own.get("data")
        named = {"model": own.get("model")}
        named["data"] = data.get("tokenizer") if isinstance(data, dict) else None
        over = {
            section: value
            for section, value in self._first.items()
            if isinstance(named[section], dict)
            and not str(named[section].get("path")).startswith("run:")
        }
        return merge(tree, over)

    @property
    def _tests(self) -> Tree:
        return {name: task.test for name, task in self._tasks.items()}

    def _started(self, own: Tree) -> Tree:
        """All settings of a run that starts from the base's model."""
        return merge(merge(self._base, own), self._first)

    def _make(self, name: str, place: SettingName, tree: Tree, data: Tree, tests: Tree) -> None:
        """Note a run, whose other settings are in ``tree``."""
        if name in self._made or name in self._ordinary:
            self._add(place, f"its run {name!r} has the name of another run")
        given = {key: value for key, value in data.items() if value is not None}
        data = self._data({**tree.get("data", {}), **given})
        sets = {**tree.get("evaluation", {}), "sets": tests}
        self._made[name] = {**tree, "data": data, "evaluation": sets}

    def _data(self, data: Tree) -> Tree:
        """``data`` of a run: a tokenizer that is to be trained is trained by the first run, and the
        others read it."""
        tokenizer = data.get("tokenizer", {})
        trained = isinstance(tokenizer, dict) and tokenizer.get("kind", "trained") == "trained"
        if not (trained and self._made):
            return data
        first = next(iter(self._made))
        return {**data, "tokenizer": {"kind": "pretrained", "path": f"run:{first}"}}

    # ---- what is wrong -------------------------------------------------------------------------

    def _add(self, place: SettingName, text: str, origin: str | None = None) -> None:
        found = "command line" if covers(self._above, place) else self._where
        self.problems.append(line(origin or found, place, text))

    def _named(self, section: str, tree: Any, what: str) -> Tree:
        """A mapping of names that can be part of a run's."""
        if not isinstance(tree, dict) or not tree:
            self._add((section,), f"expected {what}" if tree else f"missing; {what}")
            return {}
        for name in tree:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                self._add((section, name), "such a name is made of letters, digits, _ and -")
            if f"run:{name}" == PREVIOUS:
                self._add((section, name), f"{PREVIOUS} is the run before; take another name")
        return tree

    def _settings(self, place: SettingName, tree: Any) -> Tree:
        """A run's settings, of which the sections that are written here are sections."""
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            self._add(place, "expected settings (name: value)")
            return {}
        sections = [name for name in ("data", "model", "evaluation") if name in tree]
        wrong = [name for name in sections if not isinstance(tree[name], dict)]
        for name in wrong:
            self._add((*place, name), "expected settings (name: value)")
        return {name: value for name, value in tree.items() if name not in wrong}

    def _section(self, cls: type[Section], place: SettingName, tree: Any) -> Any:
        section, problems = build_section(cls, tree)
        for inner, text in problems:
            self._add((*place, *inner), text)
        return section

    def _refuse_others(self, place: SettingName, settings: Tree, more: Iterable[str] = ()) -> None:
        """Refuse what is no setting of a run, besides ``more``, and what a sequence's runs get."""
        for key in [key for key in settings if key not in Run.model_fields]:
            near = nearest(key, [*more, *Run.model_fields])
            self._add((*place, key), f"no such setting{near}")
        self._refuse_given(place, settings, _GIVEN | _OF_ALL)

    def _refuse_later(self, place: SettingName, sequence: _Sequence) -> None:
        """Refuse what no run of a sequence but the first can have."""
        later = self._settings(place, sequence.later)
        self._refuse_others(place, later)
        self._refuse_model((*place, "model"), later.get("model", {}), "the run before")
        if not sequence.teacher:
            return
        teacher = later.get("teacher", {})
        if isinstance(teacher, dict) and teacher.get("kind", "live") == "live":
            model = teacher.get("model", {})
            self._refuse_model((*place, "teacher", "model"), model, "the run TASK-teacher")
        else:
            text = "with `teacher: true` it is live; expected settings (name: value) of that"
            self._add((*place, "teacher"), text)

    def _refuse_model(self, place: SettingName, own: Any, whose: str) -> None:
        """Refuse settings of a model that are those of a run's export."""
        if not isinstance(own, dict):
            self._add(place, "expected settings (name: value)")
            return
        for key in [key for key in own if key not in _KEPT]:
            text = f"this model is the export of {whose}; only {', '.join(_KEPT)} may be set"
            self._add((*place, key), text)

    def _refuse_given(
        self,
        place: SettingName,
        tree: Tree,
        given: dict[SettingName, str],
        origin: str | None = None,
    ) -> None:
        for name, where in given.items():
            node: Any = tree
            for part in name:
                node = node[part] if isinstance(node, dict) and part in node else _ABSENT
            if node is not _ABSENT:
                text = f"is written for each run of a task; it comes from {where}"
                self._add((*place, *name), text, origin)

    def _refuse_previous(self, place: SettingName, tree: Any) -> None:
        for inner in _places(tree, PREVIOUS):
            text = f"{PREVIOUS!r} is the run before in a sequence; here there is none"
            self._add((*place, *inner), text)


_ABSENT = object()


def _taught_by(path: str, own: Any) -> Tree:
    """A live teacher, with what else the settings say of a live one: where and how it runs."""
    given = own if isinstance(own, dict) and own.get("kind", "live") == "live" else {}
    model = given.get("model")
    kept = {n: model[n] for n in _KEPT if n in model} if isinstance(model, dict) else {}
    return {**given, "kind": "live", "model": {"path": path} | kept}


def _learnt(task: str, tasks: dict[str, _Task], sequence: _Sequence) -> list[Tree]:
    """The sources of what a run learns of a task."""
    if not sequence.distilled:
        return list(tasks[task].sources)
    return [{"kind": "questions", "path": f"run:{task}-teacher", "domain": task}]


def _with_previous(tree: Any, previous: str | None) -> Any:
    if isinstance(tree, dict):
        return {name: _with_previous(value, previous) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_previous(value, previous) for value in tree]
    return previous if tree == PREVIOUS else tree


def _places(tree: Any, value: str) -> Iterator[SettingName]:
    """Where in a tree a value stands."""
    if tree == value:
        yield ()
    if isinstance(tree, dict | list):
        inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, each in inner:
            for place in _places(each, value):
                yield (str(name), *place)


def _split(over: Tree, wanted: Callable[[SettingName], bool]) -> tuple[Tree, Tree]:
    """Those of the overrides whose place, of one name or two, is wanted, and the others."""
    taken: Tree = {}
    left: Tree = {}
    for name, value in over.items():
        if wanted((name,)):
            taken[name] = value
        elif isinstance(value, dict) and any(wanted((name, inner)) for inner in value):
            taken[name] = {n: v for n, v in value.items() if wanted((name, n))}
            if rest := {n: v for n, v in value.items() if not wanted((name, n))}:
                left[name] = rest
        else:
            left[name] = value
    return taken, left
