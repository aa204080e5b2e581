"""fairseq's RoBERTa: the original's logits, every usual mistake, and what is refused."""

import shutil

import pytest
import torch

from dskd.convert import fairseq
from dskd.convert.fairseq import convert
from dskd.errors import ConfigError
from tests.convert.checkpoints import (
    BEST,
    EXPECTED,
    HEAD,
    IDS,
    IN_PROJ,
    LAST,
    REAL,
    arguments,
    golden,
    off,
    plain_logits,
    random_roberta,
    save,
)

BODY = "encoder.sentence_encoder"


@pytest.mark.parametrize("path", [LAST, IN_PROJ, BEST], ids=lambda path: path.name)
def test_the_originals_logits(path):
    """They are recorded in fp32: 1.9e-6 of their own rounding is seen in float64, the smallest
    mistake below is 200 times as large."""
    converted = convert(path)
    assert type(converted.model).__name__ == "RobertaForMaskedLM"
    assert off(converted.model, torch.float32) < 4e-6
    assert off(converted.model) < 2e-6


def test_three_layouts_give_the_same_weights():
    models = [dict(convert(path).model.named_parameters()) for path in (LAST, IN_PROJ, BEST)]
    for name, value in models[0].items():
        assert all(torch.equal(value, other[name]) for other in models[1:]), name


def test_the_originals_classes():
    converted = convert(BEST, head=HEAD)
    assert converted.objective == "classification"
    assert converted.notes[0] == "left out: the masked LM head"
    with torch.no_grad():
        logits = converted.model(IDS, attention_mask=REAL.long()).logits
    assert logits == pytest.approx(torch.tensor(EXPECTED["class_logits"]), abs=1e-6)
    assert converted.model.config.num_labels == 3


def _other_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12


def _swapped(*names):
    def change(model):
        for layer in model.roberta.encoder.layer:
            a, b = (layer.attention.self.get_submodule(name) for name in names)
            setattr(layer.attention.self, names[0], b)
            setattr(layer.attention.self, names[1], a)

    return change


def _norms_swapped(model):
    layer = model.roberta.encoder.layer[0]
    first, second = layer.attention.output, layer.output
    first.LayerNorm, second.LayerNorm = second.LayerNorm, first.LayerNorm


def _positions_off_by_one(model):
    rows = model.roberta.embeddings.position_embeddings.weight
    rows[1:] = rows[:-1].clone()


MISTAKES = {
    "eps 1e-12": (_other_eps, 3.9e-4),
    "no lm_head.bias": (lambda model: model.lm_head.bias.zero_(), 0.39),
    "initial LayerNorm": (lambda m: m.roberta.embeddings.LayerNorm.reset_parameters(), 2.0),
    "LayerNorms of a layer swapped": (_norms_swapped, 2.0),
    "q and k swapped": (_swapped("query", "key"), 3.1),
    "k and v swapped": (_swapped("key", "value"), 4.3),
    "positions off by one": (_positions_off_by_one, 3.4),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name):
    mistake, figure = MISTAKES[name]
    model = convert(LAST).model
    with torch.no_grad():
        mistake(model)
    assert off(model) == pytest.approx(figure, rel=0.03)


def test_the_config_is_the_tensors():
    config = convert(LAST).model.config
    sizes = {
        "vocab_size": 46, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40,
        "num_attention_heads": 3, "max_position_embeddings": 18, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "pad_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in sizes} == sizes


def test_the_card_has_the_trainers_words():
    assert convert(LAST).source == {"architecture": "roberta_base_plus", "updates": 125_000}
    assert convert(IN_PROJ).source["updates"] == "not said"
    expected = {"architecture": "roberta", "updates": 2036, "head": HEAD}
    assert convert(BEST, head=HEAD).source == expected


SHAPES = [
    ({"L": 1, "H": 8, "F": 12, "V": 9, "P": 7}, 2),
    ({"L": 3, "H": 30, "F": 17, "V": 31, "P": 20}, 5),
    ({"L": 4, "H": 21, "F": 64, "V": 50, "P": 12}, 1),
]


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("sizes", "heads"), SHAPES)
def test_random_shapes_equal_a_forward_written_down_by_hand(tmp_path, sizes, heads, tied, legacy):
    state = random_roberta(sizes, seed=sizes["H"])
    if tied:
        state["encoder.lm_head.weight"] = state[f"{BODY}.embed_tokens.weight"]
    content = {"model": state, "args": arguments(encoder_attention_heads=heads)}
    model = convert(save(tmp_path / "a.pt", content, legacy=legacy)).model
    assert model.config.tie_word_embeddings is tied
    ids_T = (torch.arange(sizes["P"]) * 3 + 2) % sizes["V"]
    ids_T[ids_T == 1] = 2  # no padding
    with torch.no_grad():
        found = model.double()(ids_T[None]).logits[0]
    wanted = plain_logits(state, ids_T, heads)
    assert float((found - wanted).abs().max()) < 1e-10 < float(wanted.abs().max())


