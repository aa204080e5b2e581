"""Weight-Inherited Distillation: the original's trajectory, the loss, and what is refused."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig

import dskd.methods.wid
from dskd.engine.engine import decay_groups
from dskd.engine.shards import ParameterShards
from dskd.methods.base import build_method
from dskd.methods.wid import Narrowing
from dskd.narrowing.insert import Surgery
from dskd.narrowing.masked_norm import MaskedNorm
from dskd.narrowing.merge import Exactness
from dskd.runs.context import RunContext
from dskd.settings.run import Run, Train
from dskd.training.learning_rate import learning_rate
from tests.batches import batch_of
from tests.models.tiny import make
from tests.narrowing.wid_golden import (
    GOLDEN,
    assert_matches,
    group_name,
    integer,
    parameter_name,
    real,
    student,
)

TRAJECTORY = GOLDEN["trajectory"]


class Loop:
    """The trainer's body around a plain model: hooks, rates and torch's AdamW."""

    def __init__(self, hooks: Narrowing, surgery: Surgery, train: Train) -> None:
        self.hooks, self.model, self.train = hooks, surgery.model, train
        groups = hooks.groups(decay_groups(self.model, train.weight_decay, train.decay_all))
        self.scales = [group.pop("lr_scale", 1.0) for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
        self.parameters = dict(self.model.named_parameters())

    def step(self, step: int, micro_batches: list[Any], loss: Any) -> float:
        """One optimiser step over micro-batches whose losses are summed; the loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for number, batch in enumerate(micro_batches):
            self.hooks.before_micro_batch(last=number == len(micro_batches) - 1)
            value = loss(self.model, batch)
            value.backward()
            total += value.item()
        lr = learning_rate(self.train, step)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        before = ParameterShards(self.parameters, self.optimizer, gradients=True)
        self.hooks.before_step(before, step, lr)
        self.optimizer.step()
        after = ParameterShards(self.parameters, self.optimizer, gradients=False)
        self.hooks.after_step(after, step, lr)
        return total


def narrowing(
    monkeypatch: pytest.MonkeyPatch, surgery: Surgery, method: dict[str, Any],
    train: dict[str, Any], deepspeed: str = "zero0",
) -> tuple[Narrowing, Train]:  # fmt: skip
    """The hooks of a student that has its compactors already."""

    def inserted(model: torch.nn.Module, statistics: str) -> Surgery:
        assert (model, statistics) == (surgery.model, surgery.statistics)
        return surgery

    monkeypatch.setattr(dskd.methods.wid, "insert", inserted)
    run = Run(model={"path": "teacher"}, method=method, train=Train(**train), deepspeed=deepspeed)
    built = build_method(method)
    built.check(run, surgery.model.config)
    context = RunContext(run, built, torch.device("cpu"))
    return built.hooks(surgery.model, context), run.train


def golden_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, segments and targets (0: not predicted) of the golden step, from 1."""
    shape, size = [4, 8], TRAJECTORY["config"]["V"]
    tokens_BT, segments_BT = integer(1000 + step, shape, 1, size), torch.ones(shape).long()
    segments_BT[0, 6:] = 0
    chosen_BT = real(2000 + step, shape, 1.0) > 0.3
    targets_BT = torch.where(chosen_BT, integer(3000 + step, shape, 1, size), 0)
    targets_BT[0, 6:] = 0
    targets_BT[1, 1] = 5
    return tokens_BT, segments_BT, targets_BT


def golden_loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    tokens_BT, segments_BT, targets_BT = batch
    # Added, as the original does: here scores of real tokens come near it, so it is not -infinity.
    mask_B1TT = (-10000.0 * (segments_BT == 0).double())[:, None, None].expand(-1, 1, 8, 8)
    out = model(input_ids=tokens_BT, token_type_ids=segments_BT, attention_mask=mask_B1TT)
    chosen_BT = targets_BT > 0
    return cross_entropy(out.logits[chosen_BT], targets_BT[chosen_BT])


@pytest.mark.parametrize("case", TRAJECTORY["cases"], ids=lambda case: case["strategy"])
def test_the_originals_trajectory(monkeypatch, case):
    """Losses, masks and weights of 45 steps of the original code, in float64."""
    options, config = case["options"], TRAJECTORY["config"]
    surgery = student(config, identity=True, statistics=TRAJECTORY["ln"])
    method = {
        "kind": "wid", "rule": "original", "strategy": case["strategy"],
        "hidden_size": config["target"], "every": options["w_step"], "penalty": options["lam"],
        "lr": options["clr"], "norms": TRAJECTORY["ln"],
    }  # fmt: skip
    train = {
        "steps": options["total"], "warmup": round(options["warmup"] * options["total"]),
        "lr": options["lr"], "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "clip": 0.0,
    }  # fmt: skip
    hooks, run = narrowing(monkeypatch, surgery, method, train)
    loop = Loop(hooks, surgery, run)
    for step, expected in enumerate(case["losses"]):
        loss = loop.step(step, [golden_batch(step + 1)], golden_loss)
        assert loss == pytest.approx(expected, rel=1e-9 if step < 20 else 1e-6), step + 1
        removed = hooks.state()["rule"]["removed"]
        for golden, units in case["removed_at_step"].get(str(step + 1), {}).items():
            found = [unit for some in removed[group_name(golden)].values() for unit in some]
            assert sorted(found) == units, (step + 1, golden)
    for golden, numbers in case["final"].items():
        found = surgery.model.get_parameter(parameter_name(golden)).detach()
        if golden.endswith(("CL", "CR")):
            found = found + torch.eye(len(found))
        assert_matches(found, numbers, 1e-6)


def test_norms_are_the_family_s_or_those_of_the_originals_code():
    """UER's have n - 1 in the deviation and an eps of their own, in all places of a BERT."""
    kinds = set()
    for norms in ("huggingface", "uer"):
        method = build_method(ORIGINAL | {"norms": norms})
        run = Run(model={"path": "teacher"}, train=Train(steps=16, clip=0.0))
        model = make("bert")
        context = RunContext(run, method, torch.device("cpu"))
        method.hooks(model, context)
        found = [x for x in model.modules() if isinstance(x, MaskedNorm)]
        kinds |= {(norms, x.statistics, x.eps) for x in found}
        assert len(found) == 2 * model.config.num_hidden_layers + 2
    assert kinds == {("huggingface", "biased", 1e-12), ("uer", "unbiased", 1e-6)}


