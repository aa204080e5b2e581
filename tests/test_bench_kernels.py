"""launch/bench/kernels.py: its arithmetic, its truth and its verdicts; no times are judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dskd import losses
from launch.bench import cases, peers, timing, truth, verdicts
from launch.bench.cases import OURS
from launch.bench.peers import Outcome
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
MADE = dict(cases.cases(verdicts.OPS, cases.SMALL, CPU))


def test_spread_and_ratios_within_a_round():
    assert timing.spread([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "lower": 1.75, "upper": 3.25}
    samples = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert timing.over(samples, "a", "b") == {"median": 2.0, "lower": 2.0, "upper": 2.5}


def test_relative_error_of_nan_is_infinite():
    ones = torch.ones(4)
    assert timing.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    ones_with_nan = ones.clone()
    ones_with_nan[2] = torch.nan
    assert timing.relative_error(ones_with_nan, ones) == torch.inf


class CountingClock:
    """Each sample takes as long as the number of calls before it; remembers the orders."""

    def __init__(self) -> None:
        self.orders, self.ticks = [], 0

    def round(self, calls, before):
        self.orders.append("".join(calls))
        for name in calls:
            if name in before:
                before[name]()
            self.ticks += 1
        return dict.fromkeys(calls, (float(self.ticks), 0.5))


def test_rounds_are_interleaved_in_shifting_order_after_one_that_does_not_count():
    clock, restored = CountingClock(), []
    samples = timing.interleave(
        dict.fromkeys("abc", lambda: None),
        clock,
        before={"b": lambda: restored.append("b")},
        rounds=4,
        seconds=0.0,
    )
    assert clock.orders == ["abc", "abc", "bca", "cab", "abc"]
    assert len(restored) == 5
    assert samples["wall_ms"]["a"] == [6.0, 9.0, 12.0, 15.0]
    assert samples["cpu_ms"]["c"] == [0.5] * 4


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, timing.FEWEST), (1e9, timing.MOST)])
def test_time_decides_the_rounds_within_bounds(seconds, rounds):
    calls = {"a": lambda: None}
    samples = timing.interleave(calls, CountingClock(), before={}, rounds=None, seconds=seconds)
    assert len(samples["wall_ms"]["a"]) == rounds


def test_peak_of_a_call_in_a_process_of_its_own():
    def make(name):
        kept = torch.ones(1 << 20)  # an input
        return {
            "48": lambda: torch.ones(8 << 20) + torch.ones(4 << 20).sum() + kept[0],
            "broken": lambda: torch.ones(2) + torch.ones(3),
        }[name]

    peak = timing.peak_in_child(make, "48")
    assert 63 <= peak / 2**20 <= 68  # a matrix of 32 MiB, its sum with a number; 16 MiB are gone
    assert timing.peak_in_child(make, "broken").startswith("RuntimeError: The size of tensor")


@pytest.mark.parametrize("what", MADE)
def test_every_case_is_what_float64_says_and_its_eager_peer_too(what):
    case = MADE[what]()
    expected = case.truth.compute()
    for name in (OURS, "torch eager"):
        case.before.get(name, lambda: None)()
        errors = case.truth.errors(case.variants[name](), expected)
        assert errors[0] < 3e-3, (name, errors)  # bf16 logits of the peers
        assert errors[1] < 2e-2, (name, errors)
        assert name != OURS or not verdicts.wrong(case.op, *errors)
    case.floor()


def test_the_order_of_the_cases_and_the_choice_of_operations():
    assert list(MADE)[:2] == [
        "dense forward_kl torch.bfloat16 V 1003",
        "linear forward_kl (64, 64) V 1003",
    ]
    assert {what.split()[0] for what in MADE} == set(verdicts.OPS)
    chosen = dict(cases.cases(["topk"], cases.SMALL, CPU))
    assert list(chosen) == ["topk V 1003"]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_peers_compute_the_named_divergence(kind):
    student, teacher = torch.randn(2, 5, 33).double().mul(2).unbind()
    expected = peers.differentiate(
        lambda logits: losses.divergence(logits, teacher, kind).mean(), student
    )
    eager = peers.differentiate(lambda logits: peers.eager(logits, teacher, kind), student)
    torch.testing.assert_close(eager.loss.double(), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(eager.gradients[0], expected.gradients[0], rtol=1e-4, atol=1e-7)
    loss, grad = peers.closed_form(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=0)
    assert timing.relative_error(grad, expected.gradients[0]) < 4e-3  # bf16


def test_truth_goes_by_chunks_and_sees_a_wrong_row(monkeypatch):
    monkeypatch.setattr(truth, "CHUNK", 3 * 11)  # three tokens
    hidden, weight, teacher = torch.randn(8, 4), torch.randn(11, 4), torch.randn(8, 11)
    head = SimpleNamespace(hidden_ND=hidden, weight_VD=weight)

    def per_token(logits, rows):
        return losses.divergence(logits, teacher[rows].double(), "jsd")

    def whole(hidden, weight):
        return losses.divergence(hidden @ weight.t(), teacher, "jsd").mean()

    checked = truth.through_head(head, per_token)
    expected, right = checked.compute(), peers.differentiate(whole, hidden, weight)
    assert max(checked.errors(right, expected)) < 1e-6
    for wrong in (0, 1):
        gradients = [gradient.clone() for gradient in right.gradients]
        gradients[wrong][-1] += 1.0
        errors = checked.errors(Outcome(right.loss, tuple(gradients)), expected)
        assert errors[0] < 1e-6
        assert errors[1] > 0.5


def row(op: str, case: str, shape: dict, held: str = "", **variants: dict) -> dict:
    return {"op": op, "case": case, "shape": shape, "held": held, "variants": variants}


def result_of(found: dict, small: bool = False) -> dict:
    return {"small": small, "rows": [found]}


def verdict_of(found: dict) -> dict[str, str]:
    """Verdicts by what is bounded."""
    return {x.what.rsplit(": ", 1)[1]: x.verdict for x in verdicts.targets(result_of(found))}


@pytest.mark.parametrize(
    ("case", "columns", "share", "expected"),
    [
        ("forward_kl bf16", 32768, 0.86, "met"),
        ("forward_kl bf16", 32768, 0.84, "MISSED"),
        ("reverse_kl bf16", 131072, 0.76, "met"),
        ("reverse_kl bf16", 151936, 0.74, "MISSED"),
        ("jsd bf16", 32768, 0.51, "met"),
        ("jsd fp32", 32768, 0.69, "MISSED"),
        ("forward_kl fp32", 131072, 0.70, "met"),
    ],
)
def test_shares_of_the_floor(case, columns, share, expected):
    found = row("dense", case, {"N": 8192, "V": columns}, ours={"of_floor": share})
    assert verdict_of(found)["share of the floor"] == expected
    found["held"] = "red tests (test_dense)"
    assert verdict_of(found)["share of the floor"] == "not judged: red tests (test_dense)"


def test_dense_is_held_to_eager_compiled_and_no_memory():
    logits = 2 * 8192 * 32768
    found = row("dense", "forward_kl bf16", {"N": 8192, "V": 32768})
    found["variants"] = {
        "ours": {"of_floor": 0.9, "peak_bytes": logits // 50},
        "torch eager": {"over_ours": {"median": 8.1}},
        "torch compiled": {"failed": "out of memory"},
    }
    assert verdicts.targets(result_of(found, small=True)) == []
    assert verdict_of(found) == {
        "share of the floor": "met",
        "times as fast as torch eager": "met",
        "times as fast as torch compiled": "not measured",
        "extra memory over the student's logits": "MISSED",
    }


def test_linear_is_held_to_liger():
    shape = {"N": 8192, "V": 131072, "D": 4096, "E": 4096}
    found = row("linear", "jsd bf16, H 4096/4096", shape)
    chunked = "Liger chunked (1024), compiled"
    found["variants"] = {
        "ours": {"ms": {"median": 54.0}, "peak_bytes": 120},
        "Liger fused": {"over_ours": {"median": 1.6}, "peak_bytes": 100},
        chunked: {"over_ours": {"median": 1.05}, "peak_bytes": 100},
    }
    assert verdict_of(found) == {
        "times as fast as Liger fused": "met",
        "memory over Liger fused": "met",
        "ms (a target for the H200)": "met",
        f"times as fast as {chunked}": "MISSED",
        f"memory over {chunked}": "MISSED",
    }
    found["shape"] = shape | {"D": 2048}
    assert verdict_of(found)["times as fast as Liger fused"] == "MISSED"
    assert len(verdict_of(found)) == 2


def test_the_cpu_is_held_to_eager_and_the_fastest_peer():
    found = row("cpu", "linear forward_kl fp32, H 256", {"N": 512})
    found["variants"] = {
        "ours": {"ms": {"median": 10.0}, "peak_bytes": 60},
        "torch eager": {
            "ms": {"median": 12.0},
            "ours_over": {"median": 0.8},
            "peak_bytes": 100,
        },
        "TRL chunked": {"ms": {"median": 9.0}, "ours_over": {"median": 1.1}},
        "Liger chunked (1024)": {"ms": {"median": 11.0}, "ours_over": {"median": 0.9}},
        "floor": {"ms": {"median": 5.0}, "ours_over": {"median": 2.0}},
    }
    assert verdict_of(found) == {
        "memory over torch eager": "met",
        "time over torch eager": "met",
        "time over the fastest peer, TRL chunked": "MISSED",
    }
    del found["variants"]["TRL chunked"], found["variants"]["Liger chunked (1024)"]
    assert verdict_of(found)["time over the fastest peer"] == "not measured"


@pytest.mark.parametrize(
    ("name", "red"),
    [
        ("tests.kernels.test_topk", {"topk", "linear_topk"}),
        ("tests.kernels.test_dense.TestIt", {"dense", "linear"}),
        ("tests.fused.test_linear", {"linear", "linear_topk"}),
        ("tests.kernels.test_mixture", {"mixture"}),
        ("tests.fused.test_ops", set(verdicts.OPS)),
        ("tests.kernels.test_vocab_parallel", set()),
    ],
)
def test_red_tests_make_operations_red(tmp_path, name, red):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.test_label" name="test_a"/>'
        f'<testcase classname="{name}" name="test_b"><failure message="no"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert set(verdicts.red_operations(report)) == red
    assert set(verdicts.red_operations(tmp_path / "none.xml")) == set(verdicts.OPS)
    assert verdicts.red_operations(None) == {}


def test_the_cpu_table_from_the_command_line(tmp_path):
    script = str(ROOT / "launch/bench/kernels.py")
    words = ["--device", "cpu", "--small", "--rounds", "2", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = tmp_path.glob("*.json")
    result = json.loads(data.read_text())
    (only,) = result["rows"]
    assert only["held"] == ""
    assert {"ours", "torch eager", "TRL chunked", "floor"} <= set(only["variants"])
    assert result["targets"] == []
    for name in ("ours", "torch eager"):
        one = only["variants"][name]
        assert one["gradient_error"] < 1e-5
        assert one["ms"]["median"] > 0
        assert one["peak_bytes"] > 0
    for name in ("TRL chunked", "Liger chunked (1024)"):
        one = only["variants"][name]
        assert "ms" in one or one["failed"].startswith("ModuleNotFoundError: No module named"), one
    assert data.with_suffix(".md").read_text() in done.stdout
