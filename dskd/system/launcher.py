"""Ranks whose launcher has died stop by themselves, as if it had passed on a SIGTERM; so do
processes that another one here started for a part of its work.

Nothing else would end them: they would keep their GPUs, and their folder's lock, until they are
done. The parent is looked at once a second, and not waited for by the kernel's parent-death signal:
that one also comes when only the thread ends that started the ranks, and never when the process
above the parent dies (``deepspeed`` starts ``deepspeed.launcher.launch``, which starts the ranks).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

GRACE = 20.0
"""Seconds that a rank has to save its step once its launcher is gone."""

STARTED_BY = "DSKD_STARTED_BY"
"""Variable by which a process tells those that it starts, and that are to end with it, its id."""

_PROGRAMS = {"deepspeed", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}
_PERIOD = 1.0


def stop_with_launcher(status: int) -> None:
    """From now on, stop this process when the launcher that started it dies: by SIGTERM to itself,
    and after :data:`GRACE` by leaving with ``status``. A process without ``RANK`` and
    ``LOCAL_RANK`` in its environment was started by no launcher, and is left alone, but for one
    with :data:`STARTED_BY`."""
    if {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        chain = [os.getpid(), *_launchers(os.getppid())]
    elif STARTED_BY in os.environ:
        chain = [os.getpid(), int(os.environ[STARTED_BY])]  # which may be gone by now
    else:
        return
    threading.Thread(target=_watch, args=(chain, status), name="dskd-launcher", daemon=True).start()


def _watch(chain: list[int], status: int) -> None:
    while all(_parent(child) == parent for child, parent in pairwise(chain)):
        time.sleep(_PERIOD)
    rank = os.environ.get("LOCAL_RANK")
    if rank in (None, "0"):
        who = b"the launcher of this run has died; its ranks stop\n"
        # In one write and without Python's stream, whose lock the main thread may hold.
        with suppress(OSError):  # a pipe that the launcher read
            os.write(2, who if rank else b"what started this process has died; it stops\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(status)


def _launchers(parent: int) -> list[int]:
    """The process that started this one, and those above it that are DeepSpeed's own: the user's
    shell may end before the run does."""
    chain = [parent]
    while above := _parent(chain[-1]):
        if not _is_deepspeed(above):
            break
        chain.append(above)
    return chain


def _parent(pid: int) -> int | None:
    """The parent of a process; None if the process is gone, or may not be looked at."""
    if pid == os.getpid():
        return os.getppid()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # after the name, which may hold anything


def _is_deepspeed(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # the program, or what an interpreter runs: python [-u] [-m] NAME
    return bool({os.path.basename(os.fsdecode(word)) for word in words[:4]} & _PROGRAMS)
