"""One trajectory of the methods of panels whatever the machine: ZeRO stage, ranks, micro-batches,
stops, stored or live teachers."""

from pathlib import Path

import pytest

from dskd.system.log import read_metrics
from tests.equivalence.tables import Tables
from tests.equivalence.test_finetune import same
from tests.launching import cut_back
from tests.stores.caches import files

METHODS = {
    "muki": {"kind": "muki"},
    "soft": {"kind": "muki", "choice": "soft", "temperature": 2.0, "normalise": "batch_mean"},
    "vkd": {"kind": "vkd", "temperature": 2.0},
    "uhc": {"kind": "uhc"},
}
OWN = {"first": ["fruit", "bird"], "second": ["tree", "fruit"]}
"""Of each teacher the classes, in an order of its own; one is of both."""


class Panels:
    """Students of two teachers, whose runs come first."""

    def __init__(self, folder: Path) -> None:
        self.tables = Tables(folder)
        self.teachers = {
            name: self.tables.run(
                name, 1, "until=export", "train.steps=60", "train.lr=0.01", data={"labels": own}
            )
            for name, own in OWN.items()
        }

    def run(self, name: str, ranks: int, method: str, *words: str, **teacher) -> Path:
        members = {
            each: {"model": {"path": str(folder / "export")}}
            for each, folder in self.teachers.items()
        }
        panel = {"kind": "panel", "passes": 3, "dropout": 0.2, "teachers": members, **teacher}
        return self.tables.run(name, ranks, *words, teacher=panel, method=METHODS[method])


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> Panels:
    return Panels(tmp_path_factory.mktemp("panel"))


@pytest.fixture(scope="module", params=METHODS)
def single(panels, request) -> tuple[Path, str]:
    """One rank, ZeRO-0."""
    return panels.run(f"single-{request.param}", 1, request.param), request.param


def test_it_learns(single):
    """What the teachers say, from rows whose labels nothing of it reads."""
    out, _ = single
    lines = read_metrics(out / "train" / "metrics.jsonl")
    kl = [line["loss_kl"] for line in lines if "loss_kl" in line]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["deepspeed=zero1", "train.micro_batch=2"]),
        (2, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero3", "train.micro_batch=2"]),
    ],
)
def test_one_trajectory(panels, single, ranks, words):
    out, method = single
    name = "-".join([out.name, str(ranks), *words]).replace("=", "")
    same(panels.run(name, ranks, method, *words), out)


def test_resumed(panels, single):
    out, method = single
    name = f"{out.name}-resumed"
    again = panels.run(name, 2, method, "deepspeed=zero2")
    cut_back(again, 10)
    panels.run(name, 1, method, "deepspeed=zero3")
    same(again, out)


@pytest.mark.parametrize("method", ["muki", "vkd", "uhc"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, "zero0"), (2, "zero3")])
def test_live_teachers_are_stored_ones(panels, method, ranks, stage):
    stored = panels.run(f"single-{method}", 1, method)
    name = f"live-{method}-{stage}"
    same(panels.run(name, ranks, method, f"deepspeed={stage}", scores="live", at_once=2), stored)


def test_sharded_live_teachers(panels):
    stored = panels.run("single-muki", 1, "muki")
    sharded = {"deepspeed": "zero3"}
    members = {
        name: {"model": {"path": str(folder / "export")}, **sharded}
        for name, folder in panels.teachers.items()
    }
    same(panels.run("sharded", 2, "muki", scores="live", teachers=members), stored)


def test_stores_are_equal_for_any_number_of_ranks(panels):
    one = panels.run("single-muki", 1, "muki")
    two = panels.run("two-ranks", 2, "muki", "until=scores")
    for name in OWN:
        stored = files(one / "cache" / name / "train")
        assert "manifest.json" in stored and len(stored) == 2
        assert stored == files(two / "cache" / name / "train")
