"""One trajectory of the methods of panels whatever the machine: ZeRO stage, ranks, micro-batches,
stops, stored or live teachers."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from dskd.system.log import read_metrics
from tests.equivalence.tables import Tables
from tests.equivalence.test_finetune import same, scores
from tests.launching import cut_back
from tests.stores.caches import files

METHODS = {
    "muki": {"kind": "muki"},
    "soft": {"kind": "muki", "choice": "soft", "temperature": 2.0, "normalise": "batch_mean"},
    "vkd": {"kind": "vkd", "temperature": 2.0},
    "uhc": {"kind": "uhc"},
}
ALIGNED = {
    "dfa": {"kind": "dfa", "temperature": 2.0, "lr_scale": 5.0},
    "cfl": {"kind": "cfl", "layers": 2, "mmd_rows": 4, "mmd_weight": 0.1, "lr_scale": 5.0},
}
"""Methods that train modules beside the student; their teachers are live."""
ALIGNED_WORDS = [
    # By a tiny eps Adam would make steps of rounding, as of keys' biases, whose gradient is 0.
    "train.eps=1e-3", "train.batch=16", "train.steps=10", "evaluation.every=5", "checkpoint.every=5"
]  # fmt: skip
OWN = {"first": ["fruit", "bird"], "second": ["tree", "fruit"]}
"""Of each teacher the classes, in an order of its own; one is of both."""
SIZES = {"first": {}, "second": {"hidden_size": 48, "num_hidden_layers": 4}}
"""In what their models differ from the student's."""


class Panels:
    """Students of two teachers, whose runs come first."""

    def __init__(self, folder: Path) -> None:
        self.tables = Tables(folder)
        self.teachers = {
            name: self.tables.run(
                name,
                1,
                "until=export",
                "train.steps=60",
                "train.lr=0.01",
                data={"labels": own},
                model={"config": SIZES[name]},
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

    def aligned(self, name: str, ranks: int, method: str, *words: str, **member) -> Path:
        members = {
            each: {"model": {"path": str(folder / "export")}, **member}
            for each, folder in self.teachers.items()
        }
        panel = {"kind": "panel", "scores": "live", "confidence": "logits", "teachers": members}
        words = (*ALIGNED_WORDS, *words)
        return self.tables.run(name, ranks, *words, teacher=panel, method=ALIGNED[method])


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> Panels:
    return Panels(tmp_path_factory.mktemp("panel"))


@pytest.fixture(scope="module", params=METHODS)
def single(panels, request) -> tuple[Path, str]:
    """One rank, ZeRO-0."""
    return panels.run(f"single-{request.param}", 1, request.param), request.param


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(panels, method):
    """What the teachers say, from rows whose labels nothing of it reads."""
    out = panels.run(f"long-{method}", 1, method, "train.steps=60", "train.lr=0.01")
    lines = read_metrics(out / "train" / "metrics.jsonl")
    kl = [line["terms"]["kl"] for line in lines if "terms" in line]
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
    asked = {"at_once": 2}
    if method != "muki":
        asked |= {"confidence": "logits", "passes": 16, "dropout": None}
    same(panels.run(name, ranks, method, f"deepspeed={stage}", scores="live", **asked), stored)


def test_sharded_live_teachers(panels):
    stored = panels.run("single-muki", 1, "muki")
    sharded = {"deepspeed": "zero3"}
    members = {
        name: {"model": {"path": str(folder / "export")}, **sharded}
        for name, folder in panels.teachers.items()
    }
    same(panels.run("sharded", 2, "muki", scores="live", teachers=members), stored)


def test_stores_are_equal_for_any_number_of_ranks(panels):
    shards = {"rows_per_shard": 8}  # 7 of them, so that each rank has some
    one = panels.run("one-rank", 1, "muki", "until=scores", **shards)
    two = panels.run("two-ranks", 2, "muki", "until=scores", **shards)
    for name in OWN:
        stored = files(one / "cache" / name / "train")
        assert {".lock", "manifest.json"} < stored.keys()
        assert sum(file.endswith(".safetensors") for file in stored) == 7
        assert stored == files(two / "cache" / name / "train")


@pytest.fixture(scope="module", params=ALIGNED)
def aligned(panels, request) -> tuple[Path, str]:
    """One rank, ZeRO-0, four micro-batches."""
    return panels.aligned(f"single-{request.param}", 1, request.param), request.param


def test_what_is_beside_the_student_learns(aligned):
    out, _ = aligned
    lines = read_metrics(out / "train" / "metrics.jsonl")
    errors = [line["terms"]["reconstruction"] for line in lines if "terms" in line]
    assert sum(errors[-3:]) < 0.98 * sum(errors[:3])


@pytest.mark.parametrize(
    ("ranks", "words", "member"),
    [
        (1, ["deepspeed=zero1", "train.micro_batch=16"], {}),
        (2, ["deepspeed=zero2", "train.micro_batch=8"], {}),
        (2, ["deepspeed=zero3", "train.activation_checkpointing=true", "until=evaluate"],
         {"deepspeed": "zero3"}),
    ],
)  # fmt: skip
def test_one_trajectory_of_aligned_students(panels, aligned, ranks, words, member):
    out, method = aligned
    name = "-".join([out.name, str(ranks), *words]).replace("=", "")
    run = panels.aligned(name, ranks, method, *words, **member)
    same(run, out)
    if "until=evaluate" in words:
        check_export(run)


def check_export(run: Path) -> None:
    """The exported model is the student of the best step, and no more."""
    exported = json.loads((run / "scores.json").read_text())
    best = json.loads((run / "train" / "summary.json").read_text())["best_step"]
    for name, score in scores(run)[best // 5 - 1].items():
        assert exported[name] == pytest.approx(score, abs=1e-5)
    _, found = AutoModelForSequenceClassification.from_pretrained(
        run / "export", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_aligned_students_resumed(panels, aligned):
    out, method = aligned
    name = f"{out.name}-resumed"
    again = panels.aligned(name, 2, method, "deepspeed=zero2")
    cut_back(again, 5)
    panels.aligned(name, 1, method, "deepspeed=zero3")
    same(again, out)
