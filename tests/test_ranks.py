"""The test harness itself: ranks talk, and a failing rank fails the test."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum(rank, add):
    value = torch.tensor(float(rank + add))
    dist.all_reduce(value)
    return value.item()


def _fail(rank):
    if rank == 1:
        raise ValueError("rank one is unwell")


def test_ranks_reduce():
    assert run_ranks(_sum, 10) == [21.0, 21.0]


def test_failure_is_reported():
    with pytest.raises(AssertionError, match="rank one is unwell"):
        run_ranks(_fail)
