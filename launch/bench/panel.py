"""What a panel of teachers costs: a MUKI step from stored scores against one of fine-tuning, and
scores of 16 passes with dropout against 16 plain passes.

    python launch/bench/panel.py [--rounds N] [--results FOLDER] [a.b=value ...]

Student and both teachers are encoders of 5 layers and width 192; the rows are of the
built-in corpus. Steps are the real thing: DeepSpeed engine, trainer, loader, stores; only the
classes and the teachers' weights mean nothing. A batch is scored with all passes at once, some, or
one by one, without the store that a run would fill. Every round takes one sample of each variant,
in an order of its own; ratios are taken within a round, and their median is reported.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dskd.batch import Batch
from dskd.data.loader import make_batch
from dskd.data.sources import documents
from dskd.methods.base import build_method
from dskd.methods.panel import ask_teachers
from dskd.models.families import positions_of
from dskd.runs.context import RunContext
from dskd.settings.data import BuiltinSource
from dskd.settings.run import Run
from dskd.settings.yaml_tree import merge, overlay
from dskd.stores.dropout_scores import DropoutScorer
from dskd.stores.panel_scores import panelists
from launch.bench import measure
from launch.bench.measure import markdown, over, show, slug, spread
from launch.bench.step import Step, apart

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [f"class {number}" for number in range(4)]
PASSES = 16
ROWS = 16
"""Of the batch that is scored."""
WARM_UP = 3
"""Untimed steps at the start."""
LIMIT = 1.05
"""Most that a MUKI step may cost, times one of fine-tuning."""
STEPS = {"finetune": "fine-tuning", "muki": "MUKI, stored scores"}
PLAIN, BY_ONE = "plain", "by_one"
SCORING = {
    "one": "1 pass without dropout",
    PLAIN: f"{PASSES} passes, torch's dropout",
    BY_ONE: f"scores of {PASSES} passes, one by one",
    "by_four": f"scores of {PASSES} passes, four at once",
    "at_once": f"scores of {PASSES} passes, all at once",
}
_ENCODER = {
    "model_type": "bert",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "deepspeed": "zero1",
    "data": {
        "objective": "classification",
        "tokenizer": {"kind": "trained", "vocab_size": 2048},
        "block_size": 128,
    },
    "model": {"config": _ENCODER},
    "train": {"batch": 16, "micro_batch": 8, "lr": 1e-4},
    # Few passes: what is read of a store is as much for any number of them.
    "teacher": {"kind": "panel", "passes": 2},
}


def write_rows(file: Path, count: int = 300) -> None:
    """Documents of the built-in corpus, each of one of the classes in turn."""
    rows = [
        {"text": " ".join(text.split())[:1000], "label": CLASSES[number % len(CLASSES)]}
        for number, text in enumerate(documents(BuiltinSource(documents=count)))
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def variants(folder: Path, overrides: list[str], steps: int) -> dict[str, Run]:
    """The same student by both methods; stores and rows go to ``folder``."""
    tree = merge(SETTINGS, overlay(overrides))
    teachers = {  # a random model tells two classes apart
        name: {"model": tree["model"], "labels": labels}
        for name, labels in (("first", CLASSES[:2]), ("second", CLASSES[2:]))
    }
    source = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "label": "label"}
    tree = merge(
        tree,
        {
            "out": folder,
            "data": {"folder": folder / "data", "sources": [source]},
            "train": {"steps": steps},
            "teacher": {"teachers": teachers},
        },
    )
    plain = {"method": {"kind": "finetune"}, "teacher": None}
    own = {"finetune": plain, "muki": {"method": {"kind": "muki"}}}
    return {name: Run.model_validate({**tree, **own[name]}) for name in STEPS}


def context_of(run: Run, device: torch.device) -> RunContext:
    return RunContext(run, build_method(run.method), device)


def make_stores(run: Run, device: torch.device) -> None:
    """Prepare the rows and ask the teachers about them."""
    ask_teachers(context_of(run, device))


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Samples of calls that have run before, in milliseconds."""
    before = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def finished(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (call(), before())

    ended = {name: finished(call) for name, call in calls.items()}
    return measure.interleave(ended, measure.HostClock(), before=before, rounds=rounds, seconds=0.0)


def clock_steps(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of every step by method; all steps of a round are on the same rows."""
    steps = {name: Step(run, device) for name, run in runs.items()}
    for one in [*steps.values()] * (WARM_UP - 1):  # the harness adds a round of its own
        one.step()
    samples = interleaved({name: one.step for name, one in steps.items()}, device, rounds)
    for one in steps.values():
        one.loader.close()
    some = steps["finetune"]
    tokens = some.progress.tokens / some.progress.step
    return {**samples, "tokens_per_step": tokens, "student_parameters": some.parameters}


def clock_scoring(run: Run, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times in which one batch is scored in every way."""
    context = context_of(run, device)
    rows = context.prepared.train
    ids_B = np.linspace(0, len(rows) - 1, ROWS).astype(np.int64)
    batch = make_batch(rows, context.view, ids_B, np.zeros_like(ids_B))
    calls = ways(*(panelists(run, context.prepared)[0].build(run, device) for _ in range(2)))
    sent = batch.to(device)
    asked = {name: lambda call=call: call(sent) for name, call in calls.items()}
    for call in asked.values():
        call()
    return {**interleaved(asked, device, rounds), "tokens": batch.tokens}


def ways(plain: nn.Module, dropping: nn.Module) -> dict[str, Callable[[Batch], object]]:
    """What scores a batch, by name; of two models of the same weights the second one attends
    eagerly from now on."""

    def scorer(model: nn.Module, passes: int, at_once: int) -> DropoutScorer:
        def logits(batch: Batch) -> Tensor:
            return positions_of(model, batch).logits_NV

        return DropoutScorer(model, logits, passes=passes, at_once=at_once, seed=1)

    @torch.no_grad()
    def by_torch(batch: Batch) -> Tensor:
        plain.train()
        return sum(positions_of(plain, batch).logits_NV.softmax(-1) for _ in range(PASSES))

    return {
        "one": scorer(plain, 1, 1),
        PLAIN: by_torch,
        BY_ONE: scorer(dropping, PASSES, 1),
        "by_four": scorer(dropping, PASSES, 4),
        "at_once": scorer(dropping, PASSES, PASSES),
    }


def summarise(steps: dict[str, Any], scoring: dict[str, Any]) -> dict[str, Any]:
    """Medians and spreads of times and of ratios within a round, and whether the limit holds."""
    wall, cores = steps["wall_ms"], steps["cpu_ms"]
    ratio = over(wall, "muki", "finetune")
    target = {**ratio, "cpu": over(cores, "muki", "finetune"), "limit": LIMIT}
    scored = scoring["wall_ms"]
    return {
        "target": {**target, "met": ratio["median"] <= LIMIT},
        "steps": {
            name: {"ms": spread(wall[name]), "cpu_ms": spread(cores[name])} for name in STEPS
        },
        "scoring": {
            name: {
                "ms": spread(scored[name]),
                "cpu_ms": spread(scoring["cpu_ms"][name]),
                "rows_per_second": 1e3 * ROWS / median(scored[name]),
                "over_one": over(scored, name, "one"),
                "over_plain": over(scored, name, PLAIN),
                "over_by_one": over(scored, name, BY_ONE),
            }
            for name in SCORING
        },
    }


def table(result: Mapping[str, Any]) -> str:
    train, target = result["settings"]["train"], result["target"]
    steps = [
        [STEPS[name], show(row["ms"], 1), f"{row['cpu_ms']['median']:.1f}"]
        for name, row in result["steps"].items()
    ]
    header = ["scoring", "ms, median [quartiles]", "CPU ms", "rows/s", "times 1 pass"]
    scoring = [
        [
            SCORING[name],
            show(row["ms"], 1),
            f"{row['cpu_ms']['median']:.1f}",
            f"{row['rows_per_second']:,.1f}",
            show(row["over_one"], 2),
            show(row["over_plain"], 2),
            show(row["over_by_one"], 2),
        ]
        for name, row in result["scoring"].items()
    ]
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}), {result['threads']} threads, "
        f"load {result['load'][0]:.1f}; {result['student_parameters']:,} parameters, batch "
        f"{train['batch']} in micro-batches of {train['micro_batch']}, "
        f"{result['tokens_per_step']:,.0f} tokens a step, {result['settings']['deepspeed']}; "
        f"{result['rounds']} rounds.",
        "",
        *markdown(["step", "ms, median [quartiles]", "CPU ms"], steps),
        "",
        f"- MUKI / fine-tuning: {show(target, 3)}, CPU time {show(target['cpu'], 3)}; at most "
        f"{target['limit']}: {'met' if target['met'] else 'MISSED'}",
        "",
        f"Scores of {ROWS} rows, {result['scored_tokens']:,} tokens; {result['scoring_rounds']} "
        f"rounds.",
        "",
        *markdown([*header, f"times {SCORING[PLAIN]}", "times one by one"], scoring),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="of steps; of scores an eighth")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_args()
    if words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    scoring_rounds = max(2, words.rounds // 8)
    with tempfile.TemporaryDirectory(prefix="dskd-bench-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        runs = variants(folder, words.overrides, WARM_UP + words.rounds)
        apart(make_stores, runs["muki"])
        steps = apart(lambda device: clock_steps(runs, device, words.rounds))
        scoring = apart(lambda device: clock_scoring(runs["muki"], device, scoring_rounds))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = {"method", "data", "model", "teacher", "train", "deepspeed"}
    result = {
        **measure.about(device, ("torch", "deepspeed", "transformers", "numpy")),
        "settings": runs["muki"].model_dump(mode="json", include=sections),
        "overrides": words.overrides,
        "rounds": words.rounds,
        "scoring_rounds": scoring_rounds,
        "tokens_per_step": steps.pop("tokens_per_step"),
        "student_parameters": steps.pop("student_parameters"),
        "scored_tokens": scoring.pop("tokens"),
        "samples": {"steps": steps, "scoring": scoring},
        **summarise(steps, scoring),
    }
    print(table(result), flush=True)
    measure.write(
        words.results, f"{result['date']}-panel-{slug(result['device'])}", result, table(result)
    )


if __name__ == "__main__":
    main()
