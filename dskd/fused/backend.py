"""Which implementation of the row functions runs: Triton on a GPU, plain torch elsewhere.

Both offer ``dense_rows``, ``label_rows``, ``topk_rows`` and ``mixture_rows`` with one signature and
one meaning; see ``kernels/dense.py`` and ``dskd/fused/logit_loss.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor

from dskd.fused.cpu import dense, mixture, products, topk, vocab_parallel

_PLAIN = {
    "dense": dense,
    "label": dense,
    "topk": topk,
    "mixture": mixture,
    "vocab_parallel": vocab_parallel,
    "compactor": products,
}
_FORCED: ContextVar[bool] = ContextVar("triton_everywhere", default=False)


@contextmanager
def triton_everywhere() -> Iterator[None]:
    """Use the kernels on CPU tensors as well: for tests, in Triton's interpreter."""
    token = _FORCED.set(True)
    try:
        yield
    finally:
        _FORCED.reset(token)


def on_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return tensor.device.type == "cuda" or _FORCED.get()


def row_functions(operation: str, logits_NV: Tensor) -> ModuleType:
    """The module with the row function of an operation, for these logits."""
    if on_triton(logits_NV):
        # Imported when first needed: a machine without a GPU may be without Triton.
        return import_module(f"dskd.kernels.{operation}")
    return _PLAIN[operation]


def implementation(device: torch.device) -> str:
    """What computes the losses on a device, for the log."""
    if device.type != "cuda":
        return f"torch {torch.__version__} ({device.type})"
    return f"Triton {version('triton')} ({torch.cuda.get_device_name(device)})"
