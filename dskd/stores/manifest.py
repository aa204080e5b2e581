"""The manifest of a store: what the store is and, once it is complete, each shard's hash.

A checksum finds what changed by accident; what was edited on purpose has a right one. So every
number is looked at before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from dskd.errors import StoreError
from dskd.stores.shard import DTYPES, Column, StoreSpec
from dskd.system.files import read_manifest, write_manifest

FORMAT = "dskd-store-1"
MANIFEST = "manifest.json"
_MOST = 1 << 62  # any count fits an int64, and so does its double
_MEND = "remove it and make the store again: whole shards are kept"


class ShardRecord(NamedTuple):
    """A shard's line in the manifest.

    Attributes:
        rows: how many it holds; None: not written down, all that were to be held (stores of before
            rows could be added to them).
    """

    nbytes: int
    hash: str
    positions: int
    rows: int | None = None


def read_spec(folder: Path) -> tuple[StoreSpec, list[ShardRecord] | None]:
    """What a folder's manifest says: its spec and, if the store is complete, its shards.

    Raises:
        StoreError: there is no manifest, it is damaged or of something else, or it says what cannot
            be.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        content = read_manifest(path, StoreError)
        if content.get("format") != FORMAT:
            raise StoreError(f"{path}: foreign, not the manifest of a {FORMAT}")
        for problem in _problems(content):
            raise StoreError(f"{path}: damaged, {problem}")
    except StoreError as problem:
        raise StoreError(f"{problem}; {_MEND}") from problem
    spec, shards = StoreSpec.from_tree(content["store"]), content["shards"]
    return spec, None if shards is None else [ShardRecord(*record) for record in shards]


def write_spec(folder: Path, spec: StoreSpec, records: list[ShardRecord] | None) -> None:
    """Write a folder's manifest; ``records``: of all shards, or None while some are missing."""
    content = {"format": FORMAT, "store": spec.tree(), "shards": records}
    write_manifest(folder / MANIFEST, content, "the manifest of a store")


def is_count(value: object, least: int = 1) -> bool:
    """Whether a value of a manifest is a number of things, at least so many."""
    return type(value) is int and least <= value <= _MOST  # a bool is an int, too


def _problems(content: dict[str, Any]) -> Iterator[str]:
    """What no writer of a store says."""
    store, names = content.get("store"), {field.name for field in fields(StoreSpec)}
    if content.keys() != {"format", "store", "shards"} or not _has_keys(store, names):
        yield "an entry is missing or unknown"
        return
    rights = {
        "kind": isinstance(store["kind"], str),
        "columns": _are_columns(store["columns"]),
        **{name: is_count(store[name]) for name in ("rows", "draws", "rows_per_shard")},
        "fingerprints": isinstance(store["fingerprints"], dict)
        and all(isinstance(value, str) for value in store["fingerprints"].values()),
        "settings": isinstance(store["settings"], dict),
    }
    yield from (f"{name} cannot be {short(store[name])}" for name, ok in rights.items() if not ok)
    if content["shards"] is not None and all(rights.values()):
        yield from _problems_of_shards(content["shards"], StoreSpec.from_tree(store))


def _problems_of_shards(shards: object, spec: StoreSpec) -> Iterator[str]:
    if not isinstance(shards, list) or len(shards) != spec.shards:
        yield (
            f"it has not the {spec.shards} shards that {spec.draws} draws of {spec.rows} rows are, "
            f"{spec.rows_per_shard} in each"
        )
        return
    for shard, record in enumerate(shards):
        _, begin, end = spec.span(shard)
        if not _is_record(record, end - begin):
            yield f"shard {shard} cannot be {short(record)}"


def _has_keys(value: object, keys: set[str]) -> bool:
    return isinstance(value, dict) and value.keys() == keys


def _are_columns(value: object) -> bool:
    names = {field.name for field in fields(Column)}
    return isinstance(value, dict) and all(
        _has_keys(column, names)
        and column["dtype"] in DTYPES
        and isinstance(column["shape"], list)
        and all(is_count(size, 0) for size in column["shape"])
        for column in value.values()
    )


def _is_record(value: object, most: int) -> bool:
    """Whether it is of a shard of at most so many rows."""
    if not (isinstance(value, list) and len(value) in (3, 4)):
        return False
    record = ShardRecord(*value)
    return (
        is_count(record.nbytes)
        and isinstance(record.hash, str)
        and is_count(record.positions, 0)
        and (len(value) == 3 or (is_count(record.rows, 0) and record.rows <= most))
    )
