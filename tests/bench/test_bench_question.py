"""launch/bench/question.py runs at a tiny size and leaves what it promises; no times are judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench.question import AT_MOST
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[2]


def test_it_leaves_its_numbers(tmp_path):
    script = str(ROOT / "launch/bench/question.py")
    words = ["--vocabulary", "100", "--width", "64", "--layers", "1", "--rows", "40", "--row", "50"]
    words += ["--rounds", "2", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    wall = result["samples"]["wall_ms"]
    ratios = [own / plain for own, plain in zip(wall["question"], wall["plain"], strict=True)]
    assert result["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    assert result["error"] < 1e-3
    assert result["peak_bytes"].keys() == {"plain", "question"}
    assert 2 < result["bytes_per_token"] < 2.7  # 40 rows x 9 bytes and one header, of 2000 tokens
    met = [verdict["met"] for verdict in result["verdicts"]]
    assert met == [result["ratio"]["median"] <= AT_MOST, result["bytes_per_token"] <= 2.2]
    (page,) = tmp_path.glob("*.md")
    assert done.stdout.strip() == page.read_text().strip()
