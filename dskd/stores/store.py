"""Row-keyed store: some values for every supervised position of every row, in every draw.

A frozen sweep over the data fills it once (the top-k logits of a teacher), training reads it by row
id, so it does not depend on ranks, batches or interruptions. A folder holds::

    manifest.json             what the store is (a StoreSpec) and, once complete, each shard's hash
    shard-00000.safetensors   so many rows of one draw (``shard.py``), draw after draw
    cost.json                 what it cost to make (``cost.py``), where that was written down

A store is complete when it holds the rows that were asked for. When more are, they are added to its
shards; until that is done it is not complete. Rows that are there stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dskd.errors import StoreError
from dskd.stores.manifest import MANIFEST, ShardRecord, read_spec, write_spec
from dskd.stores.shard import (
    ForeignShard,
    StoreSpec,
    check_place,
    check_shard,
    encode_shard,
    held_rows,
    joined_rows,
    map_shard,
    spec_differences,
)
from dskd.system.files import file_hash, remove_temporaries, write_atomic

_OPEN_SHARDS = 128  # each holds a file descriptor
_MEND = f"remove {MANIFEST} beside it and capture again: whole shards are kept"


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def is_complete(
    folder: Path, wanted: StoreSpec, present_DR: NDArray[np.bool_] | None = None
) -> bool:
    """Whether the store is there in full, by the sizes of its shards; they are verified when it is
    opened.

    Args:
        present_DR: bool [draws, rows], which it must hold; None: whatever it holds is enough.

    Raises:
        StoreError: the folder holds another store, its manifest is damaged, or a shard is missing
            or of another size.
    """
    if not (folder / MANIFEST).exists():
        return False
    there, records = read_spec(folder)
    if records is not None:  # then the shards may be of any size
        wanted = replace(wanted, rows_per_shard=there.rows_per_shard)
    _refuse_other(folder, there, wanted)
    if records is None:
        return False
    _check_sizes(folder, there, records, _MEND)
    return present_DR is None or not lacking(folder, there, records, present_DR)


def lacking(
    folder: Path, spec: StoreSpec, records: list[ShardRecord], present_DR: NDArray[np.bool_]
) -> int:
    """How many of some rows, bool [draws, rows], a complete store does not hold.

    Raises:
        StoreError: a shard is damaged.
    """
    count = 0
    for shard, record in enumerate(records):
        draw, begin, end = spec.span(shard)
        wanted_R = present_DR[draw, begin:end]
        # without a number it has what was to be in it, and with as many as there are, all
        if record.rows not in (None, end - begin) and wanted_R.any():
            count += int((wanted_R & ~held_rows(shard_path(folder, shard))).sum())
    return count


class Writer:
    """Fills a store shard by shard; what an interrupted one left whole is kept.

    Every rank has one. Rank 0 calls :meth:`prepare` first and :meth:`finish` last, with all ranks'
    :attr:`records`.
    """

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder = folder
        self.spec = spec
        self.records: dict[int, ShardRecord] = {}
        """The shards that this writer wrote or found whole."""
        self.held: dict[int, NDArray[np.bool_]] = {}
        """Of the whole shards that lack rows, those that they hold."""

    def prepare(self) -> None:
        """Make the folder or check that it holds this store; remove half-written files. The store
        is not complete from now on.

        Raises:
            StoreError: the folder holds another store, or its manifest is damaged.
        """
        begun = False
        if (self.folder / MANIFEST).exists():
            there, records = read_spec(self.folder)
            _refuse_other(self.folder, there, self.spec)
            begun = records is None
        remove_temporaries(self.folder)
        if not begun:
            write_spec(self.folder, self.spec, None)

    def missing(
        self, shards: Iterable[int], present_DR: NDArray[np.bool_] | None = None
    ) -> list[int]:
        """Those of ``shards`` that are still to be written, or lack rows (:attr:`held`); a damaged
        one is removed.

        Args:
            present_DR: as by :func:`is_complete`.

        Raises:
            StoreError: a shard belongs to another store.
        """
        wanting = []
        for shard in shards:
            path = shard_path(self.folder, shard)
            try:
                arrays = check_shard(path, self.spec, shard)
            except ForeignShard:
                raise
            except (StoreError, FileNotFoundError):
                path.unlink(missing_ok=True)
                wanting.append(shard)
            else:
                held_R = arrays["present"].astype(bool)
                about = int(arrays["row_ptr"][-1]), int(held_R.sum())
                draw, begin, end = self.spec.span(shard)
                if present_DR is not None and (present_DR[draw, begin:end] & ~held_R).any():
                    self.held[shard] = held_R
                    wanting.append(shard)
                    continue
                self.records[shard] = ShardRecord(path.stat().st_size, file_hash(path), *about)
        return wanting

    def write_shard(
        self,
        shard: int,
        counts_R: NDArray[np.int64],
        present_R: NDArray[np.bool_],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """Write one shard, whole or not at all; the arguments are those of
        :func:`~dskd.stores.shard.encode_shard`."""
        data = encode_shard(self.spec, shard, counts_R, present_R, columns)
        write_atomic(shard_path(self.folder, shard), data, "a shard of the store")
        about = int(counts_R.sum()), int(present_R.sum())
        self.records[shard] = ShardRecord(len(data), xxhash.xxh3_128(data).hexdigest(), *about)

    def add_rows(
        self,
        shard: int,
        counts_R: NDArray[np.int64],
        present_R: NDArray[np.bool_],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """Write one shard with rows that it lacks, as :meth:`write_shard`; those that it has are
        copied."""
        there = check_shard(shard_path(self.folder, shard), self.spec, shard)
        self.write_shard(shard, *joined_rows(there, counts_R, present_R, columns))

    def finish(self, records: Mapping[int, ShardRecord]) -> None:
        """Declare the store complete.

        Raises:
            StoreError: a shard has gone or changed its size meanwhile.
        """
        in_order = [records[shard] for shard in range(self.spec.shards)]
        _check_sizes(self.folder, self.spec, in_order, _MEND)
        write_spec(self.folder, self.spec, in_order)


class Store:
    """A complete store, verified and memory-mapped for reading.

    Args:
        folder: where it is.
        kind: what it must be.
        expect: fingerprints it must have been made with, by name.
        share: ``(rank, world)``: this process verifies the shards rank, rank + world, ...; the
            ranks together verify all of them (and must agree on the outcome).
        mend: what can be done about a damaged shard; None: capture it again.

    Raises:
        StoreError: it is missing, incomplete, damaged or belongs to something else; the message
            names the file or fingerprint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        expect: Mapping[str, str],
        share: tuple[int, int] = (0, 1),
        mend: str | None = None,
    ) -> None:
        spec, records = read_spec(folder)
        if spec.kind != kind:
            raise StoreError(f"{folder}: holds {spec.kind!r}, not {kind!r}")
        for name, wanted in expect.items():
            if (there := spec.fingerprints.get(name)) != wanted:
                raise StoreError(
                    f"{folder}: made with another {name} (its fingerprint is {there}, this run's "
                    f"{wanted})"
                )
        if records is None:
            raise StoreError(f"{folder}: not complete, its capture was interrupted; run it again")
        self._mend = _MEND if mend is None else mend
        _check_sizes(folder, spec, records, self._mend)
        self.folder = folder
        self.spec = spec
        self.records = records
        """Its shards, as the manifest has them."""
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._map)  # safe in threads
        self.verify(range(share[0], spec.shards, share[1]))

    def verify(self, shards: Iterable[int]) -> None:
        """Read the shards and compare their hashes.

        Raises:
            StoreError: one of them has changed.
        """
        for shard in shards:
            path = shard_path(self.folder, shard)
            record = self.records[shard]
            if file_hash(path) != record.hash:
                raise _unlike(path, self.spec, shard, record, self._mend)
            check_place(path, self.spec, shard, record.positions, record.rows)

    def held(self, shard: int) -> NDArray[np.int64]:
        """The ids of the rows that a shard holds."""
        return self.spec.span(shard)[1] + np.flatnonzero(self._shard(shard)["present"])

    def read(
        self, row_ids_B: NDArray[np.int64], draws_B: NDArray[np.int64], columns: Iterable[str]
    ) -> tuple[NDArray[np.int64], dict[str, np.ndarray]]:
        """The positions of some rows.

        Args:
            row_ids_B: row ids, in any order, repeated or not.
            draws_B: the draw of each.
            columns: names of the columns to read; the others are not touched.

        Returns:
            counts_B, the number of positions of each row, and the columns [sum of counts, ...] in
            the order of the rows.

        Raises:
            StoreError: the store has not got a row; the message names it.
        """
        places = []
        for row, draw in zip(row_ids_B.tolist(), draws_B.tolist(), strict=True):
            if not (0 <= row < self.spec.rows and 0 <= draw < self.spec.draws):
                raise StoreError(
                    f"{self.folder}: no row {row} of draw {draw}, only rows 0 to "
                    f"{self.spec.rows - 1} of draws 0 to {self.spec.draws - 1}"
                )
            place, local = divmod(row, self.spec.rows_per_shard)
            arrays = self._shard(draw * self.spec.shards_per_draw + place)
            if not arrays["present"][local]:
                raise StoreError(f"{self.folder}: row {row} was left out of this store")
            begin, end = arrays["row_ptr"][local : local + 2].tolist()
            places.append((arrays, begin, end))
        counts_B = np.array([end - begin for _, begin, end in places], np.int64)
        found = {}
        for name in columns:
            pieces = [arrays[name][begin:end] for arrays, begin, end in places]
            found[name] = self.spec.columns[name].joined(pieces)
        return counts_B, found

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        return map_shard(shard_path(self.folder, shard))[0]


