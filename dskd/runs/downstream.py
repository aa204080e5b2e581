"""What fine-tuned models score on tasks: a table on the terminal, and a part of report.html.

It is read from ``downstream.json``, which ``dskd downstream`` writes beside the runs.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dskd.runs.curves import figures
from dskd.runs.history import read_object
from dskd.runs.report import print_rows
from dskd.system.markup import html_table

RESULT = "downstream.json"
_HEADER = ["task", "model", "score", "mean", "sd", "median", "seeds", "lr", "failed"]
_SMALL = 8.0


def print_downstream(result: Mapping[str, Any]) -> None:
    """Print the tables of what ``downstream.json`` holds to standard output."""
    for header, rows in _tables(result):
        print_rows(header, rows)
    for line in _foot(result):
        print(line)


def downstream_section(folder: Path) -> str:
    """HTML of the ``downstream.json`` in a folder; empty without it.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return ""
    result = read_object(path, ())
    parts = ["<h1>Downstream</h1>", *(html_table(*table) for table in _tables(result))]
    parts += [f"<p>{html.escape(line)}</p>" for line in _foot(result)]
    if result["tasks"]:
        panels = {
            f"{name}: {told['headline'].replace('_', ' ')}": _panel(told)
            for name, told in result["tasks"].items()
        }
        parts.append(figures("Scores of single seeds", panels))
    return "\n".join(parts)


def _tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table."""
    found = []
    scores = [row for task, told in result["tasks"].items() for row in _task_rows(task, told)]
    if scores:
        found.append((_HEADER, scores))
    differences = [
        [task, f"{one['first']} - {one['second']}", told["headline"].replace("_", " "), *_gap(one)]
        for task, told in result["tasks"].items()
        for one in told["comparisons"]
    ]
    if differences:
        header = ["task", "models", "score", "mean difference", "sd", "95 % interval"]
        found.append((header, differences))
    pairs = [
        [task, name, f"{of['accuracy']:.3f}", f"{of['random']:.3f}", str(of["pairs"])]
        for task, models in result["pairs"].items()
        for name, of in models.items()
    ]
    if pairs:
        header = ["minimal pairs", "model", "mean of paradigms", "random weights", "pairs"]
        found.append((header, pairs))
    glue = [[name, _number(of["average"]), of["over"]] for name, of in result["glue"].items()]
    if glue:
        found.append((["model", "GLUE", "over"], glue))
    return found


def _task_rows(task: str, told: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for model, of in told["models"].items():
        failed = f"{of['failed']} ({of['failed_of_all']} of all {of['trials']})"
        for score, spread in of["scores"].items():
            cells = [_number(spread[name]) for name in ("mean", "sd", "median")]
            seeds = str(len(of["seeds"]))
            rows.append(
                [task, model, score.replace("_", " "), *cells, seeds, f"{of['lr']:g}", failed]
            )
    return rows


def _gap(one: Mapping[str, Any]) -> list[str]:
    interval = one["interval"]
    text = (
        "-" if interval is None or None in interval else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
    )
    mean = one["mean"]
    return ["-" if mean is None else f"{mean:+.4f}", _number(one["sd"]), text]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _foot(result: Mapping[str, Any]) -> list[str]:
    """What must be known of the numbers."""
    lines = []
    tasks = result["tasks"]
    own = [name for name, told in tasks.items() if told["headline"].startswith(told["selected_on"])]
    if tasks:
        lines.append(
            "Of each model and task the rate is the one with the best mean over all seeds on the "
            "rows that select, of each trial the epoch that is the best there; sd is over seeds."
        )
    if own:
        lines.append(
            f"{', '.join(own)}: reported on the very rows that selected rate and epoch, so too "
            "good by what that picks; `holdout` selects on others."
        )
    if any(told["comparisons"] for told in tasks.values()):
        lines.append("Differences are seed by seed; of fewer than 5 seeds no interval is given.")
    if any(of["failed_of_all"] for told in tasks.values() for of in told["models"].values()):
        lines.append(
            "Failed: trials that say the same of every row that selects, or diverged; they stay in "
            "the means."
        )
    return lines


def _panel(told: Mapping[str, Any]) -> Figure:
    """Of a task a dot for each seed of each model, and a line at their mean."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, of in enumerate(told["models"].values()):
        spread = of["scores"][told["headline"]]
        values: Sequence[float] = [value for value in spread["values"] if value is not None]
        axes.plot([place] * len(values), values, ".")
        if spread["mean"] is not None:
            axes.plot([place - 0.2, place + 0.2], [spread["mean"]] * 2, color="0.5", linewidth=1.2)
    axes.set_xticks(range(len(told["models"])), list(told["models"]), fontsize=_SMALL)
    axes.set_xlim(-0.6, len(told["models"]) - 0.4)
    axes.grid(axis="y", alpha=0.25)
    return figure
