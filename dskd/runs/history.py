"""What a trained run left about itself: its logged steps, its evaluations, its summary."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.errors import CheckpointError
from dskd.runs.about import About, read_about
from dskd.settings.folders import RunFolder
from dskd.system.log import read_metrics

Points = list[tuple[float, float]]
"""(completed steps, value) pairs, by rising step."""

_TRAINING_KEYS = ("step", "loss", "terms", "lr")
_RATES = ("alpha", "grad_norm", "tokens_per_second", "peak_memory_bytes")
"""Which a line of training may lack."""
_SUMMARY_KEYS = (
    "steps",
    "metric",
    "higher_is_better",
    "tokens_per_second",
    "peak_memory_bytes",
    "wall_seconds",
    "parameters",
)
_GPU_KEYS = ("reserved_memory_bytes",)
"""Of the summary of a run on GPUs."""

_TYPES = {"terms": dict, "metric": str}
"""Of what is no number, among the keys that a file must have."""


@dataclass(frozen=True)
class History:
    """One run: its lines of training and of evaluation by step, its summary, and what it says there
    about itself (None: it is of an earlier dskd)."""

    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    about: About | None

    def evaluated(self, metric: str) -> Points:
        """A result of the evaluations, where they have it."""
        return [(line["step"], line[metric]) for line in self.evaluations if metric in line]

    def rate(self, name: str) -> Points:
        """A number of the training lines, where they have it: no alpha without a teacher."""
        return [(s["step"], s[name]) for s in self.training if s.get(name) is not None]

    def term(self, name: str) -> Points:
        """One loss term, at the steps where it was computed."""
        return [(s["step"], s["terms"][name]) for s in self.training if name in s["terms"]]


def read_history(folder: Path) -> History:
    """Read what the run in ``folder`` left.

    Raises:
        CheckpointError: a file is missing or damaged; it is named, with the line.
    """
    path = RunFolder(folder).metrics
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; has the run been trained?")
    summary = read_summary(folder)
    training, evaluations = [], []
    for number, line in enumerate(read_metrics(path), 1):
        where = f"{path}, line {number}"
        if summary["metric"] in line:
            evaluations.append(_require(line, ("step", summary["metric"]), where))
        else:
            rates = [name for name in _RATES if line.get(name) is not None]
            training.append(_require(line, (*_TRAINING_KEYS, *rates), where))
    if not evaluations:
        raise CheckpointError(f"{path}: no evaluation in it; has the run been trained to its end?")
    return History(training, evaluations, summary, read_about(folder, summary))


def read_summary(folder: Path) -> dict[str, Any]:
    """The ``train/summary.json`` of the run in ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = RunFolder(folder).summary
    summary = read_object(path, _SUMMARY_KEYS)
    return _require(summary, [key for key in _GPU_KEYS if key in summary], str(path))


def steps_to(points: Points, target: float, *, higher_is_better: bool = False) -> float | None:
    """Steps at which a loss first is at or below ``target``, linear between evaluations; or, where
    higher is better, at or above it.

    None if it never is; the first evaluated step if it is there already. Evaluations at which it
    was undefined (nan) are none.
    """
    before: tuple[float, float] | None = None
    for step, loss in points:
        if math.isnan(loss):
            continue
        if loss >= target if higher_is_better else loss <= target:
            if before is None:
                return float(step)
            last_step, last_loss = before
            return last_step + (step - last_step) * (last_loss - target) / (last_loss - loss)
        before = (step, loss)
    return None


def read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON file's object, which has ``keys``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is the run finished?")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as problem:
        raise CheckpointError(f"{path}: damaged, not readable as JSON ({problem})") from problem
    return _require(value, keys, str(path))


def _require(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """``value``, if it is an object that has ``keys``: numbers, but for those in ``_TYPES``."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: damaged, not an object")
    for key in keys:
        if not isinstance(value.get(key), _TYPES.get(key, (int, float))):
            raise CheckpointError(f"{where}: damaged, '{key}' is missing or of the wrong type")
    return value
