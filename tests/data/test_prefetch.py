"""Batches that are made and sent ahead: in order, one ahead, and with their own errors."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from dskd.batch import Batch
from dskd.data.prefetch import prefetch
from dskd.errors import StoreError
from tests.batches import batch_of

CPU = torch.device("cpu")


def batch(row: int) -> Batch:
    return batch_of(torch.tensor([[row]]), row_ids_B=torch.tensor([row]))


def rows(batches: Iterator[Batch]) -> list[int]:
    return [each.row_ids_B.item() for each in batches]


def test_all_come_in_order():
    assert rows(prefetch(map(batch, range(5)), CPU)) == [0, 1, 2, 3, 4]
    assert rows(prefetch([], CPU)) == []


def test_the_next_one_is_made_by_another_thread_meanwhile():
    made = [threading.Event() for _ in range(4)]
    threads = set()

    def make(row: int) -> Batch:
        threads.add(threading.current_thread())
        made[row].set()
        return batch(row)

    for row, _ in enumerate(prefetch(map(make, range(3)), CPU)):
        # without the next one being asked for
        assert row == 2 or made[row + 1].wait(timeout=10)
        assert not made[row + 2 if row < 2 else 3].is_set()
    assert threading.main_thread() not in threads


def test_an_error_comes_in_the_place_of_its_batch():
    def make(row: int) -> Batch:
        if row == 2:
            raise StoreError("row 2 is damaged")
        return batch(row)

    taken = []
    with pytest.raises(StoreError, match=r"^row 2 is damaged$"):
        for each in prefetch(map(make, range(5)), CPU):
            taken.append(each.row_ids_B.item())
    assert taken == [0, 1]


def test_closed_early_its_thread_ends():
    with closing(prefetch(map(batch, range(100)), CPU)) as batches:
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("dskd-prefetch")]
