"""Heads that are found from the models: every architecture against HuggingFace and torch, what is
refused, and what else a model type brings."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GraniteForCausalLM

from dskd.batch import SAME, LogitMap
from dskd.engine.zero import is_sharded, sharded_construction
from dskd.errors import ConfigError
from dskd.models import reaching, structure
from dskd.models.build import build, check_model
from dskd.models.configs import check_shape, check_vocabulary, config_of
from dskd.models.families import (
    has_types,
    head_in,
    head_of,
    longest_row,
    positions_of,
    projection_of,
)
from dskd.models.generate import Decoding, continuations
from dskd.models.structure import language_head, language_objective, padding_position
from dskd.models.writing import export
from dskd.settings.model import Model
from dskd.system import dist
from launch.bench import families
from launch.bench.families import FAMILIES, KINDS
from launch.bench.families import config_of as tiny_config
from tests.models.tiny import tokenizer, zero3
from tests.ranks import run_ranks

CLOSE = 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_huggingfaces_and_torchs(name):
    """With padding and a row without a label; as student, and as live and cached teacher."""
    assert max(families.as_student(name)) < CLOSE
    assert max(families.as_teacher(name, cached=False)) < CLOSE
    assert max(families.as_teacher(name, cached=True)) < CLOSE


def _numbers(rank, name):
    found = families.sharded(name, rank, 2)
    return {each: tensor.numpy() for each, tensor in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_at_zero3_have_the_gradients_of_one_without(kind):
    """Of a student and a teacher of that kind."""
    found = [
        {each: torch.from_numpy(value) for each, value in rank.items()}
        for rank in run_ranks(_numbers, KINDS[kind])
    ]
    assert max(families.of_two_ranks(KINDS[kind], found)) < CLOSE


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", SAME),
        ("cohere", LogitMap(0.3)),
        ("granite", LogitMap(1 / 6)),
        ("gemma2", LogitMap(softcap=2.0)),
        ("nanochat", LogitMap(softcap=15.0)),
    ],
)
def test_scale_and_softcap_are_found(name, wanted):
    model = families.model_of(name)
    assert head_in(model).map == projection_of(model).map == wanted


def _settings(name, **more) -> Model:
    fields = {"model_type": name.partition(" (")[0], **FAMILIES[name], **more}
    return Model(config=fields)


def _built(settings, objective, tokenizer=tokenizer()):  # noqa: B008  never changed
    how = {"block_size": 16, "seed": 3, "ds": None, "dtype": torch.float32, "where": "model"}
    return build(settings, tokenizer, objective=objective, **how)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_model_is_read_by_huggingface_and_here(name, tmp_path):
    """From random weights of the settings; every parameter that is trained is in the graph."""
    model_type = name.partition(" (")[0]
    objective = language_objective(model_type)
    model = _built(_settings(name), objective).eval()
    data = families.batch()
    data = type(data).of(
        row_ids_B=data.row_ids_B,
        domains_B=data.domains_B,
        ids_BT=data.ids_BT % 43,
        mask_BT=data.mask_BT,
        labels_BT=data.labels_BT,
    )
    logits_NV = positions_of(model, data).logits_NV
    logits_NV.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    export(model, tokenizer(), tmp_path / "out", card={})
    theirs, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found_NV = families.their_logits(theirs.eval(), data)
    torch.testing.assert_close(found_NV, logits_NV.detach(), rtol=0, atol=2e-6)
    again = _built(Model(path=str(tmp_path / "out")), objective)
    mine = dict(model.named_parameters())
    for parameter_name, parameter in again.named_parameters():
        assert parameter.equal(mine[parameter_name]), parameter_name
    longest = AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length
    assert longest == longest_row(model.config)


def _written_by_transformers(name, folder):
    model = families.model_of(name)
    model.save_pretrained(folder)
    tokenizer(families.VOCABULARY).save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["gpt_neox", "nomic_bert", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_names_and_shapes_of_older_folders_are_understood(name, tmp_path):
    """Transformers writes what it read once: Pythia's embed_out, one tensor for each expert."""
    wanted = dict(_written_by_transformers(name, tmp_path).named_parameters())
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert stored - wanted.keys()
    objective = language_objective(name)
    tok = tokenizer(families.VOCABULARY)
    found = _built(Model(path=str(tmp_path)), objective, tokenizer=tok)
    for each, parameter in found.named_parameters():
        assert parameter.equal(wanted[each]), each


@pytest.mark.parametrize(
    ("lacking", "text"),
    [
        ("experts.3.w3", r": weights do not fit: |do not make"),
        ("experts.3.w", r": weights do not "),
    ],
)
def test_an_expert_that_is_missing_is_noticed(tmp_path, lacking, text):
    _written_by_transformers("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if lacking not in key}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^model\.path.*{text}"):
        _built(Model(path=str(tmp_path)), "causal", tokenizer=tokenizer(families.VOCABULARY))


