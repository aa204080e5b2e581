"""The honest table of Self-Evolution: training on what is hard against training on at random.

    python launch/bench/self_evolution.py [--seeds 1,2,3] [--out FOLDER] [--data FOLDER]
                                          [--results FOLDER]

Runs every way of ``launch/self_evolution/compare.yaml`` from one base model with several seeds (of
order and masks), then scores each exported model on the validation rows twice: on the tokens that
the BASE found hard there (the hardest fifth of all, at most 15 % of a row, always the mask token),
and on random masks, as any run is evaluated. A killed call goes on from there, a finished run is
skipped. The table is printed and written with all numbers into the folder of results.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # this folder, put first, has a kernels.py, and transformers imports a package of that name
    sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from statistics import mean
from typing import Any

import torch

from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.data.views import View
from dskd.hardness.masks import hard_view
from dskd.hardness.question import question
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness
from dskd.methods.base import build_method
from dskd.methods.metrics import LM_LOSS
from dskd.models.build import build, model_fingerprint
from dskd.settings.data import HardTokens
from dskd.settings.model import Model
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import Tree, dump, load, merge
from dskd.system.files import write_atomic
from dskd.training.evaluation import EvaluationSet, evaluate
from dskd.training.objective import Objective

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/self_evolution/compare.yaml"
BASE, CONTROL = "base", "random"
CPU = torch.device("cpu")
HARD = HardTokens(
    kind="hard_tokens",
    metric="quantile",
    quantile=0.2,
    least=0.0,
    replacement="all_mask",
    micro_batch=64,
)
"""The hard tokens of the validation rows, whatever a run was trained on."""


def trials(seeds: list[int]) -> dict[str, Tree]:
    """The runs of the recipe, each way but the base once for every seed."""
    runs = load(RECIPE)["runs"]
    made = {BASE: runs[BASE]}
    for way, own in runs.items():
        if way != BASE:
            made |= {name_of(way, seed): merge(own, {"seed": seed}) for seed in seeds}
    return made


def name_of(way: str, seed: int) -> str:
    """Of a way's run."""
    return f"{way}-seed{seed}"


def carry_out(out: Path, data: Path, seeds: list[int]) -> None:
    """Train and export what is not done yet."""
    path = out / "compare.yaml"
    write_atomic(path, dump({"base": load(RECIPE)["base"], "runs": trials(seeds)}).encode())
    words = [f"out={out}", f"data.folder={data}", "train.micro_batch=32"]  # one rank
    command = [sys.executable, str(ROOT / "dskd/train.py"), str(path), *words]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


# ---- scores --------------------------------------------------------------------------------------


def model_of(folder: Path, run: Run, prepared: Prepared) -> torch.nn.Module:
    """An exported model."""
    return build(
        Model(path=str(folder / "export")),
        prepared.tokenizer,
        objective=run.data.objective,
        block_size=run.data.block_size,
        seed=run.seed,
        ds=None,
        dtype=torch.float32,
        where="export",
    )


def hard_validation(out: Path, run: Run, prepared: Prepared) -> View:
    """Masks the tokens of the validation rows that the base finds hard."""
    base, rows = out / BASE, prepared.validation
    data = run.data.model_copy(update={"masking": HARD})
    asking = scoring_view(data, prepared.tokenizer, run.seed)
    prints = {
        "data": rows.fingerprint,
        "model": model_fingerprint(Model(path=str(base / "export")), seed=run.seed, where="base"),
    }
    question(
        HARD,
        lambda: model_of(base, run, prepared),
        replace(prepared, train=rows),
        asking,
        out / "validation-questions",
        fingerprints=prints,
        device=CPU,
    )
    store = Hardness(out / "validation-questions", prints)
    about = {"scores": store.fingerprint, "rowset": rows}
    return hard_view(data, prepared.tokenizer, run.seed, lambda _: store, **about)


def hard_nll(folder: Path, run: Run, prepared: Prepared, view: View) -> float:
    """An exported model's loss on the hard tokens of all validation rows, nats a token."""
    objective = Objective(
        model_of(folder, run, prepared).eval(), build_method({"kind": "lm"}), None
    )
    validation = EvaluationSet("eval", prepared.validation, view)
    micro_batch = run.evaluation.micro_batch
    scores = evaluate(objective, [validation], [LM_LOSS], micro_batch=micro_batch, device=CPU)
    return scores["eval"]["nll"]


def random_nll(folder: Path) -> float:
    """An exported model's loss on random masks, as its run scored it."""
    return json.loads((folder / "scores.json").read_text())["eval_nll"]


def compare(seeds: list[int], out: Path, data: Path) -> dict[str, Any]:
    """Carry out the runs; the numbers of the table."""
    carry_out(out, data, seeds)
    run = read(RECIPE, [f"out={out}", f"data.folder={data}"]).runs[BASE]
    prepared = open_prepared(prepare(run.data))
    view = hard_validation(out, run, prepared)

    def scores(name: str) -> dict[str, float]:
        hard = hard_nll(out / name, run, prepared, view)
        return {"hard": hard, "random": random_nll(out / name)}

    ways = [way for way in load(RECIPE)["runs"] if way != BASE]
    return {
        "date": date.today().isoformat(),
        "seeds": seeds,
        "steps": load(RECIPE)["base"]["train"]["steps"],
        "base": scores(BASE),
        "ways": {way: [scores(name_of(way, seed)) for seed in seeds] for way in ways},
    }


# ---- the table -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as markdown."""
    base, ways = result["base"], result["ways"]
    lines = [
        f"{result['date']}, `launch/self_evolution/compare.yaml`: validation loss (nats a masked "
        f"token) after {result['steps']} more steps of a trained model, on the tokens that it "
        f"found hard before them and on random ones; seeds {', '.join(map(str, result['seeds']))}.",
        "",
        "| way | hard tokens, mean [smallest - largest] | drop | random tokens | drop |",
        "|---|---|---|---|---|",
        f"| before | {base['hard']:.3f} | | {base['random']:.3f} | |",
    ]
    for way, scores in ways.items():
        cells = [way]
        for kind in ("hard", "random"):
            values = [score[kind] for score in scores]
            cells.append(f"{mean(values):.3f} [{min(values):.3f} - {max(values):.3f}]")
            cells.append(f"{base[kind] - mean(values):+.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for kind in ("hard", "random"):
        control = [score[kind] for score in ways[CONTROL]]
        for way in (way for way in ways if way != CONTROL):
            gaps = [theirs - score[kind] for theirs, score in zip(control, ways[way], strict=True)]
            every = "every seed" if min(gaps) > 0 else "no seed" if max(gaps) <= 0 else "some seeds"
            lines.append(
                f"- {way} is below {CONTROL} on {kind} tokens: {every} ({mean(gaps):+.3f} nats)"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path(load(RECIPE)["base"]["out"]))
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    words = parser.parse_args()
    result = compare([int(seed) for seed in words.seeds.split(",")], words.out, words.data)
    print(table(result), flush=True)
    stem = f"{result['date']}-self-evolution"
    write_atomic(words.results / f"{stem}.json", json.dumps(result, indent=1).encode())
    write_atomic(words.results / f"{stem}.md", table(result).encode())


if __name__ == "__main__":
    main()
