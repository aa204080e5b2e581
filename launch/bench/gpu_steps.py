"""Steps of every method on one GPU, against the losses of the same steps on the CPU.

    python launch/bench/gpu_steps.py [--seconds N] [--results FOLDER] [--device cuda]

Tiny students are trained by the user's own command, in fp32 and bf16, with every kind of teacher:
it shows that all of it runs on a GPU and is right there, not how fast. What is done when the time
is over is compared and written down.
The status is 0 only if every case ran and has the CPU's losses.
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
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest difference of a loss (some 5 nats) from the CPU's in fp32."""
STEPS = 3

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_MASKED = {"model_type": "roberta", "intermediate_size": 96, **_SIZES, **_NO_DROPOUT}
_CAUSAL = {"model_type": "llama", "intermediate_size": 96, **_SIZES, "num_key_value_heads": 1}
_LESS = {"num_hidden_layers": 1, "initializer_range": 0.3}
_KI = {"kind": "ki", "temperature": 2.0, "rate": 0.5, "schedule": "constant"}
_SELF = {"kind": "self_evolution", "smoothing": 0.5}
_SOFT = {"kind": "muki", "choice": "soft", "margin": False}
_CLASSES = ("first", "second", "third")


class Case(NamedTuple):
    """A run.

    Attributes:
        method, teacher: their sections.
        stage: of ZeRO.
        objective: of the data.
        masking: their section.
        path: weights that the student starts from, below the folder of the runs; else random ones.
    """

    method: Mapping[str, Any]
    teacher: Mapping[str, Any] | None = None
    stage: int = 1
    objective: str = "masked"
    masking: Mapping[str, Any] = {}
    path: str = ""


def _live(config: Mapping[str, Any] = _MASKED, **more: Any) -> dict[str, Any]:
    # In fp32: `auto` is another format on a GPU than on a CPU.
    return {"kind": "live", "model": {"config": {**config, **_LESS}}, "precision": "fp32", **more}


_CACHED = {**_live(), "kind": "cached", "k": 32, "temperatures": [2.0]}
_HARD = {"kind": "hard_tokens", "metric": "quantile"}
_WID = {"kind": "wid", "hidden_size": 32, "every": 1, "ramp": 1, "anneal": 2}


def _panel(**more: Any) -> dict[str, Any]:
    """Two random classifiers, one class in common, whose passes drop."""
    members = {
        name: {"model": {"config": {**_MASKED, **_LESS, **own}}, "precision": "fp32", **named}
        for name, own, named in (
            ("one", {}, {"labels": list(_CLASSES[:2])}),
            ("two", {"initializer_range": 0.6}, {"labels": list(_CLASSES[:0:-1])}),
        )
    }
    return {"kind": "panel", "teachers": members, "passes": 4, "at_once": 2, "dropout": 0.2, **more}


_ROWS = {"objective": "classification"}
CASES = {
    "lm": Case({"kind": "lm"}),
    "ki, live teacher": Case(_KI, _live()),
    "ki, live teacher, causal": Case(_KI, _live(_CAUSAL), objective="causal"),
    "ki, cached teacher": Case(_KI, _CACHED),
    "ki, routed teachers": Case(_KI, {"kind": "routed", "domains": {"builtin": _live()}}),
    "ki, live teacher, ZeRO-2": Case(_KI, _live(), stage=2),
    "ki, sharded teacher, ZeRO-3": Case(_KI, _live(deepspeed="zero3"), stage=3),
    "self_evolution, hard tokens": Case(_SELF, {"kind": "self"}, masking=_HARD),
    "wid": Case(_WID, path="lm, cpu, fp32/export"),
    "finetune": Case({"kind": "finetune"}, **_ROWS),
    "muki, stored scores": Case({"kind": "muki", "normalise": "batch_mean"}, _panel(), **_ROWS),
    "muki, live scores, ZeRO-3": Case(_SOFT, _panel(scores="live"), stage=3, **_ROWS),
    "uhc, stored scores, ZeRO-2": Case(
        {"kind": "uhc"}, _panel(passes=1, dropout=None), stage=2, **_ROWS
    ),
}


