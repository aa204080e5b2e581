"""Compile every configuration of every kernel ahead of time, without a GPU, and read the result.

    python launch/bench/aot.py [--targets sm80,sm90,sm100] [--spread TARGETS]
        [--kernels dense,topk,...] [--json FILE] [--budget FILE] [--record]

Prints a line per configuration and target: registers of a thread, spilled bytes, shared memory, and
for the loops over the columns of a row: instructions per column (loop by loop, and their sum),
instructions of the slow unit per column, 16-byte loads, barriers. ``--spread`` compiles a few for
further targets: each kernel on one of them, and each kind and mode.

A line starting with FINDING names what is wrong, and the status is 1, if there is

- an error of the compiler,
- a spill on sm_90,
- a loop over columns without 16-byte loads, with narrower ones beside them, with stores of less
  than 8 bytes, or with a barrier,
- a sum of instructions per column more than 10 % over the budget recorded for this version of
  Triton (or the nearest earlier one), another number of loops, or nothing recorded.
  ``--record`` writes the budget instead.
The loops over columns are those whose loads are unconditional; those over edges have guarded ones
(a matrix product, with tensors_per_column 0, has none). Of the forms that a compiler makes of a
loop (unrolled, remainder) the one of most columns counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import triton
from machine_code import Instruction, Loop, parse_sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm80", "sm90", "sm100")
BUDGET = ROOT / "tests/kernels/aot_budget.json"
SLACK = 1.1
VECTOR = 16
ITEM_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}


@dataclass
class Report:
    """What became of one configuration on one target; counts are per thread."""

    name: str
    target: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: list[float] = field(default_factory=list)
    transcendental: float = 0.0
    wide_loads: int = 0
    barriers: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Instructions per column of all loops."""
        return round(sum(self.instructions), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the number of findings decides the status."""
    options = parse(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("aot.py: unset TRITON_INTERPRET; what is interpreted cannot be compiled")
    chosen = list(configurations(options.kernels))
    reports = []
    print(f"triton {triton.__version__}")
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for name, configuration, target in plan(chosen, options.targets, options.spread):
            reports.append(check(name, configuration, target))
            print(line(reports[-1]), flush=True)
    recorded = json.loads(options.budget.read_text()) if options.budget.exists() else {}
    if options.record:
        options.budget.write_text(budget_text(record(recorded, reports)))
    else:
        compare(reports, recorded)
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    findings = [f"{r.name} on {r.target}: {text}" for r in reports for text in r.findings]
    for finding in findings:
        print(f"FINDING {finding}")
    print(f"{len(reports)} compilations, {len(findings)} findings")
    return 1 if findings else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", type=_words, default=TARGETS)
    parser.add_argument("--spread", type=_words, default=())
    parser.add_argument("--kernels", type=_words, default=(), help="names in kernels/, or files")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--budget", type=Path, default=BUDGET)
    parser.add_argument("--record", action="store_true", help="write the budget")
    return parser.parse_args(arguments)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


# ---- what is compiled


def configurations(kernels: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration of these kernel files, called ``kernel/configuration``."""
    for kernel in kernels or sorted(path.stem for path in (ROOT / "kernels").glob("*.py")):
        if kernel.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(kernel).stem, kernel)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(f"dskd.kernels.{kernel}")
        if kernels or "configurations" in vars(module):
            for configuration in module.configurations():
                yield f"{Path(kernel).stem}/{configuration['name']}", configuration


