"""What came out of a recipe's runs: one self-contained report.html and a table on the terminal.

Read are each run's ``train/metrics.jsonl`` and ``train/summary.json``, and ``scores.json`` where
the run got that far. What matters is the last column: in how many fewer steps a run reaches the
loss, or other score, that the control, trained without a teacher, has at its end. That is a number
of runs that may be compared (``comparable.py``) only: each group of such runs is shown by itself.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from dskd import __version__
from dskd.engine.checkpoints import Selection
from dskd.errors import ConfigError
from dskd.methods.metrics import BITS_PER_BYTE
from dskd.runs.curves import Look, curves
from dskd.runs.history import History, Points, read_history, read_object, steps_to
from dskd.runs.identity import (
    capture_section,
    data_section,
    settings_section,
    time_text,
    versions_section,
)
from dskd.runs.page import write_page
from dskd.settings.folders import RunFolder
from dskd.system.log import clock, memory_text
from dskd.system.markup import html_table
from dskd.training.evaluation import VALIDATION

BY_BYTES = f"{VALIDATION}_{BITS_PER_BYTE}"
"""The score of which runs on the same text may be compared whose tokens differ."""
_OF_BYTES = (
    "Bits per byte are the mean bits of a token, times the tokens of the validation text (with "
    "those that end documents), divided by its bytes as UTF-8. Where rows have no start token, the "
    "first token of each, which nothing predicts, so counts as the others do."
)
_WIDE = 40
"""Letters of a name that is not broken on the terminal; numbers are, at spaces."""
_RATES = {
    "Inheritance rate and learning rate": {
        "alpha": ("alpha (weight of the teacher)", 1.0),
        "lr": ("learning rate", 1.0),
    },
    "Gradient, speed and memory": {
        "grad_norm": ("norm of the gradient before clipping", 1.0),
        "tokens_per_second": ("tokens/s", 1.0),
        "peak_memory_bytes": ("peak memory of rank 0, GiB", 2.0**-30),
    },
}
"""Curves of numbers of the training lines: by heading and name, the title and a factor."""


@dataclass(frozen=True)
class Group:
    """Runs by name whose scores may be compared; ``why`` they are apart from others, if so.

    ``compared``: by what; None: by what selects the control's checkpoints, or the first run's.
    """

    names: Sequence[str]
    why: str = ""
    compared: Selection | None = None

    def control(self, name: str | None) -> str | None:
        """The control run, if it is one of these."""
        return name if name in self.names else None


def table(
    runs: Mapping[str, Path], control: str | None, compared: Selection | None = None
) -> Table:
    """The comparison of runs that may be compared as a rich table; ``control`` names the run whose
    final loss is the target, or what else they are ``compared`` by (see :class:`Group`)."""
    histories, compared = _read(runs, control, compared)
    return new_table(*_table(histories, compared, control))


def new_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table of names in the first column and numbers in the others."""
    first, *others = header
    longest = max((len(row[0]) for row in rows), default=0)
    names = Column(first, overflow="fold", min_width=min(longest, _WIDE))
    made = Table(names, *(Column(name, justify="right") for name in others))
    for row in rows:
        made.add_row(*row)
    return made


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print :func:`new_table` to standard output, at its full width where that is no terminal."""
    _console().print(new_table(header, rows))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_table(
    runs: Mapping[str, Path], control: str | None, groups: Sequence[Group] | None = None
) -> None:
    """Print :func:`table` to standard output, at its full width where that is no terminal.

    ``groups`` are those that may be compared, each shown by itself; None: all of them may be.
    """
    console = _console()
    _refuse_unknown(control, runs)
    for group in groups or [Group(list(runs))]:
        if group.why:
            console.print(group.why, markup=False, highlight=False)
        own = {name: runs[name] for name in group.names}
        console.print(table(own, group.control(control), group.compared))


ReportSection = Callable[[Mapping[str, RunFolder]], str]
"""HTML about the runs, by name, or an empty text."""


def write_report(
    runs: Mapping[str, Path],
    folder: Path,
    control: str | None,
    sections: Sequence[ReportSection],
    groups: Sequence[Group] | None = None,
    *,
    first: str = "",
) -> Path:
    """Write ``folder/report.html``: the table and the curves, with nothing to load beside it.

    Args:
        runs: run folders by name, in the order to show them.
        control: the run whose final score the others are measured against.
        sections: what stages of the runs show besides, in order.
        groups: those that may be compared, each shown by itself; None: all of them may be.
        first: HTML of all runs together.

    Raises:
        CheckpointError: a run's file is missing or damaged.
        ConfigError: ``control`` is none of the runs.
    """
    _refuse_unknown(control, runs)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    written = f'<p class="note">Written {now} by dskd {__version__}.</p>'
    parts = [first, "<h1>Runs compared</h1>", written]
    for group in groups or [Group(list(runs))]:
        parts += [f"<h1>{html.escape(group.why)}</h1>"] if group.why else []
        own = {name: runs[name] for name in group.names}
        parts += _parts(own, group.control(control), sections, group.compared)
    return write_page(RunFolder(folder).report, parts)


def _parts(
    runs: Mapping[str, Path],
    control: str | None,
    sections: Sequence[ReportSection],
    by: Selection | None,
) -> list[str]:
    """The HTML of runs that may be compared; where that is ``by`` another score than their own, the
    rest of it is in other groups."""
    histories, compared = _read(runs, control, by)
    table_html = html_table(*_table(histories, compared, control))
    of_score, *others = _curves(histories, compared, control)
    if by is not None:
        about = [f"<p>{_OF_BYTES}</p>"] if by.metric == BY_BYTES else []
        return [*about, table_html, of_score]
    abouts = {name: history.about for name, history in histories.items()}
    return [
        table_html,
        of_score,
        *others,
        *(section({name: RunFolder(run) for name, run in runs.items()}) for section in sections),
        settings_section(runs),
        data_section(abouts),
        capture_section(abouts),
        versions_section(abouts),
    ]


def _refuse_unknown(control: str | None, runs: Mapping[str, Path]) -> None:
    if control is not None and control not in runs:
        raise ConfigError(f"control run '{control}' is none of: {', '.join(runs)}")


def _read(
    runs: Mapping[str, Path], control: str | None, compared: Selection | None
) -> tuple[dict[str, History], Selection]:
    """The runs, and what they are compared by; None: what selects the control's checkpoints, or the
    first run's."""
    _refuse_unknown(control, runs)
    histories = {name: read_history(folder) for name, folder in runs.items()}
    if compared is not None:
        return histories, compared
    summary = histories[control or next(iter(runs))].summary
    return histories, Selection(summary["metric"], summary["higher_is_better"])


