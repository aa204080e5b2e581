"""Models from settings: what is refused, and what the config and vocabulary become."""

import pytest
import torch

from dskd.errors import ConfigError
from dskd.models.build import build, model_fingerprint, parameter_count
from dskd.models.configs import hidden_size
from dskd.models.families import lm_head, longest_row
from dskd.settings.model import Model
from tests.models.tiny import ALL, BLOCK, make, settings, stored, tokenizer
from tests.stores.caches import flip


def _load(chosen, model_type, **more):
    how = {"block_size": BLOCK, "seed": 1, "ds": None, "dtype": torch.float32}
    how |= {"objective": lm_head(model_type).objective, "where": "teacher.model"}
    return build(chosen, more.pop("tok", None) or tokenizer(), **(how | more))


@pytest.mark.parametrize("model_type", ALL)
def test_vocabulary_and_special_tokens_are_the_tokenizers(model_type):
    tok = tokenizer(50)
    config = make(model_type, tok=tok).config
    assert config.vocab_size == 50
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)


def test_a_padding_token_that_text_contains_is_no_padding_index():
    tok = tokenizer()
    tok.pad_token = tok.eos_token
    model = make("llama", tok=tok)
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().padding_idx is None  # its row would get no gradient
    assert model.get_input_embeddings().weight[tok.eos_token_id].abs().min() > 0


def test_vocabulary_is_padded_to_the_multiple():
    model = make(Model(config=settings("llama").config, vocab_multiple=64))
    assert model.config.vocab_size == 64
    assert model.lm_head.weight.shape == (64, 32)
    assert make(Model(config=settings("llama").config, vocab_multiple=43)).config.vocab_size == 43


def test_ids_beyond_the_number_of_tokens_count():
    tok = tokenizer()
    vocab = tok.get_vocab()
    tok.get_vocab = lambda: {**vocab, "far": 60}
    assert make("bert", tok=tok).config.vocab_size == 61


def test_unknown_fields_are_refused_all_at_once():
    with pytest.raises(ConfigError) as error:
        make("llama", hidden_siz=3, num_layers=2, vocab_size=9, torch_dtype="bfloat16")
    assert str(error.value).splitlines() == [
        "model.config.hidden_siz: a llama config has no such field; did you mean 'hidden_size'?",
        "model.config.num_layers: a llama config has no such field; "
        "did you mean 'num_hidden_layers'?",
        "model.config.vocab_size: comes from the tokenizer (and vocab_multiple)",
        "model.config.torch_dtype: comes from the precision setting",
    ]


def test_other_names_of_known_fields_are_taken():
    assert make("llama", rope_theta=500.0).config.rope_parameters["rope_theta"] == 500.0
    wide = settings("gpt2").config | {"hidden_size": 40}
    del wide["n_embd"]
    assert make(Model(config=wide)).config.n_embd == 40


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model_type": "t5"}, r"model\.config\.model_type: .* has no .* LM of type 't5'"),
        ({"model_type": "qwen33"}, r"no masked or causal LM of type 'qwen33'; .*'qwen3'\?"),
        ({}, r"model\.config\.model_type: needed without model\.path"),
        ({"model_type": "bert", "hidden_size": "big"}, r"model\.config: .*hidden_size.*"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, r"model.*30"),
        ({"model_type": "bert", "hidden_act": "gleu"}, r"model: .*gleu"),
    ],
)
def test_impossible_configs(fields, text):
    with pytest.raises(ConfigError, match=text):
        _load(Model(config=fields), "bert", where="model")


def test_family_must_fit_the_objective():
    with pytest.raises(ConfigError, match=r"a gpt2 is a causal LM, data.objective is masked$"):
        _load(settings("gpt2"), "bert")
    with pytest.raises(ConfigError, match=r"a bert is a masked LM, data.objective is causal$"):
        _load(settings("bert"), "gpt2")


def test_positions_must_hold_a_row():
    assert longest_row(make("roberta", block=30).config) == 30  # two go to the padding id
    few = r"max_position_embeddings: 32 are too few for data.block_size 31; 33 are "
    with pytest.raises(ConfigError, match=few):
        make("roberta", block=31)
    make("bert", block=32)
    with pytest.raises(ConfigError, match=r"32 are too few for data\.block_size 33; 33 are needed"):
        make("gpt2", block=33)


