"""The honest table of a method: a recipe of ways to train, over learning rates and seeds.

    python launch/bench/compare.py RECIPE.yaml [--seeds 1,2,3] [--results FOLDER] [a.b=value ...]

``RECIPE.json`` beside the recipe holds what is compared (:class:`Plan`). The runs come in three
goes, each a recipe of ``dskd/train.py`` that is written beside its runs: every way at every
learning rate on the first seed; each way's best rate on the other seeds; and cheap ways again, for
as many steps as cost what a dear one costs. A killed go is resumed, a finished one is skipped. The
table is printed and written with all numbers into the folder of results.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import date
from statistics import mean
from typing import Any, NamedTuple

import torch
from pydantic import Field
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
from dskd.settings.base import Section
from dskd.settings.data import HardTokens
from dskd.settings.length import is_in_steps
from dskd.settings.model import Model
from dskd.settings.parsing import parse
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import Tree, dump, load, merge, overlay
from dskd.system.files import write_atomic
from dskd.training.evaluation import EvaluationSet, evaluate
from dskd.training.objective import Objective
from launch.bench import measure
from launch.bench.measure import markdown
from launch.bench.wid import run_products

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LOSS, HARD, RANDOM = "loss", "hard tokens", "random tokens"
"""What a model is scored by, in nats a masked token: the loss of random masks alone, or those of
hard tokens and of random ones."""
FIXED = (
    "train.steps", "train.epochs", "train.lr", "train.warmup", "seed", "evaluation.every",
    "checkpoint.every", "method", "base", "runs",
)  # fmt: skip
"""Settings of the trials' own, which an override of all runs would silently replace."""


class Plan(Section):
    """What is compared of a recipe, in the JSON beside it. A way is a run of the recipe."""

    about: str
    """What the losses are: the head of the table."""
    origin: str
    """The run that the ways start from or learn from; it is carried out once."""
    continued: bool = False
    """Whether every way trains the origin on, so that the drop from its loss is shown."""
    hard: HardTokens | None = None
    """Also score on the tokens of the validation rows that the origin finds hard by this."""
    rates: dict[str, list[float]] = Field(default_factory=dict)
    """Peak learning rates of each way, fixed before any of them runs; empty: the recipe's."""
    budget: str | None = None
    """The way whose FLOPs the ``longer`` ones get; with it the table shows costs."""
    longer: list[str] = Field(default_factory=list)
    """The ways that are also run at the FLOPs of ``budget``."""
    better: list[str]
    """Ways that the table compares with each of ``than`` and of ``longer``: below it or not."""
    than: list[str]

    @property
    def scores(self) -> tuple[str, ...]:
        """What the models are scored by."""
        return (LOSS,) if self.hard is None else (HARD, RANDOM)


