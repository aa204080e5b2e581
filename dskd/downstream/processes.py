"""Child processes, some at a time, that end with this one and are told of by what they were for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dskd.errors import DskdError
from dskd.system.device import on_gpu
from dskd.system.launcher import STARTED_BY

_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""What a launcher says to ranks, of which a child is none."""
_PERIOD = 0.1


class ChildError(DskdError):
    """A child process failed; says what it was for, and the last it said."""


@dataclass(frozen=True)
class Child:
    """A process to be run.

    Attributes:
        name: what it is for.
        words: of ``python``.
        log: the file of all that it says.
        done: called once it has ended well.
        survives: whether it has done what it was for even though its status is another than 0.
    """

    name: str
    words: Sequence[str]
    log: Path
    done: Callable[[], None]
    survives: Callable[[], bool] = lambda: False


def default_jobs() -> int:
    """How many at a time, where nothing is said: one a GPU, or one."""
    return max(torch.cuda.device_count(), 1) if on_gpu() else 1


def run_all(children: Sequence[Child], at_once: int, say: Callable[[str], None]) -> None:
    """Run the children, so many at a time; if this process is stopped, so are they, which then keep
    what they have saved.

    Raises:
        ChildError: one failed; the others that ran are stopped.
    """
    waiting, running = list(enumerate(children, 1)), {}
    free = list(range(at_once))
    try:
        while waiting or running:
            while waiting and free:
                number, child = waiting.pop(0)
                place = free.pop(0)
                say(f"[{number}/{len(children)}] {child.name}")
                running[_started(child, place, at_once)] = (child, place)
            for process in [p for p in running if p.poll() is not None]:
                child, place = running.pop(process)
                free.append(place)
                if process.returncode and not child.survives():
                    raise ChildError(_told(child, process.returncode))
                child.done()
            time.sleep(_PERIOD)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _started(child: Child, place: int, at_once: int) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    environment[STARTED_BY] = str(os.getpid())
    paths = [str(_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if on_gpu():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
    elif at_once > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // at_once, 1)))
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *child.words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def _told(child: Child, status: int) -> str:
    lines = child.log.read_text(errors="replace").splitlines()
    errors = [n for n, text in enumerate(lines) if text.startswith("error: ")]
    said = "\n".join(lines[errors[-1] :]) if errors else (lines[-1] if lines else "")
    return f"{child.name}: status {status} ({child.log}): {said}"
