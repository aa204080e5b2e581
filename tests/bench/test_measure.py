"""launch/bench/measure.py: its arithmetic, its clocks and its truth; no times are judged."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from dskd.fused import reference
from launch.bench import measure, peers
from launch.bench.peers import Outcome


def test_spread_and_ratios_within_a_round():
    assert measure.spread([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "lower": 1.75, "upper": 3.25}
    samples = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert measure.over(samples, "a", "b") == {"median": 2.0, "lower": 2.0, "upper": 2.5}


def test_relative_error_of_nan_is_infinite():
    ones = torch.ones(4)
    assert measure.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    ones_with_nan = ones.clone()
    ones_with_nan[2] = torch.nan
    assert measure.relative_error(ones_with_nan, ones) == torch.inf


class CountingClock:
    """Each sample takes as long as the number of calls before it; remembers the orders."""

    def __init__(self) -> None:
        self.orders, self.ticks = [], 0

    def round(self, calls, before):
        self.orders.append("".join(calls))
        for _ in calls:
            before()
            self.ticks += 1
        return dict.fromkeys(calls, (float(self.ticks), 0.5))


def test_rounds_are_interleaved_after_one_that_does_not_count():
    clock, restored = CountingClock(), []
    calls, before = dict.fromkeys("abc", lambda: None), lambda: restored.append(clock.ticks)
    samples = measure.interleave(calls, clock, before=before, rounds=4, seconds=0.0)
    assert clock.orders == ["abc", *map("".join, measure.orders("abc", 4))]
    assert restored == list(range(15))  # before every sample, of whatever variant
    assert samples["wall_ms"]["a"] == [6.0, 9.0, 12.0, 15.0]
    assert samples["cpu_ms"]["c"] == [0.5] * 4


def test_no_variant_always_follows_the_same_one():
    orders = list(measure.orders("abcd", 24))
    assert orders == list(measure.orders("abcd", 24))
    assert all(sorted(order) == list("abcd") for order in orders)
    followed = [tuple(order[place : place + 2]) for order in orders for place in range(3)]
    for pair in itertools.permutations("abcd", 2):
        assert 1 <= followed.count(pair) <= 12  # 6 on average; a rotation has 18 or 0


def test_the_clock_gives_every_variant_the_same_work_before():
    done, clock = [], measure.HostClock()
    calls = {name: (lambda name=name: done.append(name)) for name in "ab"}
    assert set(clock.round(calls, lambda: done.append("-"))) == {"a", "b"}
    assert "".join(done) == "-a-b"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, measure.FEWEST), (1e9, measure.MOST)])
def test_time_decides_the_rounds_within_bounds(seconds, rounds):
    calls = {"a": lambda: None}
    samples = measure.interleave(calls, CountingClock(), before=list, rounds=None, seconds=seconds)
    assert len(samples["wall_ms"]["a"]) == rounds


def test_peak_of_a_call_in_a_process_of_its_own():
    def make(name):
        kept = torch.ones(1 << 20)  # an input
        return {
            "48": lambda: torch.ones(8 << 20) + torch.ones(4 << 20).sum() + kept[0],
            "broken": lambda: torch.ones(2) + torch.ones(3),
        }[name]

    peak = measure.peak_in_child(make, "48")
    assert 63 <= peak / 2**20 <= 68  # a matrix of 32 MiB, its sum with a number; 16 MiB are gone
    assert measure.peak_in_child(make, "broken").startswith("RuntimeError: The size of tensor")


def test_truth_goes_by_chunks_and_sees_a_wrong_row(monkeypatch):
    monkeypatch.setattr(measure, "CHUNK", 3 * 11)  # three tokens
    hidden, weight, teacher = torch.randn(8, 4), torch.randn(11, 4), torch.randn(8, 11)
    head = SimpleNamespace(hidden_ND=hidden, weight_VD=weight)

    def per_token(logits, rows):
        return reference.divergence(logits, teacher[rows].double(), "jsd")

    def whole(hidden, weight):
        return reference.divergence(hidden @ weight.t(), teacher, "jsd").mean()

    checked = measure.through_head(head, per_token)
    expected, right = checked.compute(), peers.differentiate(whole, hidden, weight)
    assert max(checked.errors(right, expected)) < 1e-6
    for wrong in (0, 1):
        gradients = [gradient.clone() for gradient in right.gradients]
        gradients[wrong][-1] += 1.0
        errors = checked.errors(Outcome(right.loss, tuple(gradients)), expected)
        assert errors[0] < 1e-6
        assert errors[1] > 0.5


def test_results_are_written_whole_and_as_a_page(tmp_path):
    folder = tmp_path / "new"
    for value in (1.5, 2.5):
        measure.write(folder, "a", {"value": value}, f"{value}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.md"]
    assert json.loads((folder / "a.json").read_text()) == {"value": 2.5}
    assert (folder / "a.md").read_text() == "2.5\n"
    assert measure.markdown(["a", "b"], [["1", ""]]) == ["| a | b |", "|---|---|", "| 1 |  |"]
