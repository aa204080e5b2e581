"""Where text comes from: the built-in corpus, text files, JSON lines, anything `datasets` reads.

A document is a string whose lines are its sentences. Every source yields its documents in a fixed
order; nothing is ever skipped but documents without any text.
"""

from __future__ import annotations

import ast
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import xxhash

from dskd.errors import ConfigError, DataError
from dskd.settings.data import BuiltinSource, HubSource, JsonlSource, Source, TextSource
from dskd.system.files import file_hash

# Folders of the standard library that hold no prose, or are no part of it.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

Advance = Callable[[int], object]
"""Told how many bytes (rows, of a ``datasets`` source) were read since the last call."""


def documents(source: Source, advance: Advance = int) -> Iterator[str]:
    """The documents of a source, in its order.

    Raises:
        DataError: a path is missing or matches nothing, a file is not UTF-8 (byte offset named) or
            not JSON (line named), a field is missing, or there is no text at all.
        ConfigError: `datasets` cannot load what the source names.
    """
    if isinstance(source, BuiltinSource):
        found = _builtin(advance)
    elif isinstance(source, TextSource):
        found = (text for path in files(source) for text in _paragraphs(path, advance))
    elif isinstance(source, JsonlSource):
        found = (
            text for path in files(source) for text in _json_lines(path, source.field, advance)
        )
    else:
        found = _table(source, advance)
    count = 0
    for text in islice((text for text in found if text.strip()), source.documents):
        count += 1
        yield text
    if not count:
        raise DataError(f"{_name(source)}: no text in it")


def files(source: Source) -> list[Path]:
    """The local files a source consists of, in the order they are read; empty if it is remote.

    Raises:
        DataError: a path is missing or matches nothing.
    """
    if isinstance(source, BuiltinSource):
        return _library()
    if isinstance(source, HubSource):
        return _table_files(source)
    return _matching(source, "*.txt" if isinstance(source, TextSource) else "*.jsonl")


def content_hash(source: Source) -> str | None:
    """Hash of the bytes of the source's files; None where only reading tells (remote sources)."""
    paths = files(source)
    if not paths:
        return None
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def size(source: Source) -> int | None:
    """Bytes that reading the source will report to ``advance``; None if unknown."""
    paths = files(source)
    if isinstance(source, HubSource) or not paths:
        return None
    return sum(path.stat().st_size for path in paths)


# The built-in corpus: language reference topics first, then docstrings by module path.


def _library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = root / "pydoc_data" / "topics.py"
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [n for n in folders if n not in _SKIPPED and not n.startswith("config-")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    paths = [topics] if topics in found else []
    paths += sorted((p for p in found if p != topics), key=lambda p: p.relative_to(root).as_posix())
    if not paths:
        raise DataError(f"data.sources: builtin: this Python has no library sources in {root}")
    return paths


def _builtin(advance: Advance) -> Iterator[str]:
    for path in _library():
        yield from _prose(path)
        advance(path.stat().st_size)


@cache  # read twice: to train the tokenizer and to make the rows
def _prose(path: Path) -> tuple[str, ...]:
    """Texts of a library file, which is parsed and never imported."""
    tree = ast.parse(path.read_bytes(), str(path))
    if path.parent.name == "pydoc_data":
        tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        values = [v for table in tables if isinstance(table, ast.Dict) for v in table.values]
        return tuple(v.value for v in values if isinstance(v, ast.Constant))
    return tuple(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, and of the classes and functions at its and their top level."""
    text = ast.get_docstring(node)  # type: ignore[arg-type]
    if text:
        yield text
    for child in node.body:  # type: ignore[attr-defined]
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


# Files.


def _matching(source: TextSource | JsonlSource, pattern: str) -> list[Path]:
    where = Path(source.path).expanduser()
    if where.is_file():
        return [where]
    if where.is_dir():
        found = sorted(p for p in where.rglob(pattern) if p.is_file())
        missing = f"no {pattern} in this folder"
    else:
        matches = glob.glob(str(where), recursive=True) if glob.has_magic(source.path) else []
        found = sorted(p for p in map(Path, matches) if p.is_file())
        missing = "no such file or folder, and no pattern that matches one"
    if not found:
        raise DataError(f"{_name(source)}: {missing}")
    return found


def _lines(path: Path, advance: Advance) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, without its end."""
    offset = 0
    with path.open("rb") as stream:
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


def _paragraphs(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file: stretches of lines between blank ones."""
    lines = (line for _, line in _lines(path, advance))
    for blank, stretch in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "\n".join(stretch)


def _json_lines(path: Path, field: str, advance: Advance) -> Iterator[str]:
    for number, line in _lines(path, advance):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{path}:{number}: not JSON: {problem}") from problem
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            keys = f"its keys are {sorted(row)}" if isinstance(row, dict) else "it is no object"
            raise DataError(f"{path}:{number}: no text under the key {field!r}; {keys}")
        text = row[field]
        try:
            text.encode()
        except UnicodeEncodeError as problem:  # "\ud800" is JSON, but no text
            raise DataError(f"{path}:{number}: not Unicode text: {problem.reason}") from problem
        yield text


# The `datasets` library. It is imported late: that takes a second or two, and few runs need it.


def _table_files(source: HubSource) -> list[Path]:
    saved = Path(source.path).expanduser()
    if saved.is_dir():
        return sorted(p for p in saved.rglob("*") if p.is_file() and not p.name.startswith("."))
    named = source.data_files or []
    local = [Path(match) for name in named for match in sorted(glob.glob(name, recursive=True))]
    return [path for path in local if path.is_file()]


def _table(source: HubSource, advance: Advance) -> Iterator[str]:
    table = _open_table(source)
    if table.column_names is not None:  # a stream may not know its columns
        if source.field not in table.column_names:
            raise DataError(
                f"{_name(source)}: no column {source.field!r}; its columns are "
                f"{sorted(table.column_names)}"
            )
        table = table.select_columns([source.field])
    for number, row in enumerate(table):
        text = row.get(source.field)
        if not isinstance(text, str):
            raise DataError(f"{_name(source)}: row {number}: no text in column {source.field!r}")
        advance(1)
        yield text


def _open_table(source: HubSource) -> Any:
    import datasets

    folder = Path(source.path).expanduser()
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            table = datasets.load_from_disk(str(folder))
        else:
            table = datasets.load_dataset(
                source.path,
                source.config,
                split=source.split,
                revision=source.revision,
                data_files=source.data_files,
                streaming=source.streaming,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise ConfigError(f"{_name(source)}: cannot load it: {problem}") from problem
    if not isinstance(table, datasets.DatasetDict):
        return table
    if source.split not in table:
        raise ConfigError(f"{_name(source)}: no split {source.split!r}; it has {sorted(table)}")
    return table[source.split]


def _name(source: Source) -> str:
    if isinstance(source, BuiltinSource):
        return "data.sources: builtin"
    return f"data.sources: {source.kind}: {source.path}"
