"""A file of whole tensors by parameter, of which each rank reads the pieces that it holds.

Written by any number of ranks and read by any, at any ZeRO stage. It is a safetensors file of flat
fp32 tensors. Its metadata says what kind of values they are, what they were made of (fingerprints),
the shapes of the parameters, and holds a digest of all of that and of the values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dskd.data.foreign import raised_as
from dskd.engine.shards import Shard
from dskd.engine.zero import full_shape
from dskd.errors import StoreError
from dskd.system import dist
from dskd.system.disk import writing
from dskd.system.files import remove_temporaries, sync_to_disk

_METADATA = "dskd"  # one key: safetensors does not keep the order of several
_KEYS = frozenset(["kind", "fingerprints", "shapes", "digest"])


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    fingerprints: Mapping[str, str],
) -> None:
    """Write the file, whole or not at all; rank 0 does it (collective).

    Args:
        path: a file that is there is replaced; no other job may be at work in its folder.
        tensors: whole ones by parameter, on the CPU; stored in fp32.
        kind: what the values are.
        fingerprints: of everything that they depend on, by name.

    Raises:
        DiskError: it cannot be written; on every rank.
    """
    with dist.agreed():
        if dist.rank() == 0:
            with writing(f"the file of each weight's {kind}", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_temporaries(path.parent)
                _write(path, tensors, kind, dict(fingerprints))


def _write(
    path: Path, tensors: Mapping[str, Tensor], kind: str, fingerprints: dict[str, str]
) -> None:
    flat = {name: tensor.detach().float().flatten() for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    about: dict[str, Any] = {"kind": kind, "fingerprints": fingerprints, "shapes": shapes}
    about["digest"] = _digest(about, (flat[name] for name in shapes))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(flat, temporary, {_METADATA: json.dumps(about)})
        sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # else half a file keeps the disk full
        raise
    sync_to_disk(path.parent)


def _digest(about: Mapping[str, Any], values: Iterable[Tensor]) -> str:
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for value in values:
        digest.update(value.numpy())
    return digest.hexdigest()


class WholeTensors:
    """A file of :func:`write_tensors`, verified.

    Rank 0 reads it whole once; the others then need not (collective).

    Args:
        path: where it is.
        kind: what its values must be.
        expect: fingerprints that it must have been made with, by name.

    Raises:
        StoreError: it is missing, damaged, or belongs to something else; on every rank.
    """

    def __init__(self, path: Path, *, kind: str, expect: Mapping[str, str]) -> None:
        self.path = path
        self.shapes: dict[str, torch.Size] = dist.on_rank0(lambda: _checked(path, kind, expect))
        """Of the parameters, by name."""

    def check_model(self, model: nn.Module) -> None:
        """Refuse a file that has other parameters than a model (sharded or not).

        Raises:
            StoreError: names the first parameter that differs.
        """
        shapes = {n: full_shape(p) for n, p in model.named_parameters() if p.requires_grad}
        for name in sorted(shapes.keys() | self.shapes.keys()):
            here, there = self.shapes.get(name), shapes.get(name)
            if here != there:
                have = "none" if here is None else f"one of {[*here]}"
                want = "none" if there is None else f"one of {[*there]}"
                raise StoreError(
                    f"{self.path}: of another model: it has {have} for {name}, the student {want}"
                )

    def piece(self, shard: Shard) -> Tensor:
        """The values at the entries that this rank holds of a parameter: fp32 [piece], on the CPU;
        only they are read."""
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice(shard.name)
            return stored[shard.start : shard.start + len(shard.weight)]

    def whole(self, name: str) -> Tensor:
        """The values of a whole parameter, in its shape, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name).view(self.shapes[name])


def _checked(path: Path, kind: str, expect: Mapping[str, str]) -> dict[str, torch.Size]:
    """The shapes that a file holds, if all of it is right."""
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    with raised_as(StoreError, f"{path}: damaged"):
        file: Any = safe_open(path, framework="pt")
        about = json.loads((file.metadata() or {}).get(_METADATA, "null"))
    if not (isinstance(about, dict) and about.keys() == _KEYS):
        raise StoreError(f"{path}: holds no values of weights")
    shapes = _shapes(file, about)
    digest = about.pop("digest")
    if shapes is None or digest != _digest(about, (file.get_tensor(name) for name in shapes)):
        raise StoreError(f"{path}: damaged, its digest does not match its content")
    if about["kind"] != kind:
        raise StoreError(f"{path}: holds each weight's {about['kind']}, not its {kind}")
    for name, wanted in expect.items():
        if (there := about["fingerprints"].get(name)) != wanted:
            raise StoreError(
                f"{path}: made with another {name} (its fingerprint is {there}, this run's "
                f"{wanted})"
            )
    return shapes


def _shapes(file: Any, about: Mapping[str, Any]) -> dict[str, torch.Size] | None:
    """The shapes in the metadata; None where they are not those of the tensors."""
    shapes, names = about["shapes"], {*file.keys()}
    if not (isinstance(shapes, dict) and shapes.keys() == names):
        return None
    for name, shape in shapes.items():
        part = file.get_slice(name)
        is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not is_shape or part.get_dtype() != "F32" or part.get_shape() != [math.prod(shape)]:
            return None
    return {name: torch.Size(shape) for name, shape in shapes.items()}
