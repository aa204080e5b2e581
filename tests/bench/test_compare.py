"""launch/bench/compare.py: its trials, its claims and its table, and one tiny comparison."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dskd.errors import ConfigError
from dskd.settings.parsing import parse
from dskd.settings.recipe import read
from dskd.settings.yaml_tree import dump, load, merge
from launch.bench import compare
from launch.bench.plan import HARD, RANDOM, Plan, Trial, refused
from tests.launching import ROOT, python

WID = ROOT / "launch/wid/compare.yaml"
EVOLUTION = ROOT / "launch/self_evolution/compare.yaml"
MUKI = ROOT / "launch/muki/compare.yaml"
RESULTS = ROOT / "launch/bench/results"


def plan_of(recipe: Path) -> Plan:
    return parse(Plan, load(recipe.with_suffix(".json")))


@pytest.mark.parametrize("path", [WID, EVOLUTION, MUKI], ids=lambda path: path.parent.name)
def test_a_plan_names_ways_of_its_recipe_and_rates_around_theirs(path):
    plan, runs = plan_of(path), read(path).runs
    ways = set(runs) - {plan.origin, *plan.upstream}
    assert set(plan.rates) in (set(), ways)
    claimed = {way for contrast in plan.claims for way in (*contrast.better, *contrast.than)}
    assert {*claimed, *plan.longer} <= ways
    assert plan.budget is None or plan.budget in ways
    for way, rates in plan.rates.items():
        assert runs[way].train.lr in rates, way


def test_all_ways_of_a_panel_choose_from_one_grid_with_two_teachers_or_four():
    both, two = plan_of(MUKI), plan_of(MUKI.with_name("two_teachers.json"))
    assert len({tuple(rates) for rates in both.rates.values()}) == 1

    def of_two(names):
        return [name for name in names if not name.endswith("-4")]

    assert two.rates == {way: both.rates[way] for way in of_two(both.rates)}
    assert two.upstream == of_two(both.upstream)
    wanted = {name: each for name, each in both.readings.items() if each.run in two.upstream}
    assert two.readings == wanted and len(both.readings) > len(wanted)
    assert two.claims == [each for each in both.claims if of_two(each.better)]
    assert {reading.run for reading in both.readings.values()} <= set(both.upstream)


def test_a_trial_changes_rate_seed_and_length_only():
    own = {"train": {"lr": 1.0, "clip": 2.0}, "model": {"path": "run:teacher"}}
    trial = Trial("slice", 1.5e-2, 3)
    assert trial.name == "slice-150e-4-seed3"
    assert trial.settings(own) == own | {"seed": 3, "train": {"lr": 1.5e-2, "clip": 2.0}}
    longer = trial._replace(steps=3600)
    assert longer.name == "slice-150e-4-seed3-3600steps"
    train = {"lr": 1.5e-2, "clip": 2.0, "steps": 3600, "warmup": 180}
    assert longer.settings(own)["train"] == train


def test_a_trial_reads_the_upstream_runs_of_its_seed():
    members = {"a": {"model": {"path": "run:one"}}, "b": {"model": {"path": "run:base"}}}
    own = {"teacher": {"path": "run:scores", "teachers": members}, "list": [1, "run:one"]}
    found = Trial("way", None, 2).settings(own, ["one", "scores"])
    members = {"a": {"model": {"path": "run:one-seed2"}}, "b": {"model": {"path": "run:base"}}}
    teacher = {"path": "run:scores-seed2", "teachers": members}
    assert found == {"teacher": teacher, "list": [1, "run:one-seed2"], "seed": 2}


def test_each_seed_has_its_own_teachers_and_scores(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        compare.subprocess,
        "run",
        lambda command, check: done.append(command) or Namespace(returncode=0),
    )
    comparison = compare.Comparison(MUKI, [f"out={tmp_path}"], MUKI.with_name("two_teachers.json"))
    comparison.carry_out([Trial("uhc-2", 1e-3, seed) for seed in (1, 2)])
    ((_, _, path, *over),) = done
    assert over == ["train.micro_batch=64", f"out={tmp_path}"]
    runs = read(Path(path), over).runs
    upstream = ["teacher-1-of-2", "teacher-2-of-2", "panel-2"]
    made = [f"{name}-seed{seed}" for seed in (1, 2) for name in upstream]
    assert list(runs) == [*made, "uhc-2-10e-4-seed1", "uhc-2-10e-4-seed2"]
    assert [run.seed for run in runs.values()] == [1, 1, 1, 2, 2, 2, 1, 2]
    last = runs["uhc-2-10e-4-seed2"]
    assert last.train.lr == 1e-3 and last.teacher.path == tmp_path / "panel-2-seed2" / "cache"
    first = last.teacher.teachers["first"].model.path
    assert first == str(tmp_path / "teacher-1-of-2-seed2" / "export")


def test_a_plan_that_compares_with_an_origin_has_one():
    for name, value in (("continued", True), ("hard", {"kind": "hard_tokens"}), ("budget", "a")):
        with pytest.raises(ConfigError, match=f"{name}: there is no origin"):
            parse(Plan, {"about": "x", "claims": [], name: value})


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=100", "train.steps"), ("train.lr=0.5", "train.lr"),
        ("train.epochs=3", "train.epochs"),
        ("train.warmup=0", "train.warmup"), ("seed=7", "seed"), ("method.every=3", "method"),
        ("train={steps: 3, warmup: 0}", "train.steps, train.warmup"),
        ("evaluation.every=10", "evaluation.every"), ("checkpoint={every: 10}", "checkpoint.every"),
        ("method={kind: lm}", "method"), ("runs.wid-dim.train.lr=1", "runs"),
    ],
)  # fmt: skip
def test_what_is_a_trials_own_is_refused(override, named, monkeypatch, capsys, tmp_path):
    """As an override of all runs it would replace the grid's rate, the longer runs' steps ..."""
    monkeypatch.setattr(sys, "argv", ["compare.py", str(WID), f"out={tmp_path}", override])
    monkeypatch.setattr(compare, "Comparison", lambda *rest: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    assert f"error: {named}: every trial has its own" in capsys.readouterr().err


@pytest.mark.parametrize("train", [{"steps": None, "epochs": 3}, {"warmup": 0.1}])
def test_a_recipe_in_epochs_or_shares_is_refused(train, tmp_path):
    """Its trials would have no number of steps to be compared by."""
    tree = load(WID)
    (tmp_path / "r.yaml").write_text(dump(merge(tree, {"base": {"train": train}})))
    (tmp_path / "r.json").write_text(WID.with_suffix(".json").read_text())
    with pytest.raises(ConfigError, match=r"^runs\.\w+\.train: is in epochs or shares"):
        compare.Comparison(tmp_path / "r.yaml", [f"out={tmp_path}"])


def test_other_overrides_go_through():
    over = ["train.micro_batch=8", "deepspeed=zero1", "evaluation.rows=8", "train.precision=fp32"]
    assert refused(over) == []


def test_a_claim_needs_every_seed_to_be_certain():
    def line(way: str, losses: list[float], longer: bool = False) -> dict:
        way += ", equal FLOPs" if longer else ""
        return {"way": way, "scores": {"loss": losses}, "longer": longer}

    rows = [
        line("wid-dim", [2.0, 2.2]), line("wid-head", [2.5, 2.6]), line("slice", [2.1, 2.4]),
        line("kd", [2.3, 2.4]), line("scratch", [3.0, 3.0]), line("slice", [1.0, 1.0], longer=True),
        line("scratch", [2.2, 2.9], longer=True),
    ]  # fmt: skip
    found = {claim["text"]: claim for claim in compare.claims(plan_of(WID), rows)}
    assert len(found) == 10
    for text, gap, on in (
        ("wid-dim is below kd", 0.25, "every seed"),
        ("wid-dim is below slice", 0.15, "some seeds"),
        ("wid-head is below kd", -0.2, "no seed"),
        ("wid-head is below scratch", 0.45, "every seed"),
        ("wid-dim is below slice, equal FLOPs", -1.1, "no seed"),
        ("wid-dim is below scratch, equal FLOPs", 0.45, "some seeds"),
    ):
        assert found[text]["gap"] == pytest.approx(gap), text
        assert found[text]["on"] == on, text


def test_classifiers_of_one_seed_are_compared_by_accuracy():
    """The luck of a seed's teachers is shared by its students."""
    plan = Plan(
        about="x",
        upstream=["teacher"],
        metrics=["accuracy", "ece"],
        claims=[{"better": ["a", "b"], "than": ["c"]}],
        readings={"teacher, own classes": {"run": "teacher", "scores": {"accuracy": "k"}}},
    )
    scores = {"a": [0.6, 0.8], "b": [0.6, 0.7], "c": [0.5, 0.75]}
    rows = [
        {"way": way, "longer": False, "lr": 0.001, "scores": {"accuracy": own, "ece": [0.1, 0.3]}}
        for way, own in scores.items()
    ]
    result = {"date": "d", "recipe": "r", "plan": plan.model_dump(), "seeds": [1, 2], "rows": rows}
    result |= {"origin": None, "grid": {}, "claims": compare.claims(plan, rows)}
    result |= {"readings": {"teacher, own classes": {"accuracy": [0.875, 0.625]}}}
    lines = compare.table(result).splitlines()
    assert lines[-2:] == [
        "- a is above c: every seed (+0.075)",
        "- b is above c: some seeds (+0.025)",
    ]
    assert lines[4:6] == [
        "| teacher, own classes |  | 0.750 [0.625 - 0.875] |  |",
        "| a | 0.001 | 0.700 [0.600 - 0.800] | 0.200 [0.100 - 0.300] |",
    ]


