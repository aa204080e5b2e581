"""Weights of single experts, as folders have them, and the stacks that models have of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dskd.errors import ConfigError
from dskd.models.build import check_model
from dskd.models.configs import config_of
from dskd.models.reading import load_weights, unrounded_weights
from dskd.models.writing import export
from tests.models.tiny import make, settings, stored, tokenizer

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
NAMES = {"mixtral": "block_sparse_moe.experts.{}.w1", "qwen3_moe": "mlp.experts.{}.gate_proj"}

MAKE_NONE = r"experts\.0\..* do not make model\.layers\.1\.mlp\.experts\.gate_up_proj"


def rewritten(folder, change) -> None:
    """The weights of a folder after ``change`` of their mapping."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def named(model_type: str, expert: int) -> str:
    return f"model.layers.1.{NAMES[model_type].format(expert)}.weight"


def without_last_maps(tensors) -> None:
    """Of the experts of layer 1."""
    last = (".w2.weight", "down_proj.weight")
    for name in [n for n in tensors if ".layers.1." in n and n.endswith(last)]:
        del tensors[name]


@pytest.mark.parametrize("model_type", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), MAKE_NONE),
        (lambda tensors, name: tensors.update({name: tensors[name][:4].clone()}), MAKE_NONE),
        (lambda tensors, name: tensors.update({name.replace("weight", "scale"): torch.ones(3)}),
         r"no use for: .*experts\.2\."),
        (lambda tensors, name: tensors.update({name.replace(".2.", ".7."): tensors[name].clone()}),
         MAKE_NONE),
        (lambda tensors, name: without_last_maps(tensors),
         r"weights are missing: model\.layers\.1\.mlp\.experts\.down_proj"),
        (lambda tensors, name: tensors.update(
            {name.replace("w1", "w9").replace("gate_proj", "gates"): tensors[name].clone()}),
         r"no use for: .*experts\.2\.(w9|gates)\."),
    ],
)  # fmt: skip
def test_experts_that_make_no_stack_are_named(tmp_path, model_type, change, message) -> None:
    stored(tmp_path, model_type)
    rewritten(tmp_path, lambda tensors: change(tensors, named(model_type, 2)))
    with pytest.raises(ConfigError, match=rf"^model\.path: .*{message}"):
        load_weights(make(model_type), tmp_path, "model.path")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_what_is_exported_is_read_again(tmp_path, model_type) -> None:
    """Stacked, as models have it; and from single experts, unrounded, what a 16-bit one rounds."""
    one = make(model_type, seed=3)
    export(one, tokenizer(), tmp_path / "stacked", card={})
    again = make(model_type, seed=4)
    load_weights(again, tmp_path / "stacked", "model.path")
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    stored(tmp_path / "apart", model_type)
    load_weights(again, tmp_path / "apart", "model.path")
    half = make(model_type, dtype=torch.bfloat16)
    whole = dict(unrounded_weights(half, tmp_path / "apart", "model.path"))
    assert whole.keys() == dict(half.named_parameters()).keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(whole[name], parameter), name


def test_a_dense_model_has_no_use_for_experts(tmp_path) -> None:
    stored(tmp_path, "qwen3_moe")
    with pytest.raises(
        ConfigError, match=r"^model\.path: tensors .* no use for: .*\.mlp\.experts\."
    ):
        load_weights(make("qwen3"), tmp_path, "model.path")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_trial_without_memory_leaves_the_config_as_it_is(model_type) -> None:
    """Models that are made with it compute their experts in HuggingFace's own way."""
    config = config_of(settings(model_type), where="model")
    before = config.to_dict(), config._experts_implementation
    check_model(config, settings(model_type), objective="causal", block_size=16, where="model")
    assert (config.to_dict(), config._experts_implementation) == before
