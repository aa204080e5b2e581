"""Batches on their way to the device, copied beside the work that it does meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dskd.batch import Batch


@dataclass(frozen=True)
class Sent:
    """A batch whose copy to a device has begun.

    Attributes:
        batch: on the CPU.
    """

    batch: Batch
    _moved: Batch
    _arrived: torch.cuda.Event | None

    def on_device(self) -> Batch:
        """The batch there: what the device is given to do from now on waits for it, but not the
        host."""
        if self._arrived is None:
            return self._moved
        stream = torch.cuda.current_stream(self._moved.ids_BT.device)
        stream.wait_event(self._arrived)
        for tensor in tree_leaves(dict(vars(self._moved))):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)  # or its memory is given away while it is still read
        return self._moved


def send(batch: Batch, device: torch.device) -> Sent:
    """Begin to copy a batch of CPU tensors to a device, from whichever thread."""
    if device.type != "cuda":
        return Sent(batch, batch.to(device), None)
    with torch.cuda.stream(_beside(device)):
        moved = batch.pinned().to(device)
        return Sent(batch, moved, torch.cuda.current_stream(device).record_event())


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies, apart from that of the work."""
    return torch.cuda.Stream(device)


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; a thread makes and sends the next one meanwhile.

    Close it where it may not be taken to its end.

    Args:
        batches: on the CPU. What goes wrong in making one is raised where it would have come.
    """
    source = iter(batches)

    def ahead() -> Sent | None:
        batch = next(source, None)
        return None if batch is None else send(batch, device)

    with ThreadPoolExecutor(1, thread_name_prefix="dskd-prefetch") as thread:
        coming = thread.submit(ahead)
        while (sent := coming.result()) is not None:
            coming = thread.submit(ahead)
            yield sent.on_device()