def recorded_wid() -> dict[str, Any]:
    """The recorded result of the first comparison of WID in the present form."""
    old = json.loads((RESULTS / "2026-11-21-wid-compare.json").read_text())
    rows = [
        row
        | {"scores": {"loss": row["eval_nll"]}, "way": row["way"] + ", equal FLOPs" * row["longer"]}
        for row in old["rows"]
    ]
    return old | {"origin": {"loss": old["teacher"]}, "rows": rows}


def recorded_evolution() -> dict[str, Any]:
    """The same of Self-Evolution."""
    old = json.loads((RESULTS / "2026-11-21-self-evolution.json").read_text())
    names = {"hard": HARD, "random": RANDOM}
    rows = []
    for way, scores in old["ways"].items():
        found = {names[key]: [score[key] for score in scores] for key in names}
        rows.append({"way": way, "longer": False, "scores": found})
    origin = {names[key]: loss for key, loss in old["base"].items()}
    return old | {"origin": origin, "rows": rows, "grid": {}}


@pytest.mark.parametrize(
    ("path", "made", "page"),
    [
        (WID, recorded_wid, "2026-11-21-wid-compare.md"),
        (EVOLUTION, recorded_evolution, "2026-11-21-self-evolution.md"),
    ],
    ids=["wid", "self_evolution"],
)
def test_recorded_results_give_the_recorded_table(path, made, page):
    plan, result = plan_of(path), made()
    result |= {"plan": plan.model_dump(mode="json"), "recipe": f"{path.parent.name}/compare.yaml"}
    result["claims"] = compare.claims(plan, result["rows"])
    old, new = (RESULTS / page).read_text(), compare.table(result)

    def cells(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    def verdicts(text: str) -> list[str]:
        lines = [line.rpartition(": ")[2] for line in text.splitlines() if "nats)" in line]
        return [line.replace("yes, ", "").replace("no (", "no seed (") for line in lines]

    def grid(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if line.startswith("- ")]
        return [line for line in lines if "nats)" not in line]

    first = 2  # header and rule; then the origin, which the older table of WID names in its text
    assert cells(new)[:first] == cells(old)[:first]
    assert cells(new)[-len(result["rows"]) :] == cells(old)[-len(result["rows"]) :]
    assert len(cells(new)) == first + 1 + len(result["rows"])
    assert verdicts(new) == verdicts(old)
    assert grid(new) == grid(old)
    assert len({line.count("|") for line in cells(new)}) == 1


TINY = """
base:
  out: {folder}/runs
  method: {{kind: lm}}
  teacher: null
  data:
    folder: {folder}/data
    objective: masked
    sources: [{{kind: builtin, documents: 30}}]
    tokenizer: {{vocab_size: 320}}
    block_size: 32
  train: {{steps: 2, batch: 4, warmup: 0, lr: 0.01}}
  evaluation: {{rows: 4, micro_batch: 4}}
runs:
  origin:
    model:
      config:
        model_type: bert
        hidden_size: 16
        intermediate_size: 32
        num_hidden_layers: 1
        num_attention_heads: 2
        max_position_embeddings: 32
  random: {{model: {{path: "run:origin"}}}}
  again: {{model: {{path: "run:origin"}}}}
"""


def test_a_comparison_from_the_command_line(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.format(folder=tmp_path))
    plan = {
        "about": "nothing", "origin": "origin", "continued": True,
        "hard": {"kind": "hard_tokens", "metric": "quantile", "replacement": "all_mask"},
        "rates": {"random": [0.01, 0.001], "again": [0.01]}, 
        "claims": [{"better": ["again"], "than": ["random"]}],
    }  # fmt: skip
    recipe.with_suffix(".json").write_text(json.dumps(plan))
    words = [str(recipe), "--seeds", "1,2", "--results", str(tmp_path / "results")]
    done = python(str(ROOT / "launch/bench/compare.py"), *words, "train.clip=0.5")
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    random, again = result["rows"]
    grid = {float(lr): loss for lr, loss in result["grid"]["random"].items()}
    assert random["lr"] == min(grid, key=grid.__getitem__)
    assert grid[random["lr"]] == random["scores"][RANDOM][0]
    assert result["grid"]["again"]["0.01"] == grid[0.01]  # two runs of the same settings
    for score in (HARD, RANDOM):
        assert len({*random["scores"][score], *again["scores"][score]}) >= 2  # two seeds
    assert result["origin"].keys() == {HARD, RANDOM}
    assert result["origin"][HARD] != result["origin"][RANDOM]
    assert path.with_suffix(".md").read_text() in done.stdout
