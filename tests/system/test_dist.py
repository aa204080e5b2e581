"""Work on rank 0 alone: its value and its errors reach every rank."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

from dskd.errors import ConfigError, DiskError
from dskd.system import dist
from tests.ranks import free_port, run_ranks


def _slow_value(rank):
    return dist.on_rank0(lambda: time.sleep(1.5) or "made")


def _refusal(rank):
    def work():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$") as caught:
        dist.on_rank0(work)
    return caught.value.printed_by_other_rank


def _collective_inside(rank):
    dist.on_rank0(dist.barrier)


def _one_fails(rank):
    with pytest.raises(DiskError) as caught, dist.agreed():
        if rank == 1:
            raise OSError("disk full")
    return str(caught.value), caught.value.printed_by_other_rank


def test_value_on_every_rank():
    assert run_ranks(_slow_value) == ["made", "made"]


def test_error_on_every_rank_told_by_rank_0():
    assert run_ranks(_refusal) == [False, True]


def test_collective_inside_is_a_defect_not_a_hang():
    with pytest.raises(AssertionError, match="a collective inside on_rank0"):
        run_ranks(_collective_inside)


def test_error_of_one_rank_is_told_by_it():
    assert run_ranks(_one_fails) == [("disk full", True), ("disk full", False)]


def _beside_a_silent_group(rank, port):
    """What goes over the host's group where the main one is of a backend that carries nothing."""
    torch_dist.destroy_process_group()
    store = torch_dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    torch_dist.init_process_group("fake", rank=rank, world_size=2, store=store)
    dist.add_host_group(timedelta(seconds=20))
    began = time.monotonic()
    time.sleep(rank * 0.5)
    dist.barrier()
    waited = time.monotonic() - began
    names = dist.gather_objects(f"rank {rank}"), dist.broadcast_object(f"of {rank}")
    made = dist.on_rank0(lambda: f"made by {rank}")
    problem, told = _one_fails(rank)
    found = {
        "waited": waited >= 0.5,
        "names": names,
        "made": made,
        "problem": problem,
        "told": told,
        "host": dist.sum_over_ranks(torch.tensor([1.0 + rank, 0.5])).tolist(),
        # the fake backend leaves what it is given as it is
        "device": dist.sum_over_ranks(torch.ones(3, device="meta")).shape[0],
    }
    dist.leave()
    assert dist.world() == 1 and dist.broadcast_object("alone") == "alone"
    return found


def test_only_what_is_on_a_device_goes_over_a_group_of_another_backend():
    """The main group here carries nothing: a NCCL group would abort a rank that waits in it."""
    both = {
        "waited": True,
        "names": (["rank 0", "rank 1"], "of 0"),
        "made": "made by 0",
        "problem": "disk full",
        "host": [3.0, 1.0],
        "device": 3,
    }
    assert run_ranks(_beside_a_silent_group, free_port()) == [
        both | {"told": True},
        both | {"told": False},
    ]


def _one_group(rank):
    del rank
    dist.add_host_group(timedelta(seconds=20))
    dist.barrier()
    return len(torch_dist.distributed_c10d._world.pg_map)


def test_a_main_group_of_gloo_serves_the_host_too():
    assert run_ranks(_one_group) == [1, 1]
