"""What the measured rows say: the notes' targets with their verdicts, and the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from launch.bench.logit_cases import FLOOR, OURS
from launch.bench.timing import show

MIB = 1 << 20
OPS = ("dense", "topk", "mixture", "label", "vocab_parallel", "linear", "linear_topk")
BUILT_ON = {"linear": {"dense"}, "linear_topk": {"linear", "topk"}}
"""Whose red tests make an operation red too, besides its own."""
APART = ("aot", "cpu")
"""Test files that say nothing about a measured operation."""
RIGHT = (1e-4, 4e-3)
"""Largest relative errors of loss and gradient of ours on a GPU.

Every gradient is rounded to bf16 once, 0.17 %, and that of a head once more, 0.24 % together. The
error to be caught is that of bf16 logits in ``linear_kd``, 0.9 to 1.4 %."""
RIGHT_INTERPRETED = (1e-4, 6e-3)
"""In Triton's interpreter, which truncates where a GPU rounds: 0.2 to 0.5 %."""
RIGHT_ON_CPU = (1e-4, 1e-4)
"""Of every variant of the CPU table, fp32 throughout."""
LIBRARIES = ("torch", "triton", "numpy", "liger-kernel", "trl", "transformers")
MEMORY_NOTE = (
    "Peak: what a call allocates beyond its inputs. On bf16 logits ours (vocab_parallel apart) "
    "writes the gradient over the logits, so that its peak is without the gradient, and the peers' "
    "(but for Liger's cross entropy, in place too) is with theirs. On fp32 logits ours and torch "
    "compiled write a bf16 gradient, torch eager and Liger one of fp32."
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One bound; ``value`` is None where it was not measured, ``held`` why it is not judged."""

    what: str
    value: float | None
    limit: float
    at_least: bool
    held: str = ""

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED``, or why neither."""
        if self.held:
            return f"not judged: {self.held}"
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "MISSED"


def targets(result: Row) -> list[Target]:
    """The bounds of all rows, in their order; small sizes have none."""
    if result["small"]:
        return []
    return [target for row in result["rows"] for target in _targets(row)]


def _targets(row: Row) -> list[Target]:
    by_op = {"dense": _dense, "topk": _topk, "linear": _linear, "cpu": _cpu}
    bounds = by_op[row["op"]](row) if row["op"] in by_op else []
    where = " ".join(f"{key} {value}" for key, value in row["shape"].items())
    return [
        Target(f"{row['op']}, {row['case']}, {where}: {what}", value, limit, at_least, row["held"])
        for what, value, limit, at_least in bounds
    ]


Bound = tuple[str, float | None, float, bool]


def _dense(row: Row) -> list[Bound]:
    kind, dtype = row["case"].split()
    short = row["shape"]["V"] <= 1 << 16
    if kind == "jsd":
        share = 0.50 if dtype == "bf16" else 0.70
    elif dtype == "fp32":
        share = 0.70
    else:
        share = 0.85 if short else 0.75
    bounds = [("share of the floor", _of_floor(row), share, True)]
    if dtype == "bf16":
        logits = 2 * row["shape"]["N"] * row["shape"]["V"]
        bounds += [
            ("times as fast as torch eager", _gain(row, "torch eager"), 8.0, True),
            ("extra memory over the student's logits", _memory(row, logits), 0.01, False),
            # peers are compiled for the first cases only; elsewhere the bound was not measured
            ("times as fast as torch compiled", _gain(row, "torch compiled"), 1.5, True),
        ]
    return bounds


def _topk(row: Row) -> list[Bound]:
    return [("share of the floor", _of_floor(row), 0.85, True)]


def _linear(row: Row) -> list[Bound]:
    shape, liger, chunked = row["shape"], "Liger fused", "Liger chunked (1024), compiled"
    gain = 1.8 if shape["D"] <= 2048 else 1.5
    bounds = [
        (f"times as fast as {liger}", _gain(row, liger), gain, True),
        (f"memory over {liger}", _memory_over(row, liger), 1.25, False),
    ]
    if (shape["V"], shape["D"], shape["E"]) == (131072, 4096, 4096):
        ours = row["variants"][OURS].get("ms", {}).get("median")
        bounds += [
            ("ms (a target for the H200)", ours, 55.0, False),
            (f"times as fast as {chunked}", _gain(row, chunked), 1.1, True),
            (f"memory over {chunked}", _memory_over(row, chunked), 1 / 3, False),
        ]
    return bounds


def _cpu(row: Row) -> list[Bound]:
    timed = {name: one["ms"]["median"] for name, one in row["variants"].items() if "ms" in one}
    rivals = {name: ms for name, ms in timed.items() if name not in (OURS, FLOOR, "torch eager")}
    bounds: list[Bound] = [
        ("memory over torch eager", _memory_over(row, "torch eager"), 0.6, False),
        ("time over torch eager", _time_over(row, "torch eager"), 1.0, False),
    ]
    if not rivals:
        return [*bounds, ("time over the fastest peer", None, 1.0, False)]
    fastest = min(rivals, key=rivals.__getitem__)
    return [
        *bounds,
        (f"time over the fastest peer, {fastest}", _time_over(row, fastest), 1.0, False),
    ]


def _of_floor(row: Row) -> float | None:
    return row["variants"][OURS].get("of_floor")


def _gain(row: Row, name: str) -> float | None:
    return row["variants"].get(name, {}).get("over_ours", {}).get("median")


def _time_over(row: Row, name: str) -> float | None:
    return row["variants"].get(name, {}).get("ours_over", {}).get("median")


def _memory(row: Row, unit: int) -> float | None:
    peak = row["variants"][OURS].get("peak_bytes")
    return None if peak is None else peak / unit


def _memory_over(row: Row, name: str) -> float | None:
    other = row["variants"].get(name, {}).get("peak_bytes")
    return _memory(row, other) if other else None


def wrong(op: str, loss_error: float, gradient_error: float, *, interpreted: bool = False) -> bool:
    """Whether a variant computes something else, or less precisely than it should."""
    limits = RIGHT_INTERPRETED if interpreted else RIGHT
    loss_limit, gradient_limit = RIGHT_ON_CPU if op == "cpu" else limits
    return not (loss_error <= loss_limit and gradient_error <= gradient_limit)


def held_back(op: str, red: Mapping[str, str], ours: Row) -> str:
    """Why the row of an operation is not judged, or nothing."""
    if op in red:
        return f"red tests ({red[op]})"
    if ours.get("wrong"):
        return "ours is wrong"
    return ours.get("failed", "")


def red_operations(report: Path | None) -> dict[str, str]:
    """Operations whose timing is not to be trusted, each with the test file that says so.

    Args:
        report: JUnit XML of the kernel tests. None: nobody asked. No such file: the tests did not
            come to their end, and every operation is red.
    """
    if report is None:
        return {}
    if not report.exists():
        return dict.fromkeys(OPS, "the tests did not come to their end")
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not any(child.tag in ("failure", "error") for child in case):
            continue
        # tests.kernels.test_dense[.TestClass]; a file that could not be imported is the name
        names = f"{case.get('classname')}.{case.get('name')}".split(".")
        file = next((name for name in names if name.startswith("test_")), "unknown")
        stem = file.removeprefix("test_")
        if any(stem.startswith(apart) for apart in APART):
            continue
        named = [op for op in OPS if op == stem] or list(OPS)
        for op in OPS:
            if op in named or BUILT_ON.get(op, set()) & set(named):
                found.setdefault(op, file)
    return found


def table(result: Row) -> str:
    """The result as markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}, {result['threads']} threads); "
        f"{versions}. {result['note']}",
        "",
        *((MEMORY_NOTE, "") if any(row["op"] != "cpu" for row in result["rows"]) else ()),
        "| operation | variant | ms, median [quartiles] | CPU ms | times ours | % of floor "
        "| peak, MiB | loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = " ".join(f"{key} {value}" for key, value in row["shape"].items())
        for name, one in row["variants"].items():
            first = f"{row['op']}, {row['case']}, {shape}, {row['rounds']} rounds"
            lines.append(f"| {first if name == OURS else ''} | {name} | {_cells(one)} |")
    lines += ["", *(f"- {_line(target)}" for target in targets(result))]
    lines += [f"- not measured: {left}" for left in result["left_out"]]
    return "\n".join(lines) + "\n"


def _cells(one: Row) -> str:
    if "failed" in one:
        return f"{one['failed']} | | | | | |"
    if "ms" not in one:
        untimed = "WRONG, not timed" if one.get("wrong") else "not timed"
        return f"{untimed} | | | | | {_error(one, 'loss')} | {_error(one, 'gradient')}"
    peak, share = one.get("peak_bytes"), one.get("of_floor")
    return " | ".join(
        (
            show(one["ms"], 3 if one["ms"]["median"] < 100 else 1),
            f"{one['cpu_ms']:.1f}" if one["cpu_ms"] else "",
            show(one["over_ours"], 3) if "over_ours" in one else "",
            f"{100 * share:.1f}" if share is not None else "",
            f"{peak / MIB:.1f}" if peak is not None else one.get("peak_note", ""),
            _error(one, "loss"),
            _error(one, "gradient"),
        )
    )


def _error(one: Row, which: str) -> str:
    value = one.get(f"{which}_error")
    return "" if value is None else f"{value:.1e}"


def _line(target: Target) -> str:
    bound = "at least" if target.at_least else "at most"
    value = "" if target.value is None else f" {target.value:.3g}"
    return f"{target.what}:{value}; {bound} {target.limit:.3g}: {target.verdict}"


def as_data(target: Target) -> Row:
    """For JSON."""
    return asdict(target) | {"verdict": target.verdict}
