"""Parameters that are used outside of their own modules' forward passes, where ZeRO-3 has them
whole: DeBERTa's encoder reads the weight of the embeddings of relative positions itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Reached = tuple[str, int]
"""A parameter, its layers' numbers left out, and how many parts of its name are that of the module
in whose forward pass it is used."""


_OF_NO_VALUE = frozenset({"__get__", "is_floating_point", "is_complex", "size", "dim", "numel"})
"""Functions that ask for a type or a size, which is there at any time."""


def numberless(name: str) -> str:
    """The name of a parameter without the numbers of its layer, expert ..."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


class _Watch(TorchFunctionMode):
    """Notes the parameters that functions are given, and in which modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self.inside: list[str] = []
        self.found: set[Reached] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The function as it is."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in _OF_NO_VALUE:
            for leaf in tree_leaves((args, kwargs)):
                self._note(self._names.get(id(leaf), []))
        return function(*args, **kwargs)

    def _note(self, names: list[str]) -> None:
        if not names or any(name.rpartition(".")[0] in self.inside for name in names):
            return
        name = names[0]
        around = [path for path in self.inside if not path or name.startswith(f"{path}.")]
        longest = max(around, key=len, default="")
        self.found.add((numberless(name), len(longest.split(".")) if longest else 0))


def reached(model: nn.Module, run: Callable[[], Any]) -> frozenset[Reached]:
    """What of a model is reached so in a run of it, which is not compiled."""
    watch = _Watch(model)
    hooks = []
    for path, module in model.named_modules():
        enter = lambda *_, path=path: watch.inside.append(path)  # noqa: E731
        leave = lambda *_: watch.inside.pop() and None  # noqa: E731
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with watch:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(watch.found)
