"""The parts that settings wire, held to the original's numbers, and which of them there are."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dskd.continual import earlier_tasks
from dskd.continual.earlier_tasks import RowLoss, hooks_of
from dskd.continual.kept_weights import keep_weights
from dskd.continual.settings import Memories, Penalty
from dskd.engine.shards import ParameterShards
from dskd.errors import ConfigError, StoreError
from dskd.settings.run import Run
from tests.continual.cases import CASES, GEM

ADAMW = CASES["reg_adamw_3_steps"]
LOSS = RowLoss("loss", "counts", None, ())
PLAIN = {"penalty": None, "memories": None, "original_adamw": False}


class Rows:
    """Stands in for rows, of which only the domains are known."""

    def __init__(self, domains: list[int]) -> None:
        self._domains = np.array(domains)

    def __len__(self) -> int:
        return len(self._domains)

    def domains_B(self, row_ids_B):
        return self._domains[row_ids_B]


class OneParameter:
    """A model of one float64 parameter, and how hooks see it."""

    def __init__(self, values: list) -> None:
        self.model = torch.nn.Module()
        self.model.p = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.optimizer: Any = torch.optim.SGD([self.model.p])

    def shards(self, gradient: list | None = None) -> ParameterShards:
        """With a gradient before the step, without one after it."""
        given = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        self.model.p.grad = given
        return ParameterShards({"p": self.model.p}, self.optimizer, gradients=given is not None)


def context_of(tasks: int, rows: int = 5, **sections: Any) -> Any:
    """A run with 20 new rows and so many of each of some earlier tasks, carried out."""
    named = ["new", *(f"task{number}" for number in range(tasks))]
    new, *memory = ({"kind": "questions", "path": "x", "domain": name} for name in named)
    run = {"data": {"sources": [new], "memory": memory or None}, "train": {"micro_batch": 2}}
    prepared = SimpleNamespace(domains=named, train=Rows([0] * 20))
    earlier = Rows([number + 1 for number in range(tasks)] * rows)
    return SimpleNamespace(
        run=Run.model_validate(run | sections), prepared=prepared, rows_of=lambda sources: earlier
    )


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Penalty:
    """The golden case's importances and anchor, of the model that is called ``start``."""
    given = ADAMW["inputs"]
    omega, anchor = (torch.tensor(given[key], dtype=torch.float64) for key in ("omega", "anchor"))
    began = torch.nn.Module()
    began.named_parameters = {"p": anchor}.items
    prints = {"model": "start", "kind": "mas", "anchor": "latest"}
    folder = tmp_path / "importance"
    keep_weights(folder, lambda: began, lambda model: {"p": omega}, fingerprints=prints)
    monkeypatch.setattr(earlier_tasks, "model_fingerprint", lambda model, **about: model.path)
    return Penalty(kind="mas", strength=given["reg_lambda"], earlier=str(tmp_path))


def test_the_golden_steps_of_penalty_and_adamw(kept):
    given, of = ADAMW["inputs"], OneParameter(ADAMW["inputs"]["p0"])
    context = context_of(0, model={"path": "start"}, train={"eps": given["eps"]})
    parts = {**PLAIN, "penalty": kept, "original_adamw": True}
    hooks = hooks_of(of.model, context, LOSS, **parts)
    groups = [{"params": [of.model.p], "weight_decay": given["weight_decay"]}]
    how = {"betas": given["betas"], "eps": given["eps"], "lr": given["lr"]}
    of.optimizer = torch.optim.AdamW(hooks.groups(groups), **how)
    for step, gradient in enumerate(given["grads"]):
        hooks.before_step(of.shards(gradient), step, given["lr"])
        of.optimizer.step()
        hooks.after_step(of.shards(), step, given["lr"])
        wanted = torch.tensor(ADAMW["expected"]["params"][step], dtype=torch.float64)
        torch.testing.assert_close(of.model.p.detach(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "model", "told"),
    [
        ({}, "other", r"omega\.safetensors: made with another model \(.* start, this run's other"),
        ({"kind": "ewc"}, "start", "another kind .* mas, this run's ewc"),
        ({"anchor": "first"}, "start", "another anchor .* latest, this run's first"),
    ],
    ids=["model", "kind", "anchor"],
)
def test_importances_of_something_else_are_refused(kept, changes, model, told):
    of, context = OneParameter([[0.0] * 3] * 2), context_of(0, model={"path": model})
    parts = {**PLAIN, "penalty": kept.model_copy(update=changes)}
    with pytest.raises(StoreError, match=told):
        hooks_of(of.model, context, LOSS, **parts)


