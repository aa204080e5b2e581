"""launch/bench/lifelong.py and the rows of launch/l2kd/toys.py: what is compared, how it is judged,
and one whole comparison whose runs are made up."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from dskd.settings.parsing import parse
from dskd.settings.recipe import read
from dskd.settings.yaml_tree import load
from launch.bench import lifelong
from launch.bench.lifelong import Claim, Plan, Study, judged, table
from launch.l2kd import toys
from tests.launching import ROOT

RECIPE = ROOT / "launch/l2kd/toys.yaml"


def plan_of(**changes) -> Plan:
    return parse(Plan, load(RECIPE.with_suffix(".json")) | changes)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_right(task: str, row: dict) -> bool:
    context, answer = row["context"].split(), row["answer"].split()
    if task == "rev":
        return answer == context[::-1]
    if task == "maj":
        (first, most), *others = Counter(context).most_common()
        return answer == [first] and all(count < most for _, count in others)
    places = [toys.WORDS.index(word) for word in context]
    return [toys.WORDS[(place + 1) % len(toys.WORDS)] for place in places] == answer


def test_rows_of_the_toys(tmp_path):
    """The same bytes for the same arguments; wrong answers are as many as asked for."""
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        toys.write(folder, noise=0.3, seed=seed, count=200, tests=50)
    one, same, other = folders
    for path in (path for path in one.rglob("*") if path.is_file()):
        assert path.read_bytes() == (same / path.relative_to(one)).read_bytes()
    for task in toys.QUESTIONS:
        train, test = rows_of(one / f"{task}-train.jsonl"), rows_of(one / f"{task}-test.jsonl")
        assert train != rows_of(other / f"{task}-train.jsonl")
        assert (len(train), len(test)) == (200, 50)
        assert sum(not is_right(task, row) for row in train) == 60
        assert all(is_right(task, row) for row in test)
        assert len({row["context"] for row in train + test}) == 250
    words = toys.tokenizer()
    assert len(words) == 18 and words("a h what").input_ids[:2] == [3, 10]


def test_the_plan_names_ways_of_its_recipe():
    plan, tree = plan_of(), load(RECIPE)
    ways = [way for group in plan.groups for way in group]
    assert sorted(ways) == sorted(tree["sequences"])
    for named in plan.noises.values():
        assert set(named) <= set(ways)
    first = next(iter(plan.noises.values()))
    for way, grid in plan.grid.items():
        assert way in first
        node = tree["sequences"][way]
        for part in grid.setting.split("."):
            node = node[part]
        assert node in grid.values
    for claim in plan.claims:
        named = plan.noises[f"{claim.noise:g}"]
        assert claim.way in named and (claim.than is None or claim.than in named)


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ({"way": "a", "least": 40}, "holds on every seed"),
        ({"way": "a", "least": 45}, "holds in the mean, on 1 of 2 seeds"),
        ({"way": "a", "than": "b", "least": 25}, "does not hold"),
        ({"way": "a", "than": "b", "least": 10}, "holds on every seed"),
        ({"way": "b", "score": "earlier", "most": 5}, "holds on every seed"),
    ],
)
def test_a_claim_is_judged_by_every_seed(claim, verdict):
    rows = {
        "0": {
            "a": {"average": [40.0, 60.0]},
            "b": {"average": [30.0, 30.0], "earlier": [5.0, 0.0]},
        }
    }
    assert judged(Claim(noise=0.0, **claim), rows)["verdict"] == verdict


@pytest.mark.parametrize(
    ("lines", "diverged"),
    [
        (["error: step 3: the loss is NaN"], True),
        (["error: step 3: the gradient of a memory is NaN or infinite"], True),
        (
            ["error: logits are not finite in sample 2", "error: data.sources: no information"],
            False,
        ),
        (["error: step 3: the loss is nan", "report: x/report.html"], False),
    ],
)
def test_only_numbers_that_are_not_finite_diverge(tmp_path, lines, diverged):
    job = lifelong.Job(tmp_path / "job", 0.0, 1, {})
    job.log.write_text("\n".join(lines))
    assert lifelong._diverged(job) is diverged


def test_a_whole_comparison(tmp_path, monkeypatch):
    """Which recipes are carried out, and that each way's score is that of its last run."""
    done = []

    def carried_out(command, stdout, **_):
        recipe = read(command[2], command[3:])
        done.append((command[2].removeprefix(f"{tmp_path}/"), list(recipe.runs)))
        for name, run in recipe.runs.items():
            penalty = run.method.get("penalty") or {"strength": 0.0}
            if penalty["strength"] > 100:
                stdout.write(b"error: step 3: the gradient's norm is nan\n")
                return SimpleNamespace(returncode=2)
            seed = 10.0 * run.seed
            scores = {"rev_em": seed, "maj_em": penalty["strength"], "shift_em": 100.0}
            if name in ("shift", "ewc-shift", "multitask"):
                (run.out).mkdir(parents=True)
                (run.out / "scores.json").write_text(json.dumps(scores))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(lifelong.subprocess, "run", carried_out)
    plan = plan_of(
        groups=[["lll", "ewc"], ["multitask"]],
        noises={"0": ["lll", "ewc", "multitask"], "0.5": ["lll", "ewc"]},
        grid={"ewc": {"setting": "method.penalty.strength", "values": [1.0, 60.0, 1e9]}},
        claims=[{"noise": 0, "way": "multitask", "than": "lll", "least": 0}],
    )
    monkeypatch.setattr(lifelong, "write", lambda folder, **about: made.append(about))
    made = []
    result = Study(RECIPE, plan, [1, 2], [f"out={tmp_path}", "train.epochs=1"]).result(1)
    assert [path for path, _ in done] == [
        "noise-0-seed-1/grid-ewc-0.yaml", "noise-0-seed-1/grid-ewc-1.yaml",
        "noise-0-seed-1/grid-ewc-2.yaml", "noise-0-seed-1/group-0.yaml",
        "noise-0-seed-1/group-1.yaml", "noise-0-seed-2/group-0.yaml",
        "noise-0-seed-2/group-1.yaml", "noise-0.5-seed-1/group-0.yaml",
        "noise-0.5-seed-2/group-0.yaml",
    ]  # fmt: skip
    runs = dict(done)
    assert runs["noise-0-seed-1/group-0.yaml"] == ["rev", "maj", "shift"]
    assert runs["noise-0-seed-2/group-0.yaml"][3:] == ["ewc-rev", "ewc-maj", "ewc-shift"]
    assert made[0] == {"noise": 0.0, "seed": 1} and {"noise": 0.5, "seed": 2} in made
    assert result["best"] == {"ewc": 60.0}
    ewc = result["rows"]["0"]["ewc"]
    assert ewc["average"] == pytest.approx([170 / 3, 60.0])
    assert ewc["earlier"] == [35.0, 40.0] and ewc["last"] == [100.0, 100.0]
    assert result["rows"]["0"]["multitask"]["earlier"] == [None, None]
    page = table(result)
    assert "seeds 1, 2; 1 epochs a task, 48 rows a step" in page and f"{tmp_path}" not in page
    assert "| ewc | 58.3 [56.7 - 60.0] | 37.5 [35.0 - 40.0] | 15.0 [10.0 - 20.0] |" in page
    assert "- noise 0: multitask - lll, average >= 0: holds on every seed (0.0: 0.0, 0.0)" in page
    assert "- ewc, `method.penalty.strength`: 1 37.0, 60 56.7, 1e+09 diverges" in page
