"""launch/bench/wid.py runs at a tiny size and leaves what it promises; no times are judged. And the
arithmetic of its cost models."""

import json
from pathlib import Path

import pytest
import torch

from dskd.settings.recipe import read
from launch.bench import wid
from tests.launching import ROOT, python


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two rounds of the script, beside its numbers."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--tokens", "128,1024", "--width", "16", "--rounds", "2", "--results", str(folder)]
    python(str(ROOT / "launch/bench/wid.py"), *words)
    (page,) = folder.glob("*.md")
    return page


def test_the_numbers_of_every_variant_are_there(page):
    result = json.loads(page.with_suffix(".json").read_text())
    assert [case["tokens"] for case in result["cases"]] == [128, 1024]
    for case in result["cases"]:
        wall = case["samples"]["wall_ms"]
        assert list(wall) == list(case["variants"]) == list(wid.VARIANTS)
        for name, row in case["variants"].items():
            assert row["ms"]["median"] == pytest.approx(sum(wall[name]) / 2)
            ratios = [own / plain for own, plain in zip(wall[name], wall["teacher"], strict=True)]
            assert row["over_teacher"]["median"] == pytest.approx(sum(ratios) / 2)
            assert row["peak_bytes"] >= 0
        speedups = [a / b for a, b in zip(wall["chained"], wall["merged"], strict=True)]
        assert case["speedup"]["median"] == pytest.approx(sum(speedups) / 2)
    assert result["error"] < wid.TOLERANCE


def test_the_verdicts_are_those_of_the_medians(page):
    result = json.loads(page.with_suffix(".json").read_text())
    found = result["verdicts"]
    small, large = result["cases"]
    assert [v["value"] for v in found] == [
        small["variants"]["compacted"]["over_teacher"]["median"],
        large["speedup"]["median"],
        large["variants"]["compacted"]["over_teacher"]["median"],
    ]
    first, speedup, last = (v["value"] for v in found)
    assert [v["met"] for v in found] == [first < 1, speedup >= 2, last < 1]
    table = page.read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(wid.VARIANTS)
    assert len({row.count("|") for row in rows}) == 1
    assert table.count("met") + table.count("MISSED") == 3


def test_the_products_of_a_step_by_hand():
    """A BERT layer's chain is 4.5 times the plain layer, merging adds 4 H / M."""
    for tokens in (256, 1024, 4096):
        found = wid.products(256, tokens)
        plain = found["teacher"]
        assert plain == 3 * 12 * 256**2 * tokens * wid.LAYERS
        assert found["chained"] == 4.5 * plain
        assert found["merged"] == pytest.approx(plain * (1 + 4 * 256 / tokens))
        assert found["student"] == plain / 16
        # four maps of 5/16 H^3 and two of 2 H^3, merged once and taken apart at twice the price
        merging = 3 * (4 * 5 / 16 + 2 * 2) * 256**3 * wid.LAYERS
        assert found["compacted"] == pytest.approx(plain / 16 + merging)


@pytest.mark.parametrize("name", wid.VARIANTS)
def test_every_variant_trains_all_that_it_has(name):
    step = wid.Step(name, 16, 128, torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in step.encoder.named_parameters()}
    step()
    for n, parameter in step.encoder.named_parameters():
        assert parameter.shape == before[n].shape
        assert n.endswith("key.bias") or not torch.equal(parameter, before[n]), n
    width = 4 if name in ("compacted", "student") else 16
    assert step.gradients().shape == (1, 128, width)


# ---- the cost of whole runs ----------------------------------------------------------------------

SIZES = wid.Sizes(M=1536, S=230.0, T=48, L=2, V=384)


def test_a_wid_step_costs_a_teachers_step_and_its_compactors():
    """Merging adds 48 H^3 a layer and 2 H^3 x 3 in the head, chains H^2 a token."""
    hidden, small = 64, 16
    plain = 3 * wid.forward_products(SIZES, hidden)
    found = wid.wid_products(SIZES, hidden, small, compacted=False)
    added = 3 * (2 * 48 + 2) * hidden**3 + 3 * hidden**2 * (SIZES.M + SIZES.S)
    assert found == pytest.approx(plain + added)


def test_a_compacted_step_costs_a_students_step_and_small_merges():
    hidden, small = 64, 16
    plain = 3 * wid.forward_products(SIZES, small)
    found = wid.wid_products(SIZES, hidden, small, compacted=True)
    merging = 3 * (2 * 5.25 + 5 / 16) * hidden**3
    chained = 3 * hidden * small * (SIZES.M + SIZES.S)
    whole_projection = 3 * SIZES.V * (hidden - small) * SIZES.S
    assert found == pytest.approx(plain + merging + chained + whole_projection)


def test_a_run_is_narrow_from_where_the_rule_says():
    runs = read(ROOT / "launch/wid/compare.yaml").runs

    def products(way: str, steps: int = 800) -> float:
        return wid.run_products(runs[way], runs["teacher"], steps)

    sizes = wid.sizes_of(runs["teacher"])
    assert sizes == wid.Sizes(M=1536, S=pytest.approx(230.4), T=48, L=2, V=384)
    before, after = (
        wid.wid_products(sizes, 64, 16, compacted=compacted) for compacted in (False, True)
    )
    found = products("wid-dim")
    assert found == pytest.approx(199 * before + 601 * after)
    taught = 800 * wid.forward_products(sizes, 64)
    assert products("wid-ki") == pytest.approx(found + taught)
    plain = products("scratch")
    assert plain == pytest.approx(800 * 3 * wid.forward_products(sizes, 16))
    assert products("slice") == plain
    assert products("kd") == pytest.approx(plain + taught)
    assert round(found / products("slice", 1)) == 3609  # steps at equal FLOPs, as in the log
