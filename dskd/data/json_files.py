"""JSON lines and JSON arrays, value by value, and what stands in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dskd.data.text_files import Advance, text_lines
from dskd.errors import DataError

_SHOWN_KEYS = 10
_SPACE = re.compile(r"[ \t\n\r]*")
"""What JSON has between its values."""
_ARRAY = re.compile(r"\s*\[\s*([{\]]|$)")
"""How an array of objects begins."""


def json_texts(path: Path, field: str, advance: Advance, skip: bool = False) -> Iterator[str]:
    """Documents of a JSON file: the text under the key ``field`` of each value.

    Args:
        skip: whether null is an empty text.

    Raises:
        DataError: a value is not JSON or has no text there; the message names its place.
    """
    for place, row in json_rows(path, advance):
        value = row_value(row, field, place)
        yield document(value, place, f"under the key {field!r}", skip)


def json_rows(
    path: Path, advance: Advance, whole: Callable[[str], Any] = float
) -> Iterator[tuple[str, Any]]:
    """Place and value of each JSON value of a file: one a line, or the elements of its one array.

    An array is known by how the file begins: a row is never a list. Its text is held in memory, its
    elements are made one after the other.

    Args:
        whole: makes whole numbers.

    Raises:
        DataError: a line is not JSON, or the array is none, or not the last of its file.
    """
    lines = text_lines(path, advance)
    begun = False
    for number, line in lines:
        if not line.strip():
            continue
        if not begun and _ARRAY.match(line):
            above = "\n" * (number - 1)  # so that messages count lines as an editor does
            yield from _elements(path, chain([above + line], (more for _, more in lines)), whole)
            return
        begun = True
        place = f"{path}:{number}"
        yield place, json_value(line, place, whole)


def _elements(
    path: Path, lines: Iterator[str], whole: Callable[[str], Any]
) -> Iterator[tuple[str, Any]]:
    """Place and value of each element of the array that the lines are."""
    text = "\n".join(lines)
    decoder = json.JSONDecoder(parse_int=whole)
    at = _behind_space(text, text.index("[") + 1)
    number = 0
    while number or not text.startswith("]", at):
        place = f"{path}: element {number}"
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError as problem:
            raise DataError(f"{place}: nested too deep") from problem
        except ValueError as problem:
            raise DataError(f"{place}: not JSON: {problem}") from problem
        yield place, value
        at = _behind_space(text, at)
        if not text.startswith(",", at):
            break
        at = _behind_space(text, at + 1)
        number += 1
    if not text.startswith("]", at):
        raise DataError(f"{path}: not JSON: its array does not end behind element {number}")
    if _behind_space(text, at + 1) < len(text):
        raise DataError(f"{path}: more text behind the end of its array")


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found, "it matches nothing, too"
    return found.end()


def row_value(row: Any, key: str, place: str, what: str = "text") -> Any:
    """What stands under a key of a JSON object; ``a.b`` is the key ``b`` of the object under ``a``,
    unless there is a key ``a.b``. Under a key of null there is null.

    Raises:
        DataError: it is no object, or has no such key; names ``place``, where it stands.
    """
    names = [key] if isinstance(row, dict) and key in row else key.split(".")
    value, above = row, ""
    for name in names:
        if above and value is None:
            return None
        if not isinstance(value, dict):
            found = f"{repr(above) if above else 'it'} is no object but {json_type(value)}"
            raise DataError(f"{place}: no {what} under the key {key!r}; {found}")
        if name not in value:
            more = ", ..." if len(value) > _SHOWN_KEYS else ""
            keys = f"[{', '.join(map(repr, sorted(value)[:_SHOWN_KEYS]))}{more}]"
            whose = f"the keys of {above!r}" if above else "its keys"
            raise DataError(f"{place}: no {what} under the key {key!r}; {whose} are {keys}")
        value, above = value[name], f"{above}.{name}" if above else name
    return value


def json_value(line: str, place: str, whole: Callable[[str], Any] = float) -> Any:
    """What a line of JSON says; ``whole`` makes its whole numbers.

    Raises:
        DataError: it is none; ``place`` is where it stands.
    """
    try:
        return json.loads(line, parse_int=whole)  # int() refuses long numbers, which are JSON
    except (ValueError, RecursionError) as problem:
        deep = isinstance(problem, RecursionError)
        why = "nested too deep" if deep else f"not JSON: {problem}"
        raise DataError(f"{place}: {why}") from problem


def checked_text(value: Any, row: str, place: str) -> str:
    """``value``, if it is text.

    Args:
        row: the file and line or the source and row that it is of.
        place: the key or column in that.

    Raises:
        DataError: it is of another type, or no Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{row}: no text {place} but {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as problem:  # "\ud800" is JSON, but no text
        raise DataError(f"{row}: not Unicode text {place}: {problem.reason}") from problem
    return value


def document(value: Any, row: str, place: str, skip: bool) -> str:
    """As :func:`checked_text`; with ``skip``, null is an empty text."""
    return "" if skip and value is None else checked_text(value, row, place)


def json_type(value: Any) -> str:
    """What a value is that is no text, in the words of JSON."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
