"""launch/bench/wid.py runs at a tiny size and leaves what it promises; no times are judged. And the
arithmetic of both of its files' cost models, and of the table of launch/bench/wid_compare.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dskd.settings.recipe import read
from launch.bench import wid
from launch.bench import wid_compare as compare
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of two rounds of the script."""
    folder = tmp_path_factory.mktemp("bench")
    script = str(ROOT / "launch/bench/wid.py")
    words = ["--tokens", "128,1024", "--width", "16", "--rounds", "2", "--results", str(folder)]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_numbers_of_every_variant_are_there(folder):
    (path,) = folder.glob("*.json")
    result = json.loads(path.read_text())
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


def test_the_verdicts_are_those_of_the_medians(folder):
    (path,) = folder.glob("*.json")
    result = json.loads(path.read_text())
    found = result["verdicts"]
    small, large = result["cases"]
    assert [v["value"] for v in found] == [
        small["variants"]["compacted"]["over_teacher"]["median"],
        large["speedup"]["median"],
        large["variants"]["compacted"]["over_teacher"]["median"],
    ]
    assert [v["met"] for v in found] == [
        found[0]["value"] < 1,
        found[1]["value"] >= 2,
        found[2]["value"] < 1,
    ]
    table = next(folder.glob("*.md")).read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(wid.VARIANTS)
    assert len({row.count("|") for row in rows}) == 1
    assert table.count("met") + table.count("MISSED") == 3


def test_the_products_are_those_of_the_spec():
    """Section 5.1: a BERT layer's chain is 4.5 times the plain layer, merging adds 4 H / M."""
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


# ---- the table of the comparison -----------------------------------------------------------------

SIZES = compare.Sizes(M=1536, S=230.0, T=48, L=2, V=384)


def test_a_wid_step_costs_a_teachers_step_and_its_compactors():
    """Spec 5.1: merging adds 48 H^3 a layer and 2 H^3 x 3 in the head, chains H^2 a token."""
    hidden, small = 64, 16
    plain = 3 * compare.forward_products(SIZES, hidden)
    found = compare.wid_products(SIZES, hidden, small, compacted=False)
    added = 3 * (2 * 48 + 2) * hidden**3 + 3 * hidden**2 * (SIZES.M + SIZES.S)
    assert found == pytest.approx(plain + added)


def test_a_compacted_step_costs_a_students_step_and_small_merges():
    hidden, small = 64, 16
    plain = 3 * compare.forward_products(SIZES, small)
    found = compare.wid_products(SIZES, hidden, small, compacted=True)
    merging = 3 * (2 * 5.25 + 5 / 16) * hidden**3
    chained = 3 * hidden * small * (SIZES.M + SIZES.S)
    whole_projection = 3 * SIZES.V * (hidden - small) * SIZES.S
    assert found == pytest.approx(plain + merging + chained + whole_projection)


def test_a_run_is_narrow_from_where_the_rule_says():
    method = {"every": 10, "ramp": 16, "anneal": 40}
    before, after = (
        compare.wid_products(SIZES, 64, 16, compacted=compacted) for compacted in (False, True)
    )
    found = compare.run_products("wid-dim", 800, SIZES, 64, 16, method)
    assert found == pytest.approx(199 * before + 601 * after)
    taught = 800 * compare.forward_products(SIZES, 64)
    assert compare.run_products("wid-ki", 800, SIZES, 64, 16, method) == found + taught
    plain = compare.run_products("scratch", 800, SIZES, 64, 16, method)
    assert compare.run_products("kd", 800, SIZES, 64, 16, method) == plain + taught


def test_every_way_of_the_recipe_has_a_grid_and_its_rate_in_it():
    runs = read(compare.RECIPE).runs
    assert set(runs) == {compare.TEACHER, *compare.GRID}
    for way, rates in compare.GRID.items():
        assert runs[way].train.lr in rates, way
    sizes = compare.sizes_of(runs["scratch"])
    assert sizes == compare.Sizes(M=1536, S=pytest.approx(230.4), T=48, L=2, V=384)


def test_a_trial_changes_rate_seed_and_length_only():
    own = {"train": {"lr": 1.0, "clip": 2.0}, "model": {"path": "run:teacher"}}
    trial = compare.Trial("slice", 1.5e-2, 3)
    assert trial.name == "slice-150e-4-seed3"
    assert trial.settings(own) == own | {"seed": 3, "train": {"lr": 1.5e-2, "clip": 2.0}}
    longer = trial._replace(steps=3600)
    assert longer.name == "slice-150e-4-seed3-3600steps"
    assert longer.settings(own)["train"] == {
        "lr": 1.5e-2,
        "clip": 2.0,
        "steps": 3600,
        "warmup": 180,
    }


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=100", "train.steps"),
        ("train.lr=0.5", "train.lr"),
        ("train.warmup=0", "train.warmup"),
        ("train={steps: 3, warmup: 0}", "train.steps, train.warmup"),
        ("seed=7", "seed"),
        ("evaluation.every=10", "evaluation.every"),
        ("checkpoint={every: 10}", "checkpoint.every"),
        ("method.every=3", "method"),
        ("method={kind: lm}", "method"),
        ("runs.wid-dim.train.lr=1", "runs"),
    ],
)
def test_what_is_a_trials_own_is_refused(override, named, monkeypatch, capsys, tmp_path):
    """As an override of all runs it would replace the grid's rate, the longer runs' steps ..."""
    monkeypatch.setattr(sys, "argv", ["wid_compare.py", f"out={tmp_path}", override])
    monkeypatch.setattr(compare, "compare", lambda *rest: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    assert f"error: {named}: every trial has its own" in capsys.readouterr().err


def test_other_overrides_go_through():
    over = ["train.micro_batch=8", "deepspeed=zero1", "evaluation.rows=8", "train.precision=fp32"]
    assert compare.refused(over) == []


def test_a_claim_needs_every_seed_to_be_certain():
    def line(way: str, losses: list[float], longer: bool = False) -> dict:
        middle = sum(losses) / len(losses)
        return {"way": way, "eval_nll": losses, "mean": middle, "longer": longer}

    rows = [
        line("wid-dim", [2.0, 2.2]),
        line("wid-head", [2.5, 2.6]),
        line("slice", [2.1, 2.4]),
        line("kd", [2.3, 2.4]),
        line("scratch", [3.0, 3.0]),
        line("slice", [1.0, 1.0], longer=True),
        line("scratch", [2.2, 2.9], longer=True),
    ]
    found = {claim["text"]: claim for claim in compare.claims(rows)}
    assert len(found) == 10
    for text, gap, every in (
        ("wid-dim beats kd at equal steps", 0.25, True),
        ("wid-dim beats slice at equal steps", 0.15, False),
        ("wid-head beats kd at equal steps", -0.2, False),
        ("wid-head beats scratch at equal steps", 0.45, True),
        ("wid-dim beats slice at equal FLOPs", -1.1, False),
        ("wid-dim beats scratch at equal FLOPs", 0.45, False),
    ):
        assert found[text]["gap"] == pytest.approx(gap), text
        assert found[text]["every"] == every, text
