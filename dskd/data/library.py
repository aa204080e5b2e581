"""The text that every Python brings along: language reference topics and docstrings, as a corpus;
and the docstrings' paragraphs as labelled rows.

Its files are parsed, never imported.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path

from dskd.data.text_files import Advance
from dskd.errors import DataError

# Folders of the standard library that hold no prose, or are no part of it.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

# Fixed, so that the classes are the same on every Python; tkinter and turtle have more text than
# most of these, but are missing where Python was installed without a desktop.
MODULES = (
    "asyncio", "decimal", "difflib", "doctest", "email", "http", "importlib", "inspect",
    "ipaddress", "logging", "multiprocessing", "statistics", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
"""The classes of labelled rows, by code point: modules and packages of much text in Pythons 3.10
to 3.13."""
_NAMES = re.compile(rf"\b(?:{'|'.join(MODULES)})\b", re.IGNORECASE)
_PARAGRAPHS = re.compile(r"\n\s*\n")
_WORDS = re.compile(r"[A-Za-z]{2,}")
_LEAST_WORDS = 6
"""Of a labelled row: "Return a string." may be of any module."""


def library_files() -> list[Path]:
    """The files of the corpus: reference topics first, then by path.

    Raises:
        DataError: this Python has none.
    """
    root = _root()
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


def module_files() -> list[Path]:
    """Those that labelled rows are made of, by path.

    Raises:
        DataError: this Python has none of some class.
    """
    paths = [path for path in library_files() if _module(path) in MODULES]
    if missing := sorted(set(MODULES) - set(map(_module, paths))):
        raise DataError(f"data.sources: builtin: this Python lacks {missing}, of label: module")
    return paths


def library_texts(advance: Advance) -> Iterator[str]:
    """The documents of the corpus, in the order of its files."""
    for path in library_files():
        yield from _prose(path)
        advance(path.stat().st_size)


def library_rows(advance: Advance) -> Iterator[tuple[str, str]]:
    """Text and module of each labelled row; the modules take turns, so that the first rows are of
    all of them.

    The names of the modules stand in no text as words of their own ("module" does instead), but
    in identifiers such as ``get_doctest`` they do. Each text is there once, and one that several
    modules have, not at all.
    """
    texts: dict[str, dict[str, None]] = {module: {} for module in MODULES}
    for path in module_files():
        texts[_module(path)] |= dict.fromkeys(_paragraphs(path))
        advance(path.stat().st_size)
    counts = Counter(text for own in texts.values() for text in own)
    rows = ([(text, name) for text in own if counts[text] == 1] for name, own in texts.items())
    for turn in zip_longest(*rows):
        yield from (row for row in turn if row is not None)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _module(path: Path) -> str:
    """What a file of the library is imported as, its packages left out but for the first;
    ``_pydecimal.py`` is decimal without C."""
    return path.relative_to(_root()).parts[0].removesuffix(".py").removeprefix("_py")


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs of a file's docstrings, each on one line."""
    for document in _prose(path):
        for paragraph in _PARAGRAPHS.split(document):
            text = _NAMES.sub("module", " ".join(paragraph.split()))
            if len(_WORDS.findall(text)) >= _LEAST_WORDS:
                yield text


@cache  # read again: for the classes, to train the tokenizer and to make the rows
def _prose(path: Path) -> tuple[str, ...]:
    """The texts of a file."""
    tree = ast.parse(path.read_bytes(), str(path))
    if path.parent.name == "pydoc_data":
        tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        values = [v for table in tables if isinstance(table, ast.Dict) for v in table.values]
        return tuple(v.value for v in values if isinstance(v, ast.Constant))
    return tuple(docstrings(tree))


def docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, and of the classes and functions at its and their top level."""
    text = ast.get_docstring(node)  # type: ignore[arg-type]
    if text:
        yield text
    for child in node.body:  # type: ignore[attr-defined]
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child)
