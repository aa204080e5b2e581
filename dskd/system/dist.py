"""The few things dskd asks of torch.distributed; with one process and no group they do nothing.

What is on a GPU goes over the main group. Everything else, objects, flags and waiting, goes over a
group of gloo: it waits for no device, and one rank that is late or fails is an error there that the
others report, where NCCL would abort them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from dskd.errors import DiskError, DskdError
from dskd.system.disk import reason
from dskd.system.doing import got_on

Value = TypeVar("Value")

_RANK0_THREAD = "dskd-rank0"
"""Name of the thread in which rank 0 works alone: a collective in it would wait for ever."""

_host: list[torch_dist.ProcessGroup] = []
"""The group of gloo, where the main group is another; else the main one serves."""


def add_host_group(timeout: timedelta) -> None:
    """Make the group of what is on the CPU, if the main group is not one itself (collective)."""
    if torch_dist.get_backend() != "gloo":
        _host.append(torch_dist.new_group(backend="gloo", timeout=timeout))


def leave() -> None:
    """Leave all groups."""
    _host.clear()
    torch_dist.destroy_process_group()


def _host_group() -> torch_dist.ProcessGroup | None:
    """The group of what is on the CPU; None: the main one."""
    return _host[0] if _host else None


def _grouped() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 without a group."""
    return torch_dist.get_rank() if _grouped() else 0


def world() -> int:
    """Number of ranks, 1 without a group."""
    return torch_dist.get_world_size() if _grouped() else 1


def _together() -> bool:
    """Whether there are others to take part in a collective."""
    assert not threading.current_thread().name.startswith(_RANK0_THREAD), (
        "a collective inside on_rank0"
    )
    return _grouped()


def barrier() -> None:
    """Wait until every rank is here."""
    if _together():
        torch_dist.barrier(group=_host_group())
        got_on()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum ``value`` over the ranks in place (identical on every rank afterwards); return it. On a
    GPU the host does not wait for the sum."""
    if _together():
        torch_dist.all_reduce(value, group=_host_group() if value.device.type == "cpu" else None)
        got_on()
    return value


class Summing:
    """Numbers of this rank on their way to their sums over the ranks: begun when it is made
    (collective), so that there is other work to do until they are wanted.

    Args:
        values: summed as float64, on the CPU.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(values, dtype=torch.float64)
        self._work: torch_dist.Work | None = None
        if _together():
            self._work = torch_dist.all_reduce(self._values, group=_host_group(), async_op=True)

    def sums(self) -> list[float]:
        """The sums, the same on every rank; waits until all ranks have begun."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            got_on()
        return self._values.tolist()


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` (picklable), on every rank."""
    if not _together():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=_host_group())
    got_on()
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (picklable), by rank, on every rank."""
    if not _together():
        return [value]
    values: list[Any] = [None] * world()
    torch_dist.all_gather_object(values, value, group=_host_group())
    got_on()
    return values


def agree(problem: DskdError | None) -> None:
    """Raise on every rank the first rank's ``problem``, if any rank has one.

    Work that may fail on one rank ends with this, so that the others do not wait for it for ever.
    """
    for where, found in enumerate(gather_objects(problem)):
        if found is not None:
            found.printed_by_other_rank = where != rank()
            raise found


@contextmanager
def agreed() -> Iterator[None]:
    """What goes wrong inside on one rank is raised on all of them, told by one; also a barrier."""
    problem: DskdError | None = None
    try:
        yield
    except DskdError as found:
        problem = found
    except OSError as found:  # a full disk, no right to write: the user's to mend
        named = "" if found.filename is None else f"{found.filename}: "
        problem = DiskError(named + reason(found))
    agree(problem)


def on_rank0(function: Callable[[], Value]) -> Value:
    """Rank 0's ``function()`` on every rank, however long it takes.

    Rank 0 works in a thread and tells the others every second that it is still at it, so that no
    collective waits for longer than the group's timeout. Its error is raised on every rank.
    """
    if world() == 1:
        return function()
    with ThreadPoolExecutor(1, thread_name_prefix=_RANK0_THREAD) as pool:
        work = pool.submit(function) if rank() == 0 else None
        busy = True
        while busy:
            done = wait([work], timeout=1).done if work is not None else ()
            busy = broadcast_object(not done)
        problem = work.exception() if work is not None else None
        if problem is not None and not isinstance(problem, DskdError):
            raise problem  # ours to mend: this rank dies of it, and the launcher ends the rest
        agree(problem)
        return broadcast_object(work.result() if work is not None else None)
