"""Whether a rank waits for others or hangs by itself, from where its main thread stands."""

import threading
import time

from dskd.system import dist
from dskd.system.doing import Beat, here
from tests.ranks import run_ranks


def _seen(work) -> Beat:
    """This process's beat a moment after its main thread has begun some work."""
    found: list[Beat] = []
    watcher = threading.Timer(0.2, lambda: found.append(here(0.0)))
    watcher.start()
    work()
    watcher.join()
    return found[0]


def _beside_a_late_rank(rank):
    """The beats of rank 0 in collectives that rank 1 joins late, and of rank 1 meanwhile."""
    counts = dist.Summing([1.0])
    beats = []
    for collective in (dist.barrier, lambda: dist.Summing([1.0]).sums()):
        beats.append(_seen(collective if rank == 0 else lambda: time.sleep(0.5)))
        if rank == 1:
            collective()
    assert counts.sums() == [2.0]
    return [(beat.waits, beat.place.partition(":")[0]) for beat in beats]


def test_who_waits_and_who_keeps_the_others_waiting():
    waits, hangs = (True, "system/dist.py"), (False, "an unknown place")
    assert run_ranks(_beside_a_late_rank) == [[waits, waits], [hangs, hangs]]
