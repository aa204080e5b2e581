"""Labelled rows: the examples that tables and JSON lines hold, each a text with what it is.

An example is taken as it stands in its row; nothing is left out but what the settings say, and
whatever makes no example is refused by file and row.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dskd.data.glue import glue_rows
from dskd.data.json_files import checked_text, json_rows, json_type, row_value
from dskd.data.library import library_rows
from dskd.data.sources import files, limited, source_name
from dskd.data.tables import table_rows
from dskd.data.text_files import Advance, text_lines
from dskd.errors import DataError
from dskd.settings.data import BuiltinSource, HubSource, JsonlSource, LabelledSource
from dskd.settings.labels import Columns, CsvSource, GlueSource, TsvSource


class Example(NamedTuple):
    """One row of a labelled source.

    Attributes:
        text: is not empty.
        pair: a second text, which is not empty either; None: there is none.
        label: the name of its class, or its number; None: it has neither.
        place: file and line, or source and row, for messages.
    """

    text: str
    pair: str | None
    label: str | float | None
    place: str

    @property
    def texts(self) -> tuple[str, ...]:
        """One text or two."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


def examples(
    source: LabelledSource, advance: Advance = int, skipped: Callable[[], object] = int
) -> Iterator[Example]:
    """The examples of a source, in its order.

    Args:
        source: the settings.
        advance: told what was read.
        skipped: called for each row that is left out, as ``on_bad_rows`` says.

    Raises:
        DataError: a path is missing or matches nothing; a file is not UTF-8, or no CSV, TSV or
            JSON; a column is missing, a text empty, a label neither text nor a whole number, a
            target no number, or missing where the settings do not say that it may be; there is no
            row at all. It names file and row.
        ConfigError: `datasets` cannot load what the source names.
    """
    if isinstance(source, BuiltinSource):
        where = source_name(source)
        found = (Example(text, None, module, where) for text, module in library_rows(advance))
    elif isinstance(source, GlueSource):
        found = _of_glue(source, advance, skipped)
    else:
        found = _taken(source, _rows(source, advance), skipped)
    yield from limited(found, source, "row")


def _taken(
    source: Columns, rows: Iterator[tuple[str, dict[str, Any]]], skipped: Callable[[], object]
) -> Iterator[Example]:
    """The examples of rows, those with a missing text left out if the source says so."""
    texts = [name for name in (source.field, source.pair) if name is not None]
    for place, values in rows:
        if source.on_bad_rows == "skip" and any(_is_missing(values[name]) for name in texts):
            skipped()
        else:
            yield _example(source, values, place)


def _of_glue(
    source: GlueSource, advance: Advance, skipped: Callable[[], object]
) -> Iterator[Example]:
    """The examples of a task of GLUE."""
    for path in files(source):
        for text, pair, label, place in glue_rows(
            path, source.task, source.split, advance, skipped
        ):
            bad = not text or pair == ""
            if bad and source.on_bad_rows == "error":
                more = "`on_bad_rows: skip` leaves such rows out"
                raise DataError(f"{place}: an empty text; {more}")
            if bad:
                skipped()
            else:
                yield Example(text, pair, label, place)


class _WholeNumber(str):
    """A whole number of a JSON file, digit by digit: as the name of a class it is not rounded."""


def _names(source: Columns) -> list[str]:
    """The columns that are read."""
    names = [source.field, source.pair, source.label, source.target]
    return [name for name in names if name is not None]


def _rows(source: Columns, advance: Advance) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row, by column."""
    names = _names(source)
    if isinstance(source, HubSource):
        where = source_name(source)
        found = table_rows(source, names, where, advance, source.label)
        for number, values in enumerate(found):
            yield f"{where}: row {number}", dict(zip(names, values, strict=True))
    elif isinstance(source, JsonlSource):
        for path in files(source):
            for place, row in json_rows(path, advance, _WholeNumber):
                yield place, {name: row_value(row, name, place, "value") for name in names}
    else:
        assert isinstance(source, CsvSource | TsvSource), source
        for path in files(source):
            yield from _table(path, source, names, advance)


def _table(
    path: Path, source: CsvSource | TsvSource, names: list[str], advance: Advance
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of cells, whose first line names the columns unless the source does."""
    quoted = isinstance(source, CsvSource) or source.quoting
    lines = text_lines(path, advance)
    delimiter = "," if isinstance(source, CsvSource) else "\t"
    cells = _cells(path, lines, delimiter) if quoted else _plain_cells(lines)
    header = source.columns if source.columns is not None else _header(path, cells, names)
    for number, row in cells:
        if row == source.columns:
            raise DataError(f"{path}:{number}: names its columns; leave `columns` out")
        if len(row) != len(header):
            raise DataError(
                f"{path}:{number}: {len(row)} cells, but there are {len(header)} columns"
            )
        values = dict(zip(header, row, strict=True))
        yield f"{path}:{number}", {name: values[name] for name in names}


def _header(path: Path, cells: Iterator[tuple[int, list[str]]], names: list[str]) -> list[str]:
    """The names of the columns in the first line of a file."""
    number, header = next(cells, (0, None))
    if header is None:
        raise DataError(f"{path}: empty; its first line names its columns")
    for name in names:
        if header.count(name) != 1:
            what = "no column" if name not in header else "more than one column"
            raise DataError(f"{path}:{number}: {what} {name!r}; its columns are {header}")
    return header


def _plain_cells(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        if line.strip():
            yield number, line.split("\t")


def _cells(
    path: Path, lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Rows of cells that may be quoted, each with the number of its first line."""
    reader = csv.reader((f"{line}\n" for _, line in lines), delimiter=delimiter, strict=True)
    first = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as problem:
            raise DataError(f"{path}:{first}: cannot be read as cells: {problem}") from problem
        if row is None:
            return
        if row:  # else a line of nothing
            yield first, row
        first = reader.line_num + 1


def _example(source: Columns, values: dict[str, Any], place: str) -> Example:
    pair = None if source.pair is None else _text(values[source.pair], source.pair, place)
    label: str | float | None = None
    if source.label is not None:
        label = _class_name(values[source.label], source.label, place)
    elif source.target is not None:
        label = _number(values[source.target], source.target, place)
    if label is None and source.labelled and not source.unlabelled:
        column = source.label if source.target is None else source.target
        raise DataError(
            f"{place}: nothing in column {column!r}; rows without a label need `unlabelled: true` "
            "at their source"
        )
    return Example(_text(values[source.field], source.field, place), pair, label, place)


def _text(value: Any, column: str, place: str) -> str:
    where = f"in column {column!r}"
    if isinstance(value, _WholeNumber):
        raise DataError(f"{place}: no text {where} but a number")
    text = checked_text(value, place, where)
    if not text.strip():
        raise DataError(f"{place}: empty text {where}")
    return text


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _class_name(value: Any, column: str, place: str) -> str | None:
    if _is_missing(value):
        return None
    if isinstance(value, str):
        return str(checked_text(value, place, f"in column {column!r}"))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    more = "; for regression, name it `target`" if isinstance(value, float) else ""
    raise DataError(
        f"{place}: the label in column {column!r} is neither text nor a whole number but "
        f"{json_type(value)}{more}"
    )


def _number(value: Any, column: str, place: str) -> float | None:
    if _is_missing(value):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place}: the target in column {column!r} is no number: {value!r}")
    return number
