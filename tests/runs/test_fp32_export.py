"""The fp32 weights of a run in 16 bits, exported as the optimizer has them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dskd.engine.hooks import StepHooks
from dskd.errors import ConfigError
from dskd.models.writing import export
from dskd.settings.model import Model
from tests.continual.loops import GEOMETRIES, loop_of, steps, whole_weights
from tests.equivalence.small import Runs, causal
from tests.launching import forked
from tests.models.tiny import make, tokenizer
from tests.ranks import run_ranks
from tests.runs.test_plan import BERT, WID, checked, recipe_of


def _trained(rank, folder, stage, world, micro):
    """Train in bf16, export, and give the masters and what the student computes with."""
    del rank
    trainer, engine = loop_of(stage, world, micro, 0, lambda model: StepHooks(), bf16=True)
    steps(trainer, 0, 3)
    masters = engine.weights(gradients=False).whole
    export(engine.module.student, tokenizer(), folder / "fp32", card={}, masters=masters)
    export(engine.module.student, tokenizer(), folder / "trained", card={})
    return whole_weights(engine)


@pytest.mark.parametrize(("stage", "world", "micro"), [g for g in GEOMETRIES if g[2] == 4])
def test_the_masters_are_exported_bit_for_bit(tmp_path, stage, world, micro):
    masters = run_ranks(_trained, tmp_path, stage, world, micro, world=world)[0]
    wide, narrow = (
        load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "trained")
    )
    assert wide.keys() == masters.keys() == narrow.keys()
    for name, values in wide.items():
        assert values.dtype == torch.float32
        assert torch.equal(values.flatten(), torch.tensor(masters[name])), name
        assert torch.equal(values.bfloat16(), narrow[name]), name
    assert any((values != values.bfloat16()).any() for values in wide.values())
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    again = make(Model(path=str(tmp_path / "fp32")), model_type="gpt2", dtype=torch.bfloat16)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, narrow[name]), name


def test_a_run_says_in_which_format_it_exports(tmp_path):
    """Its scores are those of the student in its own precision, whatever is stored."""
    runs = Runs(tmp_path)
    words = ("train.precision=bf16", "train.steps=2", "method.steps=2", "deepspeed=zero2")
    words = (*words, "until=evaluate")
    found = {}
    for name in ("trained", "fp32"):
        out = runs.run(name, 2, *words, f"checkpoint.export={name}", **causal())
        weights = load_file(out / "export" / "model.safetensors")
        found[name] = weights, json.loads((out / "scores.json").read_text())
        assert f"export: {name}" in (out / "export" / "README.md").read_text()
        for file in (out / "export").iterdir():  # they are for others, too
            assert str(tmp_path).encode() not in file.read_bytes(), file
    for name, values in found["fp32"][0].items():
        assert values.dtype == torch.float32
        assert torch.equal(values.bfloat16(), found["trained"][0][name])
    assert found["fp32"][1] == found["trained"][1]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_nothing_is_rounded_from_one_run_to_the_next(tmp_path, stage, ranks):
    """One that starts as the other's model, and learns nothing, exports the same."""
    lm = {"method": {"kind": "lm"}, "checkpoint": {"every": 2, "export": "fp32"}}
    first = {"model": {"config": BERT | {"tie_word_embeddings": False}}, **lm}
    tokenizer = {"kind": "pretrained", "path": "run:first"}
    second = {"model": {"path": "run:first"}, "data": {"tokenizer": tokenizer}, **lm}
    path = recipe_of(tmp_path, {"first": first, "second": {**second, "train": {"lr": 0.0}}})
    place = (f"deepspeed=zero{stage}", "train.micro_batch=2", "train.precision=bf16")
    forked(ranks, str(path), "until=export", *place)
    one, two = (
        load_file(tmp_path / "runs" / name / "export" / "model.safetensors")
        for name in ("first", "second")
    )
    assert any((values != values.bfloat16()).any() for values in one.values())
    for name, values in one.items():
        assert torch.equal(two[name], values), name


def test_what_cannot_be_exported_so_is_refused(tmp_path):
    runs = {
        "start": {"model": {"config": BERT}},
        "small": {"model": {"path": "run:start"}, "method": WID, "checkpoint": {"export": "fp32"}},
    }
    path = recipe_of(tmp_path, runs)
    told = "runs.small.checkpoint.export: fp32, but method wid exports another model"
    with pytest.raises(ConfigError, match=told):
        checked(path)
    checked(path, "checkpoint.export=trained", "runs.small.checkpoint.export=trained")
    told = "runs.start.deepspeed: zero3_nvme: checkpoint.export fp32 cannot edit"
    with pytest.raises(ConfigError, match=told):
        checked(path, "runs.start.deepspeed=zero3_nvme", "checkpoint.export=fp32")
