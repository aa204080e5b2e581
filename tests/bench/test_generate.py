"""launch/bench/generate.py on a few prompts: it leaves what it promises; no times are judged."""

import json
import sys

import pytest

from launch.bench import generate


@pytest.fixture
def result(tmp_path, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(generate, "ROWS", 3)
    monkeypatch.setattr(generate, "NEW", 2)
    words = ["--rounds", "2", "--models", "toys", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    generate.main()
    (page,) = tmp_path.glob("*-generate-*.md")
    assert page.read_text() in capsys.readouterr().out
    return json.loads(page.with_suffix(".json").read_text())


def test_figures_of_every_variant_and_the_ratio_within_a_round(result):
    toys = result["models"]["toys"]
    assert toys["parameters"] == (64 + 128) * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    for way in ("greedy", "top-k 20"):
        wall = toys[way]["wall_ms"]
        assert {*wall} == {*toys[way]["cpu_ms"]} == {"loop", "batched", "transformers"}
        ratios = [
            loop / batched for loop, batched in zip(wall["loop"], wall["batched"], strict=True)
        ]
        gain = toys[way]["loop_over_batched"]
        assert gain["median"] == pytest.approx(sum(ratios) / 2)
        assert gain["met"] == (gain["median"] >= 10)
        assert all(isinstance(peak, int) for peak in toys[way]["peak_bytes"].values())
