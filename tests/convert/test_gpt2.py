"""GPT-2 folders of pytorch_transformers: the float64 reference's logits, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from dskd.convert.gpt2 import convert
from dskd.errors import ConfigError
from tests.convert.checkpoints import GOLDEN, save

TASK = GOLDEN / "gpt2_2019"
EXPECTED = json.loads((TASK / "expected.json").read_text())
ADDED = ["__ans__", "__pad__", "__unk__", "__gen__", "__sst__"]


@pytest.fixture
def task(tmp_path):
    """A copy of the golden folder, to be changed."""
    shutil.copytree(TASK, tmp_path / "task")
    return tmp_path / "task"


def change(task, edit):
    state = torch.load(task / "model-finish", weights_only=True)
    edit(state)
    save(task / "model-finish", state, legacy=True)
    return task


def off(model) -> float:
    with torch.no_grad():
        logits = model(torch.tensor(EXPECTED["ids"])).logits
    return float((logits - torch.tensor(EXPECTED["logits"])).abs().max())


def test_the_logits_of_the_reference():
    converted = convert(TASK)
    assert converted.objective == "causal"
    assert off(converted.model) < 1e-5
    config = converted.model.config
    found = (config.vocab_size, config.n_positions, config.n_head, config.n_layer, config.n_embd)
    assert found == (43, 10, 4, 2, 16)
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_new", 1e-5)
    assert config.tie_word_embeddings
    assert converted.model.dtype == torch.float32
    assert converted.tokenizer is None
    said = ["no vocab.json and merges.txt there: no tokenizer is written"]
    assert converted.notes == [*said, "config.json says vocab_size 40, the tensor 43"]


def test_buffers_and_a_wrappers_prefix_are_dropped(task):
    def wrap(state):
        state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        for name in list(state):
            state[f"module.{name}"] = state.pop(name)

    assert off(convert(change(task, wrap)).model) < 1e-5


def write_tokenizer(task):
    """The golden BPE as GPT-2's files, with the tokens that lifelong learning adds."""
    merges = (GOLDEN / "bpe/vocab.bpe").read_text(encoding="utf-8")
    (task / "merges.txt").write_text(merges, encoding="utf-8")
    expected = json.loads((GOLDEN / "bpe/expected_vocab.json").read_text())
    symbols = [line.split()[0] for line in (GOLDEN / "bpe/dict.txt").read_text().splitlines()]
    tokens = sorted(expected, key=expected.__getitem__)
    numbers = {int(s): tokens[4 + k] for k, s in enumerate(symbols) if s.isdigit()}
    vocab = {numbers[number]: number for number in sorted(numbers)}
    (task / "vocab.json").write_text(json.dumps(vocab))
    added = {token: len(vocab) + k for k, token in enumerate(ADDED)}
    (task / "added_tokens.json").write_text(json.dumps(added))
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "__pad__"}
    (task / "special_tokens_map.json").write_text(json.dumps(roles))
    return len(vocab)


def widen(rows):
    def edit(state):
        wide = torch.zeros(rows, 16, dtype=torch.float16)
        wide[:43] = state["transformer.wte.weight"]
        state["transformer.wte.weight"] = state["lm_head.weight"] = wide

    return edit


def test_added_tokens_keep_their_ids(task, tmp_path):
    size = write_tokenizer(task)
    assert size == 267
    converted = convert(change(task, widen(280)))
    assert converted.notes[0] == "vocabulary: 272 tokens; 8 further embeddings are of no token"
    converted.tokenizer.save_pretrained(tmp_path / "hf")
    for found in (converted.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "hf")):
        assert found.convert_tokens_to_ids(ADDED) == list(range(267, 272))
        assert found.pad_token_id == 268
        assert found.eos_token_id == 266
        assert found("the__gen__")["input_ids"][-1] == 270
        assert found(" the")["input_ids"] == [258]
    config = converted.model.config
    assert (config.bos_token_id, config.eos_token_id) == (266, 266)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: (t / "model-finish").rename(t / "model-3"), "no model-finish.* are model-3"),
        (lambda t: (t / "config.json").unlink(), "config.json: no such file"),
        (lambda t: (t / "config.json").write_text("{"), "config.json is damaged"),
        (lambda t: configured(t, n_head=3), "3 heads do not divide its width of 16"),
        (lambda t: configured(t, n_head=None), "no n_head; no tensor tells the number"),
        (lambda t: configured(t, n_layer=3), "config.json: n_layer is 3, .* has 2"),
        (lambda t: configured(t, n_positions=9), "config.json: n_positions is 9, .* has 10"),
        (lambda t: configured(t, pruned_heads={"0": [1]}), "pruned_heads: a model with heads rem"),
        (lambda t: (t / "vocab.json").write_text("{}"), "has vocab.json of a tokenizer's"),
        (lambda t: change(t, lambda s: s.pop("transformer.ln_f.bias")), "missing: transformer.ln"),
        (lambda t: change(t, lambda s: s.update(x=torch.ones(2))), r"no place in the model: x \[2"),
        (lambda t: change(t, lambda s: s.pop("lm_head.weight")), "missing: lm_head.weight"),
        (write_tokenizer, "has embeddings of 43 tokens, its tokenizer 272"),
    ],
)  # fmt: skip
def test_what_is_no_whole_task(task, edit, message):
    edit(task)
    with pytest.raises(ConfigError, match=message):
        convert(task)


def configured(task, **changes):
    own = json.loads((TASK / "config.json").read_text())
    (task / "config.json").write_text(json.dumps(own | changes))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"pad_token": "[PAD]"}, r"pad_token: '\[PAD\]' is not in the vocabulary"),
        ({"ans_token": "__ans__"}, "ans_token: '__ans__' is not one of bos_token, "),
        ({"pad_token": 3}, "pad_token: 3 is not one of"),
    ],
)
def test_a_role_of_no_token(task, roles, message):
    write_tokenizer(task)
    (task / "special_tokens_map.json").write_text(json.dumps(roles))
    with pytest.raises(ConfigError, match=message):
        convert(change(task, widen(280)))


def test_roles_as_later_versions_write_them(task):
    write_tokenizer(task)
    roles = {"pad_token": {"content": "__pad__", "lstrip": False}}
    roles["additional_special_tokens"] = ["__gen__"]
    (task / "special_tokens_map.json").write_text(json.dumps(roles))
    assert convert(change(task, widen(280))).tokenizer.pad_token_id == 268


def test_an_added_token_out_of_order(task):
    write_tokenizer(task)
    (task / "added_tokens.json").write_text('{"__ans__": 269}')
    with pytest.raises(ConfigError, match="'__ans__' has the id 269, expected 267"):
        convert(change(task, widen(280)))
