"""Batches reach the device, and numbers the host, without a wait but the one that is meant."""

from typing import NamedTuple

import torch
from torch import Tensor

from dskd.batch import TopKTeacher
from dskd.data.prefetch import prefetch, send
from dskd.system.device import Fetched
from tests.batches import batch_of
from tests.shadow.waits import Watch

DEVICE = torch.device("cuda", 0)
LABELS = torch.tensor([[5, -100, 7], [-100, 8, -100]])


def batch():
    return batch_of(LABELS, columns={"weight": torch.tensor([1.0, 2.0, 3.0])})


def test_a_batch_is_sent_without_a_wait():
    with Watch() as watch:
        sent = send(batch(), DEVICE)
        there = sent.on_device()
    assert not watch.found
    for name in ("ids_BT", "mask_BT", "labels_BT", "positions_N", "labels_N"):
        assert getattr(there, name).is_cuda
        assert getattr(there, name).tolist() == getattr(sent.batch, name).tolist()
    assert there.columns["weight"].is_cuda and there.columns["weight"].tolist() == [1, 2, 3]
    for counted in (there.row_ids_B, there.counts_B, there.lengths_B, *vars(sent.batch).values()):
        assert not (isinstance(counted, Tensor) and counted.is_cuda)


def test_prefetched_ones_are_sent_too():
    with Watch() as watch:
        found = [sent.on_device() for sent in prefetch([batch(), batch()], DEVICE)]
    assert len(found) == 2 and all(each.labels_BT.is_cuda for each in found)
    assert not watch.found


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_what_is_fetched_is_waited_for_once():
    """As what it was, a tuple or a dataclass, with its tensors on the CPU."""
    ones = torch.ones(2, 3, device=DEVICE)
    kept = TopKTeacher(ones.int(), ones, {2.0: ones[:, 0]})
    with Watch() as watch:
        fetched = Fetched(kept), Fetched(Pair(ones * 2, ones.t())), Fetched(torch.ones(2))
        assert not watch.found
        teacher, pair, here = (each.read() for each in fetched)
    ((_, wait),) = watch.found
    assert wait.what == "synchronize of an event"
    assert wait.place.startswith("dskd/system/device.py:")
    assert watch.found.total() == 2  # none for what was on the CPU
    assert teacher.ids_NK.tolist() == [[1] * 3] * 2 and teacher.tail_N[2.0].tolist() == [1, 1]
    assert type(pair) is Pair and pair.first.tolist() == [[2] * 3] * 2
    assert pair.second.tolist() == [[1] * 2] * 3 and here.tolist() == [1, 1]
    assert not any(each.is_cuda for each in (*pair, teacher.logprobs_NK, here))


def test_what_is_fetched_is_as_it_was_when_it_was_asked_for():
    values = torch.ones(2, device=DEVICE)
    fetched = Fetched(values)
    values.zero_()
    assert fetched.read().tolist() == [1, 1]