def pulled(hooks, gradient: list, values: list) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient as hooks leave it, and how far they move the weights after a step by it."""
    of = OneParameter(values)
    hooks.before_step(of.shards(gradient), 0, 0.1)
    edited = of.model.p.grad.clone()
    before = of.model.p.detach().clone()
    hooks.after_step(of.shards(), 0, 0.1)
    return edited, of.model.p.detach() - before


def test_the_pull_is_part_of_the_gradient_or_comes_after_the_step(kept):
    given, context = ADAMW["inputs"], context_of(0, model={"path": "start"})
    model, gradient = OneParameter(given["p0"]).model, given["grads"][0]
    plain, p0, omega, anchor = (
        torch.tensor(values, dtype=torch.float64)
        for values in (gradient, given["p0"], given["omega"], given["anchor"])
    )
    slope = 2 * given["reg_lambda"] * omega * (p0 - anchor)
    found = {}
    for update in ("gradient", "decoupled"):
        penalty = kept.model_copy(update={"update": update})
        hooks = hooks_of(model, context, LOSS, **{**PLAIN, "penalty": penalty})
        found[update] = pulled(hooks, gradient, given["p0"])
    nothing = torch.zeros_like(plain)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found["gradient"], (plain + slope, nothing), **close)
    torch.testing.assert_close(found["decoupled"], (plain, -0.1 * slope), **close)


def test_of_a_first_task_nothing_is_pulled():
    penalty = Penalty(kind="ewc")
    assert hooks_of(torch.nn.Module(), context_of(0), LOSS, **{**PLAIN, "penalty": penalty}) is None


def memories_of(context: Any, monkeypatch, **settings: Any) -> tuple[Any, list[dict]]:
    """The hooks of memories, and what each memory is made of; its batches are its number."""
    made: list[dict] = []

    def memory(**of):
        made.append(of)
        return SimpleNamespace(batches=lambda step: [of["task"]])

    monkeypatch.setattr(earlier_tasks, "RowMemory", memory)
    memories = Memories(**{"kind": "gem", **settings})
    return hooks_of(torch.nn.Module(), context, LOSS, **{**PLAIN, "memories": memories}), made


@pytest.mark.parametrize("name", GEM)
def test_golden_projections(name, monkeypatch):
    """Of gradients that are not clipped."""
    given, expected = CASES[name]["inputs"], CASES[name]["expected"]
    settings = {"margin": given["margin"], "ridge": given["eps"], "clip": 1e9}
    hooks, _ = memories_of(context_of(len(given["G"])), monkeypatch, **settings)
    of = OneParameter(given["g"])

    def probe(batches, loss, counts):
        (task,) = batches
        assert (loss, counts) == (LOSS.loss, LOSS.counts)
        return of.shards(given["G"][task])

    hooks.before_passes(probe, 0)
    hooks.before_step(of.shards(given["g"]), 0, 0.1)
    tolerance = {"rtol": 0, "atol": CASES[name]["tol"]}
    np.testing.assert_allclose(of.model.p.grad.numpy(), expected["projected"], **tolerance)
    assert hooks.rates() == {"violated": sum(dot < 0 for dot in expected["dots"])}


def test_each_earlier_task_is_a_memory(monkeypatch):
    """As many rows of each as a share of the new ones, or all; the same for the same seed."""
    context = context_of(3, rows=7)
    _, made = memories_of(context, monkeypatch, share=0.25, per_step=2)
    _, again = memories_of(context, monkeypatch, share=0.25, per_step=2)
    _, every = memories_of(context, monkeypatch, share=2.0)
    for task, memory in enumerate(made):
        rows = memory["rows_M"].tolist()
        assert len(rows) == 5 and {row % 3 for row in rows} == {task}
        assert rows == again[task]["rows_M"].tolist()
        about = (memory["per_step"], memory["micro_batch"], memory["seed"], memory["task"])
        assert about == (2, 2, 1, task)
        assert every[task]["rows_M"].tolist() == [*range(task, 21, 3)]


def test_memories_without_enough_rows_are_refused(monkeypatch):
    for settings, told in (
        ({"share": 0.04}, r"memories\.share: 0\.04: no row of each memory, for the run has 20 new"),
        ({"per_step": 5}, r"memories\.per_step: 5: more than the 4 rows of the memory 'task0'"),
    ):
        with pytest.raises(ConfigError, match=told):
            memories_of(context_of(2), monkeypatch, **settings)
