"""What keeps a file from being written, named in one way, whichever library found it."""

from __future__ import annotations

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dskd.errors import DiskError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file may not be that large here (see ulimit -f)",
    errno.EROFS: "it is read-only",
    errno.EACCES: "there is no right to write there",
    errno.EPERM: "there is no right to write there",
}
_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) end a message, whatever the exception's class."""

_MORE = bytes(1 << 16)


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Inside, ``path`` is written: a file, or a folder with all that is in it.

    Args:
        what: what that is, for the message: "the checkpoint".

    Raises:
        DiskError: it cannot be written. What goes wrong with files elsewhere, and what has nothing
            to do with the disk, is raised as it is.
    """
    try:
        yield
    except OSError as problem:
        if _is_elsewhere(problem, path):
            raise
        raise DiskError(f"{path}: cannot write {what}: {reason(problem)}") from problem
    except Exception as problem:  # of libraries, which have no class for it
        found = _hidden(problem, path)
        if found is None:
            raise
        raise DiskError(f"{path}: cannot write {what}: {reason(found)}") from problem


def reason(problem: OSError) -> str:
    """Why something cannot be written, in words."""
    number = problem.errno
    if number is None:
        return str(problem)
    text = os.strerror(number)
    return f"{_REASONS[number]} ({text})" if number in _REASONS else text


def _is_elsewhere(problem: OSError, path: Path) -> bool:
    """Whether a file is named that is neither in ``path`` nor beside or above it."""
    name = problem.filename
    if not isinstance(name, str | bytes) or problem.errno == errno.ENOSPC:
        return False
    named = Path(os.path.abspath(os.fsdecode(name)))
    own = Path(os.path.abspath(path))
    return not (named.is_relative_to(own.parent) or own.is_relative_to(named))


def _hidden(problem: Exception, path: Path) -> OSError | None:
    """The error of the disk behind a library's own, if there is one."""
    if number := _RUST.search(str(problem)):
        return OSError(int(number[1]), "")
    return _found_out(path) if isinstance(problem, RuntimeError) else None


def _found_out(path: Path) -> OSError | None:
    """Why nothing more can be written to ``path``: torch, which writes in C++, does not say."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = path.rglob("*") if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if limit != resource.RLIM_INFINITY and max(sizes, default=0) >= limit:
        return OSError(errno.EFBIG, "")
    folder = path if path.is_dir() else path.parent  # which may be where a disk begins
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:  # without a name, if a kill comes here
            stream.write(_MORE)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as found:
        return found
    return None