def shard_arrays(store: Store) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of each shard of a store, in order; only those that are touched are read."""
    for shard in range(store.spec.shards):
        yield map_shard(shard_path(store.folder, shard))[0]


def _refuse_other(folder: Path, there: StoreSpec, wanted: StoreSpec) -> None:
    if found := spec_differences(there, wanted):
        lines = "".join(f"\n  {line}" for line in found)
        raise StoreError(f"{folder}: holds another store; remove it or choose another path{lines}")


def _check_sizes(folder: Path, spec: StoreSpec, records: list[ShardRecord], mend: str) -> None:
    for shard, record in enumerate(records):
        path = shard_path(folder, shard)
        if not path.is_file():
            raise StoreError(f"{path}: missing; {mend}")
        if path.stat().st_size != record.nbytes:
            raise _unlike(path, spec, shard, record, mend)


def _unlike(path: Path, spec: StoreSpec, shard: int, record: ShardRecord, mend: str) -> StoreError:
    """What to say of a shard that is not the one in the manifest."""
    try:
        check_shard(path, spec, shard)
    except ForeignShard as foreign:
        return foreign
    except StoreError:
        pass  # damaged, but how is seen better from outside
    nbytes = path.stat().st_size
    if nbytes < record.nbytes:
        return StoreError(f"{path}: truncated, {nbytes} bytes of {record.nbytes}; {mend}")
    return StoreError(f"{path}: damaged, its bytes are not those that were captured; {mend}")
