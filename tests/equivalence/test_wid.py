"""Weight-Inherited Distillation gives one trajectory in any geometry, and goes on in any other.

Tiny students in forked ranks, by the user's command; losses and evaluations agree to 1e-5 (fp32).
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dskd.settings.yaml_tree import merge
from tests.equivalence.small import LIVE, MASKED, Runs, cached, same, step_lines
from tests.launching import cut_back, evaluations, exported_nll, forked, losses

STEPS = 6
STUDENT = {"config": MASKED | {"num_hidden_layers": 1}}
ANNEALED = {"kind": "wid", "hidden_size": 16, "every": 1, "ramp": 3, "anneal": 2, "lr": 0.01}
# 16 choices of units, so a longer run; its jumps make the most of rounding, so a lower rate.
ORIGINAL = {"kind": "wid", "hidden_size": 16, "rule": "original", "every": 1, "lr": 0.003}
SETTINGS = {
    "annealed": {"method": ANNEALED, "train": {"steps": STEPS}, "deepspeed": "zero0"},
    "original": {
        "method": ORIGINAL,
        "train": {"steps": 17, "clip": 0.0, "lr": 0.003},
        "checkpoint": {"every": 4, "keep": 4},
        "deepspeed": "zero0",
    },
}


def train(
    runs: Runs, name: str, ranks: int, *words: str, rule: str = "annealed", **changes: Any
) -> Path:
    """A run of the tiny student by a rule."""
    tree = {"model": student(runs), "teacher": None} | SETTINGS[rule]
    return runs.run(name, ranks, *words, **merge(tree, changes))


def student(runs: Runs) -> dict[str, Any]:
    """What all start as: random weights in a folder."""
    return STUDENT | {"path": str(runs.folder / "teacher" / "export")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("wid"))
    still = {"steps": 1, "lr": 1e-12}
    plain = {"method": {"kind": "lm"}, "teacher": None, "deepspeed": "zero0", "until": "export"}
    # whole sections: a method's settings are none of another's
    runs.run("teacher", 1, model=STUDENT, train=still, **plain)
    return runs


@pytest.fixture(scope="module")
def references(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, two micro-batches a step."""
    return {rule: train(runs, rule, 1, rule=rule) for rule in SETTINGS}


def score_of(checkpoint: Path) -> float | None:
    """What a checkpoint was evaluated at, if it is a candidate for the best."""
    score = json.loads((checkpoint / "manifest.json").read_text())["score"]
    return None if score is None else score["value"]


def column(run: Path, name: str) -> list[float]:
    return [line[name] for line in step_lines(run) if name in line]


def test_units_are_removed_and_go_to_zero(references):
    """A third at each of steps 1 to 3, in two steps each; the width is what is left."""
    run = references["annealed"]
    assert column(run, "hidden") == [27, 21, 16, 16, 16, 16]
    assert column(run, "kept")[-1] == 0.5
    removed = column(run, "removed")
    assert removed[0] > 1 and removed[2] > 1
    assert removed[3:] == [0.0] * 3
    assert column(references["original"], "hidden")[-1] == 16
    assert column(references["original"], "removed")[-1] > 0.0


def test_only_complete_students_are_candidates_for_the_best(references):
    folders = (references["annealed"] / "train" / "checkpoints").glob("step-*")
    told = {f.name: score_of(f) for f in folders}
    assert told["step-00000004"] is not None and told["step-00000006"] is not None
    assert told.get("step-00000002") is None


GEOMETRIES = [
    ("annealed", 0, 2, 4),
    ("annealed", 1, 2, 2),
    ("annealed", 2, 1, 8),
    ("annealed", 3, 2, 2),
    ("original", 0, 1, 2),
    ("original", 2, 2, 2),
    ("original", 3, 2, 4),
]


@pytest.mark.parametrize(("rule", "stage", "ranks", "micro"), GEOMETRIES)
def test_any_geometry_is_the_same_run(runs, references, rule, stage, ranks, micro):
    words = [f"deepspeed=zero{stage}", f"train.micro_batch={micro}"]
    out = train(runs, f"{rule}-{stage}-{ranks}-{micro}", ranks, *words, rule=rule)
    same(out, references[rule])


