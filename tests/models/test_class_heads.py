"""Heads for classification: the logits of HuggingFace's own classes, bit for bit."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    ModernBertForMaskedLM,
    RobertaForMaskedLM,
)

from dskd.batch import IGNORE
from dskd.errors import ConfigError
from dskd.models.build import check_random, parameter_count
from dskd.models.families import head_of, positions_of, projection_of
from dskd.models.heads import CLASSIFIERS
from dskd.models.writing import export
from dskd.settings.model import Model
from tests.batches import batch_of
from tests.models.test_initial import fingerprints
from tests.models.tiny import BLOCK, make, settings, tokenizer, zero3
from tests.ranks import run_ranks

CLASSES = ["air", "earth", "fire", "water", "wood"]


def rows_of(lengths: list[int], seed: int = 0, **fields):
    """A batch of one supervised position a row, its first, as the data makes it."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids_BT = torch.randint(5, 43, (len(lengths), width), generator=generator)
    mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[:, 0] = torch.randint(0, 5, (len(lengths),), generator=generator)
    ids_BT = ids_BT.where(mask_BT == 1, 1)
    return batch_of(labels_BT, ids_BT=ids_BT, mask_BT=mask_BT, **fields)


@pytest.mark.parametrize("lengths", [[12, 12, 12], [16, 9, 3]], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_logits_are_huggingfaces_bit_for_bit(model_type, training, lengths):
    model = make(model_type, classes=CLASSES).train(training)
    data = rows_of(lengths)
    with torch.no_grad():
        torch.manual_seed(3)
        found_NC = positions_of(model, data).logits_NV
        torch.manual_seed(3)
        whole_NC = model(input_ids=data.ids_BT, attention_mask=data.mask_BT).logits
    assert found_NC.shape == (3, 5)
    assert torch.equal(found_NC, whole_NC)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_hidden_states_are_of_all_layers_and_the_last_is_what_the_head_reads(model_type):
    """Some families have a norm behind their last layer."""
    model, data = make(model_type, classes=CLASSES).eval(), rows_of([16, 9, 3])
    with torch.no_grad():
        found = positions_of(model, data, states=True)
        inputs = {"input_ids": data.ids_BT, "attention_mask": data.mask_BT}
        body = model.base_model(**inputs, output_hidden_states=True)
    assert len(found.states) == model.config.num_hidden_layers + 1 == 3
    real_BT = data.mask_BT == 1  # what stands on padding is nobody's
    for mine, theirs in zip(found.states, body.hidden_states, strict=True):
        assert mine.shape == (3, 16, model.config.hidden_size)
        torch.testing.assert_close(mine[real_BT], theirs[real_BT])
    assert torch.equal(body.hidden_states[-1], body.last_hidden_state)
    assert torch.equal(found.logits_NV, positions_of(model, data).logits_NV)
    assert positions_of(model, data).states is None


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_one_seed_drops_and_no_seed_does_not(model_type):
    """The case above says something only if dropout is there to be drawn alike."""
    model, data = make(model_type, classes=CLASSES), rows_of([12, 5])
    with torch.no_grad():
        drawn = [positions_of(model.train(), data).logits_NV for _ in range(2)]
        kept = [positions_of(model.eval(), data).logits_NV for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(*kept)


@pytest.mark.parametrize(("model_type", "types"), [("bert", 2), ("electra", 2), ("deberta-v2", 2)])
def test_a_second_text_is_told_by_types_where_there_are_any(model_type, types):
    model = make(model_type, classes=CLASSES, type_vocab_size=types).eval()
    data = rows_of([14, 9])
    types_BT = ((torch.arange(14) >= 5) & (data.mask_BT == 1)).long()
    typed = rows_of([14, 9], types_BT=types_BT)
    with torch.no_grad():
        found_NC = positions_of(model, typed).logits_NV
        inputs = {"input_ids": data.ids_BT, "attention_mask": data.mask_BT}
        whole_NC = model(**inputs, token_type_ids=types_BT).logits
        assert not torch.equal(found_NC, positions_of(model, data).logits_NV)
    assert torch.equal(found_NC, whole_NC)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "modernbert", "gpt2", "llama"])
def test_a_model_without_types_is_given_none(model_type):
    more = {"type_vocab_size": 1} if model_type == "roberta" else {}
    model = make(model_type, classes=CLASSES, **more).eval()
    typed = rows_of([14, 9], types_BT=torch.ones(2, 14, dtype=torch.long))
    with torch.no_grad():
        plain = positions_of(model, rows_of([14, 9])).logits_NV
        assert torch.equal(positions_of(model, typed).logits_NV, plain)


def test_types_go_with_the_rows():
    types_BT = torch.arange(3)[:, None].expand(3, 12).clone()
    data = rows_of([12, 12, 12], types_BT=types_BT)
    assert data.to(torch.device("cpu")).types_BT.equal(types_BT)
    assert data.select(torch.tensor([2, 0])).types_BT.equal(types_BT[[2, 0]])


