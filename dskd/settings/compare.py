"""Whether two runs, as their settings say, come to the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import to_jsonable_python

from dskd.settings.base import CHOSEN_LATER, FREE, Freedom, Section
from dskd.settings.parsing import show
from dskd.settings.run import Run


def differences(a: Run, b: Run, *, chosen: bool = True) -> list[str]:
    """Settings in which two runs differ so that their results differ: ``name: a's value, now b's``.

    What is marked ``FREE`` at its field may differ: folders, geometry, the last stage, the cadence
    of logs, checkpoints and evaluations. So may what is marked ``CHOSEN_LATER``, unless something
    depends on the choice of tokens yet (``chosen``).
    """
    free = {FREE} if chosen else {FREE, CHOSEN_LATER}
    return list(_changes(a, b, "", free))


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
