"""launch/bench/kernels.py: its cases, its gate and its table; no times are judged."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from dskd.fused import reference
from launch.bench import cases, kernels, measure, peers
from launch.bench.cases import FLOOR, OURS
from tests.launching import ROOT, python

CPU = torch.device("cpu")
MADE = dict(cases.cases(kernels.OPS, cases.SMALL, CPU))


@pytest.mark.parametrize("what", MADE)
def test_every_case_is_what_float64_says_and_its_eager_peer_too(what):
    case = MADE[what]()
    expected = case.truth.compute()
    for name in (OURS, "torch eager"):
        case.restore()
        errors = case.truth.errors(case.variants[name](), expected)
        assert errors[0] < 3e-3, (name, errors)  # bf16 logits of the peers
        assert errors[1] < 2e-2, (name, errors)
        assert name != OURS or not kernels.wrong(case.op, *errors)
    case.floor()


def test_the_order_of_the_cases_and_the_choice_of_operations():
    assert list(MADE)[:2] == [
        "dense forward_kl torch.bfloat16 V 1003",
        "linear forward_kl (64, 64) V 1003",
    ]
    assert {what.split()[0] for what in MADE} == set(kernels.OPS)
    assert list(dict(cases.cases(["topk"], cases.SMALL, CPU))) == ["topk V 1003"]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_peers_compute_the_named_divergence(kind):
    student, teacher = torch.randn(2, 5, 33).double().mul(2).unbind()
    expected = peers.differentiate(
        lambda logits: reference.divergence(logits, teacher, kind).mean(), student
    )
    eager = peers.differentiate(lambda logits: peers.eager(logits, teacher, kind), student)
    torch.testing.assert_close(eager.loss.double(), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(eager.gradients[0], expected.gradients[0], rtol=1e-4, atol=1e-7)
    loss, grad = peers.closed_form(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=0)
    assert measure.relative_error(grad, expected.gradients[0]) < 4e-3  # bf16


def bench_of(folder: Path) -> kernels.Bench:
    words = {"device": "cuda", "small": True, "tests": None, "rounds": 2, "results": folder}
    return kernels.Bench(CPU, argparse.Namespace(**words), "")


def test_memory_that_ends_while_timing_is_said_and_is_no_success(tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench, case = bench_of(tmp_path), MADE["topk V 1003"]()
    bench.measure(case)
    assert bench.good()
    monkeypatch.setattr(measure, "interleave", out_of_memory)
    bench.measure(case)
    assert not bench.good()
    bench.write()
    (data,) = tmp_path.glob("*.json")
    timed, untimed = json.loads(data.read_text())["rows"]
    assert (timed["held"], timed["rounds"]) == ("", 2)
    assert (untimed["held"], untimed["rounds"]) == ("out of memory while timed", 0)
    ours = untimed["variants"][OURS]
    assert "ms" not in ours
    assert ours["gradient_error"] == timed["variants"][OURS]["gradient_error"] < 4e-3
    table = data.with_suffix(".md").read_text()
    assert table.count("| not timed |") == len(untimed["variants"])
    assert "WRONG" not in table
    assert table.count("writes the gradient over the logits") == 1
    assert untimed["variants"][FLOOR] == {}


@pytest.mark.parametrize("words", [["--ops", "dense"], ["--seconds", "9"], ["--tests", "a.xml"]])
def test_the_cpu_table_refuses_what_it_does_not_take(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit, match="2"):
        kernels.read_words()
    assert f"{words[0]}: the table of --device cpu has one case" in capsys.readouterr().err


def test_the_cpu_table_from_the_command_line(tmp_path):
    words = ["--device", "cpu", "--small", "--rounds", "2", "--results", str(tmp_path)]
    done = python(str(ROOT / "launch/bench/kernels.py"), *words, timeout=120)
    (data,) = tmp_path.glob("*.json")
    result = json.loads(data.read_text())
    (only,) = result["rows"]
    assert only["held"] == ""
    assert {"ours", "torch eager", "TRL chunked", "floor"} <= set(only["variants"])
    for name in ("ours", "torch eager"):
        one = only["variants"][name]
        assert one["gradient_error"] < 1e-5
        assert one["ms"]["median"] > 0
        assert one["peak_bytes"] > 0
    for name in ("TRL chunked", "Liger chunked (1024)"):
        one = only["variants"][name]
        assert "ms" in one or one["failed"].startswith("ModuleNotFoundError: No module named"), one
    assert data.with_suffix(".md").read_text() in done.stdout


# ---- what is wrong, and which tests make an operation red ----------------------------------------


def test_bf16_logits_of_the_fused_linear_loss_are_judged_wrong():
    """The defect that the limits are for: 1 % of error in place of 0.2 %."""
    case = cases.linear(cases.Sizes(16, 4000, 0, CPU, False), "forward_kl", (256, 256))
    expected = case.truth.compute()
    right = case.truth.errors(case.variants[OURS](), expected)
    rounded = partial(case.variants[OURS], logits_dtype=torch.bfloat16)
    worse = case.truth.errors(rounded(), expected)
    assert 1e-3 < right[1] < 2.5e-3
    assert 8e-3 < worse[1] < 1.5e-2
    for interpreted in (False, True):
        assert not kernels.wrong("linear", *right, interpreted=interpreted)
        assert kernels.wrong("linear", *worse, interpreted=interpreted)


def test_limits_lie_above_one_rounding_more_and_above_truncation():
    """A head's gradient is rounded to bf16 twice, in the interpreter once towards 0."""
    exact = torch.randn(100_000)
    once = measure.relative_error(exact.bfloat16(), exact)
    assert once == pytest.approx(1.65e-3, rel=0.02)
    assert not kernels.wrong("linear", 1e-4, 2**0.5 * once)
    cut = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    truncated = measure.relative_error(cut, exact)
    assert truncated == pytest.approx(3.3e-3, rel=0.02)
    assert not kernels.wrong("dense", 1e-4, 1.5 * truncated, interpreted=True)
    assert kernels.wrong("dense", 1e-4, 1.5 * truncated)
    assert kernels.wrong("dense", 2e-4, 0.0)
    assert kernels.wrong("dense", float("nan"), 0.0)


@pytest.mark.parametrize(
    ("name", "red"),
    [
        ("tests.kernels.test_topk", {"topk", "linear_topk"}),
        ("tests.kernels.test_dense.TestIt", {"dense", "linear"}),
        ("tests.fused.test_linear", {"linear", "linear_topk"}),
        ("tests.kernels.test_mixture", {"mixture"}), ("tests.fused.test_ops", set(kernels.OPS)),
        ("tests.fused.test_vocab_parallel", {"vocab_parallel"}),
        ("tests.kernels.test_aot", set()), ("tests.fused.cpu.test_topk", set()),
    ],
)  # fmt: skip
def test_red_tests_make_operations_red(tmp_path, name, red):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.test_label" name="test_a"/>'
        f'<testcase classname="{name}" name="test_b"><failure message="no"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert set(kernels.red_operations(report)) == red
    assert set(kernels.red_operations(tmp_path / "none.xml")) == set(kernels.OPS)
    assert kernels.red_operations(None) == {}
