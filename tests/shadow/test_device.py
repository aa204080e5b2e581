"""The device itself: errors, bytes, waits and collectives are those of a GPU."""

import os
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.shadow.cases import in_fork
from tests.shadow.waits import Watch


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype).to("cuda")


@in_fork
def test_values_and_gradients_are_those_of_the_cpu():
    a, b = on_device(3, 4), on_device(4, 5).requires_grad_()
    (torch.nn.functional.gelu(a @ b) ** 2).sum().backward()
    host = b.detach().cpu().requires_grad_()
    (torch.nn.functional.gelu(a.cpu() @ host) ** 2).sum().backward()
    assert b.grad.is_cuda
    assert torch.equal(b.grad.cpu(), host.grad)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a: a + torch.ones(3),
        lambda a: torch.cat([a, torch.ones(3)]),
        lambda a: a.index_select(0, torch.tensor([0])),
        lambda a: torch.where(torch.ones(3).bool(), a, a),
        lambda a: a.masked_fill(torch.ones(3).bool(), 0.0),
    ],
)
def test_a_cpu_tensor_among_those_of_the_device_is_an_error(mixed):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(on_device(3))


def test_numbers_and_indices_of_the_cpu_are_taken():
    a = on_device(3)
    assert (a * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert a[torch.tensor([2, 0])].tolist() == [2, 0]


def test_counts_bytes():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    a = torch.zeros(1000, device="cuda")
    b = a * 2  # made by a CPU kernel
    assert torch.cuda.memory_allocated() - before == 8000
    c = a.view(10, 100)[2:]  # the same memory
    assert torch.cuda.memory_allocated() - before == 8000
    del a, b
    assert torch.cuda.memory_allocated() - before == 4000
    del c
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 8000


def test_views_share_memory():
    a = on_device(4)
    a.view(2, 2)[1].zero_()
    assert a.tolist() == [0, 1, 0, 0]
    a.resize_(6)[4:] = 7
    assert a.tolist() == [0, 1, 0, 0, 7, 7]


def test_pinned_memory_is_known_while_it_lives():
    a = torch.ones(5)
    pinned = a.pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not a.is_pinned()
    with pytest.raises(RuntimeError, match="pin"):
        on_device(3).pin_memory()


WAITS = {
    "item": lambda a: a.sum().item(),
    "nonzero": lambda a: a.nonzero(),
    "unique": lambda a: a.unique(),
    "equal": lambda a: torch.equal(a, a),
    "repeat_interleave": lambda a: a.repeat_interleave(a.long()),
    "indexing by a mask": lambda a: a[a > 0],
    "copy to the CPU": lambda a: a.cpu(),
    "copy of pageable memory": lambda a: torch.ones(3).to("cuda", non_blocking=True),
    "tensor of Python values": lambda a: torch.tensor(1.0, device="cuda"),
    "torch.cuda.synchronize": lambda a: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_found(what):
    a = on_device(3)
    with Watch() as watch:
        WAITS[what](a)
    ((_, wait),) = watch.found
    assert wait.what == what
    assert wait.place.startswith("tests/shadow/test_device.py:") and not wait.under


@pytest.mark.parametrize(
    "free",
    [
        lambda a, pinned: pinned.to("cuda", non_blocking=True),
        lambda a, pinned: a.to("cpu", non_blocking=True),
        lambda a, pinned: a.index_select(0, a.long()),
        lambda a, pinned: a.repeat_interleave(a.long(), output_size=3),
        lambda a, pinned: a.fill_(2.0).add_(1.0),
        lambda a, pinned: torch.zeros(3, device="cuda"),
        lambda a, pinned: torch.where(a > 1, a, 0.0).sum(),
    ],
)
def test_what_is_no_wait_is_none(free):
    a, pinned = on_device(3), torch.ones(3).pin_memory()
    with Watch() as watch:
        free(a, pinned)
    assert not watch.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_with_an_exact_sum(dtype):
    a, b = (on_device(5, 5, dtype=dtype) / 7 for _ in range(2))
    exact = a.cpu().double() @ b.cpu().double()
    out = torch.empty(5, 5, device="cuda")
    torch.mm(a, b, out_dtype=torch.float32, out=out)
    assert out.cpu().double().numpy() == pytest.approx(exact.numpy(), rel=1e-6)
    torch.addmm(out, a, b, torch.float32, beta=1.0, out=out)
    assert out.cpu().double().numpy() == pytest.approx(2 * exact.numpy(), rel=1e-6)


def _collectives(rank: int) -> list[object]:
    options = {"timeout": timedelta(seconds=60), "device_id": torch.device("cuda", 0)}
    dist.init_process_group("nccl", **options)
    host = dist.new_group(backend="gloo")
    a, b = on_device(3) + rank, torch.ones(2) + rank
    dist.all_reduce(a)
    dist.all_reduce(b, group=host)
    try:
        dist.all_reduce(torch.ones(2))
        refused = ""
    except RuntimeError as problem:
        refused = str(problem)
    gathered = [None, None]
    dist.all_gather_object(gathered, rank)
    return [a.tolist(), b.tolist(), refused, gathered, dist.get_backend(), dist.get_backend(host)]


def test_nccl_takes_tensors_of_the_device_only():
    for sums, others, refused, gathered, *backends in run_ranks(_collectives, world=2):
        assert sums == [1, 3, 5] and others == [3, 3]
        assert "No backend type associated with device type cpu" in refused
        assert gathered == [0, 1]
        assert backends == ["nccl", "gloo"]


def test_the_tests_are_on_the_device():
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert deepspeed.get_accelerator().device_name() == "cuda"
