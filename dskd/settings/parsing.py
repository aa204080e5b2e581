"""From trees to typed sections, with messages that name the setting and the nearest right name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, to_json

from dskd.errors import ConfigError
from dskd.settings.yaml_tree import SettingName, Tree

S = TypeVar("S", bound=BaseModel)
Problem = tuple[SettingName, str]
"""Where in the tree, and what is wrong there."""

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "settings (name: value)",
    "model_type": "settings (name: value)",
}


def parse(cls: type[S], tree: Any, prefix: str = "", *, where: str = "") -> S:
    """Build a section from a tree of mappings, lists and scalars.

    Types are strict: a whole number may stand for a float, nothing else is converted. A section
    without ``kind`` gets the kind of its default.

    Args:
        prefix: dotted name of the section itself, put before the names in messages.
        where: file the tree came from, named in front of every message.

    Raises:
        ConfigError: one line for each unknown name, wrong type and value out of range.
    """
    section, problems = build_section(cls, tree)
    if section is None:
        above = tuple(prefix.split(".")) if prefix else ()
        lines = [line(where, (*above, *place), text) for place, text in problems]
        raise ConfigError("\n".join(lines))
    return section


def build_section(cls: type[S], tree: Any) -> tuple[S | None, list[Problem]]:
    """The section, or None and everything that is wrong with the tree."""
    text = to_json(with_kinds(cls, tree), inf_nan_mode="constants")
    try:
        return cls.model_validate_json(text, strict=True), []
    except ValidationError as problems:
        return None, [_problem(cls, e) for e in problems.errors(include_url=False)]


def with_kinds(annotation: Any, tree: Any) -> Any:
    """The tree with the default's ``kind`` in every section that may have one and names none."""
    section = section_of(annotation, tree) if isinstance(tree, dict) else None
    if section is None:
        return tree
    fields = section.model_fields
    filled = dict(tree)
    for name, value in tree.items():
        if name in fields and isinstance(value, dict):
            default = fields[name].get_default(call_default_factory=True)
            mapping = isinstance(default, dict)
            kind = default.get("kind") if mapping else getattr(default, "kind", None)
            named = value if kind is None else {"kind": kind} | value
            filled[name] = with_kinds(fields[name].annotation, named)
    return filled


def section_of(annotation: Any, tree: Tree) -> type[BaseModel] | None:
    """The section that a mapping at a field of this type describes; of several, the one of its
    ``kind``, and without one the one that has it by default; None if there is none."""
    sections = _sections(annotation)
    if len(sections) > 1 and "kind" in tree:
        sections = [cls for cls in sections if tree["kind"] in _kinds(cls)]
    elif len(sections) > 1:
        sections = [cls for cls in sections if not cls.model_fields["kind"].is_required()]
    return sections[0] if sections else None


def either(expected: str) -> WrapValidator:
    """For a field that takes one of several types: one message, that names them, for them all."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as problem:
            raise ValueError(f"expected {expected}, found {show(value)}") from problem

    return WrapValidator(validate)


def line(where: str, place: SettingName, text: str) -> str:
    """One line of an error message."""
    return ": ".join(part for part in (where, ".".join(place), text) if part)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if one of the names is near, else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def show(value: Any) -> str:
    """A value as the user would have written it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _problem(root: type[BaseModel], error: ErrorDetails) -> Problem:
    """A pydantic error in our words."""
    place, holder, here = _walk(root, error["loc"])
    kind, value, context = error["type"], show(error["input"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        text = "no such setting" + _suggest(place, holder, root)
    elif kind == "missing":
        text = "missing"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        place = (*place, "kind")
        found = "missing;" if kind == "union_tag_not_found" else f"{show(context['tag'])} is not"
        text = f"{found} one of {', '.join(k for cls in _sections(here) for k in _kinds(cls))}"
    elif kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "")
        text = f"{value} is not one of {allowed}"
    elif kind in _EXPECTED:
        text = f"expected {_EXPECTED[kind]}, found {value}"
    elif kind == "value_error":
        text = str(context["error"])
    else:
        text = error["msg"].replace("Input", value, 1)
    return place, text


def _suggest(place: SettingName, holder: Any, root: type[BaseModel]) -> str:
    """The nearest name of the section, else a setting of that name elsewhere, else all names."""
    name = place[-1]
    fields = [field for cls in _sections(holder) for field in cls.model_fields]
    if near := nearest(name, fields):
        return near
    here = ".".join(place)  # there is such a setting where the section is of another kind
    elsewhere = [n for n in _names(root) if n.rpartition(".")[2] == name and n != here]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; there are {', '.join(fields)}"


def _walk(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[SettingName, Any, Any]:
    """Dotted place of a pydantic location, the type that holds its last part, that part's type."""
    place: list[str] = []
    holder, here = None, root
    for part in loc:
        sections = _sections(here)
        if len(sections) > 1:  # pydantic names a union's member by its kind: no part of the tree
            here = next(cls for cls in sections if part in _kinds(cls))
            continue
        if part in _tags(here):  # as it does where the form of a value tells the member
            continue
        place.append(str(part))
        holder, here = here, member(here, part)
    return tuple(place), holder, here


def member(annotation: Any, part: int | str) -> Any:
    """Type of a section's field, or of a list's or mapping's entries; ``Any`` if none is known."""
    for option in _options(annotation):
        if _is_section(option):
            return option.model_fields[part].annotation if part in option.model_fields else Any
        if get_args(option):
            return get_args(option)[-1]
    return Any


def _names(annotation: Any) -> Iterator[str]:
    """Dotted names of every setting below a section."""
    for cls in _sections(annotation):
        for name, info in cls.model_fields.items():
            yield name
            yield from (f"{name}.{below}" for below in _names(info.annotation))


def _kinds(cls: type[BaseModel]) -> tuple[str, ...]:
    """The values of ``kind`` that mean this section."""
    return get_args(cls.model_fields["kind"].annotation) if "kind" in cls.model_fields else ()


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [option for option in _options(annotation) if _is_section(option)]


def _tags(annotation: Any) -> set[str]:
    """The names by which pydantic tells the members of a union that are told by a value's form."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return {mark.tag for mark in marks if isinstance(mark, Tag)} | _tags(inner)
    if get_origin(annotation) in (Union, UnionType):
        return {tag for option in get_args(annotation) for tag in _tags(option)}
    return set()


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _options(annotation: Any) -> list[Any]:
    """The members of a union, however nested and annotated; another type is its only option."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [o for arg in get_args(annotation) if arg is not NoneType for o in _options(arg)]
    return [annotation]


def named_object(target: str, where: str) -> Any:
    """What ``package.module:Name`` names, imported; the setting ``where`` holds that.

    Raises:
        ConfigError: it is no such name, there is no such module or object, or the module fails.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:\w+", target):
        raise ConfigError(f"{where}: {target!r} is not of the form package.module:Name")
    module_name, _, name = target.partition(":")
    try:
        module = import_module(module_name)
    except Exception as problem:  # of code that is not ours
        if _names_module(problem, module_name):
            raise ConfigError(f"{where}: no module {module_name!r} on the path") from problem
        if module_name.partition(".")[0] == __name__.partition(".")[0]:
            raise  # a defect of our own
        raise ConfigError(
            f"{where}: importing {module_name!r} fails: {type(problem).__name__}: {problem}"
        ) from problem
    if name not in vars(module):
        raise ConfigError(f"{where}: {module_name!r} has no {name!r}")
    return vars(module)[name]


def _names_module(problem: Exception, module_name: str) -> bool:
    """Whether a module itself is missing, not something that it imports."""
    missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")
