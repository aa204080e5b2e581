"""Anything that the ``datasets`` library reads: the hub, its builders, saved folders.

The library is imported late: that takes a second or two, and few runs need it.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dskd.data.foreign import raised_as
from dskd.data.json_files import document, json_value, row_value
from dskd.data.text_files import Advance, expanded, files_below, linked_folder, text_lines
from dskd.data.unpacking import packing, readable
from dskd.errors import ConfigError, DataError, DskdError
from dskd.settings.data import HubSource

_STATE, _DICT = "state.json", "dataset_dict.json"
"""The files that mark a folder of ``save_to_disk``: of one table, and of one for each split."""
_SHOWN_FILES = 3
_BATCH = 100
"""Rows read at a time."""


def table_files(source: HubSource, where: str) -> list[Path]:
    """The local files that are read, as far as they can be known before; none if it is remote.

    Raises:
        DataError: one of them cannot be read.
        ConfigError: an option that has no effect where the text comes from.
    """
    with readable(where):
        _refuse_idle(source, where)
        folder = Path(source.path).expanduser()
        found = _local_files(source, where)
        if folder.is_dir():
            below = {p for p in files_below(folder, where) if not p.name.startswith(".")}
            if source.data_files is None and not _is_saved(folder):
                _refuse_links(below, folder, where)
            found += sorted(below - set(found))
    return found


def _local_files(source: HubSource, where: str) -> list[Path]:
    """The local ones of ``data_files``, which are relative to ``path`` if that is a folder."""
    folder = Path(source.path).expanduser()
    found: list[Path] = []
    for name in source.data_files or []:
        pattern = folder / name if folder.is_dir() else Path(name)
        matches = [pattern] if pattern.is_file() else expanded(pattern, where)
        top = next((p for p in reversed(pattern.parents) if glob.has_magic(p.name)), pattern).parent
        _refuse_links(matches, top, where)
        found += matches
    return found


def _refuse_links(paths: Iterable[Path], top: Path, where: str) -> None:
    """Refuse what ``datasets`` leaves out: files below a link, found by going down from ``top``."""
    for path in paths:
        link = linked_folder(path, top)
        if link is not None:
            raise DataError(
                f"{where}: {link}: datasets does not follow a symbolic link to a folder; name the "
                "files behind it in data_files"
            )


def table_texts(source: HubSource, where: str, advance: Advance) -> Iterator[str]:
    """The texts of the column ``field``, row by row; empty for null, if such rows are skipped.

    Raises:
        DataError: there is no such column, a row holds no text in it, or cannot be read.
        ConfigError: the table cannot be loaded as the settings say.
    """
    rows = table_rows(source, [source.field], where, advance)
    skip = source.on_bad_rows == "skip"
    for number, (value,) in enumerate(rows):
        yield document(value, f"{where}: row {number}", f"in column {source.field!r}", skip)


def table_rows(
    source: HubSource,
    columns: Sequence[str],
    where: str,
    advance: Advance,
    named: str | None = None,
) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row.

    In the column ``named``, numbers of classes become their names if the table has names for them,
    and -1, which stands for no class, None.

    Raises:
        DataError: there is no such column, or a row cannot be read.
        ConfigError: the table cannot be loaded as the settings say.
    """
    table = _open_table(source, where)
    known = table.column_names
    if known is not None:  # a stream may not know its columns
        for column in columns:
            if _top(column, known) not in known:
                raise DataError(f"{where}: no column {column!r}; its columns are {sorted(known)}")
        table = table.select_columns(list(dict.fromkeys(_top(c, known) for c in columns)))
    names = getattr(_feature(table.features or {}, named), "names", None)
    batches = table.iter(_BATCH)
    number = 0
    while True:
        with _raised_as(DataError, f"{where}: reading fails after {number} rows", source, where):
            batch = next(batches, None)
        if batch is None:
            return
        lists = [_values(batch, column, f"{where}: row", number) for column in columns]
        if names is not None:
            place = columns.index(named)
            lists[place] = [None if n in (None, -1) else names[n] for n in lists[place]]
        for values in zip(*lists, strict=True):
            number += 1
            advance(1)
            yield values


def _top(column: str, known: Collection[str]) -> str:
    """The column of a table that ``column`` is, or is a key within."""
    return column if column in known else column.split(".", maxsplit=1)[0]


def _feature(features: Mapping[str, Any], column: str | None) -> Any:
    """What ``datasets`` knows of a column, or of a key within one; None if nothing."""
    found: Any = features
    for name in [column] if column is None or column in features else column.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _values(batch: Mapping[str, Any], column: str, where: str, number: int) -> list[Any]:
    """A column of rows, or what is under a key within it; ``number`` is that of the first row."""
    top = _top(column, batch)
    if top not in batch:
        raise DataError(f"{where} {number}: no column {column!r}")
    if top == column:
        return batch[column]
    rows = enumerate(batch[top], number)
    return [row_value({top: value}, column, f"{where} {n}", "value") for n, value in rows]


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_STATE, _DICT))


