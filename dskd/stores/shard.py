"""What a row store is (its spec), and the format of its files, the shards.

A shard is a safetensors file of a fixed range of rows of one draw. It has ``row_ptr`` [rows + 1]
int64 (row r owns the positions from row_ptr[r] to row_ptr[r + 1] - 1), ``present`` [rows] uint8 (0:
the row was left out on purpose) and, for each column, an array [positions, ...]. Its metadata names
the store and the shard and holds a digest of them and of the arrays, so that a capture can tell
which shards of an interrupted one are whole.

Shape letter: R rows of a shard.
"""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from dskd.errors import StoreError
from dskd.system.files import fingerprint

_METADATA = "dskd"  # one key: safetensors does not keep the order of several
_NUMPY = {
    "I64": np.int64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "F32": np.float32,
    "F16": np.float16,
}
DTYPES = tuple(np.dtype(kind).name for kind in _NUMPY.values())
"""Names of those that a column may have."""


@dataclass(frozen=True)
class Column:
    """A value of each position: numpy dtype name and shape (without the axis of positions)."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes per position."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def joined(self, pieces: Iterable[np.ndarray]) -> np.ndarray:
        """The values of some stretches of positions (maybe of none), one behind the other."""
        return np.concatenate([np.empty((0, *self.shape), self.dtype), *pieces])


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store is; two stores of equal spec are interchangeable.

    Attributes:
        kind: what reads it ("logits").
        columns: by name.
        rows: rows of the data set; ids are 0 to rows - 1.
        draws: how many different views of each row it holds.
        rows_per_shard: rows of a shard (the last one of a draw may have fewer).
        fingerprints: of everything its values depend on, by name.
        settings: what the reader of this kind needs to know (JSON values).
    """

    kind: str
    columns: Mapping[str, Column]
    rows: int
    draws: int
    rows_per_shard: int
    fingerprints: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def shards_per_draw(self) -> int:
        """Number of shards of one draw."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.draws * self.shards_per_draw

    def span(self, shard: int) -> tuple[int, int, int]:
        """``(draw, begin, end)``: the shard holds rows begin to end - 1 of the draw."""
        draw, place = divmod(shard, self.shards_per_draw)
        begin = place * self.rows_per_shard
        return draw, begin, min(begin + self.rows_per_shard, self.rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the store in each of its shards."""
        return fingerprint(self.tree())

    def tree(self) -> dict[str, Any]:
        """The spec as a mapping of JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> StoreSpec:
        """The inverse of :meth:`tree`."""
        columns = {k: Column(c["dtype"], tuple(c["shape"])) for k, c in tree["columns"].items()}
        return StoreSpec(**{**tree, "columns": columns})


def spec_differences(there: StoreSpec, wanted: StoreSpec) -> list[str]:
    """One line for each thing in which the store at hand is not the one that is wanted."""
    flat_there, flat_wanted = _flat(there.tree()), _flat(wanted.tree())
    return [
        f"{name} is {flat_there.get(name)!r} there and {flat_wanted.get(name)!r} here"
        for name in sorted(flat_there.keys() | flat_wanted.keys())
        if flat_there.get(name) != flat_wanted.get(name)
    ]


class ForeignShard(StoreError):
    """A whole shard, but of another store, or another one of this store."""


def encode_shard(
    spec: StoreSpec,
    shard: int,
    counts_R: NDArray[np.int64],
    present_R: NDArray[np.bool_],
    columns: Mapping[str, np.ndarray],
) -> bytes:
    """A shard's file; the same arguments always give the same bytes.

    Args:
        spec: of the store.
        shard: its number.
        counts_R: positions of each of its rows.
        present_R: False where the row is left out of the store.
        columns: arrays [sum of counts, ...], positions in row order.
    """
    _, begin, end = spec.span(shard)
    assert counts_R.shape == present_R.shape == (end - begin,), (counts_R.shape, present_R.shape)
    assert columns.keys() == spec.columns.keys(), columns.keys()
    row_ptr = np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64)
    arrays = {"row_ptr": row_ptr, "present": present_R.astype(np.uint8)}
    for name, column in spec.columns.items():
        array = np.ascontiguousarray(columns[name])
        assert array.shape == (row_ptr[-1], *column.shape), (name, array.shape, row_ptr[-1])
        assert array.dtype == column.dtype, (name, array.dtype, column.dtype)
        arrays[name] = array
    store = spec.fingerprint
    about = {"store": store, "shard": shard, "digest": _digest(store, shard, arrays)}
    return save(arrays, {_METADATA: json.dumps(about)})


def joined_rows(
    there: Mapping[str, np.ndarray],
    counts_R: NDArray[np.int64],
    present_R: NDArray[np.bool_],
    columns: Mapping[str, np.ndarray],
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, np.ndarray]]:
    """What :func:`encode_shard` is given of a shard that holds rows and gets others.

    Args:
        there: its arrays, of :func:`check_shard`.
        counts_R, present_R, columns: of the rows that are added, none of which is there.
    """
    held_R, held_counts_R = there["present"].astype(bool), np.diff(there["row_ptr"])
    assert not (held_R & present_R).any(), "a row is there already"
    rows_R = np.arange(len(held_R))
    row_N = np.concatenate([np.repeat(rows_R, held_counts_R), np.repeat(rows_R, counts_R)])
    order_N = np.argsort(row_N, kind="stable")
    whole = {name: np.concatenate([there[name], columns[name]])[order_N] for name in columns}
    return held_counts_R + counts_R, held_R | present_R, whole


def map_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays as read-only views of the mapped file, and the metadata; no digest is compared.

    (``safetensors.safe_open`` would copy whole arrays where a few of their rows are wanted.)
    """
    with path.open("rb") as stream:
        mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    start = 8 + int(mapped[:8].view(np.uint64)[0])
    header = json.loads(mapped[8:start].tobytes())
    about = json.loads(header.pop("__metadata__")[_METADATA])
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = mapped[start + begin : start + end]
        if len(raw) != end - begin:
            raise ValueError(f"{name} ends beyond the file's end")
        arrays[name] = raw.view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays, about


