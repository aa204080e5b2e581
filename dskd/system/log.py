"""What a run says while it trains: a progress line and ``metrics.jsonl``, both from rank 0."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dskd.errors import CheckpointError
from dskd.system import dist
from dskd.system.device import on_gpu
from dskd.system.disk import writing
from dskd.system.files import write_atomic

_STATUS = Path("/proc/self/status")
WHAT = "the metrics"
"""What messages call what is written here."""


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if dist.rank() == 0:
        print(text, flush=True)


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of rank 0, if its standard error is a terminal; ``update(done, total)``."""
    console = Console(stderr=True)
    disable = not (dist.rank() == 0 and console.is_terminal)
    with Progress(console=console, disable=disable, transient=True) as progress:
        task = progress.add_task(text)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def peak_memory() -> int:
    """Most bytes held since the last reset: of the GPU by tensors, else of the process."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def used_memory() -> dict[str, int]:
    """:func:`peak_memory`, and on a GPU the most bytes that were reserved for tensors besides, by
    the names that they are logged under. It is the reserve that runs out, and where rows differ in
    width it may be far above what tensors took."""
    used = {"peak_memory_bytes": peak_memory()}
    if on_gpu():
        used["reserved_memory_bytes"] = torch.cuda.max_memory_reserved()
    return used


def memory_text(used: dict[str, int]) -> str:
    """What :func:`used_memory` found, for a reader."""
    peak = used["peak_memory_bytes"]
    reserved = used.get("reserved_memory_bytes", peak)
    more = "" if reserved == peak else f" ({reserved / 2**30:.2f} reserved)"
    return f"{peak / 2**30:.2f} GiB{more}"


def reset_peak_memory() -> None:
    """Count :func:`used_memory` from now on (on a CPU under Linux only)."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with its ``step``.

    Args:
        path: the file; lines after ``step`` are dropped, so that a resumed run repeats none.
        step: completed steps of the checkpoint the run goes on from.

    Raises:
        CheckpointError: a line is damaged; it is named.
        DiskError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        with dist.agreed():
            if dist.rank() == 0 and path.exists():
                lines = read_metrics(path) if step else []
                kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
                write_atomic(path, "".join(kept).encode(), WHAT)

    def write(self, **values: Any) -> None:
        """Append one line (rank 0), whole or not at all.

        Raises:
            DiskError: it cannot be written; on rank 0 alone.
        """
        if dist.rank() != 0:
            return
        with writing(WHAT, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as stream:
                before = os.fstat(stream.fileno()).st_size
                try:
                    write_all(stream, json.dumps(values).encode() + b"\n")
                except OSError:
                    with suppress(OSError):
                        stream.truncate(before)
                    raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a ``metrics.jsonl`` that is written to its end; a kill may cut the last one,
    nothing else may be cut.

    Raises:
        CheckpointError: a line is no JSON object with a ``step``; the message names it.
    """
    *whole, _ = path.read_bytes().split(b"\n")
    values = []
    for number, line in enumerate(whole, 1):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as problem:
            raise CheckpointError(f"{path}, line {number}: not JSON ({problem})") from problem
        step = value.get("step") if isinstance(value, dict) else None
        if type(step) is not int or step < 0:  # a bool is an int, too
            raise CheckpointError(f"{path}, line {number}: damaged, not an object with a `step`")
        values.append(value)
    return values


def write_all(stream: FileIO, data: bytes) -> None:
    """Write all of ``data``: an unbuffered stream may take a part of it and fail at the rest."""
    while data:
        data = data[stream.write(data) :]


def progress_line(
    step: int, steps: int, values: dict[str, float | None], *, tokens_per_second: float, left: float
) -> str:
    """One line of progress: step, terms and rates, tokens/s, memory, time left in seconds."""
    shown = " ".join(f"{k} {_short(v)}" for k, v in values.items() if v is not None)
    return (
        f"step {step:{len(str(steps))}d}/{steps}  {shown}  {tokens_per_second:,.0f} tok/s  "
        f"{memory_text(used_memory())}  {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _short(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"
