"""The table of ways to learn tasks in turn: a recipe of sequences, over seeds and noise.

    python launch/bench/lifelong.py [RECIPE.yaml] [--plan PLAN.json] [--seeds 1,2,3] [--jobs 2]
        [--results FOLDER] [a.b=value ...]

The recipe is ``launch/l2kd/toys.yaml``, the plan (:class:`Plan`) the JSON beside it. For each seed
and share of wrong labels ``toys.py`` makes rows, and each group of ways is carried out as a recipe
of its own, by one process of one thread; ``--jobs`` of them at a time. The ways of the plan's grid
come first, on the first seed and share alone; all others get the value that is best there. Called
again, it goes on where it was stopped. The table is printed and written with all numbers into the
folder of results, every claim of the plan with the seeds on which it holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from statistics import mean
from typing import Any, Literal, NamedTuple

from pydantic import Field

from dskd.settings.base import Section
from dskd.settings.parsing import parse
from dskd.settings.recipe import read
from dskd.settings.yaml_tree import Tree, dump, load, merge, overlay
from dskd.system.files import write_atomic
from launch.bench import measure
from launch.bench.measure import markdown
from launch.l2kd.toys import write

ROOT = Path(__file__).resolve().parents[2]
OWN = frozenset({"seed", "sequences", "teachers", "runs"})
"""Settings that are not overridden."""


class Grid(Section):
    """The values of a setting of which a way gets the best one."""

    setting: str
    """Its dotted name below ``sequences.WAY``."""
    values: list[float] = Field(min_length=1)


class Claim(Section):
    """What a score of a way should be, in per cent."""

    noise: float
    way: str
    score: Literal["average", "earlier", "last"] = "average"
    """Of the last model: the mean of all tasks, of all but the last, or that of the last."""
    than: str | None = None
    """The other way, from whose score it is the distance; null: it is the score itself."""
    least: float | None = None
    most: float | None = None


class Plan(Section):
    """What is compared."""

    about: str
    groups: list[list[str]]
    """The ways; those of a group are carried out by one process, and share their teachers."""
    noises: dict[str, list[str]]
    """By the share of wrong labels, the ways that learn them."""
    grid: dict[str, Grid] = Field(default_factory=dict)
    claims: list[Claim]


class Job(NamedTuple):
    """A recipe that one process carries out: sequences, by the names they have in it."""

    folder: Path
    noise: float
    seed: int
    sequences: dict[str, Tree]
    may_diverge: bool = False

    @property
    def recipe(self) -> Path:
        """Its file."""
        return self.folder.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """What its process says, of all calls."""
        return self.folder.with_suffix(".log")


class Study:
    """A recipe and its plan, carried out."""

    def __init__(self, recipe: Path, plan: Plan, seeds: Sequence[int], over: Sequence[str]) -> None:
        self.plan, self.seeds = plan, list(seeds)
        self._over = [text for text in over if not text.startswith("out=")]
        self._recipe = recipe
        self._tree = load(recipe)
        runs = read(recipe, over)
        self.out = runs.out
        self.train = next(iter(runs.runs.values())).train
        self.tasks = list(self._tree["tasks"])

    def result(self, jobs: int) -> dict[str, Any]:
        """All numbers of the table, once all jobs are done, so many at a time."""
        first = (self.noises[0], self.seeds[0])
        ways = [way for group in self.plan.groups for way in group]
        trials = {way: self._trials(way, first) for way in ways if way in self.plan.grid}
        grids = [job for found in trials.values() for job in found.values()]
        self._carry_out([*grids, *self._groups(*first, {})], jobs)
        tried = {way: self._tried(found) for way, found in trials.items()}
        best = {way: max(found, key=found.__getitem__) for way, found in tried.items()}
        chosen = {way: trials[way][value].sequences[way] for way, value in best.items()}
        cells = [(noise, seed) for noise in self.noises for seed in self.seeds]
        others = [job for cell in cells if cell != first for job in self._groups(*cell, chosen)]
        self._carry_out(others, jobs)
        scores = {}
        for cell in cells:
            for job in self._groups(*cell, {} if cell == first else chosen):
                found = {way: self._scores(job, way) for way in job.sequences}
                scores.setdefault(cell, {}).update(found)
        for way, value in best.items():
            scores[first][way] = self._scores(trials[way][value], way)
        return self._told(scores, tried, best)

    @property
    def noises(self) -> list[float]:
        """The shares of wrong labels."""
        return [float(noise) for noise in self.plan.noises]

    def _told(
        self, scores: Mapping[tuple[float, int], Tree], tried: Tree, best: Mapping[str, float]
    ) -> dict[str, Any]:
        rows = {}
        for noise, ways in self.plan.noises.items():
            rows[noise] = {
                way: {
                    name: [scores[float(noise), seed][way].get(name) for seed in self.seeds]
                    for name in ("average", "earlier", "last", *self.tasks)
                }
                for way in ways
            }
        return {
            "date": date.today().isoformat(),
            "recipe": f"{self._recipe.parent.name}/{self._recipe.name}",
            "overrides": self._over,
            "plan": self.plan.model_dump(mode="json"),
            "seeds": self.seeds,
            "tasks": self.tasks,
            "train": self.train.model_dump(mode="json"),
            "rows": rows,
            "tried": tried,
            "best": dict(best),
            "claims": [judged(claim, rows) for claim in self.plan.claims],
        }

    # ---- the jobs ------------------------------------------------------------------------------

    def _cell(self, noise: float, seed: int) -> Path:
        return self.out / f"noise-{noise:g}-seed-{seed}"

    def _trials(self, way: str, cell: tuple[float, int]) -> dict[float, Job]:
        """The jobs of a way's grid, one a value, which may diverge."""
        grid, own = self.plan.grid[way], self._tree["sequences"][way]
        found = {}
        for place, value in enumerate(grid.values):
            tree = merge(own, overlay([f"{grid.setting}={value}"]))
            folder = self._cell(*cell) / f"grid-{way}-{place}"
            found[value] = Job(folder, *cell, {way: tree}, may_diverge=True)
        return found

    def _tried(self, jobs: Mapping[float, Job]) -> dict[float, float]:
        """The scores of the values of a way's grid.

        Raises:
            SystemExit: there is none.
        """
        (way,) = next(iter(jobs.values())).sequences
        found = {
            value: self._scores(job, way)["average"]
            for value, job in jobs.items()
            if not _diverged(job)
        }
        if not found:
            raise SystemExit(f"{way}: it diverges at every value of its grid")
        return found

    def _groups(self, noise: float, seed: int, chosen: Mapping[str, Tree]) -> list[Job]:
        """The jobs of all ways of a cell but those of the grid that have no value yet."""
        wanted = self.plan.noises[next(n for n in self.plan.noises if float(n) == noise)]
        found = []
        for number, group in enumerate(self.plan.groups):
            ways = {
                way: chosen.get(way, self._tree["sequences"][way])
                for way in group
                if way in wanted and (way not in self.plan.grid or way in chosen)
            }
            if ways:
                folder = self._cell(noise, seed) / f"group-{number}"
                found.append(Job(folder, noise, seed, ways))
        return found

    def _write(self, job: Job) -> None:
        """Write the job's recipe, and make its rows if they are not there."""
        data = self._cell(job.noise, job.seed) / "data"
        if not (data / "tokenizer").exists():  # which comes last
            write(data, noise=job.noise, seed=job.seed)
        tree = {**self._tree, "sequences": job.sequences}
        asked = any(own.get("teacher") or own.get("distilled") for own in job.sequences.values())
        if not asked:
            tree.pop("teachers", None)
        old = str(Path(self._tree["base"]["data"]["tokenizer"]["path"]).parent)
        tree = _moved(tree, old, str(data))
        own = {"out": str(job.folder), "seed": job.seed, "data": {"folder": str(data / "rows")}}
        tree = {**tree, "base": merge(tree["base"], own)}
        write_atomic(job.recipe, dump(tree).encode())

    def _carry_out(self, jobs: Iterable[Job], at_once: int) -> None:
        """Run the jobs.

        Raises:
            SystemExit: one failed; the others that had begun are at their end.
        """
        jobs = [job for job in jobs if not (job.may_diverge and _diverged(job))]
        for job in jobs:
            self._write(job)
        with ThreadPoolExecutor(at_once) as pool:
            statuses = list(pool.map(self._run, jobs))
        for job, status in zip(jobs, statuses, strict=True):
            if status and not (job.may_diverge and _diverged(job)):
                raise SystemExit(status)

    def _run(self, job: Job) -> int:
        path, log, begun = job.recipe, job.log, time.monotonic()
        command = [sys.executable, str(ROOT / "dskd/train.py"), str(path)]
        # One rank: the whole batch at once.
        command += [f"train.micro_batch={self.train.batch}", *self._over]
        print(f"begun: {path}", flush=True)
        with log.open("ab") as stream:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            status = subprocess.run(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
            ).returncode
        end = "done" if status == 0 else f"status {status}, see {log}"
        print(f"{end}: {path} ({(time.monotonic() - begun) / 60:.1f} min)", flush=True)
        return status

    # ---- the scores ----------------------------------------------------------------------------

    def _scores(self, job: Job, way: str) -> dict[str, float]:
        """The scores of the last model of a sequence."""
        own = job.sequences[way]
        order = own.get("order") or self.tasks
        name = f"{way}-{order[-1]}" if way != next(iter(job.sequences)) else order[-1]
        folder = job.folder / (way if own.get("together") else name)
        found = json.loads((folder / "scores.json").read_text())
        each = {task: found[f"{task}_{self._metric(task)}"] for task in self.tasks}
        scores = {"average": mean(each.values()), **each}
        if not own.get("together"):
            scores["earlier"] = mean(each[task] for task in order[:-1])
            scores["last"] = each[order[-1]]
        return scores

    def _metric(self, task: str) -> str:
        return self._tree["tasks"][task]["test"]["metric"]


