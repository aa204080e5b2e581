"""UER's BERT: the original's logits under both namings, its LayerNorm, and what is refused."""

import json

import pytest
import torch

from dskd.convert.uer import convert
from dskd.errors import ConfigError
from tests.convert.checkpoints import GOLDEN, save

OLD, NEW = GOLDEN / "uer/model_2022.bin", GOLDEN / "uer/model_2023.bin"
EXPECTED = json.loads((GOLDEN / "uer/expected.json").read_text())
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + n) for n in range(24))]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return path


def off(model) -> float:
    """How far the logits are from the original's in float64, at tokens that are no padding."""
    ids, segments = torch.tensor(EXPECTED["src"]), torch.tensor(EXPECTED["seg_uer"])
    with torch.no_grad():
        logits = model(ids, attention_mask=(segments > 0).long()).logits.double()
    wanted = [
        torch.tensor(row, dtype=torch.float64)
        for row in (logits for sample in EXPECTED["logits"] for logits in sample if logits)
    ]
    return float((logits[segments > 0] - torch.stack(wanted)).abs().max())


@pytest.mark.parametrize("path", [OLD, NEW], ids=["2022", "2023"])
def test_the_originals_logits(path, vocab):
    model = convert(path, vocab, heads=4).model
    assert type(model).__name__ == "BertForMaskedLM"
    assert off(model) < 5e-5
    uncorrected = convert(path, vocab, heads=4, trained_in="elsewhere").model
    assert off(uncorrected) == pytest.approx(0.144, rel=0.02)


def test_elsewhere_leaves_every_weight_as_it_is(vocab):
    state = torch.load(NEW, weights_only=True)
    model = convert(NEW, vocab, heads=4, trained_in="elsewhere").model
    layer = model.bert.encoder.layer[1]
    assert torch.equal(
        layer.output.LayerNorm.weight, state["encoder.transformer.1.layer_norm_2.gamma"]
    )
    types = model.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(types, state["embedding.seg.embedding.weight"][1:])
    corrected = convert(NEW, vocab, heads=4).model.bert.encoder.layer[1].output.LayerNorm.weight
    wanted = layer.output.LayerNorm.weight * torch.tensor(15 / 16).sqrt()
    assert torch.allclose(corrected, wanted, rtol=1e-6, atol=0)


def test_the_config_is_the_tensors(vocab):
    config = convert(OLD, vocab, heads=4).model.config
    sizes = {
        "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 4, "max_position_embeddings": 12, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in sizes} == sizes


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_found_in_the_tensors(tmp_path, vocab, tied):
    state = torch.load(OLD, weights_only=True)
    words = state["embedding.word_embedding.weight"]
    state["target.mlm_linear_2.weight"] = words.clone() if tied else words + 1
    config = convert(save(tmp_path / "a.bin", state), vocab, heads=4).model.config
    assert config.tie_word_embeddings is tied


@pytest.mark.parametrize("prefix", ["target.sp_linear_", "target.nsp_linear_"])
def test_next_sentences_are_left_out(tmp_path, vocab, prefix):
    state = torch.load(OLD, weights_only=True)
    state |= {f"{prefix}1.weight": torch.ones(16, 16), f"{prefix}2.bias": torch.ones(2)}
    assert off(convert(save(tmp_path / "a.bin", state), vocab, heads=4).model) < 5e-5


def test_the_tokenizer_is_wordpiece(vocab):
    lower, cased = (convert(NEW, vocab, heads=4, cased=c).tokenizer for c in (False, True))
    assert lower.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    assert lower("a B")["input_ids"] == [2, 5, 6, 3]
    assert cased("a B")["input_ids"] == [2, 5, 1, 3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (TOKENS[:-1], "has 28 lines, .* embeddings of 29 tokens: not its vocabulary"),
        ([*TOKENS[:-1], "a"], "line 29: 'a' is line 6 already"),
        ([*TOKENS[:9], "", *TOKENS[10:]], "line 10: it is empty"),
        (["[pad]", *TOKENS[1:]], r"has no \[PAD\]: not a BERT's vocabulary"),
    ],
)
def test_the_wrong_vocabulary(tmp_path, lines, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=message):
        convert(NEW, path, heads=4)


def config(tmp_path, **changes):
    own = {"emb_size": 16, "hidden_size": 16, "feedforward_size": 32, "heads_num": 4}
    own |= {"layers_num": 2, "max_seq_length": 12, "dropout": 0.2, "hidden_act": "gelu"}
    own |= {"embedding": ["word", "pos", "seg"], "encoder": "transformer", "target": ["mlm", "sp"]}
    path = tmp_path / "uer.json"
    path.write_text(json.dumps(own | changes))
    return path


def test_uers_config_has_the_heads(tmp_path, vocab):
    model = convert(NEW, vocab, config=config(tmp_path)).model
    assert off(model) < 5e-5
    assert model.config.hidden_dropout_prob == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_num": 12}, "--config: layers_num is 12, .* has 2"),
        ({"emb_size": 8}, "--config: emb_size is 8, .* has 16"),
        ({"heads_num": 3}, "3 heads do not divide its width of 16"),
        ({"hidden_act": "gelu_fast"}, "--config: hidden_act is 'gelu_fast'; .* has 'gelu'"),
        ({"layernorm_positioning": "pre"}, "layernorm_positioning is 'pre'"),
        ({"feed_forward": "gated"}, "feed_forward is 'gated'"),
        ({"embedding": ["word", "seg"]}, r"embedding is \['word', 'seg'\]"),
    ],
)
def test_uers_config_contradicts_the_file(tmp_path, vocab, changes, message):
    with pytest.raises(ConfigError, match=message):
        convert(NEW, vocab, config=config(tmp_path, **changes))


LAYER = "encoder.transformer.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.layer_norm.gamma": (16,)}, "normalise before"),
        ({f"{LAYER}.feed_forward.linear_gate.weight": (32, 16)}, "of a gated feed-forward part"),
        ({"embedding.emb_compactor.weight": (16, 16)}, "of a WID student that is not merged"),
        ({"encoder.linear.weight": (16, 8)}, "of factorised embeddings"),
        ({f"{LAYER}.self_attn.final_linear.bias": None}, "missing: .*self_attn.final_linear.bias"),
        ({"target.mlm.linear_1.bias": None}, "missing: target.mlm.linear_1.bias"),
        ({"embedding.seg.embedding.weight": (2, 16)}, r"\[2, 16\], expected \[3, 16\]"),
        ({f"{LAYER}.feed_forward.linear_2.weight": (16, 31)}, r"is \[16, 31\], the other tensors"),
        ({"output_layer_1.weight": (16, 16)}, "no place in the model: output_layer_1.weight"),
        (
            {f"{LAYER}.self_attn.linear_layers.0.weight": (16, 8)},
            "embeddings are 16 wide, layers 8",
        ),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, vocab, changes, message):
    state = torch.load(NEW, weights_only=True)
    for name, shape in changes.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.ones(shape)
    with pytest.raises(ConfigError, match=message):
        convert(save(tmp_path / "a.bin", state), vocab, heads=4)


def test_heads_are_never_guessed(vocab):
    with pytest.raises(ConfigError, match="no tensor tells the number of attention heads"):
        convert(NEW, vocab)
