"""Files that may be compressed: gzip and Zstandard are unpacked as they are read, others refused.

A file is known by how it begins, whatever it is called.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dskd.data.foreign import raised_as
from dskd.errors import DataError

PACKED_ENDINGS = (".gz", ".zst")
"""What the names of files end with that are found below a folder and unpacked."""
_GZIP = b"\x1f\x8b"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_PACKED = {
    _GZIP: "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    _ZSTANDARD: "zstandard",
    b"\x04\x22\x4d\x18": "LZ4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"PK\x03\x04": "zip",
}
"""How compressed files begin."""


@contextmanager
def readable(where: str) -> Iterator[None]:
    """What cannot be read is refused, by its name."""
    try:
        yield
    except OSError as problem:
        path = "" if problem.filename is None else f"{problem.filename}: "
        raise DataError(f"{where}: {path}cannot be read ({problem.strerror})") from problem


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """A file, open for reading; its content if it is compressed by gzip or Zstandard.

    Raises:
        DataError: it cannot be read, is damaged, or no text, by how it begins.
    """
    with readable("data.sources"), path.open("rb") as stream:
        head = stream.peek(16)
        packed = next((begin for begin in (_GZIP, _ZSTANDARD) if head.startswith(begin)), None)
        if packed is None:
            if (what := packing(head)) is not None:
                raise DataError(f"{path}: not text but {what}")
            yield stream
            return
        with raised_as(DataError, f"{path}: cannot be unpacked"):
            content = _gzip(stream) if packed == _GZIP else _zstandard(stream)
        try:
            with content:
                yield content
        except (EOFError, zlib.error, OSError) as problem:
            if isinstance(problem, OSError) and problem.errno is not None:
                raise  # of the disk
            raise DataError(f"{path}: cannot be unpacked, it is damaged ({problem})") from problem


def _gzip(stream: IO[bytes]) -> IO[bytes]:
    content: Any = gzip.GzipFile(fileobj=stream)
    return content


def _zstandard(stream: IO[bytes]) -> IO[bytes]:
    import pyarrow  # takes a tenth of a second, and few runs need it

    content: Any = pyarrow.CompressedInputStream(stream, "zstd")
    return io.BufferedReader(content)


def packing(head: bytes) -> str | None:
    """What a file is that begins with ``head`` and is no UTF-8 text, and what to do about it."""
    for begin, name in _PACKED.items():
        if head.startswith(begin):
            return f"compressed ({name}); unpack it first"
    return "UTF-16; convert it to UTF-8" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else None
