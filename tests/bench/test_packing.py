"""launch/bench/packing.py on a small corpus: it leaves what it promises; no times are judged."""

import json
import sys

from dskd.data.prepared import open_prepared, prepare
from launch.bench import packing


def test_figures_of_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "PACKINGS", ("complete",))
    words = ["--tokens", "30000", "--rounds", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["packing.py", *words])
    packing.main()
    (page,) = tmp_path.glob("*-packing-cpu.md")
    assert page.read_text() in capsys.readouterr().out
    result = json.loads(page.with_suffix(".json").read_text())
    names = ["complete", "complete, held out"]
    assert {*result["variants"]} == {f"{w}: {n}" for w in ("pass", "prepare") for n in names}
    for of in result["variants"].values():
        speeds = sorted(result["tokens"] / time / 1e3 for time in of["cpu_ms"])
        speed = of["million_tokens_a_second_of_a_core"]["median"]
        assert abs(speed - sum(speeds) / 2) < 1e-9
        assert of["met"] == (speed >= packing.LEAST / 1e6)
        assert len(of["wall_ms"]) == 2 and of["peak_bytes"] > 0


def test_the_pass_makes_the_rows_of_a_run(tmp_path):
    assert abs(packing.write_corpus(tmp_path, 30_000) - 30_000) < 3000
    for held_out in (False, True):
        data = packing.settings(tmp_path, "complete", held_out)
        opened = open_prepared(prepare(data))
        held = len(opened.validation) if held_out else 0
        assert packing.packed(data) == len(opened.train) + held
