"""Weight-Inherited Distillation: the original's trajectory, the loss, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, PreTrainedConfig

import dskd.methods.wid
from dskd.batch import Batch
from dskd.engine import decay_groups
from dskd.errors import ConfigError
from dskd.method import build_method
from dskd.methods.wid import Narrowing
from dskd.models.merged import Exactness
from dskd.models.surgery import Surgery
from dskd.schedule import learning_rate
from dskd.settings import Run, Train
from dskd.shards import Weights
from tests.models.wid_golden import (
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

    def __init__(self, change: Narrowing, surgery: Surgery, train: Train) -> None:
        self.change, self.model, self.train = change, surgery.model, train
        groups = change.groups(decay_groups(self.model, train.weight_decay, train.decay_all))
        self.scales = [group.pop("lr_scale", 1.0) for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
        self.parameters = dict(self.model.named_parameters())

    def step(self, step: int, micro_batches: list[Any], loss: Any) -> float:
        """One optimiser step over micro-batches whose losses are summed; the loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for number, batch in enumerate(micro_batches):
            self.change.before_micro_batch(last=number == len(micro_batches) - 1)
            value = loss(self.model, batch)
            value.backward()
            total += value.item()
        lr = learning_rate(self.train, step)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        before = Weights(self.parameters, self.optimizer, gradients=True)
        self.change.before_step(before, step, lr)
        self.optimizer.step()
        after = Weights(self.parameters, self.optimizer, gradients=False)
        self.change.after_step(after, step, lr)
        return total


def narrowing(
    monkeypatch: pytest.MonkeyPatch,
    surgery: Surgery,
    method: dict[str, Any],
    train: dict[str, Any],
    deepspeed: str = "zero0",
) -> tuple[Narrowing, Train]:
    """The change of a student that has its compactors already."""
    monkeypatch.setattr(dskd.methods.wid, "insert", lambda model: surgery)
    run = Run(model={"path": "teacher"}, method=method, train=Train(**train), deepspeed=deepspeed)
    built = build_method(method)
    built.check(run, surgery.model.config)
    return built.change(surgery.model, run), run.train


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
        "kind": "wid",
        "rule": "original",
        "strategy": case["strategy"],
        "hidden_size": config["target"],
        "every": options["w_step"],
        "penalty": options["lam"],
        "lr": options["clr"],
    }
    train = {
        "steps": options["total"],
        "warmup": round(options["warmup"] * options["total"]),
        "lr": options["lr"],
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "clip": 0.0,
    }
    change, run = narrowing(monkeypatch, surgery, method, train)
    loop = Loop(change, surgery, run)
    for step, expected in enumerate(case["losses"]):
        loss = loop.step(step, [golden_batch(step + 1)], golden_loss)
        assert loss == pytest.approx(expected, rel=1e-9 if step < 20 else 1e-6), step + 1
        removed = {name: gone_U.nonzero()[:, 0] for name, gone_U in removed_units(change).items()}
        for golden, units in case["removed_at_step"].get(str(step + 1), {}).items():
            assert removed[group_name(golden)].tolist() == units, (step + 1, golden)
    for golden, numbers in case["final"].items():
        found = surgery.model.get_parameter(parameter_name(golden)).detach()
        if golden.endswith(("CL", "CR")):
            found = found + torch.eye(len(found))
        assert_matches(found, numbers, 1e-6)


def removed_units(change: Narrowing) -> dict[str, Tensor]:
    """By group, bool [U], as the checkpoint has them."""
    removed = {}
    for name, by_step in change.state()["rule"]["removed"].items():
        removed[name] = torch.zeros(1024, dtype=torch.bool)
        for units in by_step.values():
            removed[name][units] = True
    return removed


TEACHER = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)
WID = {"kind": "wid", "hidden_size": 16, "every": 2, "ramp": 4, "anneal": 3, "lr": 0.01}


def check(
    method: dict[str, Any],
    train: dict[str, Any],
    deepspeed: str = "zero0",
    config: PreTrainedConfig | None = TEACHER,
    path: str | None = "teacher",
) -> None:
    """What is checked before a run, with the config of its student."""
    steps = Train(**{"steps": 20, "clip": 0.0, "precision": "fp32"} | train)
    run = Run(model={"path": path}, train=steps, deepspeed=deepspeed)
    built = build_method((ORIGINAL if method.get("rule") == "original" else WID) | method)
    built.check(run, config)


