"""launch/bench/step.py runs on a tiny recipe and leaves what it promises; no times are judged."""

import json
from pathlib import Path

import pytest

from tests.launching import ROOT, environment, python

RECIPE = """
base:
  out: {folder}/runs
  data:
    folder: {folder}/data
    objective: causal
    sources: [{{kind: builtin, documents: 30}}]
    tokenizer: {{vocab_size: 320}}
    block_size: 32
    packing: contiguous
  model:
    config: &small
      model_type: llama
      hidden_size: 16
      intermediate_size: 32
      num_hidden_layers: 1
      num_attention_heads: 2
      num_key_value_heads: 2
  train: {{batch: 4, micro_batch: 2}}
runs:
  teacher: {{method: {{kind: lm}}, teacher: null, model: {{config: {{<<: *small}}}}}}
  ki:
    method: {{kind: ki, temperature: 1.0, steps: 10}}
    teacher: {{kind: cached, model: {{path: "run:teacher"}}, k: 4, temperatures: [1.0]}}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two rounds of the script, beside its numbers."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    words = ["--rounds", "2", "--settings", str(recipe), "--results", str(folder / "results")]
    python(str(ROOT / "launch/bench/step.py"), *words, "train.lr=0.01")
    (page,) = (folder / "results").glob("*.md")
    return page


@pytest.mark.parametrize("script", ["step", "kernels", "wid", "panel", "generate"])
@pytest.mark.parametrize("safe", ["", "1"], ids=["python", "python -P"])
def test_the_scripts_folder_is_off_the_path_and_the_checkout_on_it(tmp_path, script, safe):
    """The lines above a script's imports, in a checkout of their own that is reached by a link."""
    head, imports, _ = (ROOT / f"launch/bench/{script}.py").read_text().partition("import argparse")
    assert imports
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "launch/bench").mkdir(parents=True)
    link.symlink_to(real)
    (real / "launch/bench/head.py").write_text(f"{head}print(*sys.path, sep='\\n')\n")
    safely = environment() | {"PYTHONSAFEPATH": safe}
    done = python(str(link / "launch/bench/head.py"), env=safely)
    places = done.stdout.splitlines()
    assert places[0] == str(real)
    assert not [place for place in places if place.endswith("bench")]


def test_the_numbers_of_every_variant_are_there(page):
    result = json.loads(page.with_suffix(".json").read_text())
    assert result["rounds"] == 2
    assert result["tokens_per_step"] == 4 * 32
    assert set(result["wall_ms"]) == {"plain", "cached", "eager", "live", "forward"}
    for name, row in result["variants"].items():
        samples = result["wall_ms"][name]
        assert len(samples) == len(result["cpu_ms"][name]) == 2
        assert row["ms"]["median"] == pytest.approx(sum(samples) / 2)
        assert row["tokens_per_second"] == pytest.approx(2000 * 4 * 32 / sum(samples))
        assert (row["peak_memory_bytes"] is None) == (name == "forward")
    assert all(row["peak_memory_bytes"] > 0 for row in list(result["variants"].values())[:-1])
    assert result["variants"]["plain"]["over_plain"]["median"] == 1
    assert result["settings"]["overrides"] == ["train.lr=0.01"]
    assert {"python", "torch", "deepspeed"} <= set(result["versions"])
    assert {"device", "cpu", "ranks", "load"} <= set(result)


def test_the_bounds_are_taken_within_a_round(page):
    result = json.loads(page.with_suffix(".json").read_text())
    plain, cached, live, forward = (
        result["wall_ms"][name] for name in ("plain", "cached", "live", "forward")
    )
    ratios = {
        "cached": [cached[i] / plain[i] for i in range(2)],
        "live": [live[i] / (plain[i] + forward[i]) for i in range(2)],
    }
    for name, limit in {"cached": 1.10, "live": 1.15}.items():
        target = result["targets"][name]
        assert target["median"] == pytest.approx(sum(ratios[name]) / 2)
        assert target["limit"] == limit
        assert target["met"] == (target["median"] <= limit)


def test_the_table_is_markdown(page):
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert len({row.count("|") for row in rows}) == 1