# Refusals.


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (AutoConfig.for_model("bart"), r"bart: an encoder with a decoder, whose logits need a"),
        (AutoConfig.for_model("gemma3"),
         r"gemma3: its text model is a part of it, .*gemma3_text\)"),
        (AutoConfig.for_model("xlnet", n_layer=2, d_model=32, n_head=2, d_inner=32),
         r"xlnet: a causal LM whose logits at a token change with the tokens after it$"),
        (AutoConfig.for_model("xlstm"), r"xlstm: a small copy of it, by which it is proved, has "),
        (AutoConfig.for_model(
            "minicpm3", hidden_size=64, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, dim_model_base=32),
         r"minicpm3: its logits are not the last hidden state's, through lm_head: they are apart"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_what_is_unusual_is_refused_by_name(config, text):
    with pytest.raises(ConfigError, match=rf"^teacher\.model\.config\.model_type: {text}"):
        head_of(config, language_objective(config.model_type), "teacher.model")


class _Another(GraniteForCausalLM):
    """Logits that no scale and no softcap give."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = self.change(found.logits)
        return found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x + 0.5, r"what is done to the numbers that its last linear map gives is neith"),
        (lambda x: x.relu(), r"what is done to the numbers that its last linear map gives is neit"),
        (lambda x: -x, r"1 that its last linear map gives becomes a logit of -0.166667$"),
        (lambda x: x[:, :-1], r"the logits of 2 rows of 14 tokens, 60 in the vocabulary, have the"),
        (
            lambda x: x * torch.arange(1, x.shape[1] + 1)[:, None],
            r"its logits are not the last hidden state's, through lm_head: ",
        ),
        (lambda x: None, r"the forward pass of a _Another gives no logits$"),
    ],
)
def test_logits_that_are_something_else_are_refused_by_name(monkeypatch, change, text):
    monkeypatch.setattr(structure, "_HEADS", {})
    monkeypatch.setattr(structure, "LANGUAGE", {"causal": {type(tiny_config("granite")): _Another}})
    monkeypatch.setattr(_Another, "change", staticmethod(change))
    with pytest.raises(ConfigError, match=rf"^model\.config\.model_type: granite: {text}"):
        language_head(tiny_config("granite"), "model")


class _OfItsWidth(GraniteForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 16 / self.config.hidden_size
        return found


def test_a_scale_that_hangs_on_the_width_is_refused_where_a_narrow_copy_is_made(monkeypatch):
    config = AutoConfig.for_model("granite", num_hidden_layers=1)
    monkeypatch.setattr(structure, "_HEADS", {})
    monkeypatch.setattr(structure, "LANGUAGE", {"causal": {type(config): _OfItsWidth}})
    with pytest.raises(ConfigError, match=r"granite: what is done to .* hangs on its width$"):
        language_head(config, "model")


def test_a_wrong_mask_is_noticed(monkeypatch):
    """The proof's batch is padded: attention without a mask is not HuggingFace's."""
    monkeypatch.setattr(structure, "_HEADS", {})
    monkeypatch.setattr(structure, "attention_arguments", lambda *args, **how: {})
    with pytest.raises(ConfigError, match=r"bert: its logits are not the last hidden state's, thr"):
        language_head(tiny_config("bert"), "model")


def test_random_numbers_go_on_as_if_nothing_was_proved(monkeypatch):
    monkeypatch.setattr(structure, "_HEADS", {})
    torch.manual_seed(4)
    language_head(tiny_config("llama"), "model")
    found = torch.rand(1)
    torch.manual_seed(4)
    assert found == torch.rand(1)


def test_a_class_that_draws_no_number_is_refused_by_name():
    fields = {"model_type": "data2vec-text", **FAMILIES["bert"]}
    with pytest.raises(ConfigError, match=r"^random weights: the class of a data2vec-text draws n"):
        _built(Model(config=fields), "masked")


# What else a type brings.


@pytest.mark.parametrize(
    ("name", "longest"),
    [("bloom", int(1e30)), ("mpt", 32), ("roformer", 32), ("camembert", 30), ("mpnet", 30),
     ("opt", 32), ("gpt_neox", 32), ("esm", 32)],
)  # fmt: skip
def test_the_longest_row_is_as_long_as_the_positions_go(name, longest):
    config = tiny_config(name)
    assert longest_row(config) == longest
    model = families.model_of(name)
    most = min(longest, 40)
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 9))
    if name in ("camembert", "mpnet", "opt"):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 9))


def test_positions_that_are_counted_past_padding():
    esm = {**FAMILIES["esm"], "position_embedding_type": "absolute"}
    esm = AutoConfig.for_model("esm", vocab_size=43, pad_token_id=1, **esm)
    mpnet = AutoConfig.for_model("mpnet", vocab_size=43, pad_token_id=0, **FAMILIES["mpnet"])
    ibert = AutoConfig.for_model("ibert")
    several = (esm, mpnet, ibert, tiny_config("bert"))
    assert [padding_position(config) for config in several] == [1, 1, 1, None]
    assert longest_row(ibert) == 512 - 2
    far = AutoConfig.for_model("camembert", pad_token_id=200)
    assert padding_position(far) == 200 and longest_row(far) == 512 - 201
    tok = tokenizer()
    tok.pad_token = "<s>"
    text = r"^model: its pad_token_id is 1, the tokenizer's 0; mpnet counts positions by it$"
    with pytest.raises(ConfigError, match=text):
        check_vocabulary(mpnet, tok, "model")


def test_too_few_positions_are_named_by_the_types_own_field():
    text = r"^x\.config\.max_seq_len: 32 are too few for data.block_size 33; 33 are needed$"
    with pytest.raises(ConfigError, match=text):
        check_shape(tiny_config("mpt"), "causal", 33, "x")
    check_shape(tiny_config("bloom"), "causal", 10_000, "x")


def test_types_of_tokens_go_to_models_that_take_them():
    takes = {name: has_types(tiny_config(name)) for name in ("bert", "roformer", "albert", "mpnet")}
    assert takes == {"bert": True, "roformer": True, "albert": True, "mpnet": False}


@pytest.mark.parametrize("name", ["cohere", "gemma2", "bloom", "opt", "falcon (alibi)", "gpt_neox"])
def test_continuations_are_the_likeliest_tokens_of_the_logits_here(name):
    """HuggingFace's generation, with its cache, and positions_of agree about every new token."""
    model = families.model_of(name)
    vocabulary = families.VOCABULARY
    prompts = [[9, 12, 7], [30, 8, 41, 17, 22]]
    decoding = Decoding(longest=6, positions=32, vocabulary=vocabulary, ends=(), pad=1)
    found = continuations(model, prompts, decoding, numbers=[0, 1], batch=2)
    for prompt, new in zip(prompts, found, strict=True):
        data = families.whole_row(torch.tensor([prompt + new]))
        with torch.no_grad():
            likeliest = positions_of(model, data).logits_NV.argmax(1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == new


def test_a_config_whose_forward_pass_reads_values_is_checked_without_them():
    """Mixtures of experts, and DeBERTa, have none without memory; ESM's has no default vocabulary
    or padding."""
    for name in ("mixtral", "deberta-v2", "llama", "esm"):
        settings = _settings(name)
        config = config_of(settings, where="model")
        objective = language_objective(config.model_type)
        check_model(config, settings, objective=objective, block_size=16, where="model")


def test_a_head_is_found_while_a_model_without_memory_is_made(monkeypatch):
    """MPT writes the type of its weights into a config within its own, Longformer its windows; a
    head that is looked for then is not found on ``meta``, where nothing can be proved."""
    monkeypatch.setattr(structure, "_HEADS", {})
    settings = _settings("mpt")
    config = config_of(settings, where="model")
    check_model(config, settings, objective="causal", block_size=16, where="model")
    assert len(structure._HEADS) == 1
    with torch.device("meta"):
        assert language_head(tiny_config("bloom"), "model").projection == "lm_head"


def test_a_type_whose_body_has_no_class_is_refused():
    with pytest.raises(ConfigError, match="trocr: transformers has no class of its body alone"):
        language_head(AutoConfig.for_model("trocr"), "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_weight_of_relative_positions_is_used_outside_of_its_module(name):
    """ZeRO-3 has to be told of it."""
    reached = head_in(families.model_of(name)).reached
    relative = FAMILIES[name].get("relative_attention", False)
    assert reached == ({("encoder.rel_embeddings.weight", 1)} if relative else set())


def test_what_is_reached_is_named_by_its_layer():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)

        def forward(self, x):
            return x + self.inner.weight.sum() + self.inner(x) * self.inner.weight.numel()

    model = torch.nn.Sequential(Layer(), Layer())
    found = reaching.reached(model, lambda: model(torch.ones(1, 3)))
    assert found == {("N.inner.weight", 1)}


def test_what_no_logit_needs_is_not_trained():
    model = _built(_settings("esm"), "masked")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"esm.contact_head.regression.weight", "esm.contact_head.regression.bias"}


def _within_a_sharded_construction(rank):
    """What is found there by a process that never asked before; and what is made after it."""
    del rank
    config = AutoConfig.for_model("roberta", hidden_size=32, num_attention_heads=4)
    for known in (structure._HEADS, structure._POSITIONS, structure._READS_VALUES):
        known.clear()
    with sharded_construction(zero3(dist.world())):
        found = (
            language_head(config, "model").projection,
            padding_position(config),
            structure.reads_values(config),
        )
        after = torch.nn.Linear(4, 4)
    outside = torch.nn.Linear(4, 4)
    return found, is_sharded(after.weight), is_sharded(outside.weight)


def test_what_is_found_within_a_sharded_construction():
    """A student's compactors are made in one, by a process that may not have asked before."""
    found = ("lm_head.decoder", 1, False)
    assert run_ranks(_within_a_sharded_construction) == [(found, True, False)] * 2
