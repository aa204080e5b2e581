"""``history.jsonl``: which settings of a run were changed while it was trained, when, and at which
step. A run that was not changed has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dskd.errors import CheckpointError
from dskd.settings.compare import on_the_way
from dskd.settings.folders import RunFolder
from dskd.settings.parsing import show
from dskd.settings.run import Run
from dskd.system.files import write_atomic
from dskd.system.log import read_metrics
from dskd.system.markup import html_table

Line = dict[str, Any]
"""``date``, the ``step`` after which it holds, and ``changed``: by name [before, now]."""


def changes_of(before: Run, now: Run) -> dict[str, list[Any]]:
    """The settings that were changed, by name: ``[before, now]``."""
    old, new = on_the_way(before), on_the_way(now)
    return {name: [old[name], new[name]] for name in new if old[name] != new[name]}


def note(folder: RunFolder, before: Run, changed: dict[str, list[Any]], step: int) -> None:
    """Write down what is changed after a step, if anything is.

    It is called before the settings are written, and on every call of the run, so that a line of
    settings that never were, since the job was killed in between, is removed.

    Args:
        before: the settings that lie in the folder.

    Raises:
        CheckpointError: the file is damaged.
        DiskError: it cannot be written.
    """
    there = read_changes(folder.history)
    settings = on_the_way(before)
    stale = there and any(settings.get(n) != new for n, (_, new) in there[-1]["changed"].items())
    lines = there[:-1] if stale else there
    if changed:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [*lines, {"date": date, "step": step, "changed": changed}]
    if lines != there:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(folder.history, text.encode(), "the run's history")


def read_changes(path: Path) -> list[Line]:
    """The lines of a ``history.jsonl``, none if it is not there.

    Raises:
        CheckpointError: a line is damaged; it is named.
    """
    lines = read_metrics(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        changed = line.get("changed")
        right = isinstance(line.get("date"), str) and isinstance(changed, dict) and changed
        if not right or not all(isinstance(v, list) and len(v) == 2 for v in changed.values()):
            text = "damaged, not a date and what was changed"
            raise CheckpointError(f"{path}, line {number}: {text}")
    return lines


def changes_section(runs: Mapping[str, RunFolder]) -> str:
    """A table of what was changed in the runs, or nothing."""
    rows = [
        [name, f"{line['step']:,}", line["date"], setting, show(before), show(now)]
        for name, folder in runs.items()
        for line in read_changes(folder.history)
        for setting, (before, now) in line["changed"].items()
    ]
    if not rows:
        return ""
    header = ["run", "after step", "date", "setting", "before", "since then"]
    return "<h2>Changed on the way</h2>\n" + html_table(header, rows)