TEACHER = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)
WID = {"kind": "wid", "hidden_size": 16, "every": 2, "ramp": 4, "anneal": 3, "lr": 0.01}
ORIGINAL = {"kind": "wid", "rule": "original", "every": 1, "hidden_size": 16, "strategy": "head"}


def test_the_exported_config_is_narrow():
    config = build_method(WID).exported_config(TEACHER)
    assert (config.hidden_size, config.intermediate_size) == (16, 32)
    assert config.num_attention_heads == 4
    assert not config.tie_word_embeddings


def test_groups_and_rates(monkeypatch):
    """Compactors have a rate of their own and no decay; the original's decay is its own affair."""
    config = GOLDEN["model"]["config"]
    for rule, decays in (("annealed", [0.3, 0.0, 0.0]), ("original", [0.0, 0.0, 0.0])):
        surgery = student(config, identity=True, statistics="hf")
        method = {"annealed": WID | {"hidden_size": 8}, "original": ORIGINAL | {"lr": 0.01}}[rule]
        train = {"steps": 40, "lr": 0.1, "weight_decay": 0.3, "clip": 0.0}
        hooks, run = narrowing(monkeypatch, surgery, method, train)
        groups = hooks.groups(decay_groups(surgery.model, run.weight_decay, run.decay_all))
        assert [group["weight_decay"] for group in groups] == decays
        assert [group.get("lr_scale", 1.0) for group in groups] == pytest.approx([1.0, 1.0, 0.1])
        names = {id(p): name for name, p in surgery.model.named_parameters()}
        found = {names[id(p)] for p in groups[-1]["params"]}
        assert found == {n for n in names.values() if n.endswith((".left", ".right"))}
        assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_zero_stays_zero_by_any_optimiser(monkeypatch, tmp_path, kind):
    """SGD's momentum goes on pushing after the gradient is gone."""
    config = GOLDEN["model"]["config"]
    preset = tmp_path / "ds.json"
    preset.write_text(json.dumps({"optimizer": {"type": kind, "params": {"lr": "auto"}}}))
    surgery = student(config, identity=True, statistics="hf")
    train = {"steps": 30, "lr": 0.05, "warmup": 0, "clip": 0.0}
    method = WID | {"hidden_size": 8, "lr": 0.05}
    hooks, run = narrowing(monkeypatch, surgery, method, train, str(preset))
    loop = Loop(hooks, surgery, run)
    if kind == "SGD":
        groups = [{"params": group["params"]} for group in loop.optimizer.param_groups]
        loop.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def loss(model, rows):
        return model(input_ids=rows, labels=rows).loss

    for step in range(25):
        loop.step(step, [integer(step, [2, 8], 1, config["V"])], loss)
        settled = hooks.complete(step + 1)
        assert settled == (step + 1 >= 10)
        assert not settled or hooks.rates()["removed"] == 0.0


@pytest.mark.parametrize(("tokens", "rows"), [(8, 64), (100, 5), (1024, 1)])
def test_an_export_is_tried_on_few_tokens(monkeypatch, tokens, rows):
    """On a CPU: some 512, whatever the rows of an evaluation's micro-batch are."""
    surgery = student(GOLDEN["model"]["config"], identity=True, statistics="hf")
    train = {"steps": 20, "lr": 0.01, "clip": 0.0}
    hooks, _ = narrowing(monkeypatch, surgery, WID | {"hidden_size": 8}, train)
    found = []

    def tried(surgery, keep, whole, batch, *, soft):
        found.append((batch.ids_BT, soft))
        return surgery.model, Exactness(0.0, 0.0, 0.0, "none")

    monkeypatch.setattr(dskd.methods.wid, "checked_merge", tried)
    ids_BT = torch.arange(300)[:, None].expand(300, tokens)
    batch = batch_of(ids_BT, ids_BT=ids_BT)
    weights = ParameterShards(dict(surgery.model.named_parameters()), None, gradients=False)
    hooks.exported(weights, batch)
    ((tried_BT, soft),) = found
    assert torch.equal(tried_BT, ids_BT[:rows])
    assert soft
