"""The settings' fields of a config have their effect or are refused, and a config makes a model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dskd.errors import ConfigError
from dskd.models.build import check_model
from dskd.models.configs import config_of, with_fields
from dskd.models.families import lm_head
from dskd.settings.model import Model
from tests.models.tiny import ALL, BLOCK, batch, make, settings, stored, tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
FAR = {"rope_type": "default", "rope_theta": 5e5}


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=batch().ids_BT).logits


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 1e3}, FAR | {"rope_theta": 1e3}),
        ({"rope_scaling": YARN}, YARN | {"rope_theta": 5e5}),
        ({"rope_parameters": YARN}, YARN | {"rope_theta": 5e5}),
        ({"rope_parameters": YARN | {"rope_theta": 7.0}}, YARN | {"rope_theta": 7.0}),
        ({"rope_scaling": YARN, "rope_theta": 7.0}, YARN | {"rope_theta": 7.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        ({"rope_scaling": None}, FAR),
    ],
)  # fmt: skip
def test_rotary_positions_over_those_of_a_stored_model(tmp_path, fields, rope):
    """A scaling keeps the base; the model is the one that was stored with both."""
    folder = stored(tmp_path / "far", "llama", rope_parameters=FAR).path
    mine = make(Model(path=folder, config=fields), model_type="llama")
    assert mine.config.rope_parameters.items() >= rope.items()
    config = AutoConfig.from_pretrained(folder, rope_parameters=dict(rope))
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert torch.equal(_logits(mine), _logits(theirs))
    if fields != {"rope_scaling": None}:
        assert not torch.equal(_logits(mine), _logits(make(Model(path=folder), model_type="llama")))


def test_null_takes_a_stored_scaling_away(tmp_path):
    folder = stored(tmp_path, "llama", rope_parameters=YARN | {"rope_theta": 5e5}).path
    config = config_of(Model(path=folder, config={"rope_scaling": None}), where="model")
    assert config.rope_parameters.items() >= FAR.items() and "factor" not in config.rope_parameters


def test_each_kind_of_layers_has_rotary_positions_of_its_own(tmp_path):
    chosen = stored(tmp_path, "modernbert")
    own = {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}
    config = config_of(Model(path=chosen.path, config=own), where="model")
    assert config.rope_parameters["full_attention"]["rope_theta"] == 9.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("model_type", "fields", "line"),
    [
        ("modernbert", {"rope_theta": 9.0},
         "rope_theta: each kind of layers has its own; set model.config.rope_parameters."),
        ("modernbert", {"rope_scaling": YARN},
         "rope_scaling: expected settings for one of full_attention, sliding_attention, found"),
        ("llama", {"rope_scaling": YARN, "rope_parameters": YARN},
         "rope_scaling: means rope_parameters, which is there, too"),
        ("llama", {"rope_scaling": 3}, "rope_scaling: expected settings (name: value) or null"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor: this model turns whole heads"),
        ("llama", {"partial_rotary_factor": 0.5},
         "partial_rotary_factor: a llama config has no such field"),
        ("qwen2", {"sliding_window": 16},
         "sliding_window: 16 has no effect; the qwen2 config made with it says null"),
        ("llama", {"quantization_config": {}}, "quantization_config: weights are trained"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["random", "stored"])
def test_a_field_without_effect_is_refused(tmp_path, how, model_type, fields, line):
    chosen = settings(model_type, **fields)
    if how == "stored":
        chosen = Model(path=stored(tmp_path, model_type).path, config=fields)
    with pytest.raises(ConfigError) as caught:
        config_of(chosen, where="model")
    assert str(caught.value).startswith(f"model.config.{line}"), caught.value


def test_the_settings_are_left_as_they_are():
    """HuggingFace writes into the mappings that it is given."""
    fields = {"rope_scaling": dict(YARN)}
    with_fields(AutoConfig.for_model("llama"), fields, "model")
    config_of(Model(config={"model_type": "llama", **fields}), where="model")
    assert fields == {"rope_scaling": YARN}


def test_null_is_what_huggingface_puts_in_its_place():
    config = config_of(settings("llama", num_key_value_heads=None), where="model")
    assert config.num_key_value_heads == config.num_attention_heads


def _check(chosen, model_type):
    config = config_of(chosen, where="teacher.model")
    data = {"objective": lm_head(model_type).objective, "block_size": BLOCK}
    check_model(config, chosen, **data, where="teacher.model")


@pytest.mark.parametrize("model_type", ALL)
def test_every_family_runs_without_memory(model_type):
    _check(settings(model_type), model_type)
    assert len(tokenizer()) > 0


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("bert", {"num_attention_heads": 0}),
        ("bert", {"num_attention_heads": 5}),
        ("bert", {"hidden_size": -8}),
        ("bert", {"hidden_act": "gleu"}),
        ("bert", {"id2label": 3}),
        ("bert", {"hidden_dropout_prob": 1.5}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"num_key_value_heads": 0}),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 5}),
        ("llama", {"num_hidden_layers": -1}),
        ("llama", {"num_hidden_layers": 0}),
        ("llama", {"rope_parameters": {"rope_type": "none"}}),
        ("gpt2", {"n_head": 5}),
        ("gpt2", {"activation_function": "gleu"}),
    ],
)
def test_a_config_that_makes_no_model_is_refused_before_one_is_made(model_type, fields):
    with pytest.raises(ConfigError, match=r"^teacher\.model"):
        _check(settings(model_type, **fields), model_type)


@pytest.mark.parametrize("kind", [[1], 3, {"a": 1}, None])
def test_a_model_type_that_is_no_word(kind):
    with pytest.raises(ConfigError, match=r"^model\.config\.model_type: "):
        config_of(Model(config={"model_type": kind}), where="model")