def write_rows(folder: Path) -> None:
    """``rows.jsonl`` and ``valid.jsonl`` of the built-in corpus, each row of one of three classes
    in turn."""
    from dskd.data.sources import documents
    from dskd.settings.data import BuiltinSource

    texts = [" ".join(text.split())[:240] for text in documents(BuiltinSource(documents=40))]
    for name, some in (("rows", texts[8:]), ("valid", texts[:8])):
        rows = [{"text": text, "label": _CLASSES[n % 3]} for n, text in enumerate(some)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def settings(case: Case, folder: Path, precision: str) -> dict[str, Any]:
    """A run of the case, written below the folder."""
    causal = case.objective == "causal"
    path = {"path": str(folder / case.path)} if case.path else {}
    data: dict[str, Any] = {
        "folder": str(folder / "data"),
        "objective": case.objective,
        "tokenizer": {"kind": "trained", "vocab_size": 500},
        "block_size": 64,
    }
    if case.objective == "classification":
        for section, name in (("sources", "rows"), ("validation", "valid")):
            rows = {"kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "label": "label"}
            data[section] = [rows]
    else:
        data |= {
            "packing": "contiguous",
            "sources": [{"kind": "builtin", "documents": 12}],
            "validation": [{"kind": "builtin", "documents": 2}],
            "masking": {} if causal else {"draws": 2, **case.masking},
        }
    return {
        "seed": 3,
        "data": data,
        "deepspeed": f"zero{case.stage}",
        "model": {"config": _CAUSAL if causal else _MASKED, **path},
        "teacher": case.teacher,
        "method": case.method,
        "train": {
            **{"steps": STEPS, "batch": 8, "micro_batch": 4, "lr": 1e-3, "warmup": 0},
            "precision": precision,
        },
        "evaluation": {"every": STEPS, "rows": 16},
        "checkpoint": {"every": STEPS},
        "until": "evaluate",
    }


class Trained(NamedTuple):
    """What became of a run: its losses, or why there are none."""

    losses: list[float]
    failed: str = ""


def train(name: str, device: str, precision: str, folder: Path, end: float) -> Trained:
    """Train a case by the user's command, until the clock says so; its output is printed if it
    fails."""
    from dskd.settings.yaml_tree import dump
    from dskd.system.log import read_metrics

    out = folder / f"{name}, {device}, {precision}"
    recipe = folder / f"{out.name}.yaml"
    recipe.write_text(dump(settings(CASES[name], folder, precision)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "dskd/train.py"), str(recipe), f"out={out}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"}
    left = end - time.monotonic()
    if left <= 0:
        return Trained([], "no time was left")
    try:
        done = subprocess.run(command, env=env, timeout=left, check=False, **options)
    except subprocess.TimeoutExpired:
        return Trained([], "cut off by time")
    if done.returncode:
        print(f"{out.name}: status {done.returncode}\n{done.stdout}", flush=True)
        *_, last = done.stdout.strip().splitlines() or [""]
        return Trained([], f"status {done.returncode}: {last}")
    read = read_metrics(out / "train" / "metrics.jsonl")
    losses = [each["loss"] for each in read if "loss" in each]
    keys = ("eval_nll", "eval_loss")  # of tokens, of labelled rows
    return Trained(losses + [each[key] for each in read for key in keys if key in each])


Key = tuple[str, str, str]
"""Case, device and precision."""


def train_all(device: str, folder: Path, seconds: float) -> Iterator[dict[Key, Trained]]:
    """Train every case on the CPU in fp32 and on the device in every precision, several beside one
    another, no longer than so many seconds; all that is done, after each one."""
    end = time.monotonic() + seconds
    write_rows(folder)
    first, *others = CASES
    # Before the others, of which one starts from its weights.
    done = {(first, "cpu", "fp32"): train(first, "cpu", "fp32", folder, end)}
    keys = [(name, device, precision) for precision in TOLERANCE for name in CASES]
    keys += [(name, "cpu", "fp32") for name in others]
    at_once = max(1, (os.cpu_count() or 2) * 3 // 4)  # a thread each, and a loader's now and then
    with ThreadPoolExecutor(at_once) as pool:
        running = {
            pool.submit(train, *key, folder, end): key
            for key in dict.fromkeys(keys)
            if key not in done
        }
        for future in as_completed(running):
            done[running[future]] = future.result()
            yield done


def compared(trained: Mapping[Key, Trained], device: str) -> list[dict[str, Any]]:
    """Every case in every precision: the losses on both devices, their largest difference, and what
    is wrong (empty: nothing)."""
    rows = []
    for precision, tolerance in TOLERANCE.items():
        for name in CASES:
            cpu, gpu = (
                trained.get(key, Trained([], "not run"))
                for key in ((name, "cpu", "fp32"), (name, device, precision))
            )
            row = {"case": name, "precision": precision, "cpu": cpu.losses, "gpu": gpu.losses}
            row["wrong"] = gpu.failed or (cpu.failed and f"on the CPU: {cpu.failed}")
            if not row["wrong"]:
                apart = [abs(a - b) for a, b in zip(gpu.losses, cpu.losses, strict=True)]
                row["difference"] = max(apart)
                if not all(each <= tolerance for each in apart):  # a NaN is not
                    row["wrong"] = f"beyond {tolerance:g}"
            rows.append(row)
    return rows


def report(rows: list[dict[str, Any]], results: Path) -> str:
    """Write the table, with all numbers, into the folder of results; the table."""
    import torch

    from launch.bench.measure import about, markdown, slug, write

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**about(device, ["torch", "triton", "transformers", "deepspeed"]), "rows": rows}
    cells = [
        [
            row["case"],
            row["precision"],
            " ".join(f"{loss:.4f}" for loss in row["cpu"]),
            " ".join(f"{loss:.4f}" for loss in row["gpu"]),
            f"{row['difference']:.1e}" if "difference" in row else "",
            row["wrong"] or f"within {TOLERANCE[row['precision']]:g}",
        ]
        for row in rows
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    page = [
        f"{result['date']}, {result['device']}; {versions}. Losses of {STEPS} steps and one "
        f"evaluation, the CPU's in fp32.",
        "",
        *markdown(["case", "precision", "CPU", "GPU", "difference", ""], cells),
    ]
    text = "\n".join(page) + "\n"
    write(results, f"{result['date']}-steps-{slug(result['device'])}", result, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for trained in train_all(words.device, Path(folder), words.seconds):
            rows = compared(trained, words.device)
            text = report(rows, words.results)  # each time: what stops it may leave no time for it
    print(text, flush=True)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
