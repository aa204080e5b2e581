"""One trajectory of a task that keeps what earlier ones learnt, whatever ZeRO stage, world size,
micro-batch and stops, in it and between the tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dskd.settings.yaml_tree import dump
from tests.data.test_questions import TASKS, data_of
from tests.equivalence import small
from tests.equivalence.small import Runs, same, step_lines
from tests.launching import forked, losses

# Far from uniform, so that what the first task leaves differs from what it began with.
CAUSAL = small.CAUSAL | {"initializer_range": 0.3}
EWC = {"kind": "ewc", "strength": 30.0}
MAS = {"kind": "mas", "strength": 3e7, "rows": "batch", "anchor": "first", "update": "gradient"}
GEM = {"share": 0.5, "per_step": 4}
METHODS: dict[str, dict[str, Any]] = {
    "ewc": {"penalty": EWC},
    "mas": {"penalty": MAS, "adamw": "original"},
    "gem": {"memories": {"kind": "gem", **GEM}, "word_kd": True},
    "a_gem": {"memories": {"kind": "a_gem", "every": 3, **GEM}, "word_kd": True},
}
"""What the second of two tasks is learnt by. Where a memory's gradient is taken before every third
step, a run that is resumed after two steps takes the next one by what its checkpoint holds."""


@dataclass(frozen=True)
class Chain:
    """Two tasks in a folder, the second of which is learnt by one of the methods."""

    runs: Runs
    name: str

    @property
    def method(self) -> dict[str, Any]:
        """Of the second task."""
        return {"kind": "l2kd", **METHODS[self.name]}

    def data(self, domain: str) -> dict[str, Any]:
        """Of a task, with rows of the other one as a memory, if the method reads them."""
        data = data_of(self.runs.folder).model_dump(mode="json", include={"objective", "sources"})
        own = [source for source in data["sources"] if source["domain"] == domain]
        others = [source for source in data["sources"] if source["domain"] != domain]
        modelling = self.method.get("text_weight") != 0
        return {
            **data,
            "sources": own,
            "memory": others if "memories" in self.method and domain == "down" else None,
            "validation_fraction": 0.3,
            "questions": {"task_tokens": TASKS, "room": 6, "modelling": modelling},
            "tokenizer": {"kind": "trained", "vocab_size": 320},
        }

    def train(self, name: str, ranks: int, *words: str, **sections: Any) -> Path:
        """A run whose sections of data, model, method and teacher are these."""
        name, tree = f"{self.name}-{name}", small.settings(self.runs.folder)
        fixed = {"folder": tree["data"]["folder"], "block_size": 32}
        sections["data"] = fixed | sections["data"]
        path, out = (self.runs.folder / f"{name}{end}" for end in (".yaml", ""))
        path.write_text(dump(tree | {"teacher": None} | sections), encoding="utf-8")
        forked(ranks, str(path), f"out={out}", "train.clip=0", "train.eps=1e-4", *words)
        return out

    def first(self, name: str, ranks: int, *words: str) -> Path:
        """The first task, with what it leaves for the second."""
        own = {key: value for key, value in self.method.items() if key in ("kind", "text_weight")}
        if "penalty" in self.method:
            own["penalty"] = self.method["penalty"]
            words = ("until=importance", *words)
        else:
            words = ("until=export", *words)
        how = {"data": self.data("up"), "method": own, "model": {"config": CAUSAL}}
        return self.train(f"up-{name}", ranks, *words, **how)

    def second(self, name: str, ranks: int, earlier: Path, *words: str, kept: bool = True) -> Path:
        """The second task, which starts as the first one's model; ``kept``: by the method."""
        export = {"path": str(earlier / "export")}
        method, data = self.method, self.data("down")
        if "penalty" in method:
            method["penalty"] = {**method["penalty"], "earlier": str(earlier)}
        if not kept:
            method |= {name: None for name in ("penalty", "memories") if name in method}
            data["memory"] = None
        data["tokenizer"] = {"kind": "pretrained", **export}
        how = {"data": data, "method": method, "model": export}
        if method.get("word_kd"):
            how["teacher"] = small.causal()["teacher"]
        return self.train(name, ranks, *words, **how)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("continual"))


@pytest.fixture(scope="module", params=METHODS)
def chain(runs, request) -> tuple[Chain, Path, Path]:
    """Both tasks on one rank at ZeRO-0."""
    chain = Chain(runs, request.param)
    up = chain.first("one", 1)
    return chain, up, chain.second("one", 1, up)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero1", ("deepspeed=zero1", "train.micro_batch=2")),
        ("zero3", ("deepspeed=zero3", "train.micro_batch=4")),
    ],
)
def test_one_trajectory(chain, name, words):
    chain, up, reference = chain
    found = chain.second(name, 2, up, *words)
    same(found, reference)
    assert violations(found) == violations(reference)


def violations(run: Path) -> list[float | None]:
    """How many memories each step's gradient pointed against."""
    return [line.get("violated") for line in step_lines(run)]


def test_one_trajectory_over_a_stop_at_another_stage(chain):
    chain, up, reference = chain
    chain.runs.copied(reference, f"{chain.name}-stopped", step=2)
    same(chain.second("stopped", 2, up, "deepspeed=zero2"), reference)


def test_one_trajectory_whatever_trained_the_first_task(chain):
    chain, up, reference = chain
    if "penalty" not in chain.method:
        pytest.skip("reads nothing but the model of the first task")
    again = chain.first("zero3", 2, "deepspeed=zero3", "train.micro_batch=2")
    one, other = (load_file(run / "importance" / "omega.safetensors") for run in (up, again))
    for name, omega in one.items():
        torch.testing.assert_close(other[name], omega, rtol=1e-3, atol=1e-5 * omega.max().item())
    same(chain.second("after-zero3", 1, again, "train.micro_batch=8"), reference)


def test_the_first_task_matters(chain):
    """Without the penalty or the memories the second one is learnt otherwise."""
    chain, up, reference = chain
    assert "memories" not in chain.method or max(violations(reference)) == 1
    free = chain.second("free", 1, up, kept=False)
    assert losses(free)[:2] == pytest.approx(losses(reference)[:2], abs=1e-6)  # a step without rate
    assert losses(free)[-1] != pytest.approx(losses(reference)[-1], abs=1e-3)
