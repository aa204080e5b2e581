"""This rank's pieces of several gradients: their products over all ranks, and how they are kept.

A piece is what a :class:`~dskd.engine.shards.Shard` holds of one parameter's gradient, so the same
code serves every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dskd.engine.shards import ParameterShards
from dskd.errors import CheckpointError
from dskd.system import dist

Pieces = Mapping[str, Tensor]
"""One gradient's pieces by parameter, each flat and in the dtype that DeepSpeed sums in."""

_AT_ONCE = 1 << 22
"""Entries of a piece of which there is a float64 copy at one time."""


def held_pieces(weights: ParameterShards) -> dict[str, Tensor]:
    """The gradient that the engine holds, in its own memory, without parameters that have none."""
    found = {shard.name: shard.gradient for shard in weights.shards()}
    return {name: piece for name, piece in found.items() if piece is not None}


def gram_of(gradients: Sequence[Pieces], weights: ParameterShards) -> Tensor:
    """Inner products of all pairs of n gradients, float64 [n, n], the same on every rank.

    Local products and one all-reduce of n^2 numbers (collective); none at ZeRO-0, where every rank
    holds all of every gradient.

    Args:
        gradients: with the pieces of the same parameters.
        weights: of which they are the gradients.
    """
    size = len(gradients)
    # Where the model computes, though offloaded pieces lie elsewhere: a rank that holds none at all
    # takes part in the same all-reduce.
    gram = torch.zeros(size, size, dtype=torch.float64, device=weights.device)
    for name, first in gradients[0].items():
        for begin in range(0, len(first), _AT_ONCE):
            parts = [pieces[name][begin : begin + _AT_ONCE].double() for pieces in gradients]
            stacked = torch.stack(parts)
            gram += (stacked @ stacked.T).to(gram.device)
    return dist.sum_over_ranks(gram) if weights.spread else gram


def save_pieces(folder: Path, gradients: Sequence[Pieces], starts: Mapping[str, int]) -> None:
    """Write this rank's pieces of some gradients into a checkpoint's folder, a file a rank.

    Args:
        starts: where in its parameter each piece begins.
    """
    tensors = {
        f"{number}:{starts[name]}:{name}": piece
        for number, pieces in enumerate(gradients)
        for name, piece in pieces.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"gradients-{dist.rank():05d}.safetensors")


def has_pieces(folder: Path) -> bool:
    """Whether :func:`save_pieces` wrote anything there."""
    return any(_files(folder))


def load_pieces(folder: Path, count: int, weights: ParameterShards) -> list[dict[str, Tensor]]:
    """What of ``count`` gradients belongs to this rank, whatever the number of ranks and the ZeRO
    stage that wrote them.

    Raises:
        CheckpointError: the files do not hold all of it.
    """
    shards = {s.name: s for s in weights.shards() if s.gradient is not None}
    found = [
        {name: torch.empty_like(s.gradient) for name, s in shards.items()} for _ in range(count)
    ]
    missing = count * sum(len(shard.weight) for shard in shards.values())
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dict
                number, start, name = key.split(":", 2)
                if name not in shards:
                    continue
                stored, own = file.get_slice(key), shards[name]
                begin = max(int(start), own.start)
                end = min(int(start) + stored.get_shape()[0], own.start + len(own.weight))
                if begin < end:
                    part = stored[begin - int(start) : end - int(start)]
                    found[int(number)][name][begin - own.start : end - own.start] = part
                    missing -= end - begin
    if missing:
        raise CheckpointError(f"{folder}: {missing} entries of the kept gradients are missing")
    return found


def _files(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("gradients-*.safetensors")))
