"""The command ``dskd downstream``: models fine-tuned on tasks, and the table of what they score."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dskd.downstream.grid import Grid
from dskd.errors import ConfigError
from dskd.runs import plan
from dskd.runs.downstream import RESULT, print_downstream
from dskd.settings.recipe import read
from dskd.system.files import write_atomic
from dskd.system.locks import alone

USAGE = """usage: dskd downstream FILE.yaml [a.b=value ...]

Fine-tune models on tasks, over rates and seeds, as the section `downstream` of FILE says, which
stands beside the runs of a recipe or, with `out`, alone. Called again, it goes on."""
_STOPPED = 75


def main(words: Sequence[str]) -> int:
    """The command ``dskd downstream FILE [a.b=value ...]``; returns the exit status.

    Writes ``out/downstream.json`` and ``out/report.html``, and prints the table.

    Raises:
        ConfigError: the settings are wrong, or a trial of before is of others.
        ChildError: a trial failed; it is named, with the last that it said.
        DiskError: something cannot be written.
    """
    if {"-h", "--help"} & {*words}:
        print(USAGE)
        return 0
    files = [word for word in words if "=" not in word]
    if len(files) != 1 or files[0].startswith("-"):
        raise ConfigError(f"downstream: one settings file, not {len(files)}\n{USAGE}")
    recipe = read(Path(files[0]), [word for word in words if "=" in word])
    if recipe.downstream is None:
        raise ConfigError(f"{files[0]}: downstream: missing; the section with models and tasks")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(_STOPPED))
    with alone(recipe.out):
        result = _undefined_as_null(Grid(recipe.downstream, recipe.out).carry_out())
        text = json.dumps(result, indent=1, allow_nan=False)
        write_atomic(recipe.out / RESULT, text.encode(), "the scores of tasks")
    print_downstream(result)
    print(f"report: {plan.report_downstream(recipe)}")
    return 0


def _undefined_as_null(value: Any) -> Any:
    """The result with None, which is null in JSON, in the place of nan."""
    if isinstance(value, Mapping):
        return {name: _undefined_as_null(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_undefined_as_null(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
