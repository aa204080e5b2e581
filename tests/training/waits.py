"""Counts where the host would wait for a GPU, on a CPU: a stand-in for a device's queue.

Parameters, and what a batch is moved to, count as on the device, and so does all that is computed
from them. Reading one of these from Python (``item``, ``tolist``, ``int`` ...) waits until the
device has computed it, and so does an operation whose result has a size that depends on values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).resolve().parents[2] / "dskd"
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}


class HostWaits(TorchDispatchMode):
    """While active, counts waits by the line of dskd that caused them directly; not those of the
    closed forms in ``fused/cpu``, in whose place a GPU has kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self._places: set[int] = set()
        self._kept: list[Any] = []  # so that no storage's address is given away again

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Count these as on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr():  # what is empty has no place
                self._kept.append(storage)
                self._places.add(storage.data_ptr())

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor counts as on the device."""
        return tensor.untyped_storage().data_ptr() in self._places

    def note(self) -> None:
        """Count a wait, if the innermost line outside torch is one of dskd's."""
        frame = sys._getframe(1)
        here = {__file__, torch.__file__.rpartition("/")[0]}
        while frame is not None and any(frame.f_code.co_filename.startswith(h) for h in here):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "fused/cpu"):
            self.lines[f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(self.holds(x) for x in inputs)
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]
        )
        if on_device and (name == "_local_scalar_dense" or name in SIZED_BY_VALUES or masked):
            self.note()
        found = func(*args, **kwargs)
        if on_device:
            self.put(x for x in tree_leaves(found) if isinstance(x, Tensor))
        return found

    def __enter__(self) -> HostWaits:
        # On a CPU these read memory without an operation that a dispatch mode could see.
        self._plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}
        for name, plain in self._plain.items():
            setattr(Tensor, name, self._watched(plain))
        return super().__enter__()

    def __exit__(self, *problem: object) -> None:
        for name, plain in self._plain.items():
            setattr(Tensor, name, plain)
        super().__exit__(*problem)

    def _watched(self, plain: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.holds(tensor):
                self.note()
            return plain(tensor, *args, **kwargs)

        return read
