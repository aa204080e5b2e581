"""What a measurement of step times says: medians and spreads, ratios within a round, the table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dskd.settings.run import Run
from launch.bench import timing
from launch.bench.timing import over, show, spread

FORWARD = "forward"
"""The teacher's forward pass alone, on the batches of the step."""
VARIANTS = {
    "plain": "plain LM",
    "cached": "KI, cached",
    "live": "KI, live",
    "eager": "KI, cached, eager loss",
}
BOUNDS = {"cached": ("plain",), "live": ("plain", FORWARD)}
LIMITS = {"cached": 1.10, "live": 1.15}
"""Most that a step may cost, times the sum of its bounds."""


def about(runs: Mapping[str, Run], settings: Path, overrides: list[str]) -> dict[str, Any]:
    """Date, machine, versions and settings of a measurement."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = timing.about(device, ("torch", "deepspeed", "transformers", "numpy"))
    run = runs["cached"]
    return {
        "date": found["date"],
        "machine": {
            "device": found["device"],
            "cpu": found["cpu"],
            "cores": os.cpu_count(),
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "threads_per_rank": found["threads"],
            "load": os.getloadavg(),
        },
        "versions": found["versions"],
        "settings": {
            "file": settings.name,
            "overrides": overrides,
            "deepspeed": run.deepspeed,
            **run.model_dump(mode="json", include={"method", "data", "model", "teacher", "train"}),
        },
    }


def summarise(measured: dict[str, Any], peaks: Mapping[str, int]) -> dict[str, Any]:
    """Medians and spreads of times and of ratios within a round, and whether the limits hold."""
    wall, cores, tokens = (measured[key] for key in ("wall_ms", "cpu_ms", "tokens_per_step"))
    rows = {
        name: {
            "ms": spread(wall[name]),
            "cpu_ms": spread(cores[name]),
            "tokens_per_second": 1e3 * tokens / median(wall[name]),
            "over_plain": over(wall, name, "plain"),
            "peak_memory_bytes": peaks.get(name),
        }
        for name in wall
    }
    targets = {}
    for name, bound in BOUNDS.items():
        ratio = over(wall, name, *bound)
        targets[name] = {
            **ratio,
            "cpu": over(cores, name, *bound),
            "limit": LIMITS[name],
            "met": ratio["median"] <= LIMITS[name],
        }
    return {"variants": rows, "targets": targets}


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    machine, train = result["machine"], result["settings"]["train"]
    lines = [
        f"{result['date']}, {machine['device']} ({machine['cpu']}), {machine['ranks']} ranks x "
        f"{machine['threads_per_rank']} threads; {result['settings']['file']}: "
        f"{result['student_parameters']:,} parameters, batch {train['batch']} in micro-batches of "
        f"{train['micro_batch']}, {result['tokens_per_step']:,} tokens a step, K = "
        f"{result['settings']['teacher']['k']}, T = {result['settings']['method']['temperature']}, "
        f"{result['settings']['deepspeed']}; {result['rounds']} rounds.",
        "",
        "| step | ms, median [quartiles] | CPU ms | tokens/s | times the plain step | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        peak = row["peak_memory_bytes"]
        cells = [
            VARIANTS.get(name, "teacher forward"),
            show(row["ms"], 1),
            f"{row['cpu_ms']['median']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            show(row["over_plain"], 3),
            "" if peak is None else f"{peak / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    cached, eager = (result["variants"][name]["peak_memory_bytes"] for name in ("cached", "eager"))
    lines += ["", f"- peak memory of the eager loss over the fused one: {eager / cached:.2f}"]
    for name, target in result["targets"].items():
        verdict = "met" if target["met"] else "MISSED"
        lines.append(
            f"- {name} / ({' + '.join(BOUNDS[name])}): {show(target, 3)}, CPU time "
            f"{show(target['cpu'], 3)}; at most {target['limit']}: {verdict}"
        )
    return "\n".join(lines) + "\n"