@pytest.mark.parametrize(
    ("function", "ours"),
    [("relu", "relu"), ("gelu_accurate", "gelu_new"), ("gelu_fast", "gelu_new")],
)
def test_other_activations(tmp_path, function, ours):
    content = golden()
    content["cfg"]["model"]["activation_fn"] = function
    assert convert(save(tmp_path / "a.pt", content)).model.config.hidden_act == ours


def test_settings_may_be_a_namespace_in_cfg(tmp_path):
    content = golden()
    content["cfg"]["model"] = arguments(encoder_attention_heads=3)
    assert convert(save(tmp_path / "a.pt", content)).source["architecture"] == "roberta_base"


def test_shapes_win_over_settings_and_it_is_said(tmp_path):
    content = golden()
    content["cfg"]["model"]["encoder_layers"] = 12
    converted = convert(save(tmp_path / "a.pt", content))
    assert converted.model.config.num_hidden_layers == 2
    assert "its settings say encoder_layers 12, its tensors 2: taken" in converted.notes


def test_heads_come_from_the_file_or_the_user(tmp_path):
    content = golden()
    del content["cfg"]["model"]["encoder_attention_heads"]
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(ConfigError, match=r"no tensor tells the number of attention .*--heads"):
        convert(path)
    assert off(convert(path, heads=3).model) < 2e-6
    with pytest.raises(ConfigError, match="5 heads do not divide its width of 24"):
        convert(path, heads=5)
    with pytest.raises(ConfigError, match=r"--heads is 4, encoder_attention_heads of .* 3"):
        convert(LAST, heads=4)


def test_the_dtype_is_kept_if_asked_for():
    assert convert(LAST).model.dtype == torch.float32
    half = convert(LAST, dtype=torch.float16).model
    assert half.dtype == torch.float16
    assert off(half) < 2e-6  # its tensors are fp16 in the file


def test_numbers_beyond_the_dtype(tmp_path):
    content = golden()
    content["model"]["encoder.lm_head.bias"][3] = 1e5
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(ConfigError, match=r"lm_head.bias has numbers beyond torch.float16"):
        convert(path, dtype=torch.float16)
    convert(path, dtype=torch.bfloat16)


NAMES = {"a": "lm_head.bias", "x": f"{BODY}.layers.1.fc2.weight"}


def _without(name):
    return lambda content: content["model"].pop(name)


def _with(name, *shape):
    return lambda content: content["model"].update({name: torch.zeros(shape)})


def _set(**values):
    return lambda content: content["cfg"]["model"].update(values)


