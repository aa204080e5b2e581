"""All ranks come together before their process group is made, so that the one that is missing, or
the port that is taken, is named: torch would say how many came, after a traceback."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore

from dskd.errors import ConfigError, LostRankError

_PERIOD = 0.05
_NOTICE = 1.0
"""Seconds that rank 0 stays, once it gives up, for the others to learn that it has said why."""


def join(minutes: float) -> Store:
    """Wait until every rank that the launcher describes is here; the store that they share, in
    which ``host/RANK`` is the name of each one's node.

    Raises:
        ConfigError: another program has the port at which the ranks meet.
        LostRankError: a rank is not here after so many minutes.
    """
    end = time.monotonic() + 60 * minutes
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = meeting_place()
    if rank == 0 and not _served_by_launcher():
        _refuse_taken(host, port)
    elif not _reachable(host, port, end):
        raise _nobody(host, port, minutes)
    store = _store(host, port, rank, world, end)
    if store is None:
        raise _nobody(host, port, minutes)
    if store.add(f"dskd/came/{rank}", 1) > 1:
        raise ConfigError(f"{_place(host, port)} is that of another run; {_REMEDY}")
    store.set(f"dskd/host/{rank}", socket.gethostname())
    _wait(store, rank, world, end, minutes)
    return store


_REMEDY = (
    "start this one with another port: `deepspeed --master_port N`, or MASTER_PORT where the "
    "ranks are started otherwise"
)


def meeting_place() -> tuple[str, int]:
    """The address at which the ranks meet, as the launcher wrote it down.

    Raises:
        ConfigError: it is none.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"MASTER_ADDR={host} MASTER_PORT={port}: expected a host and a port")
    return host, int(port)


def _served_by_launcher() -> bool:
    """Whether the launcher listens at that port, as torchrun does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _place(host: str, port: int) -> str:
    return f"MASTER_PORT: port {port} of {host}"


def _refuse_taken(host: str, port: int) -> None:
    """torch says the same, below many lines of its own."""
    try:
        socket.create_server(("", port)).close()
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            text = f"{_place(host, port)} is in use by another program; {_REMEDY}"
        else:
            text = f"{_place(host, port)} cannot be used ({problem.strerror}); {_REMEDY}"
        raise ConfigError(text) from problem


def _reachable(host: str, port: int, end: float) -> bool:
    """Whether anybody listens there before the end."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return True
        except OSError:
            if time.monotonic() > end:
                return False
        time.sleep(_PERIOD)


def _store(host: str, port: int, rank: int, world: int, end: float) -> TCPStore | None:
    """torch's store at that address; None if what listens there is none. In a thread, for against
    another program's port it waits without end, and this process must hear a signal."""
    found: Future[TCPStore] = Future()
    left = timedelta(seconds=max(end - time.monotonic(), 1))
    serves = rank == 0 and not _served_by_launcher()
    options = {"timeout": left, "wait_for_workers": False, "multi_tenant": True}

    def connect() -> None:
        try:
            found.set_result(TCPStore(host, port, world, serves, **options))
        except DistError as problem:
            found.set_exception(problem)

    threading.Thread(target=connect, name="dskd-join", daemon=True).start()
    while not found.done() and time.monotonic() < end:
        wait_for([found], timeout=1)
    if not found.done():
        return None
    try:
        return found.result()
    except DistError as problem:
        first, *_ = str(problem).splitlines()
        raise ConfigError(f"{_place(host, port)}: {first}; {_REMEDY}") from problem


def _wait(store: TCPStore, rank: int, world: int, end: float, minutes: float) -> None:
    hosts = [f"dskd/host/{other}" for other in range(world)]
    try:
        while not store.check(hosts):
            if store.check(["dskd/gave_up"]):
                raise _silent("rank 0 gave up")
            if time.monotonic() > end:
                missing = [other for other in range(world) if not store.check([hosts[other]])]
                if missing:
                    _give_up(store, rank, missing, minutes)
            time.sleep(_PERIOD)
    except DistError as problem:  # the connection to rank 0 is lost
        lost = LostRankError("rank 0 has died while the ranks were started; see its message")
        lost.printed_by_other_rank = rank != 1
        raise lost from problem


def _give_up(store: TCPStore, rank: int, missing: list[int], minutes: float) -> None:
    if rank != 0:
        time.sleep(_NOTICE)
        raise _silent("a rank is missing")
    store.set("dskd/gave_up", "")
    time.sleep(_NOTICE)
    names = ", ".join(map(str, missing))
    which = f"rank {names} has" if len(missing) == 1 else f"the ranks {names} have"
    raise LostRankError(
        f"{which} not come within {minutes:g} minutes (`ranks_timeout`); nothing has begun: mend "
        f"what keeps it from starting, and give the same command"
    )


def _silent(text: str) -> LostRankError:
    """For a rank that leaves the message to rank 0."""
    lost = LostRankError(text)
    lost.printed_by_other_rank = True
    return lost


def _nobody(host: str, port: int, minutes: float) -> LostRankError:
    lost = LostRankError(
        f"rank 0 has not come within {minutes:g} minutes (`ranks_timeout`): it is not at port "
        f"{port} of {host} (MASTER_PORT, MASTER_ADDR); nothing has begun, and the same command "
        f"begins"
    )
    speaks = os.environ["RANK"] == "1" or os.environ["LOCAL_RANK"] == "0"
    lost.printed_by_other_rank = not speaks
    return lost
