"""Loading: bit for bit what from_pretrained gives, whole or sharded, and never a part."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining

from dskd.engine.zero import full_shape
from dskd.errors import ConfigError
from dskd.models.families import lm_head
from dskd.settings.model import Model
from dskd.system import dist
from tests.models.test_initial import fingerprints
from tests.models.tiny import ALL, SIX, auto_of, count_gathered, make, stored, tokenizer, zero3
from tests.ranks import run_ranks

_store = partial(stored, drift=True)


def _load(chosen, model_type, **more):
    return make(chosen, model_type=model_type, **more)


def _loaded(rank, chosen, dtype):
    del rank
    half = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    return {
        model_type: fingerprints(_load(one, model_type, ds=zero3(2, **half), dtype=dtype))
        for model_type, one in chosen.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_from_pretrained(tmp_path, dtype):
    chosen = {model_type: _store(tmp_path / model_type, model_type) for model_type in ALL}
    expected = {}
    for model_type, one in chosen.items():
        theirs = auto_of(model_type).from_pretrained(one.path, dtype=dtype)
        expected[model_type] = fingerprints(theirs)
        mine = _load(one, model_type, dtype=dtype)
        assert fingerprints(mine) == expected[model_type]
        assert mine.training
    for found in run_ranks(_loaded, chosen, dtype):
        assert found == expected


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "qwen3"])
def test_untied_in_several_files(tmp_path, model_type):
    chosen = _store(tmp_path, model_type, shard="20KB", tie_word_embeddings=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    theirs = auto_of(model_type).from_pretrained(tmp_path)
    expected = fingerprints(theirs)
    if bias := lm_head(model_type).bias:  # its own copy has no part in the logits; ours is tied
        del expected[f"{lm_head(model_type).projection}.bias"]
        expected[f"{bias}.bias"] = fingerprints(theirs.get_output_embeddings())["bias"]
    assert fingerprints(_load(chosen, model_type)) == expected
    for found in run_ranks(_loaded, {model_type: chosen}, torch.float32):
        assert found[model_type] == expected


def test_a_pickled_file_with_old_names_and_extra_weights(tmp_path, capsys):
    config = make("bert").config
    torch.manual_seed(5)
    whole = BertForPreTraining(config)  # with pooler and next-sentence head
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter))
    old = {}
    for name, value in whole.state_dict().items():
        gamma = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[gamma.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    assert any("gamma" in name for name in old)
    torch.save(old, tmp_path / "pytorch_model.bin")
    whole.config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    expected = fingerprints(auto_of("bert").from_pretrained(tmp_path))
    assert fingerprints(_load(Model(path=str(tmp_path)), "bert")) == expected
    unused = "bert.pooler.dense.bias, bert.pooler.dense.weight, cls.seq_relationship"
    assert f"left out: {unused}" in capsys.readouterr().out
    for found in run_ranks(_loaded, {"bert": Model(path=str(tmp_path))}, torch.float32):
        assert found["bert"] == expected


def test_a_body_saved_without_its_prefix(tmp_path):
    chosen = _store(tmp_path, "gpt2")
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the old causal mask, as on the hub
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = auto_of("gpt2").from_pretrained(tmp_path)
    assert fingerprints(_load(chosen, "gpt2")) == fingerprints(theirs)
    assert torch.equal(theirs.transformer.wte.weight, stored["transformer.wte.weight"])


def test_an_untied_head_stored_with_one_bias(tmp_path):
    """transformers 4 tied the two biases of an untied head as well and stored this one."""
    chosen = _store(tmp_path, "roberta", tie_word_embeddings=False)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["lm_head.decoder.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    model = _load(chosen, "roberta")
    assert torch.equal(model.lm_head.decoder.bias, stored["lm_head.bias"])
    assert model.lm_head.decoder.bias is model.lm_head.bias


def test_only_the_head_of_a_tied_model_is_stored(tmp_path):
    chosen = _store(tmp_path, "llama", tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = fingerprints(auto_of("llama").from_pretrained(tmp_path))
    assert fingerprints(_load(chosen, "llama")) == expected


def _messages(rank, chosen, model_type):
    """What loading says on this rank."""
    del rank
    ds = zero3(2) if dist.world() > 1 else None
    try:
        _load(chosen, model_type, ds=ds)
    except ConfigError as error:
        return str(error)
    return "loaded"


def _all_messages(chosen, model_type):
    messages = {_messages(0, chosen, model_type), *run_ranks(_messages, chosen, model_type)}
    assert len(messages) == 1
    return messages.pop()


def test_missing_weights_are_named_on_every_rank(tmp_path):
    chosen = _store(tmp_path, "qwen3", tie_word_embeddings=False)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["lm_head.weight"], stored["model.layers.1.self_attn.q_norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    missing = "model.layers.1.self_attn.q_norm.weight, lm_head.weight"
    assert _all_messages(chosen, "qwen3") == f"model.path: weights are missing: {missing}"


def test_a_truncated_file_is_named_on_every_rank(tmp_path):
    chosen = _store(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"model.path: {path} is damaged" in _all_messages(chosen, "llama")


def test_a_missing_file_is_named(tmp_path):
    chosen = _store(tmp_path, "llama", shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / gone).unlink()
    with pytest.raises(ConfigError, match=f"model.safetensors.index.json names {gone}, which"):
        _load(chosen, "llama")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors or pytorch_model\.bin in "):
        _load(chosen, "llama")


def test_tied_weights_that_differ_are_refused(tmp_path):
    chosen = _store(tmp_path, "gpt2", tie_word_embeddings=False)
    untied = Model(path=chosen.path, config={"tie_word_embeddings": True})
    message = "the config ties transformer.wte.weight and lm_head.weight, but they are stored with"
    assert message in _all_messages(untied, "gpt2")


def _largest(rank, chosen, model_type):
    """Most elements at full size at one time while loading; the largest parameter."""
    del rank
    seen = count_gathered()
    model = _load(chosen, model_type, ds=zero3(2))
    assert sum(p.numel() for p in model.parameters()) == 0
    return max(seen), len(seen), [full_shape(p).numel() for p in model.parameters()]


@pytest.mark.parametrize("model_type", SIX[:4])
def test_no_rank_holds_more_than_one_parameter(tmp_path, model_type):
    chosen = _store(tmp_path, model_type)
    for most, times, sizes in run_ranks(_largest, chosen, model_type):
        assert most == max(sizes)
        assert times == len(sizes)
        assert most < sum(sizes) / 4
