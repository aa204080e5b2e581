"""launch/bench/panel.py runs at a tiny size and leaves what it promises; no times are judged."""

import json
from pathlib import Path

import pytest
import torch

from launch.bench import panel
from tests.launching import ROOT, python
from tests.stores.test_dropout_scores import classifier, config_of, rows_of

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
WORDS = ["--rounds", "2", "data.block_size=16", "model.config.num_attention_heads=2"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two rounds of the script, beside its numbers."""
    folder = tmp_path_factory.mktemp("bench")
    words = [*WORDS, *(f"model.config.{name}={size}" for name, size in TINY.items())]
    python(str(ROOT / "launch/bench/panel.py"), "--results", str(folder), *words)
    (page,) = folder.glob("*.md")
    return page


def test_the_ratios_are_taken_within_a_round(page):
    result = json.loads(page.with_suffix(".json").read_text())
    samples, target = result["samples"], result["target"]
    found = [samples["steps"]["wall_ms"][name] for name in ("muki", "finetune")]
    ratios = [own / plain for own, plain in zip(*found, strict=True)]
    assert len(ratios) == 2
    assert target["median"] == pytest.approx(sum(ratios) / 2)
    assert target["met"] == (target["median"] <= panel.LIMIT == 1.05)
    wall = samples["scoring"]["wall_ms"]
    assert list(wall) == list(result["scoring"]) == list(panel.SCORING)
    for name, row in result["scoring"].items():
        for other in ("one", "plain", "by_one"):
            ratios = [own / plain for own, plain in zip(wall[name], wall[other], strict=True)]
            assert row[f"over_{other}"]["median"] == pytest.approx(sum(ratios) / 2)
        assert row["rows_per_second"] == pytest.approx(2000 * panel.ROWS / sum(wall[name]))


def test_both_methods_are_of_the_same_student_and_rows(page, tmp_path):
    result = json.loads(page.with_suffix(".json").read_text())
    runs = panel.variants(tmp_path, result["overrides"], 5)
    taught, plain = runs["muki"].model_dump(), runs["finetune"].model_dump()
    assert {name for name in taught if taught[name] != plain[name]} == {"method", "teacher"}
    assert plain["model"]["config"]["hidden_size"] == 16
    assert 0 < result["tokens_per_step"] <= 16 * 16
    table = page.read_text()
    assert (": met" in table) != (": MISSED" in table)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(panel.STEPS) + 2 + len(panel.SCORING)


def test_every_way_makes_as_many_passes_of_the_same_scores():
    """But for torch's own dropout, which is another one."""
    models = [classifier(config_of("bert")) for _ in range(2)]
    sizes, found, counts, batch = [], {}, {}, rows_of()
    for model in models:
        model.base_model.register_forward_hook(lambda m, args, out: sizes.append(len(out[0])))
    for name, call in panel.ways(*models).items():
        sizes.clear()
        found[name], counts[name] = call(batch), [*sizes]
    five = len(batch.counts_B)
    assert counts["one"] == [five] and counts["plain"] == 16 * [five]
    assert counts["by_one"] == 17 * [five] and counts["by_four"] == [five, *4 * [4 * five]]
    assert counts["at_once"] == [five, 16 * five]
    by_one, at_once = found["by_one"], found["at_once"]
    torch.testing.assert_close(by_one[:4], at_once[:4], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found["one"].logits_NC, at_once.logits_NC, atol=3e-6, rtol=1e-6)
    assert (found["plain"].sum(-1) - 16).abs().max() < 1e-5