class Trial(NamedTuple):
    """A way, run with one learning rate and seed; None: as in the recipe."""

    way: str
    lr: float | None
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """Of its run: letters, digits and dashes."""
        rate = "" if self.lr is None else f"-{self.lr * 1e4:g}e-4"
        steps = "" if self.steps is None else f"-{self.steps}steps"
        return f"{self.way}{rate}-seed{self.seed}{steps}"

    def settings(self, own: Tree) -> Tree:
        """Those of its run, given the way's."""
        own = merge(own, {"seed": self.seed})
        if self.lr is not None:
            own = merge(own, {"train": {"lr": self.lr}})
        if self.steps is not None:
            # the same share of warm-up, and one checkpoint, as the recipe's steps have
            own = merge(own, {"train": {"steps": self.steps, "warmup": self.steps // 20}})
            every = {"every": self.steps}
            own = merge(own, {"evaluation": every, "checkpoint": every})
        return own


# ---- the runs ------------------------------------------------------------------------------------


def refused(overrides: Iterable[str]) -> list[str]:
    """Those of ``FIXED`` that overrides reach."""
    tree, found = overlay(overrides), []
    for name in FIXED:
        node: Any = tree
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found.append(name)
    return found


class Comparison:
    """A recipe, its plan and the overrides of all runs."""

    def __init__(self, recipe: Path, over: list[str]) -> None:
        where = recipe.with_suffix(".json")
        self.plan = parse(Plan, load(where), where=str(where))
        self.recipe, self.over = recipe, over
        read_ = read(recipe, over)
        self.out, self.runs = read_.out, read_.runs
        self.origin = self.runs[self.plan.origin]
        if counted := [name for name, run in self.runs.items() if not is_in_steps(run.train)]:
            text = "is in epochs or shares; the trials are compared by steps"
            raise ConfigError(f"runs.{counted[0]}.train: {text}")
        self._goes = 0

    def carry_out(self, trials: list[Trial]) -> None:
        """Train, export and score what is not done yet, the origin first."""
        if not trials:
            return
        content, origin = load(self.recipe), self.plan.origin
        runs = {origin: content["runs"][origin]}
        runs |= {trial.name: trial.settings(content["runs"][trial.way] or {}) for trial in trials}
        self._goes += 1
        path = self.out / f"go{self._goes}.yaml"
        write_atomic(path, dump({"base": content["base"], "runs": runs}).encode())
        # One rank: the whole batch at once.
        over = [f"train.micro_batch={content['base']['train']['batch']}", *self.over]
        command = [sys.executable, str(ROOT / "dskd/train.py"), str(path), *over]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(status)

    def loss(self, name: str) -> float:
        """An exported model's loss on random masks of the validation rows, nats a token."""
        return json.loads((self.out / name / "scores.json").read_text())["eval_nll"]

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
        ways = [way for way in self.runs if way != plan.origin]
        rates = dict(plan.rates) or {way: [None] for way in ways}
        self.carry_out([Trial(way, lr, first) for way, own in rates.items() for lr in own])
        chosen = {
            way: min(own, key=lambda lr, way=way: self.loss(Trial(way, lr, first).name))
            for way, own in rates.items()
        }
        self.carry_out([Trial(way, lr, seed) for way, lr in chosen.items() for seed in others])
        lines = [(way, None) for way in chosen]
        if plan.budget is not None:
            whole = self.products(plan.budget, self.runs[plan.budget].train.steps)
            lines += [(way, round(whole / self.products(way, 1))) for way in plan.longer]
            longer = [(way, steps) for way, steps in lines if steps is not None]
            self.carry_out([Trial(w, chosen[w], seed, n) for w, n in longer for seed in seeds])
        scorers = {LOSS: self.loss}
        if plan.hard is not None:
            scorers = {HARD: hard_loss(plan.hard, self.origin), RANDOM: self.loss}
        rows = [
            self._row([Trial(way, chosen[way], seed, steps) for seed in seeds], scorers)
            for way, steps in lines
        ]
        return {
            "date": date.today().isoformat(),
            "recipe": f"{self.recipe.parent.name}/{self.recipe.name}",
            "plan": plan.model_dump(mode="json"),
            "seeds": seeds,
            "origin": {name: score(plan.origin) for name, score in scorers.items()},
            "rows": rows,
            "claims": claims(plan, rows),
            "grid": {
                way: {f"{lr:g}": self.loss(Trial(way, lr, first).name) for lr in own}
                for way, own in plan.rates.items()
            },
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
    """Whether the better ways are below the others, by how much, and on how many seeds.

    ``every seed``: their worst is below the other's best; ``no seed``: their best is not below the
    other's worst.
    """
    equal = {row["way"]: row for row in rows if not row["longer"]}
    others = [*(equal[way] for way in plan.than), *(row for row in rows if row["longer"])]
    found = []
    for score in plan.scores:
        on = f" on {score}" if len(plan.scores) > 1 else ""
        for other in others:
            for way in plan.better:
                ours, theirs = equal[way]["scores"][score], other["scores"][score]
                every, some = max(ours) < min(theirs), min(ours) < max(theirs)
                found.append(
                    {
                        "text": f"{way} is below {other['way']}{on}",
                        "gap": mean(theirs) - mean(ours),
                        "on": "every seed" if every else "some seeds" if some else "no seed",
                    }
                )
    return found


def table(result: Mapping[str, Any]) -> str:
    plan, seeds = Plan(**result["plan"]), result["seeds"]
    costed = plan.budget is not None
    about = f"{plan.about}; seeds {', '.join(map(str, seeds))}"
    if plan.rates:
        about += f"; each way's learning rate is the best of its grid on seed {seeds[0]}"
    if costed:
        about += (
            f". TFLOP: products of matrices in training, those of {plan.origin}'s own training not "
            "counted"
        )
    header, first = ["way"], [f"{plan.origin}, before" if plan.continued else plan.origin]
    if costed:
        header += ["steps", "TFLOP", "parameters", "learning rate"]
        first += [""] * 4
    for place, score in enumerate(plan.scores):
        header += [score if place else f"{score}, mean [smallest - largest]"]
        header += ["drop"] if plan.continued else []
        first += [f"{result['origin'][score]:.3f}", *([""] if plan.continued else [])]
    lines = [
        f"{result['date']}, `launch/{result['recipe']}`: {about}.",
        "",
        *markdown(
            header, [first, *(_cells(plan, row, result["origin"]) for row in result["rows"])]
        ),
        "",
        *(
            f"- {claim['text']}: {claim['on']} ({claim['gap']:+.3f} nats)"
            for claim in result["claims"]
        ),
    ]
    if result["grid"]:
        lines += ["", f"Losses on seed {seeds[0]} over the grid:", ""]
    for way, found in result["grid"].items():
        lines.append(f"- {way}: " + ", ".join(f"{lr} {loss:.3f}" for lr, loss in found.items()))
    return "\n".join(lines) + "\n"


def _cells(plan: Plan, row: Mapping[str, Any], origin: Mapping[str, float]) -> list[str]:
    cells = [row["way"]]
    if plan.budget is not None:
        cells += [f"{row['steps']:,}", f"{row['teraflop']:.2f}"]
        cells += [f"{row['parameters']:,}", f"{row['lr']:g}"]
    for score in plan.scores:
        values = row["scores"][score]
        cells.append(f"{mean(values):.3f} [{min(values):.3f} - {max(values):.3f}]")
        if plan.continued:
            cells.append(f"{origin[score] - mean(values):+.3f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--seeds", default="1,2,3", help="the first one chooses learning rates")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_intermixed_args()
    if names := refused(words.overrides):
        own = f"every trial has its own (--seeds, {words.recipe}, its .json)"
        parser.error(f"{', '.join(names)}: {own}")
    comparison = Comparison(words.recipe, words.overrides)
    result = comparison.result([int(seed) for seed in words.seeds.split(",")])
    print(table(result), flush=True)
    stem = f"{result['date']}-{words.recipe.parent.name.replace('_', '-')}-{words.recipe.stem}"
    measure.write(words.results, stem, result, table(result))


if __name__ == "__main__":
    main()
