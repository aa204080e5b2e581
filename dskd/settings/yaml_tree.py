"""Trees of settings: read from YAML, written to YAML, overridden, merged.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: ``1e-4`` is a number; ``yes``, ``010``
and ``2026-01-31`` are words. Underscores in numbers (``125_000``) stay allowed. A key given twice
is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dskd.errors import ConfigError

Tree = dict[str, Any]
SettingName = tuple[str, ...]

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = [
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", re.compile(r"<<$"), "<"),
]
_LONGEST = 1_000_000
"""Most characters of a settings file, and of an override."""
_DEEPEST = 50
"""Most levels of lists and mappings in each other."""
_MOST = 100_000
"""Most scalars, aliases counted as what they stand for."""
_DIGITS = 100
"""Most characters of a number."""

# A section whose value of one of these changes is another thing: it is replaced, never mixed.
_IDENTITIES = ("kind", "model_type")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars above and text keys; for text that :func:`_refuse_unreasonable`
    has passed."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML's own name; replaces, not extends, its list

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Tree:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
            if key.value in seen:
                text = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes what either schema would misread, so that any YAML reader gets the same values."""


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load(path: Path) -> Any:
    """The content of a YAML file; an empty file is an empty tree."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_LONGEST + 1)  # a wrong file may be of any size
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path}: not UTF-8 text (byte {problem.start})") from problem
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read ({problem.strerror})") from problem
    value = _parse(text, str(path))
    return {} if value is None else value


def dump(tree: Any) -> str:
    """YAML of a tree, in its own order; :func:`load` gives the same tree back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)


def overlay(overrides: Iterable[str]) -> Tree:
    """The tree that ``a.b=value`` overrides stand for; of two for the same name the last wins."""
    tree: Tree = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        place = tuple(name.split("."))
        if not equals or not all(place):
            raise ConfigError(f"command line: {text!r} is not of the form a.b=value")
        if len(place) > _DEEPEST:
            raise ConfigError(f"command line: {text!r} has more than {_DEEPEST} levels")
        nested = _parse(value, f"command line: {name}")
        for part in reversed(place):
            nested = {part: nested}
        tree = merge(tree, nested)
    return tree


def merge(base: Any, over: Any, place: SettingName = ()) -> Any:
    """``over`` laid on ``base``: mappings merge, anything else is replaced; neither is changed.

    A mapping whose ``kind`` or ``model_type`` changes is replaced; ``{0: ...}`` laid on a list
    merges into its entry 0.
    """
    if isinstance(base, list) and isinstance(over, dict) and over and all(map(str.isdigit, over)):
        entries = list(base)
        for key, value in over.items():
            if int(key) >= len(entries):
                name = ".".join(place)
                raise ConfigError(f"{name}.{key}: no such entry; {name} has {len(entries)}")
            entries[int(key)] = merge(entries[int(key)], value, (*place, key))
        return entries
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if any(name in over and name in base and over[name] != base[name] for name in _IDENTITIES):
        return over
    laid = {key: merge(base[key], over[key], (*place, key)) for key in over if key in base}
    return {**base, **over, **laid}


def covers(over: Mapping[str, Any], place: SettingName) -> bool:
    """Whether what is at ``place`` comes from the overlay."""
    node: Any = over
    for part in place:
        if not isinstance(node, Mapping):
            return True
        if part not in node:
            return False
        node = node[part]
    return True


def _parse(text: str, where: str) -> Any:
    if len(text) > _LONGEST:
        raise ConfigError(f"{where}: more than {_LONGEST:,} characters are no settings")
    try:
        _refuse_unreasonable(text)
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not readable as YAML: {problem.problem}") from problem
    except yaml.YAMLError as problem:
        raise ConfigError(f"{where}: not readable as YAML: {problem}") from problem


def _refuse_unreasonable(text: str) -> None:
    """Refuse YAML whose tree would be endless, huge or of foreign types, before it is made.

    Raises:
        yaml.MarkedYAMLError: at the place.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and scalars before, of each
    seen = 0
    for event in yaml.parse(text, _Loader):
        problem = None
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, seen))
            if len(open_nodes) > _DEEPEST:
                problem = f"more than {_DEEPEST} levels in each other"
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = seen - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                problem = f"*{event.anchor} stands for what it is part of"
            seen += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            seen += 1
            problem = _problem_of_text(event.value, plain=event.style is None)
        if getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag} says a type; write the value without one"
        if seen > _MOST:
            problem = f"more than {_MOST:,} values"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _problem_of_text(value: str, *, plain: bool) -> str | None:
    """What is wrong with a scalar that no setting can hold."""
    if "\0" in value:
        return "a NUL character, which no name or path can hold"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "half of a character pair (a lone surrogate), which is no text"
    if plain and len(value) > _DIGITS and re.fullmatch(r"[-+0-9_.eE]+", value):
        return f"a number of {len(value):,} characters"
    return None
