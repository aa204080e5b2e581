"""The shipped DeepSpeed JSONs fill, start and train alike; contradictions are refused by name."""

import copy
import json
from typing import ClassVar

import deepspeed
import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor import config as monitors
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero import offload_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from dskd.engine.ds_config import fill_auto, load_preset, precision_of, presets
from dskd.engine.ds_words import BROKEN, NESTED, TOP, UNUSED
from dskd.engine.run_config import student_config, teacher_config
from dskd.errors import ConfigError
from dskd.settings.recipe import read
from tests.ranks import run_ranks

PRESETS = sorted(path.stem for path in presets().glob("*.json"))
# DeepSpeed 0.19.8 quantises ZeRO++'s gradients between nodes only, by an operator that no CPU has
EXACT = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zeropp"]
WORLD = 2


def _run(*overrides):
    return read(None, ["train.precision=fp32", *overrides]).runs["run"]


def _filled(preset, *overrides, **options):
    options = {"world": WORLD, "hidden": 64, "cuda": False} | options
    ds = load_preset(preset) if isinstance(preset, str) else preset
    return fill_auto(ds, _run(*overrides), **options)


def _refused(ds, *overrides, **options):
    with pytest.raises(ConfigError) as caught:
        _filled(ds, *overrides, **options)
    return str(caught.value).splitlines()


# Presets


def test_the_shipped_presets():
    stages = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]
    assert [*stages, "zeropp"] == PRESETS


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_auto_is_left_and_the_preset_is_untouched(preset, cuda):
    ds = load_preset(preset)
    before = copy.deepcopy(ds)
    assert '"auto"' not in json.dumps(_filled(ds, cuda=cuda))
    assert ds == before


@pytest.mark.parametrize("preset", PRESETS)
def test_deepspeed_reads_every_preset(preset):
    config = deepspeed_config.DeepSpeedConfig(_filled(preset, world=1))
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (16, 2)
    assert config.gradient_clipping == 1.0
    assert config.zero_optimization_stage == (3 if preset == "zeropp" else int(preset[4]))