@pytest.fixture(scope="module")
def halves(runs) -> dict[tuple[int, int], Path]:
    """Runs killed after step 2: units are removed, some on their way to zero, some to come."""
    found = {}
    for stage, ranks in [(0, 1), (2, 2), (3, 2)]:
        words = (f"deepspeed=zero{stage}", "checkpoint.keep=3")
        out = train(runs, f"half-{stage}-{ranks}", ranks, *words)
        runs.copied(out, f"whole-{stage}-{ranks}")
        cut_back(out, step=2)
        found[stage, ranks] = out
    return found


ELSEWHERE = [((0, 1), (3, 2)), ((0, 1), (1, 2)), ((2, 2), (0, 2)), ((3, 2), (2, 1))]
AGAIN = [((0, 1), (0, 1)), ((2, 2), (2, 2)), ((3, 2), (3, 2))]


@pytest.mark.parametrize(("saved", "loaded"), ELSEWHERE + AGAIN)
def test_goes_on_in_the_middle_of_the_ramp(runs, references, halves, saved, loaded):
    name = "{}-{}--{}-{}".format(*saved, *loaded)
    runs.copied(halves[saved], name)
    stage, ranks = loaded
    out = train(runs, name, ranks, f"deepspeed=zero{stage}")
    same(out, references["annealed"])
    assert column(out, "hidden") == column(references["annealed"], "hidden")
    if saved == loaded:
        assert losses(out) == losses(runs.folder / f"whole-{stage}-{ranks}")  # bit for bit


def test_the_original_goes_on(runs, references):
    """Masks chosen anew in every step come out the same after a stop."""
    out = runs.copied(references["original"], "original-half", step=8)
    train(runs, out.name, 1, rule="original")
    assert losses(out) == losses(references["original"])


def test_a_compacted_student_goes_on(runs, references):
    """Step 4 is past the ramp; the next steps leave the removed units out."""
    out = train(runs, "compacted", 2, "deepspeed=zero3")
    cut_back(out, step=4)
    same(train(runs, out.name, 1, "deepspeed=zero1"), references["annealed"])


@pytest.mark.parametrize(("preset", "rule"), [("zero2", "annealed"), ("zero3", "original")])
def test_an_offloaded_optimizer_changes_nothing(runs, preset, rule):
    """Without clipping, which it would do before the edits; two micro-batches a step."""
    words = ["train.clip=0", "train.micro_batch=2"]
    plain = train(runs, f"unclipped-{rule}", 1, *words, rule=rule)
    words.append(f"deepspeed={preset}_offload")
    same(train(runs, f"{preset}-offload", 2, *words, rule=rule), plain)


def test_compaction_changes_nothing(runs, references):
    same(train(runs, "whole", 1, "method.compact=false"), references["annealed"])


def test_activation_checkpointing_changes_nothing(runs, references):
    words = ["train.activation_checkpointing=true"]
    same(train(runs, "recomputed", 1, *words), references["annealed"])
    words.append("deepspeed=zero3")
    same(train(runs, "recomputed-zero3", 2, *words), references["annealed"])


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_bf16_ends_at_exact_zeros(runs, references, stage, ranks):
    """From the masters to the export; the losses are those of fp32 to bf16's 8 bits."""
    words = [f"deepspeed=zero{stage}", "train.precision=bf16", "until=evaluate"]
    out = train(runs, f"bf16-{stage}", ranks, *words)
    assert column(out, "removed")[3:] == [0.0] * 3
    assert column(out, "hidden") == column(references["annealed"], "hidden")
    assert losses(out) == pytest.approx(losses(references["annealed"]), rel=0.02)
    assert exported_nll(out) == pytest.approx(evaluations(out)[-1], rel=0.01)


@pytest.mark.parametrize(
    ("saved", "loaded"), [((0, 1), (3, 2)), ((2, 2), (0, 1)), ((3, 2), (1, 2))]
)
def test_the_original_goes_on_elsewhere(runs, references, saved, loaded):
    name = "original-{}-{}--{}-{}".format(*saved, *loaded)
    (before, ranks), (after, others) = saved, loaded
    cut_back(train(runs, name, ranks, f"deepspeed=zero{before}", rule="original"), step=8)
    out = train(runs, name, others, f"deepspeed=zero{after}", rule="original")
    same(out, references["original"])


