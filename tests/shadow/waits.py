"""Records every place where the host would wait for a GPU."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
OWN = (ROOT / "dskd", ROOT / "kernels")
CLOSED_FORMS = ROOT / "dskd" / "fused" / "cpu"
"""In whose place a GPU has kernels: what waits there is not counted."""
# No code that runs on a GPU: torch, this device, and the interpreter that stands in for kernels.
_SKIPPED = (
    str(Path(torch.__file__).parent),
    *(str(Path(__file__).with_name(name)) for name in ("device.py", "nccl.py", "waits.py")),
    "<frozen",
)
_INTERPRETER = "triton/runtime/interpreter.py"

_WAITING = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "equal": "equal",
    "is_nonzero": "bool",
    "bincount": "bincount",
}
_INDEXING = ("index", "index_put_", "index_put", "_index_put_impl_")


class Wait(NamedTuple):
    """A place where the host waits.

    Attributes:
        what: it does there.
        place: ``file:line`` of the innermost line outside torch, of dskd or a library.
        under: ``file:line`` of the innermost line of dskd.
    """

    what: str
    place: str
    under: str

    @property
    def own(self) -> bool:
        """Whether it is dskd's to mend: in a line of its own, or in the model that it runs."""
        return bool(self.under) and not self.place.startswith("deepspeed/")


_watches: list["Watch"] = []


def note(what: str) -> None:
    """Count a wait here, if somebody counts."""
    if _watches:
        _watches[-1].note(what)


def noting_numbers(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor``, which copies a number of Python's to a GPU by way of pageable memory."""

    def tensor(data: Any, *args: Any, **options: Any) -> Tensor:
        device = options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            note("tensor of Python values")
        return plain(data, *args, **options)

    return tensor


class Watch(TorchDispatchMode):
    """While active, counts the waits by label, which whoever watches may change."""

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.found: Counter[tuple[str, Wait]] = Counter()

    def __enter__(self) -> "Watch":
        _watches.append(self)
        return super().__enter__()

    def __exit__(self, *problem: object) -> None:
        _watches.remove(self)
        super().__exit__(*problem)

    def note(self, what: str) -> None:
        place = under = ""
        frame = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.endswith(_INTERPRETER) or Path(file).parent == CLOSED_FORMS:
                return
            if not place and not file.startswith(_SKIPPED):
                place = _named(file, frame.f_lineno)
            if not under and any(Path(file).is_relative_to(own) for own in OWN):
                under = _named(file, frame.f_lineno)
            frame = frame.f_back
        self.found[self.label, Wait(what, place, under)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = _wait(func.overloadpacket.__name__, args, kwargs)
        if what:
            self.note(what)
        return func(*args, **kwargs)


def _named(file: str, line: int) -> str:
    *_, installed = file.rpartition("/site-packages/")
    path = Path(installed)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}"


def _wait(name: str, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why an operator waits; empty if it does not."""
    if name == "_to_copy" and kwargs.get("device") is not None:
        to = torch.device(kwargs["device"]).type
        return _copying(args[0], to, kwargs.get("non_blocking", False))
    if name == "copy_" and isinstance(args[1], Tensor):
        later = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return _copying(args[1], args[0].device.type, later)
    if not any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((args, kwargs))):
        return ""
    if name in _INDEXING:
        return _indexing([x for x in args[1] if x is not None])
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    return _WAITING.get(name, "")


def _indexing(by: list[Tensor]) -> str:
    if any(x.dtype in (torch.bool, torch.uint8) for x in by):
        return "indexing by a mask"
    return "" if all(x.is_cuda for x in by) else "indexing by a CPU tensor"


def _copying(source: Tensor, to: str, non_blocking: bool) -> str:
    if source.is_cuda and to == "cpu":
        return "" if non_blocking else "copy to the CPU"
    if source.device.type == "cpu" and to == "cuda" and source.numel():
        return "" if non_blocking and source.is_pinned() else "copy of pageable memory"
    return ""
