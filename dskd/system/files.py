"""Files that are whole or absent: atomic writes, checksums, self-checking JSON.

A manifest is a JSON object whose ``checksum`` entry covers every other entry, so that any changed
byte is found; it is written to a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ValidationError

from dskd.errors import DskdError
from dskd.system.disk import writing

Record = TypeVar("Record", bound=BaseModel)

_CHUNK = 1 << 22
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """xxh3-128 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return xxhash.xxh3_128(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, so that a rename inside it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, what: str = "the file") -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one.

    Raises:
        DiskError: it cannot be written; the message names it and says what it is (``what``).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # else half a file keeps the disk full
            raise
        sync_to_disk(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what :func:`write_atomic` left in a folder when it was killed; no other job may be at
    work there."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def is_inside(name: Any) -> bool:
    """Whether a file that a manifest names lies in the manifest's own folder, or below it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts


def write_manifest(path: Path, content: dict[str, Any], what: str = "the manifest") -> None:
    """Write ``content`` as a self-checking JSON file; ``checksum`` must not be one of its keys.

    Raises:
        DiskError: see :func:`write_atomic`.
    """
    assert "checksum" not in content
    write_atomic(path, _manifest_bytes(content), what)


def read_manifest(path: Path, error: type[DskdError]) -> dict[str, Any]:
    """Read a file of :func:`write_manifest`; raise ``error``, naming it, if absent or changed."""
    if not path.is_file():
        raise error(f"{path}: no such file")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: damaged, not readable as JSON ({problem})") from problem
    if not isinstance(content, dict) or "checksum" not in content:
        raise error(f"{path}: damaged, it has no checksum entry")
    del content["checksum"]
    if raw != _manifest_bytes(content):  # catches a changed byte even between the values
        raise error(f"{path}: damaged, its checksum does not match its content")
    return content


def read_record(path: Path, cls: type[Record], error: type[DskdError]) -> Record:
    """Read a file of :func:`write_manifest` that holds a record of the class; raise ``error``,
    naming it, if it is absent or changed, or holds something else."""
    content = read_manifest(path, error)
    try:
        return cls.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"]))
        text = f"{path}: damaged, not as dskd writes it: {place}: {first['msg']}"
        raise error(text) from problem


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    whole = {**content, "checksum": fingerprint(content)}
    return json.dumps(whole, indent=1).encode() + b"\n"
