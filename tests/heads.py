"""Logits of teachers' heads, and how much of them exists at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd.batch import ProjectedTeacher, ProjectedTeachers
from dskd.fused import chunking, linear


@torch.no_grad()
def logits_of(signal: ProjectedTeacher | ProjectedTeachers) -> Tensor:
    """A teacher's whole logits [N, V], without padding columns, in the order of the positions."""
    if isinstance(signal, ProjectedTeacher):
        return signal.projection(signal.hidden_NE)[:, : signal.vocabulary]
    logits_NV = torch.cat([logits_of(part) for part in signal.parts])
    return torch.empty_like(logits_NV).index_copy_(0, signal.places_N, logits_NV)


def small_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let a chunk on a CPU have so many tokens at the most."""
    monkeypatch.setattr(chunking, "CPU_BYTES", 0)
    monkeypatch.setattr(chunking, "CPU_LEAST", tokens)


class Largest(TorchDispatchMode):
    """While active, ``elements`` is the size of the largest tensor that an operation made, and
    ``linear_kd`` inside of itself."""

    elements = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        visit = linear.visit

        def seen(*args: Any, **options: Any) -> Any:
            with self:  # which an operator of our own is one operation to
                return visit(*args, **options)

        monkeypatch.setattr(linear, "visit", seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return found
