"""One trajectory of fine-tuning whatever the machine: ZeRO stage, ranks, micro-batches, stops."""

import json
from pathlib import Path

import pytest

from dskd.system.log import read_metrics
from tests.equivalence.tables import Tables
from tests.launching import cut_back, losses


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return Tables(tmp_path_factory.mktemp("finetune"))


def scores(run: Path) -> list[dict[str, float]]:
    lines = read_metrics(run / "train" / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if k.startswith("eval_")}
        for line in lines
        if "loss" not in line
    ]


def same(a: Path, b: Path) -> None:
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    assert len(scores(a)) == len(scores(b)) == 2
    for one, other in zip(scores(a), scores(b), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "numbers"])
def single(tables, request) -> tuple[Path, bool]:
    """One rank, ZeRO-0."""
    return tables.run(f"single-{request.param}", 1, numbers=request.param), request.param


def test_it_learns(single):
    out, numbers = single
    first, last = scores(out)
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert numbers or last["eval_accuracy"] > first["eval_accuracy"]
    summary = json.loads((out / "train" / "summary.json").read_text())
    assert summary["metric"] == ("eval_loss" if numbers else "eval_accuracy")
    assert summary["higher_is_better"] is not numbers


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["deepspeed=zero1", "train.micro_batch=2"]),
        (2, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero3", "train.micro_batch=2"]),
        (1, ["deepspeed=zero3", "train.micro_batch=8"]),
    ],
)
def test_one_trajectory(tables, single, ranks, words):
    out, numbers = single
    name = "-".join([out.name, str(ranks), *words]).replace("=", "")
    same(tables.run(name, ranks, *words, numbers=numbers), out)


def test_resumed(tables, single):
    out, numbers = single
    name = f"{out.name}-resumed"
    again = tables.run(name, 2, "deepspeed=zero2", numbers=numbers)
    cut_back(again, 10)
    tables.run(name, 1, "deepspeed=zero3", numbers=numbers)
    same(again, out)


def test_the_export_scores_as_the_student_did(tables, single):
    out, numbers = single
    tables.run(out.name, 1, "until=evaluate", numbers=numbers)
    exported = json.loads((out / "scores.json").read_text())
    best = json.loads((out / "train" / "summary.json").read_text())
    assert exported[best["metric"]] == pytest.approx(best[f"best_{best['metric']}"], abs=1e-5)
