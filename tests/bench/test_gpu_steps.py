"""launch/bench/gpu_steps.py: the command takes its runs, and every difference is named."""

import math

import pytest

from dskd.methods.base import build_method
from dskd.runs import plan
from dskd.settings.checks import check_settings
from dskd.settings.recipe import read
from dskd.settings.yaml_tree import dump
from launch.bench.gpu_steps import CASES, TOLERANCE, Trained, compared, settings, write_rows


@pytest.mark.parametrize("name", CASES)
def test_the_command_takes_every_case(tmp_path, name):
    case = CASES[name]._replace(path="")
    if CASES[name].path:
        pytest.skip("starts from weights that another case has left")
    write_rows(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(dump(settings(case, tmp_path, "fp32")), encoding="utf-8")
    recipe = read(file, [f"out={tmp_path / 'out'}"])
    check_settings(recipe, 1)
    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    plan.check(recipe, methods, world=1)


def test_every_difference_is_named():
    names = [*CASES]
    cpu, fp32, bf16 = ("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")
    trained = {(name, *cpu): Trained([5.0, 4.0]) for name in names[:-1]}
    trained |= {(name, *on): Trained([5.0, 4.0]) for name in names for on in (fp32, bf16)}
    trained[(names[0], *fp32)] = Trained([5.0, 4.0 + 2 * TOLERANCE["fp32"]])
    trained[(names[0], *bf16)] = Trained([5.0, 4.0 + 2 * TOLERANCE["fp32"]])
    trained[(names[1], *fp32)] = Trained([5.0, math.nan])
    trained[(names[2], *fp32)] = Trained([], "status 1: out of memory")
    del trained[(names[3], *fp32)]
    wrong = {(row["case"], row["precision"]): row["wrong"] for row in compared(trained, "cuda")}
    assert len(wrong) == 2 * len(names)
    assert {key: text for key, text in wrong.items() if text} == {
        (names[0], "fp32"): "beyond 0.0001",
        (names[1], "fp32"): "beyond 0.0001",
        (names[2], "fp32"): "status 1: out of memory",
        (names[3], "fp32"): "not run",
        (names[-1], "fp32"): "on the CPU: not run",
        (names[-1], "bf16"): "on the CPU: not run",
    }
