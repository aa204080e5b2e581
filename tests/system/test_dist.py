"""Work on rank 0 alone: its value and its errors reach every rank."""

import time

import pytest

from dskd.errors import ConfigError, DiskError
from dskd.system import dist
from tests.ranks import run_ranks


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