def test_the_original_is_exported_once_removed_units_are_near_zero(runs):
    """Its last masks are chosen at step 16, and at 20 it scores best, but by removed units."""
    changes = {
        "train": {"steps": 80},
        "evaluation": {"every": 20},
        "checkpoint": {"every": 20, "keep": 4},
        "method": ORIGINAL | {"lr": 0.005},
    }
    out = train(runs, "near", 2, "deepspeed=zero2", "until=evaluate", rule="original", **changes)
    folders = sorted((out / "train" / "checkpoints").glob("step-*"))
    told = [score_of(folder) for folder in folders]
    nlls = evaluations(out)
    assert told == [None, None, None, nlls[-1]]
    assert min(nlls) == nlls[0] < nlls[-1] - 0.1
    assert exported_nll(out) == pytest.approx(nlls[-1], abs=1e-4)


def test_the_original_is_refused_while_removed_units_are_large(runs, references, capfd):
    """Trained without a complaint, its last masks chosen; but the export would be another model."""
    out = runs.copied(references["original"], "large")
    folders = (out / "train" / "checkpoints").glob("step-*")
    assert all(score_of(f) is None for f in folders)
    told = r"largest norm of a removed unit is .* raise train\.steps, method\.penalty"
    with pytest.raises(AssertionError):  # of the launcher: it ended with an error
        train(runs, out.name, 2, "deepspeed=zero2", "until=export", rule="original")
    assert re.search(told, capfd.readouterr().err)
    assert not (out / "export").exists()


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_the_export_is_the_student(runs, references, stage, ranks):
    """The dense model that a user loads scores what the student with compactors scored."""
    out = runs.copied(references["annealed"], f"exported-{stage}")
    train(runs, out.name, ranks, f"deepspeed=zero{stage}", "until=evaluate")
    assert exported_nll(out) == pytest.approx(evaluations(out)[-1], abs=1e-5)
    config = json.loads((out / "export" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (16, 24)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_momentum_does_not_bring_removed_units_back(runs, stage, ranks):
    """SGD's, after the last unit is zero at step 4: it is exact to the export."""
    sgd = {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}}
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    preset = runs.folder / f"sgd-{stage}.json"
    preset.write_text(json.dumps(zero | {"optimizer": sgd}))
    method, rates = ANNEALED | {"lr": 0.05}, {"steps": 12, "lr": 0.05}
    words = [f"deepspeed={preset}", "until=evaluate"]
    out = train(runs, f"sgd-{stage}", ranks, *words, method=method, train=rates)
    assert column(out, "removed")[3:] == [0.0] * 9
    assert exported_nll(out) == pytest.approx(evaluations(out)[-1], abs=1e-5)


def test_inherits_a_distribution_as_well(runs):
    """By a live teacher, its cache or a panel of it twice, and by none once alpha is 0."""
    method = ANNEALED | {"inherit": {"schedule": "linear", "steps": 3}}
    changes = {"model": student(runs), "method": method, "train": {"steps": STEPS}}
    live = runs.run("inherit-live", 1, **changes)
    other = runs.run("inherit-cached", 2, "deepspeed=zero3", **changes | {"teacher": cached(LIVE)})
    same(live, other)
    panel = {"kind": "panel", "teachers": {"a": LIVE, "b": LIVE}, "mixture": {"rule": "uniform"}}
    both = runs.run("inherit-panel", 1, "deepspeed=zero2", **changes | {"teacher": panel})
    same(live, both)
    lines = step_lines(live)
    assert [line["alpha"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert ["kl" in line["terms"] for line in lines] == [True] * 3 + [False] * 3


def test_a_lengthened_run_is_the_unbroken_one(runs):
    """Its units go on from where they are, and what was exported is merged anew."""
    constant = {"steps": STEPS, "schedule": "constant", "clip": 0.0}
    out = train(runs, "lengthened", 1, train=constant, until="evaluate")
    forked(1, str(out / "config.yaml"), f"train.steps={STEPS + 4}")
    whole = train(runs, "unbroken", 1, train=constant | {"steps": STEPS + 4}, until="evaluate")
    assert losses(out) == losses(whole) and len(losses(out)) == STEPS + 4
    for name in ("scores.json", "export/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
