"""launch/bench/gpu_check.sh: what it runs, in which environment, and its status; nothing is timed.

A copy of the script runs in an empty folder. ``python`` and ``timeout`` are stand-ins that write
down how they were called; a test sets what each of them returns.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "python $* DEVICES=${{CUDA_VISIBLE_DEVICES-unset}}" >>"{log}"
case "$*" in
    "-c import pytest") exit {pytest} ;;
    "-c import xdist") exit 1 ;;
    "-c import deepspeed") exit {deepspeed} ;;
    "-m pytest"*) exit {tests} ;;
    "-u launch/bench/gpu_steps.py"*) exit {steps} ;;
    "-u launch/bench/kernels.py"*) echo result >"{folder}/$6/case.md"; exit {bench} ;;
    "- "*) exec {python} "$@" ;;
esac
"""
TIMEOUT = """#!/usr/bin/env bash
while [[ $1 != [0-9]* ]]; do shift 2; done
echo "timeout $1 ${{*:2:3}}" >>"{log}"
"${{@:2}}"
"""


class Check:
    """The script in a folder of its own: ``run()`` gives what was called, ``done`` the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder, folder / "calls"
        for name in ("launch/bench", "tests/kernels", "tests/fused", "bin"):
            (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "launch/bench/gpu_check.sh", folder / "launch/bench")
        self.test_file("import sys")

    def test_file(self, text: str) -> None:
        (self.folder / "tests/kernels/test_one.py").write_text(text + "\n")
        (self.folder / "tests/fused/test_two.py").write_text("")

    def run(self, *words: str, **status: int) -> list[str]:
        """``status``: what the parts end with, 0 unless said."""
        values = {"log": self._log, "folder": self.folder, "python": sys.executable}
        values |= dict.fromkeys(("pytest", "deepspeed", "tests", "steps", "bench"), 0) | status
        for name, text in {"python": PYTHON, "timeout": TIMEOUT}.items():
            path = self.folder / "bin" / name
            path.write_text(text.format(**values))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHON": "python", "CUDA_VISIBLE_DEVICES": "3"}
        for name in ("OUT", "PYTHONPATH"):  # a checkout on the path would lend its own tests
            env.pop(name, None)
        command = ["bash", str(self.folder / "launch/bench/gpu_check.sh"), *words]
        options = {"env": env, "capture_output": True, "text": True, "timeout": 60}
        self.done = subprocess.run(command, check=False, **options)
        return self._log.read_text().splitlines()


@pytest.fixture
def check(tmp_path) -> Check:
    return Check(tmp_path)


def only(calls: list[str], start: str) -> str:
    (found,) = (call for call in calls if call.startswith(start))
    return found


def test_a_gpu_is_used_or_hidden_from_the_interpreter(check):
    calls = check.run()
    assert check.done.returncode == 0, check.done.stdout + check.done.stderr
    assert only(calls, "python -u launch/bench/kernels.py").endswith("DEVICES=3")
    assert only(calls, "python -m pytest").endswith("DEVICES=3")
    (check.folder / "calls").unlink()
    calls = check.run("--small")
    assert check.done.returncode == 0
    assert only(calls, "python -u launch/bench/kernels.py").endswith("--small --rounds 2 DEVICES=")
    assert only(calls, "python -m pytest").endswith("DEVICES=")


def test_time_bounds_tests_and_benchmark_and_what_is_cut_off_is_no_success(check):
    calls = check.run(bench=124)
    assert check.done.returncode == 1
    assert "timeout 105 python -m pytest" in calls
    assert "timeout 105 python -u launch/bench/gpu_steps.py" in calls  # 75 s and its end
    assert "--seconds 75 " in only(calls, "python -u launch/bench/gpu_steps.py")
    (bound,) = (call for call in calls if call.endswith("python -u launch/bench/kernels.py"))
    assert 440 <= int(bound.split()[1]) <= 470  # 8 minutes for all of it, less what has passed
    assert (check.folder / "launch/bench/results/case.md").read_text() == "result\n"
    assert "cut off by time: the finished cases are in launch/bench/results" in check.done.stdout


@pytest.mark.parametrize(
    ("wrong", "status"),
    [({"tests": 1}, 1), ({"steps": 1}, 1), ({"bench": 1}, 1), ({"tests": 2}, 1), ({}, 0)],
)
def test_the_status_is_that_of_all_parts(check, wrong, status):
    calls = check.run(**wrong)
    assert check.done.returncode == status
    assert only(calls, "python -u launch/bench/kernels.py")


def test_without_deepspeed_the_kernel_part_runs_alone(check):
    calls = check.run(deepspeed=1)
    assert check.done.returncode == 1
    assert not [call for call in calls if "gpu_steps.py" in call]
    assert "the steps do not run: there is no deepspeed" in check.done.stdout
    assert only(calls, "python -m pytest") and only(calls, "python -u launch/bench/kernels.py")


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("import no_such_library", "test_one.py (there is no no_such_library)"),
        ("import tests.no_such_helper", None),
        ("import json", None),
    ],
)
def test_a_file_is_left_out_for_want_of_any_library_but_not_of_ours(check, text, skipped):
    check.test_file(text)
    tests = only(check.run(), "python -m pytest")
    assert ("--ignore=tests/kernels/test_one.py" in tests) == (skipped is not None)
    assert "--ignore=tests/kernels/test_aot.py" in tests
    assert "--ignore=tests/fused/test_two.py" not in tests
    assert f"not run here: tests/kernels/{skipped}" in check.done.stdout or skipped is None


def test_without_pytest_the_benchmark_runs_and_the_status_says_so(check):
    calls = check.run(pytest=1)
    assert check.done.returncode == 1
    assert not [call for call in calls if call.startswith("python -m pytest")]
    assert "the tests do not run: there is no pytest" in check.done.stdout
    assert "--tests runs/gpu_check/gpu_check_tests.xml" in only(
        calls, "python -u launch/bench/kernels.py"
    )
