"""Where text comes from: the built-in corpus, text files, JSON lines, anything `datasets` reads.

A document is a string whose lines are its sentences. Every source yields its documents in a fixed
order; nothing is ever skipped but documents without any text.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import xxhash

from dskd.data.tables import table_files, table_texts
from dskd.data.text_files import Advance, json_texts, matching_files, paragraphs, readable
from dskd.errors import DataError
from dskd.settings.data import BuiltinSource, HubSource, JsonlSource, Source, TextSource
from dskd.system.files import file_hash

# Folders of the standard library that hold no prose, or are no part of it.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


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
        found = (text for path in files(source) for text in paragraphs(path, advance))
    elif isinstance(source, JsonlSource):
        found = (text for path in files(source) for text in json_texts(path, source.field, advance))
    else:
        found = table_texts(source, source_name(source), advance)
    count = 0
    for text in islice((text for text in found if text.strip()), source.documents):
        count += 1
        yield text
    if not count:
        raise DataError(f"{source_name(source)}: no text in it")


def files(source: Source) -> list[Path]:
    """The local files a source consists of, in the order they are read; empty if it is remote.

    Raises:
        DataError: a path is missing or matches nothing.
    """
    if isinstance(source, BuiltinSource):
        return _library()
    if isinstance(source, HubSource):
        return table_files(source, source_name(source))
    pattern = "*.txt" if isinstance(source, TextSource) else f"*.{source.kind}"
    return matching_files(source.path, pattern, source_name(source))


def content_hash(source: Source) -> str | None:
    """Hash of the bytes of the source's files; None where only reading tells (remote sources)."""
    paths = files(source)
    if not paths:
        return None
    digest = xxhash.xxh3_128()
    with readable(source_name(source)):
        for path in paths:
            digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def size(source: Source) -> int | None:
    """Bytes that reading the source will report to ``advance``; None if unknown."""
    paths = files(source)
    if isinstance(source, HubSource) or not paths:
        return None
    with readable(source_name(source)):
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


def source_name(source: Source) -> str:
    """What a source is called in messages."""
    if isinstance(source, BuiltinSource):
        return "data.sources: builtin"
    return f"data.sources: {source.kind}: {source.path}"
