"""What the manifest of a checkpoint says, and that it says nothing else.

A checksum finds what changed by accident; what was edited on purpose has a right one. So every
entry is looked at before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

from dskd.errors import CheckpointError
from dskd.system.files import is_inside

MANIFEST = "manifest.json"
FORMAT = 2
"""Of a checkpoint's manifest; 1 had a loss in the place of a score, and one state for all."""

_KEYS = frozenset(["format", "step", "world", "stage", "precision", "score", "state", "files"])


@dataclass(frozen=True)
class Score:
    """What a checkpoint was evaluated at: the value of one metric, finite, and its direction."""

    metric: str
    value: float
    higher_is_better: bool


@dataclass
class Progress:
    """Where training is; part of every checkpoint."""

    step: int = 0
    """Completed optimiser steps: what schedules and decays are functions of."""
    position: int = 0
    """Optimiser batches read; beyond ``step`` by the steps fp16 overflow skipped."""
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


def name_of(step: int) -> str:
    """The folder of the checkpoint of a step."""
    return f"step-{step:08d}"


def score_of(manifest: dict[str, Any]) -> Score | None:
    """The score that a manifest holds."""
    return None if manifest["score"] is None else Score(**manifest["score"])


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Refuse what is not the manifest of the checkpoint in whose folder it lies.

    Args:
        manifest: its content, whose checksum is right.
        path: of the manifest.

    Raises:
        CheckpointError: names the file and the entry.
    """
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: written by another version of dskd; train again in another `out`"
        )
    for problem in _problems(manifest, path.parent.name):
        raise CheckpointError(f"{path}: damaged, {problem}")


def _problems(manifest: dict[str, Any], name: str) -> Iterator[str]:
    if odd := sorted(manifest.keys() ^ _KEYS):
        yield f"{', '.join(odd)}: missing or unknown"
        return
    entries = {
        "step": _is_count(manifest["step"], 1) and name_of(manifest["step"]) == name,
        "world": _is_count(manifest["world"], 1),
        "stage": _is_count(manifest["stage"], 0) and manifest["stage"] <= 3,
        "precision": manifest["precision"] in ("fp32", "bf16", "fp16"),
        "score": manifest["score"] is None or _is_score(manifest["score"]),
        "state": _is_state(manifest["state"], manifest["step"]),
        "files": isinstance(manifest["files"], dict),
    }
    for key, right in entries.items():
        if not right:
            yield f"its `{key}` cannot be {short(manifest[key])}"
            return
    for file, seal in manifest["files"].items():
        if not is_inside(file):
            yield f"its file {short(file)} is not inside the checkpoint"
        if not _is_seal(seal):
            yield f"its file {short(file)} has {short(seal)} for a size and hash"


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least  # a bool is an int, too


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_score(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in fields(Score)}
        and isinstance(value["metric"], str)
        and _is_number(value["value"])
        and isinstance(value["higher_is_better"], bool)
    )


def _is_state(value: object, step: int) -> bool:
    if not (isinstance(value, dict) and value.keys() == {"progress", "hooks"}):
        return False
    progress, hooks = value["progress"], value["hooks"]
    if not (isinstance(progress, dict) and isinstance(hooks, dict)):
        return False
    return (
        progress.keys() == {field.name for field in fields(Progress)}
        and all(_is_count(progress[key], 0) for key in ("step", "position", "tokens"))
        and all(_is_number(number) and number >= 0 for number in progress.values())
        and progress["step"] == step <= progress["position"]
    )


def _is_seal(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "xxh3"}
        and _is_count(value["bytes"], 0)
        and isinstance(value["xxh3"], str)
    )
