"""Text files: found below folders and patterns, and read line by line.

Nothing is left out without a word: symbolic links are followed, hidden files are counted, and what
cannot be read is refused by name.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from dskd.data.unpacking import PACKED_ENDINGS, readable, unpacked
from dskd.errors import DataError

Advance = Callable[[int], object]
"""Called with how many bytes (rows, of a ``datasets`` source) were read since the last call."""


def matching_files(path: str, pattern: str, where: str) -> list[Path]:
    """The file ``path``, those of that folder or those that match it, in the order of their names.

    Args:
        pattern: which names count below a folder, also with an ending of a packed file; hidden
            files and folders do not.
        where: the source, for messages.

    Raises:
        DataError: there is none, a folder cannot be read, or a folder has a file packed and not.
    """
    root = Path(path).expanduser()
    with readable(where):
        mode = _mode(root)
        if mode is not None and stat.S_ISREG(mode):
            return [root]
        if mode is not None and stat.S_ISDIR(mode):
            paths = sorted(files_below(root, where, pattern, hidden=False))
            _refuse_twins(paths, where)
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


def hidden_files(path: str, pattern: str, where: str) -> int:
    """How many files that match and folders :func:`matching_files` leaves out of a folder because
    they are hidden (their names begin with a dot); what is in such folders is not looked at."""
    root = Path(path).expanduser()
    count = 0
    with readable(where):
        if root.is_dir():
            for folder, _ in _folders(root, where, hidden=False):
                below = [folder / name for name in os.listdir(folder) if name.startswith(".")]
                count += sum(each.is_dir() or _matches(each.name, pattern) for each in below)
    return count


def files_below(root: Path, where: str, pattern: str = "*", hidden: bool = True) -> Iterator[Path]:
    """The files below a folder whose names match, in no order; see :func:`_folders`."""
    with readable(where):
        for _, paths in _folders(root, where, hidden):
            for path in paths:
                if _matches(path.name, pattern):
                    yield _plain_file(path, where)


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern + ending) for ending in ("", *PACKED_ENDINGS))


def _refuse_twins(paths: list[Path], where: str) -> None:
    """Refuse to guess whether a packed file beside one of its name holds the same text."""
    known = set(paths)
    for path in paths:
        plain = path.with_suffix("")
        if path.suffix in PACKED_ENDINGS and plain in known:
            raise DataError(
                f"{where}: {path}: beside {plain.name}; is it the same text? move one of them, or "
                "name the files by a pattern"
            )


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


def text_lines(path: Path, advance: Advance) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, without its end.

    Args:
        path: the file, as it is or compressed (see :func:`~dskd.data.unpacking.unpacked`).
        advance: told of the bytes of each line.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    offset = 0
    with unpacked(path) as stream:
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


def paragraphs(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file: stretches of lines between blank ones."""
    for blank, stretch in groupby(_lines(path, advance), key=lambda line: not line.strip()):
        if not blank:
            yield "\n".join(stretch)


def single_lines(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file: its lines, but blank ones."""
    return (line for line in _lines(path, advance) if line.strip())


def whole_file(path: Path, advance: Advance) -> Iterator[str]:
    """The one document that a text file is, its blank lines included; none if it has no others."""
    text = "\n".join(_lines(path, advance))
    if text.strip():
        yield text


def _lines(path: Path, advance: Advance) -> Iterator[str]:
    return (line for _, line in text_lines(path, advance))
