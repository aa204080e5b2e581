"""Names of a foreign model's tensors and HuggingFace's names for them, as tables that are read in
both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dskd.errors import ConfigError

_SHOWN = 6
_WILD = {"{n}": r"(?P<n>0|[1-9][0-9]*)", "{p}": r"(?P<p>weight|bias)"}


class Row(NamedTuple):
    """One line of a table: ``{n}`` stands for a number (a layer), ``{p}`` for weight or bias.

    Attributes:
        theirs: name in the foreign file.
        ours: HuggingFace's name.
        change: what is done to the tensor on the way; None: nothing.
    """

    theirs: str
    ours: str
    change: Callable[[Tensor], Tensor] | None = None


class NameTable:
    """Rows in which no foreign name and no name of HuggingFace is met twice."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self._theirs = [(re.compile(_regex(row.theirs)), row) for row in self.rows]
        self._ours = [(re.compile(_regex(row.ours)), row) for row in self.rows]

    def of_theirs(self, name: str) -> tuple[str, Row] | None:
        """HuggingFace's name for a foreign one, with its row; None: the table has none."""
        for pattern, row in self._theirs:
            if found := pattern.fullmatch(name):
                return row.ours.format(**found.groupdict()), row
        return None

    def of_ours(self, name: str) -> str | None:
        """The foreign name of HuggingFace's; None: the table has none."""
        for pattern, row in self._ours:
            if found := pattern.fullmatch(name):
                return row.theirs.format(**found.groupdict())
        return None


def _regex(pattern: str) -> str:
    text = re.escape(pattern)
    for wild, regex in _WILD.items():
        text = text.replace(re.escape(wild), regex)
    return text


def renamed(state: Mapping[str, Tensor], table: NameTable, where: str) -> dict[str, Tensor]:
    """The tensors of a file by HuggingFace's names, changed as the table says.

    Raises:
        ConfigError: a tensor has no place in the table (it is named with its shape), or holds a
            number that is not finite, or none.
    """
    found, unused = {}, []
    for name, tensor in state.items():
        place = table.of_theirs(name)
        if place is None:
            unused.append(f"{name} {list(tensor.shape)}")
            continue
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            what = f"{tensor.dtype}, {tensor.layout}"
            raise ConfigError(f"{where}: {name} is {what}: codes for numbers, or no weight")
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{where}: {name} holds numbers that are not finite")
        ours, row = place
        found[ours] = tensor if row.change is None else row.change(tensor)
    if unused:
        raise ConfigError(f"{where}: tensors that have no place in the model: {some(unused)}")
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], table: NameTable, where: str) -> None:
    """Put all tensors into a model, each parameter once, rounded to the parameter's dtype.

    Raises:
        ConfigError: one is missing, has another shape than the model, no place in it, or numbers
            beyond its dtype; the message names it as the file does, with both shapes.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    state, missing, wrong = {}, [], []
    for aliases in names.values():
        given = [name for name in aliases if name in tensors]
        if not given:
            first = next((a for a in aliases if table.of_ours(a) is not None), aliases[0])
            missing.append(f"{table.of_ours(first) or first} (HuggingFace's {first})")
            continue
        here, there = tensors[given[0]].shape, model.get_parameter(given[0]).shape
        if here != there:
            theirs = table.of_ours(given[0])
            wrong.append(f"{theirs} is {list(here)}, the other tensors ask for {list(there)}")
        tensor, dtype = tensors[given[0]], model.get_parameter(given[0]).dtype
        if dtype.itemsize < tensor.dtype.itemsize and not bool(tensor.to(dtype).isfinite().all()):
            wrong.append(f"{table.of_ours(given[0])} has numbers beyond {dtype}")
        state |= dict.fromkeys(aliases, tensor)
    if missing:
        raise ConfigError(f"{where}: tensors are missing: {some(missing)}")
    if wrong:
        raise ConfigError(f"{where}: tensors do not fit: {some(wrong)}")
    beyond = [f"{table.of_ours(n)} {list(tensors[n].shape)}" for n in tensors.keys() - state.keys()]
    if beyond:
        raise ConfigError(
            f"{where}: tensors that have no place in the model: {some(sorted(beyond))}"
        )
    model.load_state_dict(state, strict=True)


def shape_of(state: Mapping[str, Tensor], name: str, axes: int, where: str) -> list[int]:
    """The shape of a tensor that sizes are read from.

    Raises:
        ConfigError: it is missing, or has another number of axes.
    """
    if name not in state:
        raise ConfigError(f"{where}: tensors are missing: {name}")
    shape = list(state[name].shape)
    if len(shape) != axes:
        raise ConfigError(f"{where}: {name} is {shape}, expected {axes} axes")
    return shape


def layers_of(state: Iterable[str], pattern: str, where: str) -> int:
    """How many layers the names of a state speak of; ``pattern`` has one ``{n}``.

    Raises:
        ConfigError: none, or one is missing between others.
    """
    regex = re.compile(_regex(pattern) + r"\..*")
    found = {int(match["n"]) for name in state if (match := regex.fullmatch(name))}
    lacking = sorted(set(range(max(found, default=0) + 1)) - found)
    if lacking:
        raise ConfigError(f"{where}: tensors are missing: {pattern.format(n=lacking[0])}.*")
    return len(found)


def some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