ORIGINAL = {"kind": "wid", "rule": "original", "every": 1, "hidden_size": 16, "strategy": "head"}
REFUSED = [
    ({}, {"lr": 0.0}, "zero0", r"train\.lr: 0, but method\.lr follows its schedule"),
    ({}, {"compile": True}, "zero0", r"train\.compile: .* cannot be compiled"),
    (
        {},
        {"steps": 9},
        "zero0",
        r"method\.every: 2 \(with ramp 4 and anneal 3\) .* are zero after step 10, .* is 9",
    ),
    ({}, {"clip": 1.0}, "zero2_offload", r"train\.clip: 1\.0: an offloaded optimizer"),
    ({}, {}, "zero3_nvme", r"deepspeed: zero3_nvme: .* on NVMe"),
    ({"hidden_size": 15}, {}, "zero0", r"method\.hidden_size: 15 .* nearest possible: 12 or 16"),
    ({"hidden_size": 33}, {}, "zero0", r"method\.hidden_size: 33 is not within .*: 32"),
    ({"heads": 2}, {}, "zero0", r"method\.heads: 2 does not go with strategy dim"),
    (ORIGINAL, {"clip": 1.0}, "zero0", r"train\.clip: 1\.0 would clip the penalty"),
    (ORIGINAL, {"precision": "fp16"}, "zero1", r"train\.precision: rule original"),
    (ORIGINAL, {"steps": 15}, "zero0", r"method\.every: 1 .* removed after step 16, .* is 15"),
    ({"penalty": 20.0}, {}, "zero0", r"method\.penalty: of no use to rule annealed"),
    (ORIGINAL | {"penalty": 0}, {}, "zero0", r"method\.penalty: .*greater than 0"),
    (ORIGINAL | {"ramp": 16}, {}, "zero0", r"method\.ramp: of no use to rule original"),
    (ORIGINAL | {"anneal": 500}, {}, "zero0", r"method\.anneal: of no use to rule original"),
    (ORIGINAL | {"compact": True}, {}, "zero0", r"method\.compact: of no use to rule original"),
    (ORIGINAL | {"strategy": "dim"}, {}, "zero0", r"method\.hidden_size: 16 removes 4 of each"),
]


@pytest.mark.parametrize(("method", "train", "deepspeed", "message"), REFUSED)
def test_what_cannot_be_is_refused(method, train, deepspeed, message):
    with pytest.raises(ConfigError, match=message):
        check(method, train, deepspeed)


def test_what_can_be_is_not(tmp_path):
    check({}, {})
    check({}, {"clip": 1.0, "steps": 10})
    check({}, {}, "zero2_offload")
    check(ORIGINAL, {"steps": 16})


def test_a_random_student_is_refused():
    """It inherits nothing."""
    with pytest.raises(ConfigError, match=r"method\.kind: wid needs model\.path"):
        check({}, {}, path=None)


def test_a_run_is_long_enough_for_what_is_removed():
    """Units that go late by rounding, none at all, and a student not known yet."""
    equal = {"hidden_size": 32, "intermediate_size": 64}
    check(equal, {"steps": 1})
    check(ORIGINAL | equal, {"steps": 1})
    # of 2 units the last goes at k = 3 of 4
    check(equal | {"intermediate_size": 62}, {"steps": 8})
    with pytest.raises(ConfigError, match=r"after step 8, train\.steps is 7"):
        check(equal | {"intermediate_size": 62}, {"steps": 7})
    with pytest.raises(ConfigError, match=r"after step 10, train\.steps is 9"):
        check({}, {"steps": 9}, config=None)
    check({}, {"steps": 10}, config=None)
    check(ORIGINAL, {"steps": 1}, config=None)