REFUSED = {
    "missing": (_without(NAMES["x"]), rf"tensors are missing: {NAMES['x']} \(HuggingFace's rob"),
    "no LM head": (_without("encoder.lm_head.weight"), "missing: encoder.lm_head.weight"),
    "no layer": (
        lambda c: [c["model"].pop(n) for n in list(c["model"]) if ".layers.0." in n],
        rf"tensors are missing: {BODY}.layers.0",
    ),
    "extra": (_with("encoder.extra.weight", 2, 3), r"no place in the model: .*extra.weight \[2, 3"),
    "shape": (
        _with(NAMES["x"], 24, 41),
        rf"{NAMES['x']} is \[24, 41\], the other tensors ask for \[24, 40\]",
    ),
    "pre-norm": (_with(f"{BODY}.layer_norm.weight", 24), "normalise before, not behind"),
    "pre-norm, no norm": (
        _without(f"{BODY}.layernorm_embedding.weight"),
        "it has no .*layernorm_embedding.weight: its layers normalise before",
    ),
    "data2vec": (_with("encoder.regression_head.0.weight", 2), "is of data2vec"),
    "data2vec average": (_with("encoder._ema", 2), "encoder._ema is of data2vec"),
    "twice": (_with("decoder.lm_head.bias", 46), "encoder.lm_head.bias is there twice"),
    "activation": (_set(activation_fn="swish"), "activation_fn is 'swish', not one of gelu, "),
    "dropout": (_set(dropout="much"), "its settings make no RobertaConfig"),
    "heads": (_set(encoder_attention_heads="x"), "is 'x', no number of heads"),
    "sharded": (lambda c: c.update(fsdp_metadata={}), "a shard of a model of several"),
    "no model": (lambda c: c.pop("model"), "is no checkpoint of fairseq: no model among args"),
    "text": (lambda c: c["model"].update(a="b"), "'a' is a str, not a tensor"),
    "no settings": (lambda c: c.update(cfg=None), "no tensor tells the number of attention heads"),
    "not RoBERTa": (
        lambda c: c.update(model={"decoder.embed_tokens.weight": torch.zeros(2)}),
        f"no RoBERTa: nothing of {BODY} among encoder.embed_tokens",
    ),
    "diverged": (
        lambda c: c["model"]["encoder.lm_head.bias"].fill_(torch.inf),
        "encoder.lm_head.bias holds numbers that are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_by_name(tmp_path, name):
    change, message = REFUSED[name]
    content = golden()
    change(content)
    with pytest.raises(ConfigError, match=message):
        convert(save(tmp_path / "a.pt", content))


@pytest.mark.parametrize("name", ["x-shard0.pt", "x_part1.pt", "x-model_part-0.pt"])
def test_parts_are_refused_by_their_names(tmp_path, name):
    shutil.copy(BEST, tmp_path / name)
    with pytest.raises(ConfigError, match="split over several files"):
        convert(tmp_path / name)


def test_heads_for_classes_are_named(tmp_path):
    content = golden()
    for name in list(content["model"]):
        if HEAD in name:
            content["model"][name.replace(HEAD, "mnli")] = content["model"][name]
    path = save(tmp_path / "a.pt", content)
    left = convert(path).notes[0]
    assert left == f"heads for classes are left out: mnli, {HEAD} (--head NAME)"
    with pytest.raises(ConfigError, match=f"has no head 'rte'; it has mnli, {HEAD}"):
        convert(path, head="rte")
    notes = convert(path, head="mnli").notes
    assert notes[0] == f"left out: the masked LM head, the head {HEAD}"
    with pytest.raises(ConfigError, match="has no head 'mnli'; it has none"):
        convert(LAST, head="mnli")


def test_a_head_that_huggingface_has_not(tmp_path):
    content, at = golden(), f"classification_heads.{HEAD}"
    content["model"] |= {
        f"{at}.dense.weight": torch.ones(8, 24), f"{at}.dense.bias": torch.ones(8),
        f"{at}.out_proj.weight": torch.ones(3, 8),
    }  # fmt: skip
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(ConfigError, match=f"--head: {HEAD} is 8 wide, the model 24"):
        convert(path, head=HEAD)
    content = golden()
    content["cfg"]["model"]["pooler_activation_fn"] = "relu"
    with pytest.raises(ConfigError, match="pooler_activation_fn is 'relu', not tanh"):
        convert(save(path, content), head=HEAD)


def test_every_name_of_a_file_is_used_or_left_out_by_name():
    """The map is total: what is not in the table is on one of the two lists."""
    for path in (LAST, IN_PROJ, BEST):
        state = fairseq._normalised(fairseq.opened(path, fairseq.FAIRSEQ)["model"], "f")
        for name in state:
            assert fairseq.MASKED.of_theirs(name) or name.startswith("classification_heads.")
