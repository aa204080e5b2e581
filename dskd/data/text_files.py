"""Text and JSON-lines files: found below folders and patterns, and read line by line.

Nothing is left out without a word: symbolic links are followed, and what cannot be read is refused
by name.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from dskd.errors import DataError

Advance = Callable[[int], object]
"""Called with how many bytes (rows, of a ``datasets`` source) were read since the last call."""

_GZIP = b"\x1f\x8b"
_PACKED = {
    _GZIP: "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "LZ4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"PK\x03\x04": "zip",
}
"""How compressed files begin."""
_SHOWN_KEYS = 10


def matching_files(path: str, pattern: str, where: str) -> list[Path]:
    """The file ``path``, those of that folder or those that match it, in the order of their names.

    Args:
        pattern: which names count below a folder.
        where: the source, for messages.

    Raises:
        DataError: there is none, or a folder cannot be read.
    """
    root = Path(path).expanduser()
    with readable(where):
        mode = _mode(root)
        if mode is not None and stat.S_ISREG(mode):
            return [root]
        if mode is not None and stat.S_ISDIR(mode):
            paths = sorted(files_below(root, where, pattern))
            missing = f"no {pattern} in this folder"
        else:
            paths = expanded(root, where) if glob.has_magic(path) else []
            missing = "no such file or folder, and no pattern that matches one"
    if not paths:
        raise DataError(f"{where}: {missing}")
    return paths


def expanded(pattern: Path, where: str) -> list[Path]:
    """The files that a pattern matches, in the order of their names.

    ``glob`` itself passes over folders that it cannot read, and goes round in loops of links.

    Raises:
        DataError: a folder cannot be read.
    """
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    with readable(where):
        return sorted(set(_expanded(Path(pattern.anchor), parts, where)))


def linked_folder(path: Path, top: Path) -> Path | None:
    """The first symbolic link among the folders between ``top`` and a file below it."""
    between = [folder for folder in reversed(path.parents) if top in folder.parents]
    return next((folder for folder in between if folder.is_symlink()), None)


def files_below(root: Path, where: str, pattern: str = "*") -> Iterator[Path]:
    """The files below a folder whose names match, in no order; see :func:`_folders`."""
    with readable(where):
        for _, paths in _folders(root, where):
            for path in paths:
                if fnmatch.fnmatchcase(path.name, pattern):
                    yield _plain_file(path, where)


def _folders(root: Path, where: str, hidden: bool = True) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder from ``root`` down, with what it holds besides folders.

    Links are followed; a folder that several lead to (a link may lead to where it lies in) comes
    once, under the first of its names.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        inside, others = [], []
        for name in sorted(os.listdir(folder)):
            if hidden or not name.startswith("."):
                (inside if _is_folder(folder / name, where) else others).append(folder / name)
        yield folder, others
        waiting += reversed(inside)


def _expanded(base: Path, parts: tuple[str, ...], where: str) -> Iterator[Path]:
    """The files that a pattern matches; ``parts`` are its names below ``base``."""
    if not parts:
        try:
            base.lstat()
        except (FileNotFoundError, NotADirectoryError):  # a name of the pattern that is not here
            return
        if not _is_folder(base, where):
            yield _plain_file(base, where)
        return
    first, rest = parts[0], parts[1:]
    if not glob.has_magic(first):
        yield from _expanded(base / first, rest, where)
    elif not stat.S_ISDIR(_mode(base) or 0):
        return
    elif first == "**":
        for folder, _ in _folders(base, where, hidden=False):
            yield from _expanded(folder, rest or ("*",), where)
    else:
        for name in os.listdir(base):
            if fnmatch.fnmatchcase(name, first) and (name[0] != "." or first[0] == "."):
                yield from _expanded(base / name, rest, where)


def _mode(path: Path) -> int | None:
    """The kind of a file; None if there is none (``Path.is_dir`` does not tell from no right)."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_folder(path: Path, where: str) -> bool:
    mode = _mode(path)
    if mode is None:
        raise DataError(f"{where}: {path}: a symbolic link to what is not there")
    return stat.S_ISDIR(mode)


def _plain_file(path: Path, where: str) -> Path:
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{where}: {path}: neither a file nor a folder")
    return path


@contextmanager
def readable(where: str) -> Iterator[None]:
    """What cannot be read is refused, by its name."""
    try:
        yield
    except OSError as problem:
        path = "" if problem.filename is None else f"{problem.filename}: "
        raise DataError(f"{where}: {path}cannot be read ({problem.strerror})") from problem


def text_lines(path: Path, advance: Advance, *, unpack: bool = False) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, without its end.

    Args:
        path: the file.
        advance: told of the bytes of each line.
        unpack: whether the file may be compressed by gzip.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    offset = 0
    with _opened(path, unpack) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as problem:
                raise DataError(
                    f"{path}: not UTF-8 at byte {offset + problem.start} (line {number}): "
                    f"{problem.reason}"
                ) from problem
            offset += len(raw)
            advance(len(raw))
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


@contextmanager
def _opened(path: Path, unpack: bool) -> Iterator[IO[bytes]]:
    with readable("data.sources"), path.open("rb") as stream:
        head = stream.peek(16)
        if unpack and head.startswith(_GZIP):
            try:
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    yield unpacked
            except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
                raise DataError(
                    f"{path}: cannot be unpacked, it is damaged ({problem})"
                ) from problem
            return
        if (packed := packing(head)) is not None:
            raise DataError(f"{path}: not text but {packed}")
        yield stream


def packing(head: bytes) -> str | None:
    """What a file is that begins with ``head`` and is no UTF-8 text, and what to do about it."""
    for begin, name in _PACKED.items():
        if head.startswith(begin):
            return f"compressed ({name}); unpack it first"
    return "UTF-16; convert it to UTF-8" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else None


def paragraphs(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file: stretches of lines between blank ones."""
    lines = (line for _, line in text_lines(path, advance))
    for blank, stretch in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "\n".join(stretch)


def json_texts(path: Path, field: str, advance: Advance) -> Iterator[str]:
    """Documents of a JSON-lines file: the text under the key ``field`` of each line.

    Raises:
        DataError: a line is not JSON or has no text there; the message names file and line.
    """
    for place, row in json_rows(path, advance):
        yield checked_text(row_value(row, field, place), place, f"under the key {field!r}")


def json_rows(
    path: Path,
    advance: Advance,
    whole: Callable[[str], Any] = float,
    *,
    unpack: bool = False,
) -> Iterator[tuple[str, Any]]:
    """File and line of each JSON value of a file, and the value; see :func:`json_value`."""
    for number, line in text_lines(path, advance, unpack=unpack):
        if line.strip():
            place = f"{path}:{number}"
            yield place, json_value(line, place, whole)


def row_value(row: Any, key: str, place: str, what: str = "text") -> Any:
    """What stands under a key of a JSON object.

    Raises:
        DataError: it is no object, or has no such key; names ``place``, where it stands.
    """
    if not isinstance(row, dict):
        found = f"it is no object but {json_type(row)}"
        raise DataError(f"{place}: no {what} under the key {key!r}; {found}")
    if key not in row:
        more = ", ..." if len(row) > _SHOWN_KEYS else ""
        keys = f"[{', '.join(map(repr, sorted(row)[:_SHOWN_KEYS]))}{more}]"
        raise DataError(f"{place}: no {what} under the key {key!r}; its keys are {keys}")
    return row[key]


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
