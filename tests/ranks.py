"""Run a function on several gloo ranks, forked from the test process (about 0.3 s a call).

The parent imports torch, DeepSpeed and transformers once; each child sets its rank, joins the
group, runs the function and reports its value or traceback. Values must be picklable.
"""

import gc
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed

# Imported once before the fork, or each child would: seconds a test.
import deepspeed.compile.backend
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import transformers  # noqa: F401
from deepspeed import ops as deepspeed_ops

import dskd.runs.plan  # noqa: F401
from dskd.system.device import on_gpu

# The CPU communication op is compiled with g++ at start-up and hangs on a stale lock: never use it.
deepspeed_ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 120
) -> list:
    """Call ``function(rank, *args)`` on ``world`` ranks; return their values by rank.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or took too long.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    port = free_port()
    children = [
        context.Process(target=_child, args=(rank, world, port, function, args, results))
        for rank in range(world)
    ]
    gc.freeze()  # or each child's first collection walks all that the parent imported
    for child in children:
        child.start()
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(values) < world:
            try:
                rank, failed, value = results.get(timeout=0.2)
            except queue.Empty:
                dead = [c.exitcode for c in children if c.exitcode not in (None, 0)]
                assert not dead, f"a rank died with exit status {dead}"
                assert time.monotonic() < deadline, f"ranks did not end in {timeout} s"
                continue
            assert not failed, f"rank {rank}:\n{value}"
            values[rank] = value
    finally:
        for child in children:
            child.kill()
            child.join()
    return [values[rank] for rank in range(world)]


def be_rank(rank: int, world: int, port: int) -> None:
    """Set this process up as a launcher does a rank."""
    same = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    same |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(world))
    os.environ |= same | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def _child(
    rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, results: Any
) -> None:
    be_rank(rank, world, port)
    try:
        if not on_gpu():  # else the user's command joins by itself
            deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
        results.put((rank, False, function(rank, *args)))
    except BaseException:
        results.put((rank, True, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)