def check_shard(path: Path, spec: StoreSpec, shard: int) -> dict[str, np.ndarray]:
    """The arrays of the file, all of it read and found to be what it claims to be.

    Raises:
        ForeignShard: it is whole, but not this one.
        StoreError: it is damaged.
    """
    arrays, about = _mapped(path)
    if about["digest"] != _digest(about["store"], about["shard"], arrays):
        raise StoreError(f"{path}: damaged, its bytes are not those that were captured")
    _refuse_foreign(path, spec, shard, about)
    return arrays


def held_rows(path: Path) -> NDArray[np.bool_]:
    """Which of its rows a shard holds, bool; its bytes are not looked at otherwise.

    Raises:
        StoreError: it is damaged.
    """
    arrays, _ = _mapped(path)
    if "present" not in arrays:
        raise StoreError(f"{path}: damaged, it does not say which rows it holds")
    return arrays["present"].astype(bool)


def check_place(
    path: Path, spec: StoreSpec, shard: int, positions: int, rows: int | None = None
) -> None:
    """Check that a file whose bytes are those of its writer is this shard of this store, with so
    many positions and rows (None: of no matter); of the values only ``row_ptr`` and ``present`` are
    read.

    Raises:
        ForeignShard: it is another one.
        StoreError: its arrays are not those of the spec.
    """
    arrays, about = _mapped(path)
    _refuse_foreign(path, spec, shard, about)
    _, begin, end = spec.span(shard)
    wanted = {"row_ptr": ("int64", (end - begin + 1,)), "present": ("uint8", (end - begin,))}
    for name, column in spec.columns.items():
        wanted[name] = (column.dtype, (positions, *column.shape))
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    ends_R = arrays["row_ptr"] if found == wanted else np.empty(1)
    wrong = found != wanted or ends_R[0] or ends_R[-1] != positions or (np.diff(ends_R) < 0).any()
    if wrong or (rows is not None and np.count_nonzero(arrays["present"]) != rows):
        raise StoreError(f"{path}: damaged, its arrays are not those that the manifest speaks of")


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """:func:`map_shard` of a file of any content; the metadata has its three entries."""
    try:
        arrays, about = map_shard(path)
        return arrays, {name: about[name] for name in ("store", "shard", "digest")}
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise StoreError(f"{path}: damaged, its header cannot be read ({problem})") from problem


def _refuse_foreign(path: Path, spec: StoreSpec, shard: int, about: Mapping[str, Any]) -> None:
    if about["store"] != spec.fingerprint:
        raise ForeignShard(f"{path}: foreign, it belongs to another store ({about['store']})")
    if about["shard"] != shard:
        raise ForeignShard(f"{path}: foreign, it is shard {about['shard']} of this store")


def _digest(store: str, shard: int, arrays: Mapping[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128(f"{store} {shard}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
