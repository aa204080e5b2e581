"""The honest table of a method: a recipe of ways to train, over learning rates and seeds.

    python launch/bench/compare.py RECIPE.yaml [--plan PLAN.json] [--seeds 1,2,3]
        [--results FOLDER] [a.b=value ...]

``RECIPE.json`` beside the recipe, or another plan, holds what is compared (``plan.py``). The runs
come in three goes, each a recipe of ``dskd/train.py`` that is written beside its runs: every way at
every learning rate on the first seed; each way's best rate on the other seeds; and cheap ways
again, for as many steps as cost what a dear one costs. A killed go is resumed, a finished one is
skipped. The table is printed and written with all numbers into the folder of results.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import math
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open

from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.errors import ConfigError
from dskd.hardness.masks import hard_view
from dskd.hardness.question import question
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness
from dskd.methods.base import build_method
from dskd.methods.metrics import LM_LOSS
from dskd.models.build import model_fingerprint
from dskd.models.frozen import model_of
from dskd.settings.data import HardTokens, Source
from dskd.settings.length import is_in_steps
from dskd.settings.model import Model
from dskd.settings.parsing import parse
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import dump, load
from dskd.system.files import write_atomic
from dskd.training.evaluation import EvaluationSet, evaluate
from dskd.training.objective import Objective
from launch.bench import measure
from launch.bench.measure import markdown
from launch.bench.plan import HARD, LOSS, RANDOM, Plan, Trial, refused
from launch.bench.wid import run_products

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# ---- the runs ------------------------------------------------------------------------------------


class Comparison:
    """A recipe, a plan (None: the one beside it) and the overrides of all runs."""

    def __init__(self, recipe: Path, over: list[str], where: Path | None = None) -> None:
        where = recipe.with_suffix(".json") if where is None else where
        self.plan = parse(Plan, load(where), where=str(where))
        self.recipe, self.over = recipe, over
        read_ = read(recipe, over)
        self.out, self.runs = read_.out, read_.runs
        if counted := [name for name, run in self.runs.items() if not is_in_steps(run.train)]:
            text = "is in epochs or shares; the trials are compared by steps"
            raise ConfigError(f"runs.{counted[0]}.train: {text}")
        self._goes = 0

    @property
    def origin(self) -> Run:
        """The settings of the run that the ways start from."""
        assert self.plan.origin is not None, "the plan has no origin"
        return self.runs[self.plan.origin]

    def carry_out(self, trials: list[Trial]) -> None:
        """Train, export and score what is not done yet, what the ways start or learn from first."""
        if not trials:
            return
        content, upstream = load(self.recipe), self.plan.upstream
        own = content["runs"]
        runs = {} if self.plan.origin is None else {self.plan.origin: own[self.plan.origin]}
        seeds = dict.fromkeys(trial.seed for trial in trials)
        for trial in [*(Trial(name, None, seed) for seed in seeds for name in upstream), *trials]:
            runs[trial.name] = trial.settings(own[trial.way] or {}, upstream)
        self._goes += 1
        path = self.out / f"go{self._goes}.yaml"
        write_atomic(path, dump({"base": content["base"], "runs": runs}).encode())
        # One rank: the whole batch at once.
        over = [f"train.micro_batch={content['base']['train']['batch']}", *self.over]
        command = [sys.executable, str(ROOT / "dskd/train.py"), str(path), *over]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(status)

    def score(self, name: str, metric: str = "nll") -> float:
        """A metric of an exported model on the validation rows; the nll of a language model is that
        of random masks, in nats a token."""
        return self._read(name, "scores.json", f"eval_{metric}")

    def _read(self, name: str, file: str, key: str) -> float:
        found = json.loads((self.out / name / file).read_text())
        for part in key.split("."):
            found = found[part]
        return found

    def parameters(self, name: str) -> int:
        """Of an exported model."""
        with safe_open(self.out / name / "export/model.safetensors", framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)

    def products(self, way: str, steps: int) -> float:
        """Multiplications of a run of a way."""
        return run_products(self.runs[way], self.origin, steps)

    def result(self, seeds: list[int]) -> dict[str, Any]:
        """All three goes; the numbers of the table."""
        plan, (first, *others) = self.plan, seeds
        ways = [way for way in self.runs if way not in (plan.origin, *plan.upstream)]
        rates = dict(plan.rates) or {way: [None] for way in ways}
        self.carry_out([Trial(way, lr, first) for way, own in rates.items() for lr in own])
        deciding = partial(self.score, metric=plan.metrics[0] if plan.metrics else "nll")
        best = max if plan.higher_is_better else min
        chosen = {
            way: best(own, key=lambda lr, way=way: deciding(Trial(way, lr, first).name))
            for way, own in rates.items()
        }
        self.carry_out([Trial(way, lr, seed) for way, lr in chosen.items() for seed in others])
        lines = [(way, None) for way in chosen]
        if plan.budget is not None:
            whole = self.products(plan.budget, self.runs[plan.budget].train.steps)
            lines += [(way, round(whole / self.products(way, 1))) for way in plan.longer]
            longer = [(way, steps) for way, steps in lines if steps is not None]
            self.carry_out([Trial(w, chosen[w], seed, n) for w, n in longer for seed in seeds])
        scorers = self._scorers()
        rows = [
            self._row([Trial(way, chosen[way], seed, steps) for seed in seeds], scorers)
            for way, steps in lines
        ]
        return {
            "date": date.today().isoformat(),
            "recipe": f"{self.recipe.parent.name}/{self.recipe.name}",
            "plan": plan.model_dump(mode="json"),
            "data": [_named(source) for source in next(iter(self.runs.values())).data.sources],
            "seeds": seeds,
            "origin": plan.origin and {n: score(plan.origin) for n, score in scorers.items()},
            "readings": {name: self._readings(name, seeds) for name in plan.readings},
            "rows": rows,
            "claims": claims(plan, rows),
            "grid": {
                way: {f"{lr:g}": deciding(Trial(way, lr, first).name) for lr in own}
                for way, own in plan.rates.items()
            },
        }

    def _scorers(self) -> dict[str, Callable[[str], float]]:
        """What gives each of the plan's scores of a run."""
        if self.plan.metrics:
            return {name: partial(self.score, metric=name) for name in self.plan.metrics}
        if self.plan.hard is None:
            return {LOSS: self.score}
        return {HARD: hard_loss(self.plan.hard, self.origin), RANDOM: self.score}

    def _readings(self, name: str, seeds: list[int]) -> dict[str, list[float]]:
        """The scores of a further line, of each seed."""
        found = self.plan.readings[name]
        own = found.run in self.plan.upstream
        runs = [Trial(found.run, None, seed).name for seed in seeds] if own else [found.run]
        return {
            score: [self._read(run, found.file, key) for run in runs]
            for score, key in found.scores.items()
        }

    def _row(
        self, trials: list[Trial], scorers: Mapping[str, Callable[[str], float]]
    ) -> dict[str, Any]:
        way, lr, _, longer = trials[0]
        train = self.runs[way].train
        row = {
            "way": way + (", equal FLOPs" if longer else ""),
            "longer": longer is not None,
            "lr": lr or train.lr,
            "steps": longer or train.steps,
            "parameters": self.parameters(trials[0].name),
            "scores": {name: [score(t.name) for t in trials] for name, score in scorers.items()},
        }
        if self.plan.budget is not None:
            row["teraflop"] = 2 * self.products(way, row["steps"]) / 1e12
        return row


