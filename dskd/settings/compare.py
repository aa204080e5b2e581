"""Whether two runs, as their settings say, come to the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import to_jsonable_python

from dskd.settings.base import CHOSEN_LATER, FREE, OF_STEPS_TO_COME, Freedom, Section
from dskd.settings.parsing import show
from dskd.settings.run import Run, Train

OF_STEPS = [f"train.{n}" for n in Train.model_fields if Train().freedom(n) is OF_STEPS_TO_COME]
"""Names of the settings by which the steps of a run are taken that are still to come."""
OF_LOOKS = ["evaluation.every", "checkpoint.every", "checkpoint.keep", "log_every"]
"""Names of those that say how often it is looked at on the way."""


def differences(a: Run, b: Run, *, chosen: bool = True) -> list[str]:
    """Settings in which two runs differ so that their results differ: ``name: a's value, now b's``.

    What is marked ``FREE`` at its field may differ: folders, geometry, the last stage, the cadence
    of logs, checkpoints and evaluations; and what is of steps to come, for which see
    :func:`on_the_way`. So may what is marked ``CHOSEN_LATER``, unless something depends on the
    choice of tokens yet (``chosen``).
    """
    free = {FREE, OF_STEPS_TO_COME} if chosen else {FREE, OF_STEPS_TO_COME, CHOSEN_LATER}
    return list(_changes(a, b, "", free))


def on_the_way(run: Run) -> dict[str, Any]:
    """By name the settings that may become others while a run is trained, and are written down
    then."""
    found: dict[str, Any] = {}
    for name in (*OF_STEPS, *OF_LOOKS):
        value: Any = run
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def _changes(old: Any, new: Any, name: str, free: set[Freedom]) -> Iterator[str]:
    if old == new:
        return
    if isinstance(new, Section) and type(old) is type(new):
        free_names = {field for field in type(new).model_fields if new.freedom(field) in free}
        old, new = _fields(old, free_names), _fields(new, free_names)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        for key in old | new:
            inner = f"{name}.{key}" if name else key
            yield from _changes(old.get(key), new.get(key), inner, free)
    else:
        yield f"{name}: {show(_kind_or_value(old))}, now {show(_kind_or_value(new))}"


def _fields(section: Section, left_out: set[str]) -> dict[str, Any]:
    """The fields of a section, whose values may be sections, by name."""
    return {n: getattr(section, n) for n in type(section).model_fields if n not in left_out}


def _kind_or_value(value: Any) -> Any:
    plain = to_jsonable_python(value)
    return plain.get("kind", plain) if isinstance(plain, dict) else plain
