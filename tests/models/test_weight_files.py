"""Files of weights: what is no weight, belongs to something else, or is damaged is refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dskd.errors import ConfigError
from dskd.models.configs import config_of
from dskd.settings.model import Model
from tests.models.tiny import batch, make, stored


def _change(folder, change):
    """Store other tensors in the place of a folder's."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _refused(folder, model_type="qwen3", **config):
    with pytest.raises(ConfigError) as caught:
        make(Model(path=str(folder), config=config), model_type=model_type)
    text = str(caught.value)
    assert text.startswith("model.path: ")
    return text


def _edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _codes(tensors):
    """Blocks of FP8 codes with the inverse of their scale, as the hub stores them."""
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scale.reshape(1, 1)


def _rows(tensors):
    """Rows of int8 codes with the largest value of each."""
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        top = tensors[key].abs().amax(1)
        tensors[key] = (tensors[key] / top[:, None] * 127).round().to(torch.int8)
        tensors[key.replace("weight", "SCB")] = top


@pytest.mark.parametrize(("change", "dtype"), [(_codes, "F8_E4M3"), (_rows, "I8")])
def test_codes_are_no_weights(tmp_path, change, dtype):
    stored(tmp_path, "qwen3", drift=True)
    _change(tmp_path, change)
    text = _refused(tmp_path)
    assert "codes of a quantised model: model.layers.0.mlp.down_proj.weight (" in text
    assert dtype in text


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", None, 3])
def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path, method):
    stored(tmp_path, "qwen3")
    _edit_config(tmp_path, quantization_config={"quant_method": method, "load_in_8bit": True})
    with pytest.raises(ConfigError, match=r"model\.path: (its weights are quantised|cannot read)"):
        config_of(Model(path=str(tmp_path)), where="model")


def test_fp8_is_undone_by_transformers(tmp_path):
    pytest.importorskip("accelerate")
    stored(tmp_path, "qwen3", drift=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    _change(tmp_path, _codes)
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    _edit_config(tmp_path, quantization_config=how)
    mine = make(Model(path=str(tmp_path)), model_type="qwen3")
    assert not hasattr(mine.config, "quantization_config"), "the export would say it, too"
    for (name, a), (_, b) in zip(mine.named_parameters(), whole.named_parameters(), strict=True):
        assert (a - b).abs().max() <= b.abs().max() / 16, name  # three bits behind the point
    with torch.no_grad():
        ids_BT = batch().ids_BT
        near = (mine(input_ids=ids_BT).logits - whole(input_ids=ids_BT).logits).abs().max()
    assert 0 < near < 0.5 * whole(input_ids=ids_BT).logits.abs().max()


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv", "extra"],
)
def test_a_tensor_without_a_use_is_refused(tmp_path, name):
    stored(tmp_path, "qwen3")
    _change(tmp_path, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert f"has no use for: {name}; they belong" in _refused(tmp_path)


def test_layers_that_the_settings_take_away_are_refused(tmp_path):
    stored(tmp_path, "llama")
    assert "no use for: model.layers.1." in _refused(tmp_path, "llama", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, "its tensors lie under 'state_dict'"),
        ([torch.ones(2)], "a list, not tensors by name"),
        ({"lm_head.weight": 3.0}, "'lm_head.weight' is a float, not a tensor"),
        ({3: torch.ones(2)}, "a tensor is named 3, which is no text"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, problem):
    stored(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    text = _refused(tmp_path, "llama")
    assert f"{tmp_path / 'pytorch_model.bin'} is damaged" in text and problem in text


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(print), pickle.dumps({}) * 2])
def test_a_pickle_that_is_not_of_torch(tmp_path, content):
    stored(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert f"{tmp_path / 'pytorch_model.bin'} is damaged (" in _refused(tmp_path, "llama")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("{}", "no weight_map"),
        ("[]", "no weight_map"), ("null", "no weight_map"), ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names b.safetensors, which is not in"),
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_a_damaged_index(tmp_path, content, problem):
    stored(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert problem in _refused(tmp_path, "llama")


_CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig
Path(os.environ["TRACE"]).touch()
class MyConfig(LlamaConfig):
    model_type = "llama"
"""


def test_code_of_a_folder_is_run_only_where_a_setting_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("something is asked"))
    trace = tmp_path / "was_run"
    monkeypatch.setenv("TRACE", str(trace))
    folder = tmp_path / "model"
    stored(folder, "llama")
    (folder / "configuration_mine.py").write_text(_CODE)
    _edit_config(folder, auto_map={"AutoConfig": "configuration_mine.MyConfig"}, model_type="mine")
    with pytest.raises(
        ConfigError, match=r"(?s)model\.path: cannot read the config in .*trust_remote"
    ):
        config_of(Model(path=str(folder)), where="model")
    assert not trace.exists()
    with pytest.raises(ConfigError, match=r"model_type of .* has no .* LM of type 'mine'"):
        config_of(Model(path=str(folder), trust_remote_code=True), where="model")
    assert trace.exists(), "no family of dskd, but its code was asked"