def _loss(model, data):
    rows = positions_of(model, data)
    return torch.nn.functional.cross_entropy(rows.logits_NV, rows.labels_N)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_every_parameter_has_a_gradient(model_type):
    model = make(model_type, classes=CLASSES)
    _loss(model, rows_of([16, 9, 3])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert projection_of(model).weight.grad.any(1).all()  # of each class


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_the_config_names_the_classes(model_type):
    model = make(model_type, classes=CLASSES)
    config = model.config
    assert config.id2label == dict(enumerate(CLASSES)) and config.num_labels == 5
    assert config.label2id["fire"] == 2
    assert config.pad_token_id == 1
    counted = parameter_count(config, "model", "classification")
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_settings_are_looked_at_without_a_model(model_type):
    how = {"objective": "classification", "block_size": BLOCK}
    check_random(settings(model_type), **how, where="model")
    with pytest.raises(ConfigError, match=r"max_position_embeddings: 32 are too few"):
        check_random(settings(model_type), **how | {"block_size": 40}, where="model")


def test_numbers_are_of_one_column():
    config = make("bert", classes=[]).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_a_mean_of_hidden_states_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^model\.config\.classifier_pooling: 'mean', but a cla"):
        make("modernbert", classes=CLASSES, classifier_pooling="mean")
    make("modernbert", classifier_pooling="mean")  # as a masked LM it reads no class


def test_a_type_without_a_head_for_classes_is_refused_by_name():
    config = AutoConfig.for_model("albert")
    with pytest.raises(ConfigError, match=r"^x: a albert is a masked LM, .* ones are bert, robert"):
        head_of(config, "classification", "x")


def test_the_number_of_classes_is_not_the_settings():
    with pytest.raises(ConfigError, match=r"^model\.config\.num_labels: comes from the data$"):
        make("bert", classes=CLASSES, num_labels=3)


# Loading.


def _lm_folder(folder, cls, model_type):
    """A masked LM as transformers stores it, every parameter random."""
    torch.manual_seed(5)
    model = cls(make(model_type).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("cls", "model_type", "kept", "drawn"),
    [
        (BertForMaskedLM, "bert", "bert.encoder", {"bert.pooler.dense", "classifier"}),
        (RobertaForMaskedLM, "roberta", "roberta.encoder",
         {"classifier.dense", "classifier.out_proj"}),
        (ModernBertForMaskedLM, "modernbert", "head.", {"classifier"}),
    ],
)  # fmt: skip
def test_an_encoder_gets_a_head_of_the_seed(tmp_path, cls, model_type, kept, drawn, capsys):
    theirs = _lm_folder(tmp_path, cls, model_type).state_dict()
    chosen = Model(path=str(tmp_path))
    how = {"model_type": model_type, "classes": CLASSES}
    with pytest.raises(ConfigError, match=r"^model\.path: weights are missing: .*classifier"):
        make(chosen, **how)
    mine = make(chosen, **how, new_head=True, seed=7)
    state = mine.state_dict()
    weights = {n for n in state if n.endswith(".weight") and n.removesuffix(".weight") in drawn}
    assert len(weights) == len(drawn)
    for name, value in state.items():
        if name.rpartition(".")[0] not in drawn:
            assert torch.equal(value, theirs[name]), name
    assert any(name.startswith(kept) for name in state)
    said = capsys.readouterr().out
    assert "no head for classes there; random weights for" in said and "left out" in said
    random = make(model_type, classes=CLASSES, seed=7).state_dict()
    other = make(chosen, **how, new_head=True, seed=8).state_dict()
    for name in weights:
        assert torch.equal(state[name], random[name])
        assert not torch.equal(state[name], other[name])


def test_a_body_alone_is_an_encoder_too(tmp_path):
    """As encoders of sentences are stored: without the body's prefix, with its pooler."""
    torch.manual_seed(5)
    body = BertModel(make("bert").config)
    body.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    chosen = Model(path=str(tmp_path))
    state = make(chosen, model_type="bert", classes=CLASSES, new_head=True).bert.state_dict()
    for name, value in body.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_stored_head_is_of_the_same_classes_in_the_same_order(tmp_path):
    model = make("bert", classes=CLASSES, seed=3)
    export(model, tokenizer(), tmp_path / "export", card={})
    chosen = Model(path=str(tmp_path / "export"))
    how = {"model_type": "bert", "new_head": True}
    assert fingerprints(make(chosen, classes=CLASSES, **how)) == fingerprints(model)
    text = r"^model\.path: its head is for the 5 classes air, .*; those of the data, in order, are "
    for others in (CLASSES[::-1], CLASSES[:3]):
        with pytest.raises(ConfigError, match=text + f"{len(others)}: {others[0]}"):
            make(chosen, classes=others, **how)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_an_export_is_read_by_the_auto_class(tmp_path, model_type):
    model = make(model_type, classes=CLASSES, seed=3).eval()
    export(model, tokenizer(), tmp_path / "export", card={})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    data = rows_of([16, 9, 3])
    with torch.no_grad():
        theirs = loaded(input_ids=data.ids_BT, attention_mask=data.mask_BT).logits
        assert torch.equal(theirs, positions_of(model, data).logits_NV)


def _sharded(rank, folder):
    del rank
    built = {name: make(name, ds=zero3(2), classes=CLASSES) for name in CLASSIFIERS}
    loaded = make(
        Model(path=folder), model_type="bert", ds=zero3(2), classes=CLASSES, new_head=True
    )
    return {name: fingerprints(model) for name, model in built.items()}, fingerprints(loaded)


def test_a_sharded_model_is_the_same(tmp_path):
    _lm_folder(tmp_path, BertForMaskedLM, "bert")
    expected = {name: fingerprints(make(name, classes=CLASSES)) for name in CLASSIFIERS}
    chosen = Model(path=str(tmp_path))
    whole = fingerprints(make(chosen, model_type="bert", classes=CLASSES, new_head=True))
    for built, loaded in run_ranks(_sharded, str(tmp_path)):
        assert built == expected
        assert loaded == whole
