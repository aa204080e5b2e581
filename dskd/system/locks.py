"""A folder held by one job at a time."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from dskd.system import dist
from dskd.system.log import say


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, making it if need be; wait while another job works in it
    (collective). A killed job leaves no lock.

    Raises:
        StoreError: the folder cannot be written.
    """
    with ExitStack() as held:
        handle: TextIO | None = None
        with dist.agreed():
            if dist.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                handle = held.enter_context((folder / ".lock").open("w"))
        waiting = False
        # never blocking: a rank that waits must hear a signal, and the others of it
        while not dist.broadcast_object(handle is None or _locked(handle, folder)):
            if not waiting:
                say(f"waiting: another job is at work in {folder}")
            waiting = True
            time.sleep(1)
        yield
        dist.barrier()


def _locked(handle: TextIO, folder: Path) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        say(f"{folder}: its file system has no locks ({problem}); start one job at a time")
    return True