def _named(source: Source) -> str:
    """A source by the end of its path, which says enough and nothing of the machine."""
    path = getattr(source, "path", None)
    return source.kind if path is None else "/".join(Path(path).parts[-2:])


# ---- the loss of hard tokens ---------------------------------------------------------------------


def hard_loss(masking: HardTokens, origin: Run) -> Callable[[str], float]:
    """A function of a run's name: its exported model's loss on hard tokens, nats a token.

    They are those of all validation rows that the exported model of ``origin`` finds hard,
    whatever a run was trained on.
    """
    prepared = open_prepared(prepare(origin.data))
    rows, out = prepared.validation, origin.out.parent
    data = origin.data.model_copy(update={"masking": masking})
    model = Model(path=str(origin.out / "export"))
    prints = {
        "data": rows.fingerprint,
        "model": model_fingerprint(model, seed=origin.seed, where="base"),
    }
    question(
        masking,
        lambda: exported(origin.out, origin, prepared),
        replace(prepared, train=rows),
        scoring_view(data, prepared.tokenizer, origin.seed),
        out / "validation-questions",
        fingerprints=prints,
        device=CPU,
    )
    store = Hardness(out / "validation-questions", prints)
    about = {"scores": store.fingerprint, "rowset": rows}
    view = hard_view(data, prepared.tokenizer, origin.seed, lambda _: store, **about)
    micro_batch = origin.evaluation.micro_batch

    def loss(name: str) -> float:
        model = exported(out / name, origin, prepared).eval()
        objective = Objective(model, build_method({"kind": "lm"}), None)
        validation = EvaluationSet("eval", rows, view)
        scores = evaluate(objective, [validation], [LM_LOSS], micro_batch=micro_batch, device=CPU)
        return scores["eval"]["nll"]

    return loss


def exported(folder: Path, run: Run, prepared: Prepared) -> torch.nn.Module:
    """The exported model of a run's folder, in fp32."""
    model = Model(path=str(folder / "export"))
    return model_of(run, model, "export", prepared.tokenizer, None, "fp32")


# ---- the table -----------------------------------------------------------------------------------


