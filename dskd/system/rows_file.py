"""A file of JSON lines that takes hours to make: begun as ``OUT.part``, gone on with after a kill,
named ``OUT`` when it is whole.

``OUT.settings.json`` says what the rows depend on; it stays, so that the same command finds its
work done, and another one is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from dskd.errors import StoreError
from dskd.settings.parsing import show
from dskd.system import dist
from dskd.system.disk import writing
from dskd.system.files import read_manifest, sync_to_disk, write_manifest
from dskd.system.log import say, write_all


class RowsFile:
    """The file, while it is open (every method is collective; rank 0 writes).

    Args:
        path: the file, when it is whole.
        what: what messages call it.
        made_of: all that the rows depend on, by the name that a user knows; JSON-able.
        total: how many rows a whole one has.
    """

    def __init__(self, path: Path, what: str, made_of: Mapping[str, Any], total: int) -> None:
        self._path, self._what, self._made_of, self._total = path, what, dict(made_of), total
        self._part = path.with_name(f"{path.name}.part")
        self._settings = path.with_name(f"{path.name}.settings.json")
        self._stream: FileIO | None = None
        self._ends: list[int] = []  # where in the file each row that is written ends
        self.complete = False

    def __enter__(self) -> RowsFile:
        """Begin the file, or find how far it is.

        Raises:
            StoreError: it is of something else, damaged, or another process is at it.
            DiskError: it cannot be written.
        """
        try:
            with dist.agreed():
                if dist.rank() == 0:
                    self._open()
        except BaseException:
            self._close()
            raise
        self.complete, self._ends = dist.broadcast_object((self.complete, self._ends))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def keep(self, multiple: int) -> int:
        """How many rows are written; those behind the last multiple are dropped, unless they are
        all there."""
        rows = len(self._ends)
        if rows < self._total:
            rows -= rows % multiple
        self.drop(rows)
        return rows

    def drop(self, rows: int) -> None:
        """Keep the first so many rows alone."""
        self._ends = self._ends[:rows]
        with dist.agreed():
            if self._stream is not None:
                with writing(self._what, self._part):
                    self._stream.truncate(self._ends[rows - 1] if rows else 0)

    def rows(self) -> list[Any]:
        """The rows that are written, read anew (not collective: for rank 0).

        Raises:
            StoreError: one is not JSON; names its line.
        """
        path = self._path if self.complete else self._part
        *lines, _ = path.read_bytes().split(b"\n")
        return _parsed(path, lines)

    def append(self, rows: Iterable[Any]) -> None:
        """Write further rows, all of them or none.

        Raises:
            DiskError: they cannot be written.
        """
        with dist.agreed():
            if self._stream is not None:
                lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
                before = os.fstat(self._stream.fileno()).st_size
                with writing(self._what, self._part):
                    try:
                        write_all(self._stream, b"".join(lines))
                    except OSError:
                        with suppress(OSError):
                            self._stream.truncate(before)
                        raise

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            DiskError: it cannot be written.
        """
        with dist.agreed():
            if self._stream is not None:
                with writing(self._what, self._part):
                    os.fsync(self._stream.fileno())
                    self._part.replace(self._path)
                    sync_to_disk(self._path.parent)
        self.complete = True

    def _open(self) -> None:
        begun = self._path.exists() or (self._part.exists() and self._part.stat().st_size > 0)
        if begun:
            self._refuse_other()
        if self._path.exists():
            self.complete = True
            return
        with writing(self._what, self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("ab", buffering=0)
        self._lock(self._stream)
        self._ends = self._whole_rows()
        write_manifest(self._settings, self._made_of, "what the rows depend on")

    def _refuse_other(self) -> None:
        """Refuse rows that depend on something else."""
        found = self._path if self._path.exists() else self._part
        remedy = "remove it, or name another file"
        if not self._settings.exists():
            raise StoreError(
                f"{found} is there already, without {self._settings.name}, which says what its "
                f"rows are made of; {remedy}"
            )
        theirs = read_manifest(self._settings, StoreError)
        differ = [
            f"{name}: {show(theirs.get(name))}, now {show(self._made_of.get(name))}"
            for name in [*self._made_of, *(theirs.keys() - self._made_of.keys())]
            if theirs.get(name) != self._made_of.get(name)
        ]
        if differ:
            raise StoreError(f"{found} was made otherwise ({'; '.join(differ)}); {remedy}")

    def _lock(self, stream: FileIO) -> None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise StoreError(f"{self._part}: another process writes it") from problem
        except OSError as problem:
            say(f"{self._part}: its file system has no locks ({problem}); start one job at a time")

    def _whole_rows(self) -> list[int]:
        """Where each row ends; a kill may have cut the last one, nothing else may be cut."""
        *lines, _ = self._part.read_bytes().split(b"\n")
        _parsed(self._part, lines)
        if len(lines) > self._total:
            raise StoreError(f"{self._part}: damaged, {len(lines)} rows of {self._total}")
        return list(accumulate(len(line) + 1 for line in lines))

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _parsed(path: Path, lines: Iterable[bytes]) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as problem:
            raise StoreError(f"{path}:{number}: damaged, not JSON ({problem})") from problem
    return rows