def test_filled_values_follow_the_settings():
    overrides = ["train.lr=3e-4", "train.clip=0.5", "train.batch=32", "train.betas=[0.8, 0.9]"]
    filled = _filled("zero3", *overrides, "train.eps=1e-7", "train.weight_decay=0", hidden=4096)
    assert filled["train_batch_size"] == 32
    assert filled["train_micro_batch_size_per_gpu"] == 8
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 0.5
    params = {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.0}
    assert filled["optimizer"]["params"] == params | {"torch_adam": True, "fused": False}
    zero = filled["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096**2
    assert zero["stage3_prefetch_bucket_size"] == 15_099_494
    assert zero["stage3_param_persistence_threshold"] == 40_960


@pytest.mark.parametrize(
    ("preset", "cuda", "torch_adam", "fused"),
    [
        ("zero2", False, True, False),
        ("zero2", True, True, True),
        ("zero2_offload", False, True, False),
        ("zero2_offload", True, False, None),
        ("zero3_nvme", True, False, None),
    ],
)
def test_whose_adam_runs(preset, cuda, torch_adam, fused):
    params = _filled(preset, cuda=cuda)["optimizer"]["params"]
    assert (params["torch_adam"], params.get("fused")) == (torch_adam, fused)


@pytest.mark.parametrize(
    ("parameters", "reduced", "gathered"),
    [
        (1_574_016, 5_000_000, 5_000_000),
        (20_000_000, 20_000_000, 20_000_000),
        (124_439_808, 50_000_000, 124_439_808),
        (8_030_261_248, 50_000_000, 200_000_000),
        (None, 50_000_000, 200_000_000),
    ],
)
@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero2_offload"])
def test_buckets_are_no_larger_than_what_fills_them(preset, parameters, reduced, gathered):
    zero = _filled(preset, parameters=parameters)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (reduced, gathered)


def test_nodes_share_weights_within_themselves():
    zero = _filled("zeropp", "train.batch=128", world=16, ranks_per_node=8)["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 8
    zero = _filled("zeropp", world=2, ranks_per_node=2)["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 1
    lines = _refused({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}})
    assert lines == ["zero1: zero_optimization.zero_hpz_partition_size 4 does not divide 2 ranks"]


def test_student_and_teacher_swap_to_different_folders():
    paths = {
        role: _filled("zero3_nvme", "out=/nvme/x", role=role)["zero_optimization"]["offload_param"]
        for role in ("student", "teacher")
    }
    assert paths["student"]["nvme_path"] == "/nvme/x/swap/student"
    assert paths["teacher"]["nvme_path"] == "/nvme/x/swap/teacher"
    assert paths["student"]["buffer_size"] == 100_000_000


def test_a_teacher_keeps_only_what_shards_it():
    filled = _filled("zero3_offload", role="teacher", precision="bf16")
    assert filled.keys().isdisjoint({"optimizer", "gradient_clipping"})
    assert "offload_optimizer" not in filled["zero_optimization"]
    assert filled["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert precision_of(filled) == "bf16"
    lines = _refused(load_preset("zero2"), role="teacher", where="zero2")
    assert lines == [
        "zero2: zero_optimization.stage is 2, but a teacher's must be 3"
        " (a teacher without a deepspeed setting is a replica on every rank)"
    ]


# Loading


def test_a_preset_is_named_or_a_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert load_preset(str(path)) == {"zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match=r"no preset 'zero_2'; did you mean 'zero2'\?; there are"):
        load_preset("zero_2")
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        load_preset(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', r"mine\.json:2:6: not readable as JSON: Expecting ':'"),
        ('{"bf16": {}, "bf16": {}}', r"mine\.json: not readable as JSON: 'bf16' is given twice"),
        ("[1]", r"mine\.json: expected a JSON object, found \[1\]"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_preset(path)


# Contradictions


ROUND_ROBIN = "zero_optimization.round_robin_gradients"


@pytest.mark.parametrize(
    ("ds", "line"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but train.batch is 16"),
        ({"train_micro_batch_size_per_gpu": 4},
         "train_micro_batch_size_per_gpu is 4, but train.micro_batch is 8"),
        ({"gradient_accumulation_steps": 3},
         "gradient_accumulation_steps is 3, but train.batch / (train.micro_batch x ranks) is 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but train.clip is 1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}},
         "optimizer.params.lr is 1.0, but train.lr is 0.001"),
        ({"optimizer": {"type": "adam", "params": {"betas": [0.9, 0.999]}}},
         "optimizer.params.betas is [0.9, 0.999], but train.betas is [0.9, 0.98]"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0}}},
         "optimizer.params.weight_decay is 0, but train.weight_decay is 0.01"),
    ],
)  # fmt: skip
def test_a_contradiction_names_both(ds, line):
    assert _refused(ds) == [f'zero1: {line}; write "auto" to follow the setting']


@pytest.mark.parametrize(
    ("ds", "line"),
    [
        ({"zero_optimisation": {}},
         "zero_optimisation: DeepSpeed has no such setting; did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stge": 2}},
         "zero_optimization.stge: DeepSpeed has no such setting; did you mean 'stage'?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}},
         "zero_optimization.offload_param.devise: DeepSpeed has no such setting; did you mean"
         " 'device'?"),
        ({"bf16": {"enable": True}},
         "bf16.enable: DeepSpeed has no such setting; did you mean 'enabled'?"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
         f"zero_optimization.round_robin_gradients: {BROKEN[ROUND_ROBIN]}"),
        ({"zero_optimization": True}, "zero_optimization: expected an object, found true"),
        ({"scheduler": {}}, f"scheduler: {UNUSED['scheduler']}"),
        ({"gradient_allreduce_op": "sum"},
         f"gradient_allreduce_op: {UNUSED['managed_gradient_accumulation']}"),
        ({"zero_optimization": {"stage": 1, "reduce_scatter": "auto"}},
         'zero_optimization.reduce_scatter: dskd fills no "auto" here; write a value or leave it'
         " out"),
        ({"optimizer": {"params": {}}}, 'optimizer: expected {"type": "AdamW", "params": {...}}'),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named(ds, line):
    assert _refused(ds) == [f"zero1: {line}"]


def test_all_problems_are_told_at_once():
    lines = _refused({"steps_per_prnt": 1, "scheduler": {}, "bf16": {"on": True}}, where="my.json")
    names = [line.split(":")[1].strip() for line in lines]
    assert names == ["steps_per_prnt", "scheduler", "bf16.on"]
    lines = _refused({"train_batch_size": 1, "gradient_clipping": 3}, where="my.json")
    assert len(lines) == 2
    assert all(line.startswith("my.json: ") for line in lines)


def test_an_unset_adam_follows_the_settings_and_others_only_where_they_ask():
    adam = _filled({"optimizer": {"type": "Adam"}})["optimizer"]
    assert adam["params"]["betas"] == [0.9, 0.98]
    assert adam["params"]["weight_decay"] == 0.01
    lion = _filled({"optimizer": {"type": "Lion", "params": {"betas": "auto"}}})["optimizer"]
    assert lion["params"] == {"betas": [0.9, 0.98], "lr": 1e-3}
    assert _filled({})["optimizer"]["type"] == "AdamW"


# Precision


@pytest.mark.parametrize(
    ("setting", "ds", "hardware", "expected"),
    [
        ("auto", {}, {"cuda": False}, "fp32"),
        ("auto", {}, {"cuda": True}, "bf16"),
        ("auto", {}, {"cuda": True, "bf16": False}, "fp32"),
        ("auto", {"bf16": {"enabled": True}}, {"cuda": False}, "bf16"),
        ("auto", {"fp16": {"enabled": True}}, {"cuda": True}, "fp16"),
        ("auto", {"bf16": {"enabled": False}}, {"cuda": True}, "fp32"),
        ("fp32", {}, {"cuda": True}, "fp32"),
        ("bf16", {"bf16": {"enabled": "auto"}}, {"cuda": False}, "bf16"),
        ("fp16", {"bf16": {"enabled": False}}, {"cuda": True}, "fp16"),
    ],
)
def test_precision(setting, ds, hardware, expected):
    zero1 = {"zero_optimization": {"stage": 1}}
    filled = _filled(ds | zero1, f"train.precision={setting}", **hardware)
    assert precision_of(filled) == expected
    assert filled["bf16"]["enabled"] is (expected == "bf16")
    assert filled["fp16"]["enabled"] is (expected == "fp16")


@pytest.mark.parametrize(
    ("setting", "ds", "line"),
    [
        ("fp32", {"bf16": {"enabled": True}}, "bf16.enabled is true, but train.precision is fp32"),
        ("bf16", {"bf16": {"enabled": False}},
         "bf16.enabled is false, but train.precision is bf16"),
        ("bf16", {"fp16": {"enabled": True}}, "fp16.enabled is true, but train.precision is bf16"),
        ("fp16", {"zero_optimization": {"stage": 0}},
         "fp16 needs ZeRO-1, 2 or 3: at stage 0 DeepSpeed does not scale the loss"),
        ("auto", {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
         "bf16.enabled and fp16.enabled are both true; choose one"),
        ("auto", {"bf16": {"enabled": "yes"}},
         "bf16.enabled: 'yes' is not true, false or \"auto\""),
    ],
)  # fmt: skip
def test_precision_contradictions(setting, ds, line):
    assert _refused(ds, f"train.precision={setting}") == [f"zero1: {line}"]


@pytest.mark.parametrize("setting", ["bf16", "auto"])
def test_bf16_at_zero_0_on_several_gpus_names_the_better_preset(setting):
    (line,) = _refused("zero0", f"train.precision={setting}", cuda=True, where="zero0")
    assert line == (
        "zero0: zero_optimization.stage: 0 in bf16 lets the host wait twice for its GPU at every "
        "parameter tensor of a step, where DeepSpeed looks for infinities; the preset zero1 does "
        "not, and trains alike"
    )
    for filled in (
        _filled("zero0", f"train.precision={setting}", cuda=True, world=1),
        _filled("zero1", f"train.precision={setting}", cuda=True),
        _filled("zero0", "train.precision=bf16", cuda=False),
    ):
        assert precision_of(filled) == "bf16"
    assert precision_of(_filled("zero0", cuda=True)) == "fp32"


# The tables against the installed DeepSpeed


def _words(model):
    """Names of a DeepSpeed section's settings that are not deprecated."""
    return {
        info.alias or name
        for name, info in model.model_fields.items()
        if not (info.json_schema_extra or {}).get("deprecated")
    }


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("tensorboard", monitors.TensorBoardConfig),
        ("wandb", monitors.WandbConfig),
        ("csv_monitor", monitors.CSVConfig),
        ("comet", monitors.CometConfig),
        ("comms_logger", CommsLoggerConfig),
    ],
)
def test_words_are_those_of_deepspeed(name, model):
    assert NESTED[name] == _words(model)


class _Asked(dict):
    """A config that notes which of its words are looked up."""

    words: ClassVar[set[str]] = set()

    def __contains__(self, key):
        self.words.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.words.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.words.add(key)
        return super().get(key, default)

    def keys(self):
        return self


def test_top_level_words_are_those_of_deepspeed():
    deepspeed_config.DeepSpeedConfig(_Asked(train_batch_size=1))
    asked = _Asked.words | {"sequence_parallel_size"}  # looked up in a process group only
    assert asked == TOP | UNUSED.keys()
    assert not TOP & UNUSED.keys()


# Real engines


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))
        self.head = nn.Linear(16, 40)

    def forward(self, ids, labels):
        logits = self.head(self.body(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _losses(rank, ds):
    """Losses of a few steps, this rank's half of each batch."""
    torch.manual_seed(1)
    model = _Tiny()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(3):
        ids = torch.randint(0, 40, (16, 8), generator=generator)[rank::WORLD]
        loss = engine(ids, ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, type(engine.optimizer).__name__


def _train(preset, *overrides):
    filled = _filled(preset, "train.lr=0.05", "train.clip=0.5", *overrides, hidden=16)
    ranks = run_ranks(_losses, filled)
    return [sum(pair) / WORLD for pair in zip(*(losses for losses, _ in ranks), strict=True)]


@pytest.fixture(scope="module")
def plain():
    """Losses of ZeRO-0."""
    losses = _train("zero0")
    assert losses[2] < losses[0] - 0.1  # so that equal losses mean equal updates
    return losses


@pytest.mark.parametrize("preset", EXACT)
def test_presets_train_alike(plain, preset):
    assert _train(preset) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3"])
def test_buckets_of_any_size_train_alike(plain, preset):
    """Here smaller than some of the parameters, which have up to 640 elements."""
    ds = load_preset(preset)
    ds["zero_optimization"] |= {"reduce_bucket_size": 500, "allgather_bucket_size": 500}
    assert _train(ds) == pytest.approx(plain, abs=1e-5)


def test_whose_fp16_needs_a_gpu_is_named():
    run = _run("train.precision=fp16")
    with pytest.raises(ConfigError, match=r"^train\.precision: fp16 needs a GPU"):
        student_config(run, 64, world=1)
    with pytest.raises(ConfigError, match=r"^the teacher's precision: fp16 needs a GPU"):
        teacher_config("zero3", "fp16", run, 64, world=1)


@pytest.fixture(scope="module")
def halved():
    """Losses of ZeRO-1 in bf16."""
    return _train("zero1", "train.precision=bf16")


def test_bf16_is_near_fp32(plain, halved):
    assert halved == pytest.approx(plain, abs=1e-2)
    assert halved != pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("preset", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_presets_train_alike_in_bf16(halved, preset):
    # ZeRO-3's own linear layer rounds before it adds the bias: 6e-3 here.
    assert _train(preset, "train.precision=bf16") == pytest.approx(halved, abs=1.2e-2)


def _teacher_losses(rank, ds):
    torch.manual_seed(1)
    model = _Tiny().requires_grad_(False)
    ids = torch.arange(40).view(2, 20)
    before = model(ids, ids).item()
    engine, *_ = deepspeed.initialize(model=model, config=ds)
    with torch.no_grad():
        return before, engine.module.eval()(ids, ids).item(), model.head.weight.numel()


@pytest.mark.parametrize("preset", ["zero3", "zero3_offload"])
def test_a_sharded_teacher_says_the_same(preset):
    filled = _filled(preset, role="teacher", precision="fp32", hidden=4)
    for before, sharded, held in run_ranks(_teacher_losses, filled):
        assert sharded == pytest.approx(before, abs=1e-6)
        assert held == 0  # the rank holds no whole matrix
