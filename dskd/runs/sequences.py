"""Runs that learn tasks one after the other, and what each of them remembers.

Runs are in sequence if each begins as the export of the one before and all answer the same named
sets. Their scores are a matrix R: R[i][j] is that of run i on set j. Of T runs, of which run j
learns set j,

* the *average* is that of the last row,
* *forgetting* is the mean over j < T of max_{i<T} R[i][j] - R[T][j] (Chaudhry et al. 2018, ECCV,
  "Riemannian Walk for Incremental Learning", section 3),
* *backward transfer* is the mean over j < T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato 2017,
  NeurIPS, "Gradient Episodic Memory for Continual Learning", equation 3).

All are in per cent. A run learns the set that is called as the domain of its new rows.

Shape letters: T runs, S sets.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dskd.errors import CheckpointError
from dskd.runs.curves import Look, curves
from dskd.runs.history import Points, read_object
from dskd.runs.named_sets import answer_sets
from dskd.runs.report import new_table
from dskd.settings.folders import folder_of
from dskd.settings.run import Run
from dskd.settings.sets import NamedSet
from dskd.system.files import read_manifest
from dskd.system.markup import html_table

Asked = dict[str, Any]
"""What the questions of sets are, by their names."""


@dataclass(frozen=True)
class ScoreMatrix:
    """The scores of runs in sequence, or of a run to compare with them, whose T is 1.

    Attributes:
        name: of the sequence.
        runs: names of its runs, in order.
        learnt: of each run the set that it learns, by its place in ``sets``; None of a run that
            learns none of them, or several, and then stands alone.
        sets: names of the sets.
        scores_TS: float64, in per cent.
    """

    name: str
    runs: Sequence[str]
    learnt: Sequence[int | None]
    sets: Sequence[str]
    scores_TS: NDArray[np.float64]

    @property
    def average(self) -> float:
        """The mean of the last run's scores on all sets."""
        return float(self.scores_TS[-1].mean())

    @property
    def forgetting(self) -> float | None:
        """By how much the last run is worse than the best one before it, on what those learnt; None
        if it learnt the first task."""
        before = self._learnt_before()
        if not before:
            return None
        return float(np.mean([max(self.scores_TS[:-1, s]) - self.scores_TS[-1, s] for s in before]))

    @property
    def backward_transfer(self) -> float | None:
        """By how much the last run is better than those that learnt the sets before it; None if it
        learnt the first task."""
        before = self._learnt_before()
        if not before:
            return None
        return float(
            np.mean([self.scores_TS[-1, s] - self.scores_TS[t, s] for s, t in before.items()])
        )

    def _learnt_before(self) -> dict[int, int]:
        """The sets that were learnt before the last run, each with the first run that did so."""
        found: dict[int, int] = {}
        for run, place in enumerate(self.learnt[:-1]):
            if place is not None and place != self.learnt[-1]:
                found.setdefault(place, run)
        return found


def sequences_of(runs: Mapping[str, Run]) -> list[list[ScoreMatrix]]:
    """The sequences of these runs, those together that answer the same sets, with single runs that
    do so, too; none where no two runs are in sequence.

    Args:
        runs: by name; those count that are evaluated.

    Raises:
        CheckpointError: a file of a run is missing or damaged, or lacks a score.
    """
    scored = {
        name: run
        for name, run in runs.items()
        if answer_sets(run) and folder_of(run).scores.exists()
    }
    asked = {name: _asked(run) for name, run in scored.items()}
    before = {name: _before(name, scored, asked) for name in scored}
    groups: list[tuple[Asked, list[ScoreMatrix]]] = []
    for name in scored:
        if name in before.values():
            continue
        chain = [name]
        while (earlier := before[chain[0]]) is not None:
            chain.insert(0, earlier)
        group = next((each for each in groups if each[0] == asked[name]), (asked[name], []))
        if not group[1]:
            groups.append(group)
        # In the order of the group's first run, so that all have the same columns.
        sets = {place: answer_sets(scored[name])[place] for place in group[0]}
        group[1].append(_matrix(_learning([(n, scored[n]) for n in chain], list(sets)), sets))
    return [found for _, found in groups if any(len(one.runs) > 1 for one in found)]


def _asked(run: Run) -> Asked:
    """What the sets of a run are, wherever their files lie.

    Raises:
        CheckpointError: what says so is missing or damaged.
    """
    inputs = read_manifest(folder_of(run).inputs, CheckpointError)
    return {
        name: [own.metric, own.longest, inputs.get(f"evaluation.sets.{name}")]
        for name, own in answer_sets(run).items()
    }


def _before(name: str, runs: Mapping[str, Run], asked: Mapping[str, Asked]) -> str | None:
    """The run with the same sets whose export another one begins as, if there is one."""
    run = runs[name]
    if run.model.path is None:
        return None
    path = Path(run.model.path)
    for other, theirs in runs.items():
        export = folder_of(theirs).export
        # A recipe's folder may have been moved since, with all its runs.
        beside = export.parent.parent.resolve() == run.out.parent.resolve() and not path.exists()
        moved = beside and path.parts[-2:] == export.parts[-2:]
        if other != name and (path.resolve() == export.resolve() or moved):
            return other if asked[other] == asked[name] else None
    return None


def _learnt(run: Run, sets: Sequence[str]) -> int | None:
    """The place of the only set that a run learns."""
    new = {source.domain for source in run.data.sources if source.kind != "replayed"}
    found = [place for place, name in enumerate(sets) if name in new]
    return found[0] if len(found) == 1 else None


