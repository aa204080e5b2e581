"""What other libraries raise on files of any content, as one error of ours with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dskd.errors import DskdError

_LONGEST = 500
"""Most characters of a reason: some libraries put what they could not read into it."""


@contextmanager
def raised_as(error: type[DskdError], problem: str) -> Iterator[None]:
    """Raise whatever goes wrong inside as ``error``: ``problem``, and the reason in brackets.

    For calls of other libraries only: an exception of our own code is a defect, and its traceback
    is wanted.
    """
    try:
        yield
    except DskdError:
        raise
    except BaseException as found:
        # A panic of a Rust library is no Exception; the other ones that are none are not ours.
        if not isinstance(found, Exception) and type(found).__module__ != "pyo3_runtime":
            raise
        raise error(f"{problem} ({reason(found)})") from found


def reason(problem: BaseException) -> str:
    """Why a call failed, with the causes that the library names: often only the last one says."""
    parts: list[str] = []
    cause: BaseException | None = problem
    while cause is not None and len(parts) < 5:
        text = " ".join(str(cause).split())
        plain = type(cause) is Exception or isinstance(cause, OSError | ValueError)
        if not plain or not text:  # the text of a KeyError says nothing without its name
            text = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
        if not any(text in part for part in parts):
            parts.append(text[:_LONGEST])
        cause = cause.__cause__
    return "; ".join(parts)
