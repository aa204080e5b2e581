"""The honest table of Weight-Inherited Distillation: against scratch, logit KD and slicing.

    python launch/bench/wid_compare.py [--seeds 1,2,3] [--results FOLDER] [a.b=value ...]

Runs ``launch/wid/compare.yaml`` in three goes, each a recipe of ``dskd/train.py`` that is written
beside its runs: every way at every learning rate of ``GRID`` on the first seed; each way's best
rate on the other seeds; and the cheap controls again, for as many steps as cost what the WID run
costs. A killed go goes on from there, a finished one is skipped. The table is printed and written
with all numbers into the folder of results.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this folder first, where kernels.py would pass for the package that transformers
    # imports
    sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from statistics import mean
from typing import Any, NamedTuple

from safetensors import safe_open

from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import Tree, dump, load, merge, overlay
from dskd.system.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/wid/compare.yaml"
GRID = {
    "wid-dim": (5e-4, 1e-3, 2e-3, 4e-3),
    "wid-head": (5e-4, 1e-3, 2e-3, 4e-3),
    "wid-ki": (5e-4, 1e-3, 2e-3, 4e-3),
    "slice": (1e-3, 3e-3, 1e-2, 2e-2),
    "kd": (3e-3, 1e-2, 1.5e-2, 2e-2),
    "scratch": (3e-3, 1e-2, 1.5e-2, 2e-2),
}
"""Peak learning rates of each way, fixed before any of them ran; then widened where the largest was
the best (LOG.md)."""
LONGER = ("slice", "scratch")
"""The ways that are also run at the FLOPs of ``wid-dim``."""
TEACHER = "teacher"
FIXED = (
    "train.steps",
    "train.lr",
    "train.warmup",
    "seed",
    "evaluation.every",
    "checkpoint.every",
    "method",
    "base",
    "runs",
)
"""Settings of the trials' own, which an override of all runs would silently replace."""


