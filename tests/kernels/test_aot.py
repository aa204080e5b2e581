"""Every kernel compiled ahead of time, in a process whose Triton does not interpret."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import triton

from dskd.fused.arguments import Divergence, TopKMode

ROOT = Path(__file__).parents[2]
BUDGET = ROOT / "tests/kernels/aot_budget.json"
BAD = "tests/kernels/bad_kernels.py"
LOOP = r"in the loop of bad_kernels\.py:\d+"
HOT = ("sm90",)
OTHERS = ("sm80", "sm100")


def run(folder, *arguments, **environment):
    """Exit status, printed text, and the reports by configuration and target."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "launch/bench/aot.py", "--json", folder / "reports.json", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )
    written = folder / "reports.json"
    reports = json.loads(written.read_text()) if written.exists() else []
    by_place = {(report["name"], report["target"]): report for report in reports}
    return done.returncode, done.stdout + done.stderr, by_place


def test_what_is_compiled(monkeypatch):
    """By launch/aot.sh: every kernel, kind and mode for one target, and again for some other."""
    monkeypatch.syspath_prepend(ROOT / "launch/bench")
    aot = importlib.import_module("aot")
    planned = list(aot.plan(list(aot.configurations(())), HOT, OTHERS))
    compiled = [(name, target) for name, _, target in planned]
    names = {name for name, target in compiled if target in HOT}
    elsewhere = {name for name, target in compiled if target in OTHERS}
    assert {target for _, target in compiled} == {*HOT, *OTHERS}
    sources = [path.read_text() for path in ROOT.glob("kernels/*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    for targets in (HOT, OTHERS):
        assert {c["kernel"].__name__ for _, c, target in planned if target in targets} == kernels
    for some in (names, elsewhere):
        for kernel, kinds in (("dense", get_args(Divergence)), ("topk", get_args(TopKMode))):
            found = {part for name in some if name.startswith(kernel) for part in name.split("/")}
            assert set(kinds) <= found
    script = (ROOT / "launch/aot.sh").read_text()
    assert f"--targets {','.join(HOT)} --spread {','.join(OTHERS)}" in script


def test_faults_are_found_and_named(tmp_path):
    """On a budget of an earlier version, as there is for a Triton that is newer than the check."""
    recorded = {"good": [20.0], "barrier": [2.0, 2.0], "dear": [5.0]}
    recorded = {f"bad_kernels/{name}": numbers for name, numbers in recorded.items()}
    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"1.2.0": {"sm90": recorded}, "99.0.0": {"sm90": {}}}))
    arguments = ("--kernels", BAD, "--targets", "sm90", "--budget", budget)
    status, text, reports = run(tmp_path, *arguments)
    assert status == 1
    found = {}
    for (name, target), report in reports.items():
        assert target == "sm90"
        found[name.removeprefix("bad_kernels/")] = report["findings"]
        for finding in report["findings"]:
            assert f"FINDING {name} on {target}: {finding}" in text
    assert found["good"] == found["product"] == []
    (error,) = found["typo"]
    assert "CompilationError" in error
    assert "no_such_function" in error
    wide, narrow = found["scalar"][:2]
    assert wide == "0 loads of 16 bytes in loops over columns"
    assert re.fullmatch(rf"\d+ loads of less than 16 bytes {LOOP}", narrow)
    assert re.fullmatch(rf"\d barriers {LOOP}", found["barrier"][0])
    assert found["barrier"][1:] == ["1 loops over columns, 2 in the budget"]
    spill, unknown = found["spill"]
    assert re.fullmatch(r"[1-9]\d* bytes of registers are spilled", spill)
    assert unknown == f"no budget is recorded for triton {triton.__version__}"
    (dear,) = found["dear"]
    assert re.fullmatch(r"1\d\.\d instructions per column, 5\.0 in the budget", dear)
    assert reports["bad_kernels/dear", "sm90"]["transcendental"] == 11.0


def test_a_budget_is_recorded(tmp_path):
    """Ten percent are allowed; what is not compiled is kept, unless its kernel has lost it."""
    budget = tmp_path / "budget.json"
    old = {"bad_kernels/gone": [1.0], "other/kept": [2.0, 3.0]}
    budget.write_text(json.dumps({triton.__version__: {"sm90": old}, "1.2.0": {}}))
    arguments = ("--kernels", BAD, "--targets", "sm90", "--budget", budget)
    _, _, reports = run(tmp_path, *arguments, "--record")
    recorded = json.loads(budget.read_text())
    assert recorded.pop("1.2.0") == {}
    measured = {name: r["instructions"] for (name, _), r in reports.items() if r["instructions"]}
    assert {name.split("/")[1] for name in measured} == {"good", "spill", "barrier", "dear"}
    assert recorded == {triton.__version__: {"sm90": measured | {"other/kept": [2.0, 3.0]}}}
    good, dear = "bad_kernels/good", "bad_kernels/dear"
    measured |= {good: [measured[good][0] / 1.08], dear: [measured[dear][0] / 1.12]}
    budget.write_text(json.dumps({triton.__version__: {"sm90": measured}}))
    _, _, reports = run(tmp_path, *arguments)
    assert reports[good, "sm90"]["findings"] == []
    assert "in the budget" in reports[dear, "sm90"]["findings"][0]


def test_the_interpreter_is_refused(tmp_path):
    status, text, reports = run(tmp_path, TRITON_INTERPRET="1")
    assert status == 1
    assert "unset TRITON_INTERPRET" in text
    assert not reports


def test_there_is_a_budget_for_the_versions_of_ci():
    script = (ROOT / "launch/aot.sh").read_text()
    versions = set(re.findall(r"\d+\.\d+\.\d+", script))
    pinned = re.search(r"^triton==(\S+)", (ROOT / "launch/constraints.txt").read_text(), re.M)[1]
    assert len(versions) == 2
    assert versions | {pinned} == set(json.loads(BUDGET.read_text()))