def _table(
    histories: Mapping[str, History], compared: Selection, control: str | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows, with the bits per byte of runs that have them; where they are compared by
    these, without perplexities, which are not comparable."""
    header, rows = _header(compared, control), _rows(histories, compared, control)
    found = [history.evaluations[-1].get(BY_BYTES) for history in histories.values()]
    at = header.index("eval ppl")
    if compared.metric == BY_BYTES:
        for line in (header, *rows):
            del line[at]
    elif any(bits is not None for bits in found):
        header.insert(at + 1, "bits per byte")
        for row, bits in zip(rows, found, strict=True):
            row.insert(at + 1, _number(bits, ".4f"))
    return header, rows


def _header(compared: Selection, control: str | None) -> list[str]:
    score = compared.metric.replace("_", " ")
    names = ["run", "parameters", "steps", score, "eval ppl", "tokens/s", "peak memory"]
    names += ["data time", "capture time", "training time"]
    if control is None:
        return names
    goal = "score" if compared.higher_is_better else "loss"
    goal = "bits per byte" if compared.metric == BY_BYTES else goal
    return [*names, f"steps to {control}'s final {goal}", "fewer by"]


def _rows(
    histories: Mapping[str, History], compared: Selection, control: str | None
) -> list[list[str]]:
    rows = []
    for name, history in histories.items():
        summary, last = history.summary, history.evaluations[-1]
        about = history.about
        capture = None if about is None or about.capture is None else about.capture.seconds
        row = [
            name,
            f"{summary['parameters']:,}",
            f"{summary['steps']:,}",
            _number(last.get(compared.metric), ".4f"),
            _number(last.get("eval_ppl"), ".2f"),
            f"{summary['tokens_per_second']:,.0f}",
            memory_text(summary),
            time_text(None if about is None else about.preparing),
            time_text(capture),
            clock(summary["wall_seconds"]),
        ]
        rows.append(row + (_against(history, histories[control], compared) if control else []))
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _against(history: History, control: History, compared: Selection) -> list[str]:
    """Steps to the control's final score, and how many times as many steps the control took."""
    last, target = control.evaluated(compared.metric)[-1]
    points = history.evaluated(compared.metric)
    reached = steps_to(points, target, higher_is_better=compared.higher_is_better)
    if history is control or reached is None:
        return [f"{last:,}" if history is control else "not reached", "-"]
    return [f"{reached:,.1f}", f"{last / reached:.2f}x" if reached else "-"]


def _curves(
    histories: Mapping[str, History], compared: Selection, control: str | None
) -> Iterator[str]:
    """What the runs' logged lines show over their steps, as far as there is something to show."""
    lines = {name: history.evaluated(compared.metric) for name, history in histories.items()}
    direction = "higher" if compared.higher_is_better else "lower"
    target = None if control is None else lines[control][-1][1]
    shown = {f"{compared.metric}: {direction} is better": lines}
    yield curves("Evaluation", shown, Look(target=target, large=True))
    logged = [line["terms"] for history in histories.values() for line in history.training]
    terms = {n: {r: h.term(n) for r, h in histories.items()} for n in _keys(logged)}
    yield curves(
        "Training loss terms", {f"{n} (mean per supervised token)": terms[n] for n in terms}
    )
    for heading, rates in _RATES.items():
        yield curves(heading, dict(_rate(histories, name, *of) for name, of in rates.items()))


def _rate(
    histories: Mapping[str, History], name: str, title: str, factor: float
) -> tuple[str, dict[str, Points]]:
    """A panel of a number of the training lines, with its title."""
    lines = {run: [(s, v * factor) for s, v in h.rate(name)] for run, h in histories.items()}
    return title, lines


def _keys(objects: Sequence[Mapping[str, object]]) -> list[str]:
    """Each key once, in the order in which they first occur."""
    return list(dict.fromkeys(key for each in objects for key in each))


def scores_section(runs: Mapping[str, RunFolder]) -> str:
    """The exported models' scores, one row a run, one column a score."""
    scored = {
        name: read_object(run.scores, ()) for name, run in runs.items() if run.scores.exists()
    }
    numbers = [k for scores in scored.values() for k, v in scores.items() if _is_number(v)]
    # Those of single domains have a table of their own (by_domain.py).
    names = [name for name in dict.fromkeys(numbers) if not name.startswith(f"{VALIDATION}.")]
    rows = [
        [name, *(f"{scores[k]:.6g}" if _is_number(scores.get(k)) else "-" for k in names)]
        for name, scores in scored.items()
    ]
    if not rows:
        return ""
    return "<h2>Scores of the exported models</h2>\n" + html_table(["run", *names], rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
