"""The fused losses against PyTorch, Liger and TRL: times, share of the floor, memory, errors.

    python launch/bench/kernels.py [--device cuda|cpu] [--ops dense,linear] [--rounds N]
                                   [--seconds S] [--results FOLDER] [--small] [--tests FILE]

``cuda``: every operation at 8192 tokens x 32k, 128k and 152k columns. The floor is measured in the
same rounds: moving the same bytes (two matrices read and one written, ``torch.add``; one and one, a
copy, for losses without a teacher's logits), or the products of the heads by themselves. Memory is
what a call allocates beyond its inputs, with all the gradients it returns; the table names those
that are written over the logits. The cases come in the order of their interest until ``--seconds``
are over; what was left out is listed. Results are written after every case.

``cpu``: the fused linear forward KL at 512 x 32000, hidden size 256, fp32. Memory is what a call
adds to the resident set of a fresh process. It takes no ``--ops``, ``--seconds``, ``--tests``.

Every loss and gradient is compared with float64 before its time counts.

``--small`` takes the path of ``cuda`` at small sizes, for a machine without a GPU: on CPU tensors
with the kernels in Triton's interpreter (TRITON_INTERPRET=1). Its times mean nothing.

Peers that are not installed are rows with that error; ``launch/bench/peers.py`` lists their needs.
Exit status 1: ours is wrong, failed or could not be timed somewhere, or its tests are red.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import gc
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any
from xml.etree import ElementTree

import torch

from dskd import ops
from launch.bench import cases, measure
from launch.bench.cases import FLOOR, OURS, Case
from launch.bench.measure import markdown, show, slug
from launch.bench.peers import Outcome, Peer

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
OPS = ("dense", "topk", "mixture", "label", "vocab_parallel", "linear", "linear_topk")
BUILT_ON = {"linear": {"dense"}, "linear_topk": {"linear", "topk"}}
"""Whose red tests make an operation red too, besides its own."""
APART = {"test_aot", "cpu"}
"""Test files, and folders of them, that prove nothing of a measured operation."""
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
CPU_SHAPE = (512, 32000, 256)
"""Tokens, columns and hidden size of the CPU table; the small one is a test's."""
CPU_SMALL = (32, 500, 16)
CASE_SECONDS = {"cuda": 1.5, "cpu": 60.0}
"""How long the rounds of a case may take, where ``--rounds`` does not say how many."""
LEFT_AT_LEAST = 15.0
"""Seconds that must be left for another case to begin."""
GPU_ALONE = {"ops": ",".join(OPS), "seconds": 300.0, "tests": None}
"""Settings of the cases of ``cuda``, and their defaults."""

Row = dict[str, Any]


# ---- accuracy ------------------------------------------------------------------------------------


def wrong(op: str, loss_error: float, gradient_error: float, *, interpreted: bool = False) -> bool:
    """Whether a variant computes something else, or less precisely than it should."""
    limits = RIGHT_INTERPRETED if interpreted else RIGHT
    loss_limit, gradient_limit = RIGHT_ON_CPU if op == "cpu" else limits
    return not (loss_error <= loss_limit and gradient_error <= gradient_limit)


def held_back(op: str, red: Mapping[str, str], ours: Row) -> str:
    """Why the times of an operation do not count, or nothing."""
    if op in red:
        return f"red tests ({red[op]})"
    if ours.get("wrong"):
        return "ours is wrong"
    return ours.get("failed", "")