def _diverged(job: Job) -> bool:
    """Whether its process ended because numbers were not finite."""
    lines = job.log.read_text().splitlines() if job.log.exists() else []
    last = next((text for text in reversed(lines) if text.startswith("error: ")), "")
    done = lines and lines[-1].startswith("report: ")
    return not done and re.search(r"\b(nan|inf|infinite|finite)\b", last, re.I) is not None


def _moved(tree: Any, old: str, new: str) -> Any:
    """``tree`` with paths below one folder below another."""
    if isinstance(tree, dict):
        return {name: _moved(value, old, new) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value, old, new) for value in tree]
    if isinstance(tree, str) and tree.startswith(f"{old}/"):
        return new + tree.removeprefix(old)
    return tree


# ---- the claims and the table --------------------------------------------------------------------


def judged(claim: Claim, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a claim says, the numbers of each seed, and where it holds."""
    ways = next(found for noise, found in rows.items() if float(noise) == claim.noise)
    values = ways[claim.way][claim.score]
    text = f"{claim.way}, {claim.score}"
    if claim.than is not None:
        text = f"{claim.way} - {claim.than}, {claim.score}"
        values = [a - b for a, b in zip(values, ways[claim.than][claim.score], strict=True)]
    for word, bound in ((">=", claim.least), ("<=", claim.most)):
        text += "" if bound is None else f" {word} {bound:g}"

    def holds(value: float) -> bool:
        low = claim.least is None or value >= claim.least
        return low and (claim.most is None or value <= claim.most)

    count = sum(map(holds, values))
    verdict = "holds on every seed" if count == len(values) else "does not hold"
    if verdict == "does not hold" and holds(mean(values)):
        verdict = f"holds in the mean, on {count} of {len(values)} seeds"
    return {
        "text": f"noise {claim.noise:g}: {text}",
        "values": values,
        "mean": mean(values),
        "verdict": verdict,
    }


def table(result: Mapping[str, Any]) -> str:
    """The page of results."""
    plan, seeds = Plan(**result["plan"]), result["seeds"]
    train = result["train"]
    about = (
        f"{result['date']}, `launch/{result['recipe']}`: {plan.about}; seeds "
        f"{', '.join(map(str, seeds))}; {train['epochs']:g} epochs a task, {train['batch']} rows a "
        "step. Means [smallest - largest] of the last model's scores, in per cent"
    )
    page = [about + (f"; {' '.join(result['overrides'])}" if result["overrides"] else "") + "."]
    header = ["way", "all tasks", "earlier tasks", *result["tasks"]]
    for noise, ways in result["rows"].items():
        lines = [
            [way, *(_spread(found[name]) for name in ("average", "earlier", *result["tasks"]))]
            for way, found in ways.items()
        ]
        page += ["", f"{float(noise):.0%} of the labels wrong:", "", *markdown(header, lines)]
    page += ["", "Claims:", ""]
    page += [
        f"- {claim['text']}: {claim['verdict']} ({claim['mean']:.1f}: "
        f"{', '.join(f'{value:.1f}' for value in claim['values'])})"
        for claim in result["claims"]
    ]
    first = float(next(iter(plan.noises)))
    if result["tried"]:
        page += ["", f"The grid, all tasks, on seed {seeds[0]} and {first:.0%} wrong labels:", ""]
    for way, found in result["tried"].items():
        grid = plan.grid[way]
        told = {float(value): f"{score:.1f}" for value, score in found.items()}
        cells = [f"{value:g} {told.get(value, 'diverges')}" for value in grid.values]
        page.append(f"- {way}, `{grid.setting}`: " + ", ".join(cells))
    return "\n".join(page) + "\n"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.1f} [{min(known):.1f} - {max(known):.1f}]" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "launch/l2kd/toys.yaml"
    parser.add_argument("recipe", type=Path, nargs="?", default=default, metavar="RECIPE.yaml")
    parser.add_argument("--plan", type=Path, help="instead of the .json beside the recipe")
    parser.add_argument("--seeds", default="1,2,3", help="the first one chooses from the grid")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_intermixed_args()
    if "=" in str(words.recipe):  # the first override in the recipe's place
        words.overrides.insert(0, str(words.recipe))
        words.recipe = default
    if names := sorted(OWN & overlay(words.overrides).keys()):
        parser.error(f"{', '.join(names)}: every job has its own (--seeds, --plan, the recipe)")
    where = words.plan or words.recipe.with_suffix(".json")
    plan = parse(Plan, load(where), where=str(where))
    seeds = [int(seed) for seed in words.seeds.split(",")]
    result = Study(words.recipe, plan, seeds, words.overrides).result(words.jobs)
    print(table(result), flush=True)
    stem = f"{result['date']}-{words.recipe.parent.name}-{words.recipe.stem}"
    measure.write(words.results, stem, result, table(result))


if __name__ == "__main__":
    main()