class Trial(NamedTuple):
    """A way, run with one learning rate and seed; ``steps`` None: as in the recipe."""

    way: str
    lr: float
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """Of its run: letters, digits and dashes."""
        steps = "" if self.steps is None else f"-{self.steps}steps"
        return f"{self.way}-{self.lr * 1e4:g}e-4-seed{self.seed}{steps}"

    def settings(self, own: Tree) -> Tree:
        """Those of its run, given the way's."""
        train: Tree = {"lr": self.lr}
        if self.steps is not None:
            # the same share of warm-up, and one checkpoint, as the recipe's 800 have
            train |= {"steps": self.steps, "warmup": self.steps // 20}
            own = merge(own, {"evaluation": {"every": self.steps}})
            own = merge(own, {"checkpoint": {"every": self.steps}})
        return merge(own, {"seed": self.seed, "train": train})


# ---- what a step costs ---------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the cost model counts with; letters as in the functions below.

    ``M`` tokens and ``S`` supervised ones of a step, rows of ``T``, ``L`` layers, vocabulary ``V``.
    """

    M: int
    S: float
    T: int
    L: int
    V: int


def sizes_of(run: Run) -> Sizes:
    """Those of a run on full rows of BERT."""
    tokens = run.train.batch * run.data.block_size
    return Sizes(
        tokens,
        tokens * run.data.masking.probability,
        run.data.block_size,
        run.model.config["num_hidden_layers"],
        run.data.tokenizer.vocab_size,
    )


def forward_products(s: Sizes, hidden: int) -> float:
    """Multiplications of a plain forward pass.

    ``L (12 H^2 + 2 T H) M`` of the layers, ``(H^2 + V H) S`` of the head.
    """
    layers = s.L * (12 * hidden**2 + 2 * s.T * hidden) * s.M
    return layers + (hidden**2 + s.V * hidden) * s.S


def wid_products(s: Sizes, hidden: int, small: int, *, compacted: bool) -> float:
    """Multiplications of a WID step: three times those of its forward pass and of its merges.

    An N x K layer is merged by ``N K (N + K)``, compacted to n x k by ``min(n N K + n K k, N K k +
    n N k)``; six of a layer (16 H^3) and the head's one. The embedding's compactor costs ``H h M``,
    the vocabulary projection's ``H h S``; the projection itself stays V x H.
    """
    h = small if compacted else hidden
    shapes = s.L * ([(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)])
    merges = 0.0
    for outs, ins in [*shapes, (hidden, hidden)]:
        n, k = outs * h // hidden, ins * h // hidden
        merges += min(n * outs * ins + n * ins * k, outs * ins * k + n * outs * k)
    own = forward_products(s, h) - s.V * h * s.S
    return 3 * (own + merges + hidden * h * (s.M + s.S) + s.V * hidden * s.S)


def run_products(way: str, steps: int, s: Sizes, hidden: int, small: int, method: Tree) -> float:
    """Multiplications of a whole run, the teacher's forward passes included."""
    taught = steps * forward_products(s, hidden) if way in ("kd", "wid-ki") else 0.0
    if not way.startswith("wid"):
        return taught + steps * 3 * forward_products(s, small)
    settled = method["every"] * method["ramp"] + method["anneal"] - 1
    before = settled * wid_products(s, hidden, small, compacted=False)
    return taught + before + (steps - settled) * wid_products(s, hidden, small, compacted=True)


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


def carry_out(trials: Iterable[Trial], number: int, out: Path, over: list[str]) -> None:
    """Train, export and score what is not done yet, the teacher first."""
    content = load(RECIPE)
    runs = {TEACHER: content["runs"][TEACHER]}
    runs |= {trial.name: trial.settings(content["runs"][trial.way] or {}) for trial in trials}
    path = out / f"go{number}.yaml"
    write_atomic(path, dump({"base": content["base"], "runs": runs}).encode())
    # One rank: the whole batch at once.
    over = [f"train.micro_batch={content['base']['train']['batch']}", *over, f"out={out}"]
    command = [sys.executable, str(ROOT / "dskd/train.py"), str(path), *over]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def score(out: Path, trial: Trial) -> float:
    """The exported student's loss on the validation rows, nats a token."""
    return json.loads((out / trial.name / "scores.json").read_text())["eval_nll"]


def parameters(folder: Path) -> int:
    """Of an exported model."""
    with safe_open(folder / "export" / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def best(out: Path, grid: Mapping[str, tuple[float, ...]], seed: int) -> dict[str, float]:
    """By way, the learning rate of the lowest loss on one seed."""
    return {
        way: min(rates, key=lambda lr, way=way: score(out, Trial(way, lr, seed)))
        for way, rates in grid.items()
    }


# ---- the table -----------------------------------------------------------------------------------


def row(out: Path, trials: list[Trial], products: float, steps: int) -> dict[str, Any]:
    """A way's line."""
    losses = [score(out, trial) for trial in trials]
    return {
        "way": trials[0].way,
        "lr": trials[0].lr,
        "steps": steps,
        "parameters": parameters(out / trials[0].name),
        "teraflop": 2 * products / 1e12,
        "eval_nll": losses,
        "mean": mean(losses),
    }


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What WID is said to beat, and whether every seed of it does; the longer rows come last."""
    equal = {line["way"]: line for line in rows if not line["longer"]}
    longer = {line["way"]: line for line in rows if line["longer"]}
    pairs = [(equal[way], "equal steps") for way in ("scratch", "kd", "slice")]
    pairs += [(longer[way], "equal FLOPs") for way in LONGER]
    found = []
    for other, when in pairs:
        for way in ("wid-dim", "wid-head"):
            ours, theirs = equal[way]["eval_nll"], other["eval_nll"]
            text = f"{way} beats {other['way']} at {when}"
            gap = other["mean"] - equal[way]["mean"]
            found.append({"text": text, "gap": gap, "every": max(ours) < min(theirs)})
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result as markdown."""
    lines = [
        f"{result['date']}, `launch/wid/compare.yaml`: validation loss (nats a masked token, of "
        f"the exported model) of students of {result['student']} units, 1/16 of the encoder's "
        f"weights of a teacher of {result['hidden']} with {result['teacher']:.3f}; seeds "
        f"{', '.join(map(str, result['seeds']))}; each way's learning rate is the best of its grid "
        f"on seed {result['seeds'][0]}. TFLOP: products of matrices in training, the teacher's own "
        f"training not counted.",
        "",
        "| way | steps | TFLOP | parameters | learning rate | loss, mean [smallest - largest] |",
        "|---|---|---|---|---|---|",
    ]
    for line in result["rows"]:
        losses = line["eval_nll"]
        cells = [
            line["way"] + (", equal FLOPs" if line["longer"] else ""),
            f"{line['steps']:,}",
            f"{line['teraflop']:.2f}",
            f"{line['parameters']:,}",
            f"{line['lr']:g}",
            f"{line['mean']:.3f} [{min(losses):.3f} - {max(losses):.3f}]",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for claim in result["claims"]:
        verdict = (
            "no" if claim["gap"] <= 0 else "yes, every seed" if claim["every"] else "on average"
        )
        lines.append(f"- {claim['text']}: {verdict} ({claim['gap']:+.3f} nats)")
    lines += ["", f"Losses on seed {result['seeds'][0]} over the grid:", ""]
    for way, found in result["grid"].items():
        lines.append(f"- {way}: " + ", ".join(f"{lr} {loss:.3f}" for lr, loss in found.items()))
    return "\n".join(lines) + "\n"


def compare(seeds: list[int], out: Path, over: list[str]) -> dict[str, Any]:
    """All three goes; the numbers of the table."""
    recipe = read(RECIPE, [*over, f"out={out}"])
    student, wid = recipe.runs["scratch"], recipe.runs["wid-dim"]
    sizes, teacher = sizes_of(student), recipe.runs[TEACHER].model.config["hidden_size"]
    small, steps = wid.method["hidden_size"], wid.train.steps
    first, *others = seeds
    carry_out((Trial(w, lr, first) for w, rates in GRID.items() for lr in rates), 1, out, over)
    chosen = best(out, GRID, first)
    carry_out((Trial(w, lr, s) for w, lr in chosen.items() for s in others), 2, out, over)
    budget = run_products("wid-dim", steps, sizes, teacher, small, wid.method)
    longer = round(budget / run_products("scratch", 1, sizes, teacher, small, {}))
    carry_out((Trial(w, chosen[w], s, longer) for w in LONGER for s in seeds), 3, out, over)

    rows = []
    for way, lr in chosen.items():
        cost = run_products(way, steps, sizes, teacher, small, wid.method)
        rows.append(row(out, [Trial(way, lr, s) for s in seeds], cost, steps) | {"longer": False})
    for way in LONGER:
        cost = run_products(way, longer, sizes, teacher, small, {})
        trials = [Trial(way, chosen[way], s, longer) for s in seeds]
        rows.append(row(out, trials, cost, longer) | {"longer": True})
    return {
        "date": date.today().isoformat(),
        "seeds": seeds,
        "hidden": teacher,
        "student": small,
        "teacher": json.loads((out / TEACHER / "scores.json").read_text())["eval_nll"],
        "rows": rows,
        "claims": claims(rows),
        "grid": {
            way: {f"{lr:g}": score(out, Trial(way, lr, first)) for lr in rates}
            for way, rates in GRID.items()
        },
    }


def main() -> None:
    """Run what is missing; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3", help="the first one chooses learning rates")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_args()
    if names := refused(words.overrides):
        listed = ", ".join(names)
        parser.error(f"{listed}: every trial has its own (GRID, --seeds, {RECIPE.name})")
    seeds = [int(seed) for seed in words.seeds.split(",")]
    out = overlay(words.overrides).get("out") or load(RECIPE)["base"]["out"]
    over = [word for word in words.overrides if not word.startswith("out=")]
    result = compare(seeds, Path(out), over)
    print(table(result), flush=True)
    stem = f"{result['date']}-wid-compare"
    write_atomic(words.results / f"{stem}.json", json.dumps(result, indent=1).encode())
    write_atomic(words.results / f"{stem}.md", table(result).encode())


if __name__ == "__main__":
    main()