ZERO = "zero_optimization"
PRESETS = {
    "fp16": ({"fp16": {"enabled": True}}, {}, True, r"fp16\.enabled: true, but rule original"),
    "lion": ({"optimizer": {"type": "Lion"}}, {}, True, r"optimizer\.type: Lion, but .* AdamW"),
    "bias": (
        {"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}},
        {},
        True,
        r"optimizer\.params\.bias_correction: false, but rule original",
    ),
    "amsgrad": (
        {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
        {},
        True,
        r"optimizer\.params\.amsgrad: true, but rule original",
    ),
    "sums": (
        {ZERO: {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"precision": "bf16"},
        False,
        r"data_types\.grad_accum_dtype: fp32 with ZeRO-1 and bf16",
    ),
    "sums-auto": (
        {
            ZERO: {"stage": 1},
            "data_types": {"grad_accum_dtype": "float"},
            "bf16": {"enabled": True},
        },
        {"precision": "auto"},
        False,
        r"data_types\.grad_accum_dtype: float with ZeRO-1 and bf16",
    ),
    "ratio": (
        {ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        {},
        False,
        r"zero_optimization\.offload_optimizer\.ratio: 0\.5 is not tested",
    ),
    "super": (
        {ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        {},
        False,
        r"zero_optimization\.offload_optimizer\.super_offload: it is not tested",
    ),
    "zenflow": (
        {ZERO: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        {},
        False,
        r"zero_optimization\.zenflow: it is not tested",
    ),
    "swapped": (
        {ZERO: {"stage": 3, "offload_param": {"device": "nvme"}}},
        {},
        False,
        r"zero_optimization\.offload_param\.device: nvme is not tested",
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_cannot_ask_for(tmp_path, name):
    """By the name of the file and of the setting in it; ``only``: the other rule takes it."""
    ds, train, only, message = PRESETS[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(ds))
    train = {"precision": "auto"} | train
    rules = [ORIGINAL] if only else [ORIGINAL, {}]
    for method in rules:
        with pytest.raises(ConfigError, match=rf"deepspeed: .*{name}\.json: {message}"):
            check(method, train, str(path))
    if only:
        check({}, train, str(path))


def test_what_a_preset_can_ask_for(tmp_path):
    """The same words where they do no harm."""
    path = tmp_path / "harmless.json"
    offload = {"device": "cpu", "ratio": 1.0, "super_offload": False}
    zero = {"stage": 1, "offload_optimizer": offload, "offload_param": {"device": "cpu"}}
    adam = {"type": "AdamW", "params": {"lr": "auto", "bias_correction": True, "amsgrad": False}}
    ds = {ZERO: zero, "optimizer": adam, "data_types": {"grad_accum_dtype": "fp32"}}
    path.write_text(json.dumps(ds | {"fp16": {"enabled": False}}))
    for method in ({}, ORIGINAL):
        check(method, {"precision": "fp32"}, str(path))
    zero["stage"] = 2
    path.write_text(json.dumps(ds))
    check(ORIGINAL, {"precision": "bf16"}, str(path))


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
        change, run = narrowing(monkeypatch, surgery, method, train)
        groups = change.groups(decay_groups(surgery.model, run.weight_decay, run.decay_all))
        assert [group["weight_decay"] for group in groups] == decays
        assert [group.get("lr_scale", 1.0) for group in groups] == pytest.approx([1.0, 1.0, 0.1])
        names = {id(p): name for name, p in surgery.model.named_parameters()}
        found = {names[id(p)] for p in groups[-1]["params"]}
        assert found == {n for n in names.values() if n.endswith((".left", ".right"))}
        assert sum(len(group["params"]) for group in groups) == len(names)


def test_a_restored_change_goes_on_the_same(monkeypatch):
    """State through JSON in the middle of the ramp; weights and moments as they are."""
    config = GOLDEN["model"]["config"] | {"P": 8}

    def loss(model, batch):
        return model(input_ids=batch, labels=batch).loss

    batches = [integer(step, [2, 8], 1, config["V"]) for step in range(11)]
    train = {"steps": 20, "lr": 0.01, "warmup": 1, "clip": 0.0}
    surgery = student(config, identity=True, statistics="hf")
    change, run = narrowing(monkeypatch, surgery, WID | {"hidden_size": 8}, train)
    loop = Loop(change, surgery, run)
    found = [loop.step(step, [batch], loss) for step, batch in enumerate(batches)]
    assert change.state()["compacted"] and change.complete(11) and not change.complete(9)

    surgery = student(config, identity=True, statistics="hf")
    change, _ = narrowing(monkeypatch, surgery, WID | {"hidden_size": 8}, train)
    loop = Loop(change, surgery, run)
    first = [loop.step(step, [batch], loss) for step, batch in enumerate(batches[:5])]
    other = student(config, identity=True, statistics="hf")
    copy, _ = narrowing(monkeypatch, other, WID | {"hidden_size": 8}, train)
    again = Loop(copy, other, run)
    copy.restore(json.loads(json.dumps(change.state())))
    other.model.load_state_dict(surgery.model.state_dict())
    again.optimizer.load_state_dict(loop.optimizer.state_dict())
    rest = [again.step(step, [batch], loss) for step, batch in enumerate(batches) if step >= 5]
    assert first + rest == found
    assert copy.rates() == {"hidden": 8, "kept": 0.5, "removed": 0.0}


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_zero_stays_zero_by_any_optimiser(monkeypatch, tmp_path, kind):
    """SGD's momentum goes on pushing after the gradient is gone."""
    config = GOLDEN["model"]["config"]
    preset = tmp_path / "ds.json"
    preset.write_text(json.dumps({"optimizer": {"type": kind, "params": {"lr": "auto"}}}))
    surgery = student(config, identity=True, statistics="hf")
    train = {"steps": 30, "lr": 0.05, "warmup": 0, "clip": 0.0}
    method = WID | {"hidden_size": 8, "lr": 0.05}
    change, run = narrowing(monkeypatch, surgery, method, train, str(preset))
    loop = Loop(change, surgery, run)
    if kind == "SGD":
        groups = [{"params": group["params"]} for group in loop.optimizer.param_groups]
        loop.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def loss(model, rows):
        return model(input_ids=rows, labels=rows).loss

    for step in range(25):
        loop.step(step, [integer(step, [2, 8], 1, config["V"])], loss)
        settled = change.complete(step + 1)
        assert settled == (step + 1 >= 10)
        assert not settled or change.rates()["removed"] == 0.0


@pytest.mark.parametrize(("tokens", "rows"), [(8, 64), (100, 5), (1024, 1)])
def test_an_export_is_tried_on_few_tokens(monkeypatch, tokens, rows):
    """On a CPU: some 512, whatever the rows of an evaluation's micro-batch are."""
    surgery = student(GOLDEN["model"]["config"], identity=True, statistics="hf")
    train = {"steps": 20, "lr": 0.01, "clip": 0.0}
    change, _ = narrowing(monkeypatch, surgery, WID | {"hidden_size": 8}, train)
    found = []

    def tried(surgery, keep, whole, batch, *, soft):
        found.append((batch.ids_BT, soft))
        return surgery.model, Exactness(0.0, 0.0, 0.0, "none")

    monkeypatch.setattr(dskd.methods.wid, "checked_merge", tried)
    ids_BT = torch.arange(300)[:, None].expand(300, tokens)
    batch = Batch(
        row_ids_B=ids_BT[:, 0],
        domains_B=ids_BT[:, 0],
        ids_BT=ids_BT,
        mask_BT=torch.ones_like(ids_BT),
        labels_BT=ids_BT,
    )
    weights = Weights(dict(surgery.model.named_parameters()), None, gradients=False)
    change.exported(weights, batch)
    ((tried_BT, soft),) = found
    assert torch.equal(tried_BT, ids_BT[:rows])
    assert soft


def test_micro_batches_add_up(monkeypatch):
    """Merged gradients wait for the last micro-batch: two halves are the whole."""
    config = GOLDEN["model"]["config"]
    batch = integer(7, [4, 8], 1, config["V"])

    def loss(model, rows):
        return model(input_ids=rows, labels=rows).loss * len(rows) / len(batch)

    ends = []
    for parts in ([batch], [batch[:1], batch[1:]]):
        surgery = student(config, identity=True, statistics="hf")
        train = {"steps": 20, "lr": 0.01, "warmup": 0, "clip": 0.0}
        change, run = narrowing(monkeypatch, surgery, WID | {"hidden_size": 8}, train)
        loop = Loop(change, surgery, run)
        for step in range(4):
            loop.step(step, parts, loss)
        ends.append({n: p.detach().clone() for n, p in surgery.model.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-12)