def test_another_tokenizer_is_refused_with_the_first_different_entries(tmp_path):
    chosen = stored(tmp_path, "bert", tok=tokenizer(swap=(7, 9)))
    with pytest.raises(ConfigError) as error:
        _load(chosen, "bert")
    text = str(error.value)
    assert "teacher.model.path" in text
    assert "2 of 43 entries" in text
    assert text.index("id 7: 't2' in the data's tokenizer, 't4' in") < text.index("id 9: 't4'")
    with pytest.raises(ConfigError, match="id 43: 't38' in the data's tokenizer, no token in"):
        _load(stored(tmp_path / "short", "bert"), "bert", tok=tokenizer(44))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    chosen = stored(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"teacher\.model\.path"):
        _load(chosen, "llama")


def test_a_padded_vocabulary_is_loaded_a_smaller_one_refused(tmp_path):
    model = _load(stored(tmp_path / "padded", "qwen2", vocab_size=48), "qwen2")
    assert model.lm_head.weight.shape == (48, 32)
    with pytest.raises(ConfigError, match=r"vocabulary of 40 is smaller than the tokenizer's 43"):
        _load(stored(tmp_path / "small", "qwen2", vocab_size=40), "qwen2")


def test_a_stored_config_can_be_overridden(tmp_path):
    chosen = stored(tmp_path, "gpt2")
    model = _load(Model(path=chosen.path, config={"resid_pdrop": 0.25}), "gpt2")
    assert model.transformer.h[0].mlp.dropout.p == 0.25
    assert model.training
    with pytest.raises(ConfigError, match=r"teacher\.model\.config\.resid_drop: .*'resid_pdrop'\?"):
        _load(Model(path=chosen.path, config={"resid_drop": 0.25}), "gpt2")
    with pytest.raises(ConfigError, match=r"teacher\.model\.path holds a gpt2"):
        _load(Model(path=chosen.path, config={"model_type": "llama"}), "gpt2")
    with pytest.raises(ConfigError, match=r"do not fit: transformer\.h\.0\.mlp\.c_fc\.weight is"):
        _load(Model(path=chosen.path, config={"n_inner": 17}), "gpt2")


def test_padding_ids_must_agree_where_positions_are_counted_by_them(tmp_path):
    chosen = stored(tmp_path, "roberta", pad_token_id=3)
    with pytest.raises(ConfigError, match=r"pad_token_id is 3, the tokenizer's 1; roberta counts"):
        _load(chosen, "roberta")


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.model\.path: no such folder: .*nothing"):
        _load(Model(path=str(tmp_path / "nothing")), "bert")
    with pytest.raises(ConfigError, match=r"teacher\.model\.path: no folder and not on the hub"):
        _load(Model(path="someone/something"), "bert")


def test_attention_is_chosen():
    chosen = Model(config=settings("llama").config, attention="eager")
    assert make(chosen).config._attn_implementation == "eager"
    assert make("llama").config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"model: .*[Ff]lash"):
        make(Model(config=settings("llama").config, attention="flash_attention_2"))


def test_generation_settings_come_along(tmp_path):
    chosen = stored(tmp_path, "llama")
    path = tmp_path / "generation_config.json"
    path.write_text('{"max_new_tokens": 17, "eos_token_id": 2}')
    assert _load(chosen, "llama").generation_config.max_new_tokens == 17
    path.write_text("[3]")
    with pytest.raises(ConfigError, match=r"teacher\.model\.path: generation_config\.json of"):
        _load(chosen, "llama")


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"model_type": 3}', "{}", "[" * 100_000])
def test_a_config_of_any_content(tmp_path, content):
    chosen = stored(tmp_path, "llama")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^teacher\.model\.path: "):
        _load(chosen, "llama")


def test_hidden_size_needs_no_model(tmp_path):
    assert hidden_size(settings("gpt2"), where="model") == 32
    assert hidden_size(stored(tmp_path, "distilbert"), where="model") == 32
    with pytest.raises(ConfigError, match=r"teacher\.config\.hiden: "):
        hidden_size(settings("bert", hiden=3), where="teacher")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ALL)
def test_parameters_are_counted_without_a_model(model_type, tied):
    model = make(model_type, tie_word_embeddings=tied)
    counted = parameter_count(model.config, "model")
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_fingerprint_is_of_the_content(tmp_path):
    def of(chosen, seed=1):
        return model_fingerprint(chosen, seed=seed, where="teacher.model")

    assert of(settings("bert")) == of(settings("bert"))
    assert len({of(settings("bert")), of(settings("gpt2")), of(settings("bert"), seed=2)}) == 3
    here = stored(tmp_path / "a", "bert")
    there = stored(tmp_path / "b", "bert")
    assert of(here) == of(there) == of(here, seed=2)
    flip(tmp_path / "b" / "model.safetensors")
    assert of(here) != of(there)