def red_operations(report: Path | None) -> dict[str, str]:
    """Operations whose timing is not to be trusted, each with its failed test file.

    Args:
        report: JUnit XML of the kernel tests. None: none were run. No such file: the tests did not
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
        if APART & set(names):
            continue
        file = next((name for name in names if name.startswith("test_")), "unknown")
        stem = file.removeprefix("test_")
        named = [op for op in OPS if op == stem] or list(OPS)
        for op in OPS:
            if op in named or BUILT_ON.get(op, set()) & set(named):
                found.setdefault(op, file)
    return found


# ---- measurement ---------------------------------------------------------------------------------


class Bench:
    """One run: its rows so far, and where they are written."""

    def __init__(self, device: torch.device, words: argparse.Namespace, note: str) -> None:
        self.device, self._words = device, words
        self._red = red_operations(words.tests)
        self._clock = measure.clock_for(device)
        self.result = measure.about(device, LIBRARIES) | {
            "settings": {k: str(v) for k, v in vars(words).items() if v is not None},
            "note": note,
            "small": words.small,
            "red": self._red,
            "rows": [],
            "left_out": [],
        }

    def measure(self, case: Case, peaks: Mapping[str, int | str] | None = None) -> None:
        """Check, time and record one case; ``peaks`` where they were measured beforehand."""
        expected = case.truth.compute()
        found = {
            name: self._prove(case, name, call, expected) for name, call in case.variants.items()
        }
        sound = [name for name, row in found.items() if not (row.get("wrong") or "failed" in row)]
        calls = {name: case.variants[name] for name in sound}
        for name, peak in (peaks or {}).items():
            found[name] |= {"peak_bytes": peak} if isinstance(peak, int) else {"peak_note": peak}
        samples, floor, untimed = {}, {}, ""
        try:
            samples = measure.interleave(
                {**calls, FLOOR: case.floor},
                self._clock,
                before=case.restore,
                rounds=self._words.rounds,
                seconds=CASE_SECONDS[self._words.device],
            )
            for name in calls:
                found[name] |= _times(samples, name)
            floor = _times(samples, FLOOR)
        except torch.OutOfMemoryError:  # each ran alone: a round leaves the memory in pieces
            untimed = "out of memory while timed"
        self.result["rows"].append(
            {
                "op": case.op,
                "case": case.name,
                "shape": case.shape,
                "rounds": len(samples["wall_ms"][FLOOR]) if samples else 0,
                "held": held_back(case.op, self._red, found[OURS]) or untimed,
                "variants": {**found, FLOOR: floor},
                "samples": samples,
            }
        )
        self.write()

    def _prove(self, case: Case, name: str, call: Peer, expected: Outcome) -> dict[str, Any]:
        """Errors and peak memory of a variant, or why it cannot run."""
        try:
            case.restore()
            errors = case.truth.errors(call(), expected)
            row = {"loss_error": errors[0], "gradient_error": errors[1]}
            # 16-bit peers are shown as they are
            row["wrong"] = (name == OURS or case.op == "cpu") and wrong(
                case.op, *errors, interpreted=self.device.type == "cpu"
            )
            if self.device.type == "cuda":
                case.restore()
                row["peak_bytes"] = measure.peak_on_cuda(call)
        except torch.OutOfMemoryError:
            row = {"failed": "out of memory"}
        except Exception as error:  # a library's failure is a row of the table, not our end
            row = {"failed": measure.short(error)}
        self.free()
        print(f"  {name}: {row}", flush=True)
        return row

    def free(self) -> None:
        """Let go of what the last variant left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        """Put what there is into the folder of results."""
        versions = self.result["versions"]
        stem = (
            f"{self.result['date']}-kernels-{slug(self.result['device'])}"
            f"-torch{versions['torch'].partition('+')[0]}-triton{versions['triton']}"
            f"{'-small' if self._words.small else ''}"
        )
        measure.write(self._words.results, stem, self.result, table(self.result))

    def good(self) -> bool:
        """Whether ours ran, was right, timed and green everywhere."""
        return bool(self.result["rows"]) and not any(row["held"] for row in self.result["rows"])


def on_cuda(words: argparse.Namespace, device: torch.device, begin: float) -> Bench:
    """All cases, as far as the time goes."""
    shapes = cases.SMALL if words.small else cases.LARGE
    bench = Bench(device, words, "Small sizes; times mean nothing." if words.small else "")
    for what, make in cases.cases(words.ops, shapes, device):
        left = words.seconds - (time.perf_counter() - begin)
        if left < LEFT_AT_LEAST:
            bench.result["left_out"].append(f"{what} (time)")
            continue
        print(f"{what}, {left:.0f} s left", flush=True)
        torch.compiler.reset()  # else the compiler gives up after some shapes
        try:
            bench.measure(make())
        except torch.OutOfMemoryError:
            bench.result["left_out"].append(f"{what} (its inputs or its truth: out of memory)")
        bench.free()
    bench.write()
    return bench