def _refuse_idle(source: HubSource, where: str) -> None:
    """Refuse options that ``datasets`` passes over without a word."""
    names = ("config", "revision", "data_files", "streaming")
    given = [n for n in names if getattr(source, n) != HubSource.model_fields[n].default]
    if not given:
        return
    folder = Path(source.path).expanduser()
    if _is_saved(folder):
        idle, why = names, "a saved folder is read as it is"
    elif source.path.isidentifier() and find_spec(f"datasets.packaged_modules.{source.path}"):
        idle, why = names[:2], f"{source.path} is a builder of files and has none"
    elif folder.is_dir():
        idle, why = names[1:2], "a folder has none"
    else:
        return
    for name in given:
        if name in idle:
            raise ConfigError(f"{where}: {name}: has no effect here: {why}; leave it out")


def _open_table(source: HubSource, where: str) -> Any:
    import datasets

    folder = Path(source.path).expanduser()
    if _is_saved(folder):
        return _saved_table(folder, source.split, where)
    with _raised_as(ConfigError, f"{where}: cannot load it", source, where):
        return datasets.load_dataset(
            source.path,
            source.config,
            split=source.split,
            revision=source.revision,
            data_files=source.data_files,
            streaming=source.streaming,
        )


def _saved_table(folder: Path, split: str, where: str) -> Any:
    """The rows of a saved folder that ``split`` names, in the words of ``datasets``: a slice of a
    split, or several of them."""
    import datasets

    _check_saved(folder)
    with raised_as(ConfigError, f"{where}: cannot load it"):
        loaded = datasets.load_from_disk(str(folder)).with_format(None)
    if isinstance(loaded, datasets.DatasetDict):
        tables: Mapping[str, Any] = loaded
    else:
        name = str(loaded.split)  # may be none, or the slice that was saved
        named = loaded.split is not None and re.fullmatch(r"\w+(\.\w+)*", name)
        tables = {name if named else "train": loaded}
    with raised_as(ConfigError, f"{where}: no split {split!r}; it has {sorted(tables)}"):
        wanted = datasets.ReadInstruction.from_spec(split)
        parts = wanted.to_absolute({name: len(table) for name, table in tables.items()})
    chosen = [tables[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _check_saved(folder: Path) -> None:
    """Refuse a saved folder whose own files do not describe it, or name files outside it."""
    below = [folder]
    if not (folder / _STATE).is_file():
        below = [folder / name for name in _names(folder / _DICT, "splits")]
    for part in below:
        for name in _names(part / _STATE, "_data_files", "filename"):
            if not (part / name).is_file():
                raise DataError(f"{part / _STATE}: names {name}, which is not there")


def _names(path: Path, key: str, inner: str | None = None) -> list[str]:
    """The names that a file of a saved folder lists under ``key``."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from problem
    found = content.get(key) if isinstance(content, dict) else None
    if isinstance(found, list) and inner is not None:
        found = [entry.get(inner) if isinstance(entry, dict) else None for entry in found]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{path}: damaged, it does not list its files under {key!r}")
    for name in found:
        if name != Path(name).name:
            raise DataError(f"{path}: names {name!r}, which is not inside its folder")
    return found


@contextmanager
def _raised_as(
    error: type[DskdError], problem: str, source: HubSource, where: str
) -> Iterator[None]:
    """As :func:`~dskd.data.foreign.raised_as`, naming file and line where they can be found:
    ``datasets`` names a file in its log only, if at all, and a line within what it read at once."""
    logged: list[str] = []

    def kept(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            logged.append(" ".join(record.getMessage().split()))
        return record.levelno < logging.ERROR

    handlers = list(logging.getLogger("datasets").handlers)
    for handler in handlers:
        handler.addFilter(kept)
    try:
        with raised_as(error, problem):
            yield
    except DskdError as found:
        place = _broken(source, where) or "; ".join(logged)
        if place:
            raise error(f"{problem}: {place}") from found.__cause__
        files = ", ".join(map(str, _local_files(source, where)[:_SHOWN_FILES]))
        raise error(f"{found}; the first of its files: {files}" if files else str(found)) from found
    finally:
        for handler in handlers:
            handler.removeFilter(kept)


def _broken(source: HubSource, where: str) -> str | None:
    """File and line of what is wrong with the local files of a builder of text, if it is found."""
    if source.path not in ("csv", "json", "text"):
        return None
    for path in _local_files(source, where):
        with path.open("rb") as stream:
            head = stream.read(16)
        if not head:
            return f"{path}: empty"
        try:
            if packing(head) is None:  # else datasets unpacks it
                _read_through(path, source.path == "json")
        except DataError as problem:
            return str(problem)
    return None


def _read_through(path: Path, is_json: bool) -> None:
    """Raise DataError at the first line that is not UTF-8 or, in a file of JSON lines, no JSON."""
    for number, line in text_lines(path, int):
        if is_json and line.strip():
            try:
                value = json_value(line, f"{path}:{number}")
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as problem:  # "\ud800"
                raise DataError(f"{path}:{number}: not Unicode text") from problem
            except DataError:
                if number > 1 or not _is_json(path.read_bytes()):
                    raise
                return  # one value over several lines


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