def plan(
    chosen: Sequence[tuple[str, dict[str, Any]]], targets: Sequence[str], spread: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, configuration and target of every compilation."""
    seen: set[object] = set()
    for name, configuration in chosen:
        for target in targets:
            yield name, configuration, target
        constants = configuration["constants"]
        what = {(key, constants[key]) for key in ("KIND", "MODE") if key in constants}
        what.add(configuration["kernel"].__name__)
        if spread and not what <= seen:
            # the target depends on nothing but the name, so that recorded budgets stay in use
            yield name, configuration, spread[crc32(name.encode()) % len(spread)]
            seen |= what


# ---- compilation


def check(name: str, configuration: dict[str, Any], target: str) -> Report:
    """Compile one configuration and judge what came out, but for the budget."""
    report = Report(name, target)
    try:
        compiled, log = compile_for(configuration, target)
    except Exception as error:  # a compiler may raise anything, and must not end the others' check
        report.findings.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return report
    report.shared = compiled.metadata.shared
    report.registers = _number(r"Used (\d+) registers", log)
    report.spilled = _number(r"(\d+) bytes spill stores", log)
    judge(report, parse_sass(disassembled(compiled.asm["cubin"])).loops(), configuration)
    return report


def compile_for(configuration: dict[str, Any], target: str) -> tuple[Any, str]:
    """The compiled kernel, and the log of ptxas."""
    kernel, constants = configuration["kernel"], configuration["constants"]
    where = GPUTarget("cuda", int(target[2:]), 32)
    options = {"num_stages": configuration["num_stages"], "num_warps": configuration["num_warps"]}
    options |= {"enable_fp_fusion": True}
    options |= {"maxnreg": configuration["maxnreg"]} if "maxnreg" in configuration else {}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else configuration["signature"][n] for n in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", VECTOR]] for name in configuration["aligned"]
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    with contextlib.redirect_stdout(io.StringIO()) as log:
        return triton.compile(source, target=where, options=options), log.getvalue()


def disassembled(cubin: bytes) -> str:
    """SASS with the source lines of every instruction."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", "-gi", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


# ---- judgement


def judge(report: Report, loops: Sequence[Loop], configuration: dict[str, Any]) -> None:
    """Fill in what the loops over columns do, and find what they should not."""
    hot = []
    if configuration["tensors_per_column"]:  # else a matrix product: no columns to count
        hot = [loop for loop in loops if any(not i.guarded for i, _ in loop.loads())]
    report.wide_loads = sum(len(_wide(loop)) for loop in hot)
    report.barriers = sum(loop.barriers for loop in hot)
    if report.target == "sm90" and report.spilled:
        report.findings.append(f"{report.spilled} bytes of registers are spilled")
    if configuration["tensors_per_column"] and not report.wide_loads:
        report.findings.append("0 loads of 16 bytes in loops over columns")
    for loop in hot:
        if loop.barriers:
            report.findings.append(f"{loop.barriers} barriers {_at(loop)}")
        if narrow := _narrow(loop.loads(), VECTOR):
            report.findings.append(f"{narrow} loads of less than 16 bytes {_at(loop)}")
        if narrow := _narrow(loop.stores(), VECTOR // 2):
            report.findings.append(f"{narrow} stores of less than 8 bytes {_at(loop)}")
    count_columns(report, [loop for loop in hot if _wide(loop)], configuration)


def count_columns(report: Report, hot: Sequence[Loop], configuration: dict[str, Any]) -> None:
    """Fill in what is executed per column."""
    largest: dict[tuple[str, ...], int] = {}
    for loop in hot:
        largest[loop.source] = max(_bytes(loop), largest.get(loop.source, 0))
    counted = [loop for loop in hot if _bytes(loop) == largest[loop.source]]
    tensors = configuration["tensors_per_column"]
    if isinstance(tensors, int):
        tensors = (tensors,) * len(counted)
    elif len(tensors) != len(counted):
        report.findings.append(f"{len(counted)} loops over columns, {len(tensors)} expected")
        return
    pointer = next(type_ for type_ in configuration["signature"].values() if type_ in ITEM_BYTES)
    for loop, loaded in zip(counted, tensors, strict=True):
        columns = _bytes(loop) / (loaded * ITEM_BYTES[pointer])
        report.instructions.append(round(len(loop.instructions) / columns, 2))
        report.transcendental += loop.transcendental / columns


def _at(loop: Loop) -> str:
    return f"in the loop of {Path(loop.source[0]).name}" if loop.source else "in a loop"


def _bytes(loop: Loop) -> int:
    return sum(size for _, size in _wide(loop))


def _wide(loop: Loop) -> list[tuple[Instruction, int]]:
    return [(i, size) for i, size in loop.loads() if size >= VECTOR and not i.guarded]


def _narrow(accesses: Sequence[tuple[Instruction, int]], wide: int) -> int:
    return sum(size < wide and not i.guarded for i, size in accesses)


# ---- budget: triton version -> target -> configuration -> instructions per column, loop by loop

Budget = dict[str, dict[str, dict[str, list[float]]]]


def compare(reports: Sequence[Report], recorded: Budget) -> None:
    """Add a finding to every report that is over its budget or has none."""
    own = _version(triton.__version__)
    version = max((v for v in recorded if _version(v) <= own), key=_version, default="")
    for report in reports:
        if not report.instructions:
            continue
        budget = recorded.get(version, {}).get(report.target, {}).get(report.name)
        if budget is None:
            report.findings.append(f"no budget is recorded for triton {triton.__version__}")
        elif len(budget) != len(report.instructions):
            report.findings.append(
                f"{len(report.instructions)} loops over columns, {len(budget)} in the budget"
            )
        elif report.total > SLACK * sum(budget):
            report.findings.append(
                f"{report.total} instructions per column, {round(sum(budget), 1)} in the budget"
            )


def record(recorded: Budget, reports: Sequence[Report]) -> Budget:
    """The budget with these reports' numbers in the place of what their kernels had."""
    of_version = recorded.setdefault(triton.__version__, {})
    kernels = {(r.target, r.name.split("/")[0]) for r in reports}
    for target, budgets in of_version.items():
        for name in [n for n in budgets if (target, n.split("/")[0]) in kernels]:
            del budgets[name]
    for report in reports:
        if report.instructions:
            of_version.setdefault(report.target, {})[report.name] = report.instructions
    return recorded


def budget_text(recorded: Budget) -> str:
    """JSON with a line for each configuration."""
    text = json.dumps(recorded, indent=1, sort_keys=True)
    return re.sub(r"\[([^]]*)\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# ---- output

HEADER = (
    f"{'configuration':56} {'target':7} {'regs':>4} {'spill':>5} {'shared':>6} "
    f"{'instr/col':>9} {'slow/col':>8} {'wide':>4} {'bar':>3}  by loop"
)


def line(report: Report) -> str:
    by_loop = " + ".join(f"{count:.1f}" for count in report.instructions)
    return (
        f"{report.name:56} {report.target:7} {report.registers:4} {report.spilled:5} "
        f"{report.shared:6} {report.total:9} {report.transcendental:8.2f} {report.wide_loads:4} "
        f"{report.barriers:3}  {by_loop}"
    )


if __name__ == "__main__":
    sys.exit(main())