def _learning(chain: list[tuple[str, Run]], sets: Sequence[str]) -> dict[str, Run]:
    """The end of a chain from where on each run learns one set; at least its last run."""
    idle = [place for place, (_, run) in enumerate(chain) if _learnt(run, sets) is None]
    return dict(chain[min(max(idle, default=-1) + 1, len(chain) - 1) :])


def _matrix(runs: Mapping[str, Run], sets: Mapping[str, NamedSet]) -> ScoreMatrix:
    keys = [f"{name}_{own.metric}" for name, own in sets.items()]
    rows = [read_object(folder_of(run).scores, keys) for run in runs.values()]
    learnt = [_learnt(run, list(sets)) for run in runs.values()]
    tasks = [None if place is None else list(sets)[place] for place in learnt]
    scores_TS = np.array([[row[key] for key in keys] for row in rows], dtype=np.float64)
    return ScoreMatrix(_name(list(runs), tasks), list(runs), learnt, list(sets), scores_TS)


def _name(runs: Sequence[str], tasks: Sequence[str | None]) -> str:
    """What the names of the runs share before those of their tasks, or else all of them."""
    if len(runs) == 1:
        return runs[0]
    rests = {
        run.removesuffix(task).rstrip("-_/")
        for run, task in zip(runs, tasks, strict=True)
        if task is not None and run.endswith(task)
    }
    alike = len(rests) == 1 and all(t and r.endswith(t) for r, t in zip(runs, tasks, strict=True))
    return (rests.pop() if alike else "") or ", ".join(runs)


def print_sequences(groups: Sequence[Sequence[ScoreMatrix]]) -> None:
    """Print each matrix, and what becomes of the sequences, to standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for group in groups:
        for each in _matrices(group):
            pairs = zip(each.runs, each.scores_TS, strict=True)
            rows = [[run, *map(_number, scores_S)] for run, scores_S in pairs]
            title = f"{each.name}: scores by set, in per cent"
            console.print(title, markup=False, highlight=False)
            console.print(new_table(["after", *each.sets], rows))
        console.print("The last runs, in per cent", highlight=False)
        console.print(new_table(*_summary(group)))


def _matrices(group: Sequence[ScoreMatrix]) -> list[ScoreMatrix]:
    """Those of several runs."""
    return [each for each in group if len(each.runs) > 1]


def _summary(group: Sequence[ScoreMatrix]) -> tuple[list[str], list[list[str]]]:
    """A line for each sequence and single run: its last row, and what is made of it."""
    header = ["sequence", *group[0].sets, "average", "forgetting", "backward transfer"]
    rows = [
        [
            each.name,
            *map(_number, each.scores_TS[-1]),
            *map(_number, (each.average, each.forgetting, each.backward_transfer)),
        ]
        for each in group
    ]
    return header, rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 1) + 0.0:.1f}"  # no minus before a zero


def sequences_section(groups: Sequence[Sequence[ScoreMatrix]]) -> str:
    """HTML of the sequences: the summary, a map of each matrix, and the scores by set as curves;
    empty where there is none."""
    parts = []
    for group in groups:
        maps = "\n".join(map(_map, _matrices(group)))
        parts += [
            "<h1>Tasks learnt one after the other</h1>",
            "<h2>The last runs, in per cent</h2>",
            html_table(*_summary(group)),
            "<h2>Scores after each run, in per cent</h2>",
            f'<div style="display: flex; flex-wrap: wrap; gap: 1.5rem">\n{maps}\n</div>',
            "<p>Framed: the set that the run learns.</p>",
            _curves(group),
        ]
    return "\n".join(parts)


def _map(each: ScoreMatrix) -> str:
    """A table whose cells are the darker, the higher their score."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in each.sets)
    lines = [f'<tr><th class="text">after</th>{head}</tr>']
    for run, learnt, row in zip(each.runs, each.learnt, each.scores_TS, strict=True):
        cells = "".join(_cell(score, own=place == learnt) for place, score in enumerate(row))
        lines.append(f'<tr><td class="text">{html.escape(run)}</td>{cells}</tr>')
    caption = f'<caption style="text-align: left">{html.escape(each.name)}</caption>'
    return f'<div style="overflow-x: auto"><table>{caption}{"".join(lines)}</table></div>'


def _cell(score: float, *, own: bool) -> str:
    share = min(max(score / 100, 0.0), 1.0)
    style = f"background: rgba(31, 95, 168, {0.9 * share:.2f})"
    style += "; color: #fff" if share > _DARK else ""
    style += "; outline: 2px solid var(--wrong); outline-offset: -2px" if own else ""
    return f'<td style="{style}">{score:.1f}</td>'


_DARK = 0.85
"""Share of the scale above which a cell's number is white."""


def _curves(group: Sequence[ScoreMatrix]) -> str:
    """A panel for each set: its score after each run of each sequence; of single runs, which are
    the end of no sequence, a line across."""
    most = max(len(each.runs) for each in group)
    panels: dict[str, dict[str, Points]] = {}
    for place, name in enumerate(group[0].sets):
        scores = {each.name: each.scores_TS[:, place].tolist() for each in group}
        panels[name] = {
            run: list(enumerate(of if len(of) > 1 else of * most, 1)) for run, of in scores.items()
        }
    single = frozenset(each.name for each in group if len(each.runs) == 1)
    look = Look(across="tasks learnt", begin=0.9, y_limits=(-3, 103), dashed=single)
    return curves("Scores by set, in per cent", panels, look)
