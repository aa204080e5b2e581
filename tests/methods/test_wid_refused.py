"""What Weight-Inherited Distillation refuses before a run, by the name of the setting."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.settings.run import Run, Train
from tests.methods.test_wid import ORIGINAL, TEACHER, WID


def check(
    method: dict[str, Any], train: dict[str, Any], deepspeed: str = "zero0",
    config: PreTrainedConfig | None = TEACHER, path: str | None = "teacher",
    teacher: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """What is checked before a run, with the config of its student."""
    steps = Train(**{"steps": 20, "clip": 0.0, "precision": "fp32"} | train)
    run = Run(model={"path": path}, train=steps, deepspeed=deepspeed, teacher=teacher)
    built = build_method((ORIGINAL if method.get("rule") == "original" else WID) | method)
    built.check(run, config)


REFUSED = [
    ({}, {"lr": 0.0}, "zero0", r"train\.lr: 0, but method\.lr follows its schedule"),
    ({}, {"compile": True}, "zero0", r"train\.compile: .* cannot be compiled"),
    ({}, {"steps": 9}, "zero0",
     r"method\.every: 2 \(with ramp 4 and anneal 3\) .* are zero after step 10, .* is 9"),
    ({}, {"clip": 1.0}, "zero2_offload", r"train\.clip: 1\.0: an offloaded optimizer"),
    ({}, {}, "zero3_nvme", r"deepspeed: zero3_nvme: .* on NVMe"),
    ({"hidden_size": 15}, {}, "zero0", r"method\.hidden_size: 15 .* nearest possible: 12 or 16"),
    ({"hidden_size": 33}, {}, "zero0", r"method\.hidden_size: 33 is not within .*: 32"),
    ({"heads": 2}, {}, "zero0", r"method\.heads: 2 does not go with strategy dim"),
    (ORIGINAL, {"clip": 1.0}, "zero0", r"train\.clip: 1\.0 would clip the penalty"),
    (ORIGINAL, {"precision": "fp16"}, "zero1", r"train\.precision: rule original"),
    (ORIGINAL, {"steps": 15}, "zero0", r"method\.every: 1 .* removed after step 16, .* is 15"),
    ({"penalty": 10.0}, {}, "zero0", r"method\.penalty: of no use to rule annealed"),
    ({"norms": "uer"}, {}, "zero0", r"method\.norms: of no use to rule annealed; leave it out"),
    (ORIGINAL | {"penalty": 0}, {}, "zero0", r"method\.penalty: .*greater than 0"),
    (ORIGINAL | {"ramp": 8}, {}, "zero0", r"method\.ramp: of no use to rule original"),
    (ORIGINAL | {"anneal": 400}, {}, "zero0", r"method\.anneal: of no use to rule original"),
    (ORIGINAL | {"compact": False}, {}, "zero0", r"method\.compact: of no use to rule original"),
    (ORIGINAL | {"strategy": "dim"}, {}, "zero0", r"method\.hidden_size: 16 removes 4 of each"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "train", "deepspeed", "message"), REFUSED)
def test_what_cannot_be_is_refused(method, train, deepspeed, message):
    with pytest.raises(ConfigError, match=message):
        check(method, train, deepspeed)


def test_a_student_that_shrinks_does_not_teach_itself():
    """As it started it may, and where no distribution is inherited no teacher counts."""
    inherit, itself = {"inherit": {"steps": 5}}, {"kind": "self", "weights": "current"}
    with pytest.raises(ConfigError, match=r"^teacher\.weights: current, .* learn from itself"):
        check(inherit, {}, teacher=itself)
    check(inherit, {}, teacher={"kind": "self", "weights": "frozen"})
    check({}, {}, teacher=itself)


def test_what_can_be_is_not(tmp_path):
    check({}, {})
    check({}, {"clip": 1.0, "steps": 10})
    check({}, {"steps": None, "epochs": 0.1})  # so many steps as its rows will make
    check({}, {}, "zero2_offload")
    check(ORIGINAL, {"steps": 16})


def test_a_layer_norm_is_refused_where_there_is_none():
    """A Llama has RMSNorm; where its config is not known yet, it is asked again."""
    uer = ORIGINAL | {"norms": "uer"}
    check(uer, {"steps": 16})
    llama = LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(
        ConfigError, match=r"^method\.norms: uer is a LayerNorm, and .* llama has R"
    ):
        check(uer, {"steps": 16}, config=llama)
    check(uer, {"steps": 16}, config=None)


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
    "bias": ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, {}, True,
        r"optimizer\.params\.bias_correction: false, but rule original"),
    "amsgrad": ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, {}, True,
        r"optimizer\.params\.amsgrad: true, but rule original"),
    "sums": ({ZERO: {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"precision": "bf16"}, False, r"data_types\.grad_accum_dtype: fp32 with ZeRO-1 and bf16"),
    "sums-auto": ({ZERO: {"stage": 1}, "data_types": {"grad_accum_dtype": "float"},
        "bf16": {"enabled": True}}, {"precision": "auto"}, False,
        r"data_types\.grad_accum_dtype: float with ZeRO-1 and bf16"),
    "ratio": ({ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, {}, False,
        r"zero_optimization\.offload_optimizer\.ratio: 0\.5 is not tested"),
    "super": ({ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        {}, False, r"zero_optimization\.offload_optimizer\.super_offload: it is not tested"),
    "zenflow": ({ZERO: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, {}, False,
        r"zero_optimization\.zenflow: it is not tested"),
    "swapped": ({ZERO: {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, False,
        r"zero_optimization\.offload_param\.device: nvme is not tested"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_cannot_ask_for(tmp_path, name):
    """By the name of the file and of the setting in it; ``only``: the other rule takes it."""
    ds, train, only, message = PRESETS[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(ds))
    train = {"precision": "auto"} | train
    for method in [ORIGINAL] if only else [ORIGINAL, {}]:
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


@pytest.mark.parametrize("method", [WID, ORIGINAL])
def test_settings_as_they_are_printed_are_accepted(method):
    """`dskd settings` names every setting, those of the other rule too."""
    check(build_method(method).model_dump(mode="json"), {})
