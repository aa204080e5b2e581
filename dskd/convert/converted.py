"""What every conversion gives, and the folder that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dskd.convert.loading import sha256
from dskd.convert.names import NameTable, fill
from dskd.data.foreign import raised_as
from dskd.errors import ConfigError
from dskd.models.build import construct
from dskd.models.families import tie_head_bias
from dskd.models.heads import ObjectiveName
from dskd.models.writing import export

AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)

_TERMS = (
    "Released weights have terms of their own, which a conversion does not change: see where the "
    "source file comes from."
)


@dataclass(frozen=True)
class Converted:
    """A foreign model in HuggingFace's form.

    Attributes:
        model: in the dtype it is stored in.
        tokenizer: None if none could be made.
        objective: what its head is for.
        source: what the card tells of the file, by name.
        notes: lines for the user: what was left out, what was not given.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    objective: ObjectiveName
    source: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def config_with(cls: type[AnyConfig], where: str, **fields: Any) -> AnyConfig:
    """A config of HuggingFace's.

    Raises:
        ConfigError: it refuses a value, which the file's own settings have.
    """
    with raised_as(ConfigError, f"{where}: its settings make no {cls.__name__}"):
        return cls(**fields)


def model_with(
    config: PreTrainedConfig,
    objective: ObjectiveName,
    tensors: dict[str, Tensor],
    table: NameTable,
    where: str,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model of a config, every parameter from the tensors and every tensor used.

    Raises:
        ConfigError: see :func:`~dskd.convert.names.fill`.
    """
    model = construct(config, "auto", None, dtype, where, objective)
    tie_head_bias(model)
    fill(model, tensors, table, where)
    return model.eval()


def refuse_existing(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: names it.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists; a conversion writes a folder of its own")


def write(converted: Converted, kind: str, source: Path, out: Path) -> None:
    """Write a conversion as a run's ``export/`` is: whole or absent.

    Raises:
        ConfigError: the folder exists.
        DiskError: it cannot be written.
    """
    refuse_existing(out)
    about = {"kind": kind, "file": source.name, "sha256": sha256(source), **converted.source}
    card = {
        "title": f"A {type(converted.model).__name__} converted by dskd from {kind}",
        "source": about,
        "terms": _TERMS,
    }
    export(converted.model, converted.tokenizer, out, card=card)


def heads_of(given: int | None, named: Any, hidden: int, where: str, name: str) -> int:
    """The number of attention heads, which no tensor tells: of ``--heads``, or the file's settings.

    Raises:
        ConfigError: neither says it, they contradict each other, or it does not divide the width.
    """
    if named is not None and (isinstance(named, bool) or not isinstance(named, int) or named < 1):
        raise ConfigError(f"{where}: {name} is {named!r}, no number of heads")
    if given is None and named is None:
        raise ConfigError(
            f"{where}: no tensor tells the number of attention heads, nor is there {name}; give "
            "--heads N"
        )
    if None not in (given, named) and given != named:
        raise ConfigError(f"--heads is {given}, {name} of {where} {named}")
    heads = named if given is None else given
    assert heads is not None
    if heads < 1 or hidden % heads:
        raise ConfigError(f"{where}: {heads} heads do not divide its width of {hidden}")
    return heads