def on_cpu(words: argparse.Namespace, device: torch.device) -> Bench:
    """The fused linear forward KL in fp32."""
    shape = CPU_SMALL if words.small else CPU_SHAPE
    make = partial(cases.linear_on_cpu, compiled=not words.small)
    # before anything of size runs here
    names = make(shape[0], 8, 4).variants
    peaks = {n: measure.peak_in_child(lambda name: make(*shape).variants[name], n) for n in names}
    bench = Bench(device, words, "")
    bench.measure(make(*shape), peaks)
    return bench


def _times(samples: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A variant's times, and their ratios to the floor's and ours in the same rounds."""
    wall = samples["wall_ms"]
    row: dict[str, Any] = {
        "ms": measure.spread(wall[name]),
        "cpu_ms": measure.spread(samples["cpu_ms"][name])["median"],
        "of_floor": measure.over(wall, FLOOR, name)["median"],
    }
    if OURS in wall:
        row |= {
            "over_ours": measure.over(wall, name, OURS),
            "ours_over": measure.over(wall, OURS, name),
        }
    return row


# ---- the table -----------------------------------------------------------------------------------


def table(result: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    held = [row for row in result["rows"] if row["held"]]
    header = ["operation", "variant", "ms, median [quartiles]", "CPU ms", "times ours"]
    header += ["% of floor", "peak, MiB", "loss error", "gradient error"]
    rows = []
    for row in result["rows"]:
        shape = " ".join(f"{key} {value}" for key, value in row["shape"].items())
        for name, one in row["variants"].items():
            first = f"{row['op']}, {row['case']}, {shape}, {row['rounds']} rounds"
            rows.append([first if name == OURS else "", name, *_cells(one)])
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}, {result['threads']} threads, load "
        f"{result['load'][0]:.1f}); {versions}. {result['note']}",
        "",
        *((MEMORY_NOTE, "") if any(row["op"] != "cpu" for row in result["rows"]) else ()),
        *markdown(header, rows),
        "",
        *(f"- {row['op']}, {row['case']}: {row['held']}" for row in held),
        *(f"- not measured: {left}" for left in result["left_out"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(one: Row) -> list[str]:
    """What the table holds of one variant."""
    if "failed" in one:
        return [one["failed"], *[""] * 6]
    names = ("loss_error", "gradient_error")
    errors = [f"{one[name]:.1e}" if name in one else "" for name in names]
    if "ms" not in one:
        return ["WRONG, not timed" if one.get("wrong") else "not timed", *[""] * 4, *errors]
    peak, share = one.get("peak_bytes"), one.get("of_floor")
    return [
        show(one["ms"], 3 if one["ms"]["median"] < 100 else 1),
        f"{one['cpu_ms']:.1f}" if one["cpu_ms"] else "",
        show(one["over_ours"], 3) if "over_ours" in one else "",
        f"{100 * share:.1f}" if share is not None else "",
        f"{peak / MIB:.1f}" if peak is not None else one.get("peak_note", ""),
        *errors,
    ]


# ---- the command ---------------------------------------------------------------------------------


def read_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ops")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tests", type=Path, help="JUnit XML of the kernel tests")
    words = parser.parse_args()
    for name, value in GPU_ALONE.items():
        if getattr(words, name) is None:
            setattr(words, name, value)
        elif words.device == "cpu":
            parser.error(f"--{name}: the table of --device cpu has one case and no tests")
    words.ops = words.ops.split(",")
    unknown = sorted(set(words.ops) - set(OPS))
    if unknown:
        parser.error(f"--ops: {', '.join(unknown)} not among {', '.join(OPS)}")
    if words.rounds is not None and words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    if words.device == "cuda" and not torch.cuda.is_available():
        if not words.small:
            parser.error("--device: there is no CUDA device (--small proves the path without one)")
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--small: without a CUDA device, set TRITON_INTERPRET=1")
    return words


def main() -> None:
    begin = time.perf_counter()
    words = read_words()
    on_gpu = words.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if words.device == "cpu":
        bench = on_cpu(words, device)
    else:
        with nullcontext() if on_gpu else ops.triton_everywhere():
            bench = on_cuda(words, device, begin)
    print(table(bench.result), flush=True)
    sys.exit(0 if bench.good() else 1)


if __name__ == "__main__":
    main()
