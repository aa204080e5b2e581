"""Panels of language models: one trajectory in any geometry, live or from whole caches; and a panel
that leaves all to one teacher is that teacher."""

from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import small
from tests.equivalence.small import ALL_KEPT, CAUSAL, MASKED, TEACHER, Runs, causal, step_lines
from tests.launching import losses

STUDENTS = {"masked": MASKED, "causal": CAUSAL}
# The second is far surer than the first of any token; the third is of another size.
MEMBERS = {
    "even": {**TEACHER, "initializer_range": 0.05},
    "sure": {**TEACHER, "initializer_range": 0.6},
    "wide": {**TEACHER, "hidden_size": 24, "initializer_range": 0.3},
}
SOFT = {"rule": "confidence_soft"}


def model(name: str, objective: str) -> dict[str, Any]:
    return {"config": STUDENTS[objective] | MEMBERS[name]}


def panel(
    mixture: dict[str, Any], names: tuple[str, ...], objective: str, **member: Any
) -> dict[str, Any]:
    """A panel of the named teachers; one that is named twice has two names."""
    teachers = {
        f"{name}{index}": {"model": model(name, objective), **member}
        for index, name in enumerate(names)
    }
    return {"kind": "panel", "teachers": teachers, "mixture": mixture}


CACHED = {**ALL_KEPT, "temperatures": [1.0, 2.0]}
"""What makes a member a cached one, of all logits."""


def train(
    runs: Runs, name: str, ranks: int, *words: str, teacher: dict[str, Any], objective: str
) -> Path:
    changes = causal() if objective == "causal" else {}
    # the section of a live teacher that the settings have would be merged with this one
    changes = changes | {"teacher": teacher, "deepspeed": "zero0"}
    return runs.run(f"{name}-{objective}", ranks, *words, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def soft(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, two micro-batches a step; three live teachers by how sure they are."""
    names = tuple(MEMBERS)
    return {
        objective: train(
            runs, "soft", 1, teacher=panel(SOFT, names, objective), objective=objective
        )
        for objective in STUDENTS
    }


def column(run: Path, term: str) -> list[float]:
    return [line["terms"][term] for line in step_lines(run)]


def same(a: Path, b: Path) -> None:
    small.same(a, b)
    assert column(a, "kl") == pytest.approx(column(b, "kl"), abs=1e-5)


@pytest.mark.parametrize("objective", STUDENTS)
@pytest.mark.parametrize(
    ("mixture", "names", "alone"),
    [
        ({"rule": "uniform"}, ("sure", "sure"), "sure"),
        (SOFT, ("even", "even"), "even"),
        ({"rule": "fixed", "weights": {"wide0": 1, "sure1": 0}}, ("wide", "sure"), "wide"),
        ({"rule": "confidence_hard"}, ("even", "sure"), "sure"),
    ],
    ids=["uniform", "soft", "fixed", "hard"],
)
def test_a_panel_that_leaves_all_to_one_teacher_is_it(
    runs, objective, mixture, names, alone, request
):
    """Of twice the same one, of weight 0 beside it, or by far less sure."""
    name = request.node.callspec.id
    one = {"kind": "live", "model": model(alone, objective)}
    single = train(runs, f"alone-{name}", 1, teacher=one, objective=objective)
    both = train(runs, name, 1, teacher=panel(mixture, names, objective), objective=objective)
    assert losses(both) == pytest.approx(losses(single), abs=1e-6)
    assert column(both, "kl") == pytest.approx(column(single, "kl"), abs=1e-6)


def test_the_rules_are_not_alike(runs, soft):
    names = tuple(MEMBERS)
    weights = {f"{name}{index}": 1 + index for index, name in enumerate(names)}
    rules = ({"rule": "uniform"}, {"rule": "fixed", "weights": weights}, SOFT | {"sharpness": 1.0})
    found = [column(soft["causal"], "kl")[0]]
    for index, mixture in enumerate(rules):
        teacher = panel(mixture, names, "causal")
        out = train(runs, f"rule-{index}", 1, "train.steps=1", teacher=teacher, objective="causal")
        found.append(column(out, "kl")[0])
    assert min(abs(a - b) for a in found for b in found if a is not b) > 1e-3


GEOMETRIES = {
    "causal": [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)],
    "masked": [(2, 2), (3, 2)],
}


@pytest.mark.parametrize(
    ("objective", "stage", "ranks"),
    [(objective, *each) for objective, several in GEOMETRIES.items() for each in several],
)
def test_live_teachers_in_any_geometry(runs, soft, objective, stage, ranks):
    teacher = panel(SOFT, tuple(MEMBERS), objective)
    words = [f"deepspeed=zero{stage}", f"train.micro_batch={2 if ranks == 2 else 8}"]
    name = f"{stage}-{ranks}"
    out = train(runs, name, ranks, *words, teacher=teacher, objective=objective)
    same(out, soft[objective])


@pytest.mark.parametrize("objective", STUDENTS)
def test_sharded_live_teachers(runs, soft, objective):
    teacher = panel(SOFT, tuple(MEMBERS), objective, deepspeed="zero3")
    words = ["deepspeed=zero3"]
    out = train(runs, "sharded", 2, *words, teacher=teacher, objective=objective)
    same(out, soft[objective])


@pytest.mark.parametrize("objective", STUDENTS)
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_whole_caches_are_the_live_teachers(runs, soft, objective, stage, ranks):
    """Each in a folder of its own; the mixture is of all tokens."""
    teacher = panel(SOFT, tuple(MEMBERS), objective, **CACHED)
    name = f"cached-{stage}-{ranks}"
    words = [f"deepspeed=zero{stage}"]
    out = train(runs, name, ranks, *words, teacher=teacher, objective=objective)
    folders = sorted(path.name for path in (out / "cache").iterdir())
    assert folders == sorted(f"{name}{index}" for index, name in enumerate(MEMBERS))
    same(out, soft[objective])
