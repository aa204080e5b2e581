"""Files of ``torch.save`` opened without running anything that lies in them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor, nn

from dskd.data.foreign import raised_as
from dskd.errors import ConfigError

_CHUNK = 1 << 22
_ZIP = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL ([\w.<>]+)")
_REASON = re.compile(r"WeightsUnpickler error: (.*)")


class _Inert:
    """Stands for an object of fairseq's that nobody needs; it keeps nothing of what it is given."""

    def __setstate__(self, state: Any) -> None:
        pass


class _AverageMeter(_Inert):
    pass


class _TimeMeter(_Inert):
    pass


class _StopwatchMeter(_Inert):
    pass


FAIRSEQ: tuple[Any, ...] = (
    argparse.Namespace,
    (_AverageMeter, "fairseq.meters.AverageMeter"),
    (_TimeMeter, "fairseq.meters.TimeMeter"),
    (_StopwatchMeter, "fairseq.meters.StopwatchMeter"),
    # Numpy's numbers (`best`, `val_loss`), by the names of numpy 1 and 2.
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
)
"""All that a fairseq checkpoint may name beside tensors and containers. What is here is made by
``weights_only`` loading; fairseq itself is not needed."""


def opened(path: Path, allowed: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The dictionary that a file of ``torch.save`` holds, its tensors on the CPU.

    A zip file is mapped into memory; a file of a torch before 1.6 is read whole.

    Args:
        allowed: classes and functions that the file may name (``torch.serialization.safe_globals``)
            beyond what torch itself holds for safe.

    Raises:
        ConfigError: there is no such file, it is damaged, names anything else (which is not run),
            or holds no dictionary.
    """
    if path.is_dir():
        inside = sorted(str(p.relative_to(path)) for p in path.rglob("*.pt"))
        hint = f"; name one of its files: {', '.join(inside[:6])}" if inside else ""
        raise ConfigError(f"{path} is a folder, not a file of weights{hint}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with (
        raised_as(ConfigError, f"{path} is damaged, or no file of torch"),
        torch.serialization.safe_globals(list(allowed)),
    ):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as problem:
            raise ConfigError(f"{path}: {_refusal(str(problem))}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _is_zip(path: Path) -> bool:
    """As torch tells: not by what a zip file ends with, which raw numbers may be, too."""
    with path.open("rb") as stream:
        return stream.read(len(_ZIP)) == _ZIP


def _refusal(message: str) -> str:
    """Why an unpickler stopped, without torch's advice to switch it off."""
    if named := _GLOBAL.search(message):
        hint = ""
        if named[1].startswith("omegaconf."):
            hint = (
                '; where it was made, save {"model": state["model"], "args": '
                'argparse.Namespace(**state["cfg"]["model"])} and convert that'
            )
        return (
            f"it names {named[1]}, which no weights need, and is not opened: whatever such a name "
            f"stands for could run{hint}"
        )
    found = _REASON.search(message)
    why = " ".join((found[1] if found else message).split())[:200]
    return f"it is damaged, or holds what no weights need, and is not opened ({why})"


def tensors_of(content: Any, what: str) -> dict[str, Tensor]:
    """A state dict whose entries are all tensors by name.

    Raises:
        ConfigError: something else is among them; it is named.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{what} holds no tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            raise ConfigError(f"{what}: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(content)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