def claims(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether ways are better than others, by how much, and on how many seeds.

    ``every seed``: their worst is better than the other's best; ``no seed``: their best is not
    better than the other's worst. Where each seed has its own upstream, whose luck both share, they
    are compared seed by seed.
    """
    equal = {row["way"]: row for row in rows if not row["longer"]}
    sign, better = (1, "above") if plan.higher_is_better else (-1, "below")
    found = []
    for score in plan.claimed:
        on = f" on {score}" if len(plan.claimed) > 1 else ""
        for contrast in plan.claims:
            others = [*(equal[way] for way in contrast.than), *(r for r in rows if r["longer"])]
            for other, way in product(others, contrast.better):
                ours, theirs = equal[way]["scores"][score], other["scores"][score]
                pairs = zip(ours, theirs, strict=True) if plan.upstream else product(ours, theirs)
                gaps = [sign * (a - b) for a, b in pairs]
                found.append(
                    {
                        "text": f"{way} is {better} {other['way']}{on}",
                        "gap": mean(gaps),
                        "on": _seeds(gaps),
                    }
                )
    return found


def _seeds(gaps: list[float]) -> str:
    if min(gaps) > 0:
        return "every seed"
    return "some seeds" if max(gaps) > 0 else "no seed"


def table(result: Mapping[str, Any]) -> str:
    plan, seeds = Plan(**result["plan"]), result["seeds"]
    costed = plan.budget is not None
    about = f"{plan.about}; seeds {', '.join(map(str, seeds))}"
    if "data" in result:
        about += f"; data: {', '.join(result['data'])}"
    if plan.rates:
        about += f"; each way's learning rate is the best of its grid on seed {seeds[0]}"
    if costed:
        about += (
            f". TFLOP: products of matrices in training, those of {plan.origin}'s own training not "
            "counted"
        )
    header = ["way"]
    header += ["steps", "TFLOP", "parameters"] if costed else []
    header += ["learning rate"] if costed or plan.metrics else []
    blank = [""] * (len(header) - 1)
    for place, score in enumerate(plan.scores):
        header += [score if place else f"{score}, mean [smallest - largest]"]
        header += ["drop"] if plan.continued else []
    lines = []
    if plan.origin is not None:
        cells = [f"{plan.origin}, before" if plan.continued else plan.origin, *blank]
        for score in plan.scores:
            cells += [f"{result['origin'][score]:.3f}", *([""] if plan.continued else [])]
        lines.append(cells)
    for name, scores in result.get("readings", {}).items():
        lines.append([name, *blank, *(_spread(scores.get(score, [])) for score in plan.scores)])
    lines += [_cells(plan, row, result["origin"]) for row in result["rows"]]
    unit = "" if plan.metrics else " nats"
    page = [
        f"{result['date']}, `launch/{result['recipe']}`: {about}.",
        "",
        *markdown(header, lines),
        "",
        *(
            f"- {claim['text']}: {claim['on']} ({claim['gap']:+.3f}{unit})"
            for claim in result["claims"]
        ),
    ]
    if result["grid"]:
        what = plan.metrics[0].capitalize() if plan.metrics else "Losses"
        page += ["", f"{what} on seed {seeds[0]} over the grid:", ""]
    for way, found in result["grid"].items():
        page.append(f"- {way}: " + ", ".join(f"{lr} {score:.3f}" for lr, score in found.items()))
    return "\n".join(page) + "\n"


def _cells(plan: Plan, row: Mapping[str, Any], origin: Mapping[str, float] | None) -> list[str]:
    cells = [row["way"]]
    if plan.budget is not None:
        cells += [f"{row['steps']:,}", f"{row['teraflop']:.2f}", f"{row['parameters']:,}"]
    if plan.budget is not None or plan.metrics:
        cells.append(f"{row['lr']:g}")
    for score in plan.scores:
        values = row["scores"][score]
        cells.append(_spread(values))
        if plan.continued:
            cells.append(f"{origin[score] - mean(values):+.3f}")
    return cells


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} [{min(values):.3f} - {max(values):.3f}]" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--plan", type=Path, help="instead of the .json beside the recipe")
    parser.add_argument("--seeds", default="1,2,3", help="the first one chooses learning rates")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_intermixed_args()
    if names := refused(words.overrides):
        own = f"every trial has its own (--seeds, {words.recipe}, its .json)"
        parser.error(f"{', '.join(names)}: {own}")
    comparison = Comparison(words.recipe, words.overrides, words.plan)
    result = comparison.result([int(seed) for seed in words.seeds.split(",")])
    print(table(result), flush=True)
    stem = f"{result['date']}-{words.recipe.parent.name.replace('_', '-')}-{words.recipe.stem}"
    measure.write(words.results, stem, result, table(result))


if __name__ == "__main__":
    main()
