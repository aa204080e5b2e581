"""Set-up of every test: CPU, one thread, no network, seeded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers and triton look past DS_ACCELERATOR
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import ctypes
import logging
import socket
import sys

import pytest
import torch

torch.set_num_threads(1)
if sys.platform == "linux":
    # M_MMAP_THRESHOLD, which glibc raises by itself: a freed tensor leaves the process, or those
    # tests that measure what a process grows by would get it from the heap, where it stays.
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

_connect = socket.socket.connect


def _local_only(self: socket.socket, address: object) -> None:
    """Let tests reach this machine only."""
    host = address[0] if isinstance(address, tuple) else "local"
    assert host in ("local", "localhost", "::1") or str(host).startswith("127."), (
        f"a test tried to reach {address}"
    )
    _connect(self, address)


socket.socket.connect = _local_only


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whatever ran before."""
    torch.manual_seed(0)
