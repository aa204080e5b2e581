"""Scores by dropout: the original's numbers; equal for any number of rows and passes at once, for
every family; refused where nothing drops."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dskd.batch import IGNORE, Batch
from dskd.errors import ConfigError
from dskd.models.families import positions_of
from dskd.stores.dropout_scores import (
    DropoutScorer,
    dropout_fields,
    drops_by_row,
    folded,
    refuse_equal_passes,
    refuse_without_dropout,
    with_dropout,
)
from tests.batches import batch_of
from tests.methods.panels import cases, close, named, tensor

VOCABULARY, CLASSES, ROWS, WIDTH = 40, 3, 5, 12
BY_ROW = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "gpt2"]
WITHOUT = ["llama", "mistral", "qwen2", "qwen3", "modernbert"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": VOCABULARY, "pad_token_id": 1, "num_labels": CLASSES,
}  # fmt: skip
FIELDS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 8},
    "modernbert": {"classifier_pooling": "cls", "bos_token_id": 0, "cls_token_id": 0},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}
ANOTHER = {"num_key_value_heads": 1, "head_dim": 8}


def config_of(kind, **fields):
    sizes = SIZES | FIELDS.get(kind, {}) | (ANOTHER if kind in WITHOUT[:4] else {})
    if kind == "distilbert":
        sizes = {name: v for name, v in sizes.items() if not name.startswith(("hidden_s", "num_h"))}
    return AutoConfig.for_model(kind, **sizes, **fields)


def classifier(config):
    """A model with weights large enough that dropout is seen."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def rows_of(lengths=(12, 3, 9, 5, 7)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask_BT = (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).long()
    ids_BT = torch.randint(5, VOCABULARY, (len(lengths), WIDTH), generator=generator)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[:, 0] = 0
    ids_BT = ids_BT.where(mask_BT == 1, 1)
    return batch_of(labels_BT, ids_BT=ids_BT, mask_BT=mask_BT, row_ids_B=torch.arange(70, 75))


def cut(batch, rows, width=None):
    """Some rows, as wide as the longest of them."""
    some = batch.select(torch.tensor(rows))
    width = int(some.lengths_B.max()) if width is None else width
    names = ("ids_BT", "mask_BT", "labels_BT")
    narrow = {name: getattr(some, name)[:, :width] for name in names}
    return Batch.of(row_ids_B=some.row_ids_B, domains_B=some.domains_B, **narrow)


def scorer(model, *, passes=6, at_once=6, seed=4):
    def forward(batch):
        return positions_of(model, batch).logits_NV

    return DropoutScorer(model, forward, passes=passes, at_once=at_once, seed=seed)


def joined(parts):
    return [torch.cat(values) for values in zip(*(part[:4] for part in parts), strict=True)]


@pytest.mark.parametrize("at_once", [1, 3, 4])
@pytest.mark.parametrize("case", cases("mc_scores"), ids=named)
def test_scores_of_the_original(case, at_once):
    """``1 - H / ln C`` of the mean over passes; in one chunk or in several."""
    found = []
    for passes in case["inputs"]["teacher_logits_k"]:
        logits_KNC = tensor(passes)
        chunks = logits_KNC.split(at_once)
        scores = folded(logits_KNC[0], chunks, len(logits_KNC))
        found.append(1 - scores.entropy_N / np.log(logits_KNC.shape[-1]))
        entropy_KN = torch.special.entr(logits_KNC.softmax(-1)).sum(-1)
        torch.testing.assert_close(scores.mean_entropy_N, entropy_KN.mean(0))
        assert (scores.entropy_N >= scores.mean_entropy_N).all()
        assert scores.differ
    close(torch.stack(found, 1), case["expect"]["scores"], case)


def test_passes_that_are_all_alike_are_one_pass():
    logits_NC = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    alike = folded(logits_NC, [logits_NC.expand(4, 5, 3), logits_NC.expand(3, 5, 3)], 7)
    torch.testing.assert_close(alike[:4], folded(logits_NC, [logits_NC[None]], 1)[:4])
    assert not alike.differ


@pytest.mark.parametrize("kind", BY_ROW)
def test_scores_do_not_depend_on_what_is_scored_together(kind):
    """Nor on padding and passes at a time; and dropout reaches every part of the model."""
    model, batch = classifier(config_of(kind)), rows_of()
    whole = scorer(model)(batch)
    ways = {
        "alone, two passes at a time": (2, [[0], [1], [2], [3], [4]]),
        "in another order, pass by pass": (1, [[0, 2], [1, 3, 4]]),
    }
    order = {"in another order, pass by pass": [0, 2, 1, 3, 4]}
    for way, (at_once, groups) in ways.items():
        ask = scorer(model, at_once=at_once)
        found = joined([ask(cut(batch, rows)) for rows in groups])
        wanted = [each[order.get(way, range(ROWS))] for each in whole[:4]]
        torch.testing.assert_close(found[1:], wanted[1:], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[0], wanted[0], atol=3e-6, rtol=1e-6)  # logits of about 5
    plain_NC = whole.logits_NC.softmax(-1)
    assert (whole.mean_NC - plain_NC).abs().max() > 1e-2
    assert (scorer(model, seed=5)(batch).mean_NC - whole.mean_NC).abs().max() > 1e-3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", BY_ROW)
def test_dropout_of_attention_alone_is_seen(kind):
    """It is in no module of its own that could be put into train mode alone."""
    config = with_dropout(config_of(kind), 0.0)
    name = {"distilbert": "attention_dropout", "gpt2": "attn_pdrop"}
    setattr(config, name.get(kind, "attention_probs_dropout_prob"), 0.5)
    scores = scorer(classifier(config))(rows_of())
    assert scores.differ
    assert (scores.entropy_N > scores.mean_entropy_N).all()


@pytest.mark.parametrize("kind", BY_ROW)
def test_the_mean_is_that_of_the_model_in_train_mode(kind):
    """Many passes by torch's own dropout have the same mean."""
    model, batch = classifier(config_of(kind)), rows_of()
    found_NC = scorer(model, passes=600, at_once=200)(batch).mean_NC
    torch.manual_seed(0)
    many = 600
    ids_BT, mask_BT = (x.repeat(many, 1) for x in (batch.ids_BT, batch.mask_BT))
    with torch.no_grad():
        logits = model.train()(input_ids=ids_BT, attention_mask=mask_BT).logits
    passes_KNC = logits.softmax(-1).unflatten(0, (many, ROWS))
    error_NC = (passes_KNC.var(0) * 2 / many).sqrt()
    assert ((passes_KNC.mean(0) - found_NC).abs() < 4.5 * error_NC + 1e-4).all()


def test_each_pass_of_a_chunk_is_the_pass_alone():
    model, batch = classifier(config_of("bert")), rows_of()
    wanted = [scorer(model, passes=k + 1, at_once=1)(batch).mean_NC * (k + 1) for k in (1, 2, 3)]
    sums = [scorer(model, passes=k + 1, at_once=k + 1)(batch).mean_NC * (k + 1) for k in (1, 2, 3)]
    torch.testing.assert_close(sums, wanted, atol=1e-5, rtol=0)
    assert (wanted[1] - wanted[0] - (wanted[2] - wanted[1])).abs().max() > 1e-3


def test_one_pass_is_one_without_dropout():
    model, batch = classifier(config_of("bert")), rows_of()
    scores = scorer(model, passes=1)(batch)
    with torch.no_grad():
        logits_NC = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    torch.testing.assert_close(scores.logits_NC, logits_NC)
    assert torch.equal(scores.mean_NC, scores.logits_NC.softmax(-1))
    assert torch.equal(scores.entropy_N, scores.mean_entropy_N)
    refuse_equal_passes(scores, 1, "teacher")


def test_positions_and_columns_go_with_the_copies():
    """Rows without a supervised position, and whatever a reader added."""
    batch = rows_of()
    labels_BT = batch.labels_BT.clone()
    labels_BT[1, 0], labels_BT[3, 0], labels_BT[3, 4] = IGNORE, IGNORE, 2
    columns = {"of_rows": torch.arange(5.0)[:, None], "of_places": torch.arange(4)}
    seen = []

    class Model(nn.Module):
        config = AutoConfig.for_model("deberta-v2")

    def forward(copies):
        seen.append(copies)
        return copies.positions_N[:, None].float() * torch.randn(1, 2)

    types_BT = torch.arange(batch.ids_BT.numel()).view_as(batch.ids_BT) % 2
    batch = batch_of(labels_BT, ids_BT=batch.ids_BT, types_BT=types_BT, columns=columns)
    DropoutScorer(Model(), forward, passes=5, at_once=3, seed=0)(batch)
    assert [len(each.row_ids_B) for each in seen] == [5, 15, 10]
    for copies in seen[1:]:
        again = Batch.of(
            row_ids_B=copies.row_ids_B, domains_B=copies.domains_B, ids_BT=copies.ids_BT,
            mask_BT=copies.mask_BT, labels_BT=copies.labels_BT,
        )  # fmt: skip
        for name in ("positions_N", "labels_N", "lengths_B", "counts_B"):
            assert torch.equal(getattr(copies, name), getattr(again, name)), name
        assert torch.equal(copies.row_ids_B[:5], batch.row_ids_B)
        assert torch.equal(copies.types_BT[5:10], types_BT)
        assert torch.equal(copies.columns["of_places"][4:8], batch.columns["of_places"])
        assert copies.columns["of_rows"].shape == (len(copies.row_ids_B), 1)


def test_deberta_is_seeded_by_the_pass():
    """The same rows together give the same, whatever was drawn before; others would not."""
    config = config_of("deberta-v2")
    assert not drops_by_row(config) and all(drops_by_row(config_of(kind)) for kind in BY_ROW)
    model, batch = classifier(config), rows_of()
    torch.manual_seed(9)
    first = scorer(model)(batch)
    after = torch.rand(1)
    again = scorer(model)(batch)
    torch.manual_seed(9)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.differ
    assert not torch.equal(scorer(model, seed=5)(batch).mean_NC, first.mean_NC)
    assert not torch.equal(scorer(model, at_once=2)(batch).mean_NC, first.mean_NC)


def test_modes_are_put_back_whatever_happens():
    model, batch = classifier(config_of("bert")), rows_of()
    model.bert.pooler.train()
    modes = [module.training for module in model.modules()]
    scorer(model)(batch)
    assert [module.training for module in model.modules()] == modes

    def fails(copies):
        if len(copies.row_ids_B) > ROWS:
            raise RuntimeError("no memory")
        return torch.zeros(ROWS, 2)

    with pytest.raises(RuntimeError, match="no memory"):
        DropoutScorer(model, fails, passes=4, at_once=4, seed=0)(batch)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("kind", WITHOUT)
def test_models_without_dropout_are_refused_by_name(kind):
    config = config_of(kind)
    told = rf"teacher\.x: a {kind} without dropout \(.*attention_dropout 0.*whose 16 passes"
    with pytest.raises(ConfigError, match=told):
        refuse_without_dropout(config, 16, "teacher.x")
    refuse_without_dropout(config, 1, "teacher.x")
    refuse_without_dropout(with_dropout(config, 0.2), 16, "teacher.x")
    assert scorer(classifier(with_dropout(config, 0.2)))(rows_of()).differ
    silent = scorer(classifier(config))(rows_of())
    with pytest.raises(ConfigError, match=r"teacher\.x: 6 passes with dropout all gave the same"):
        refuse_equal_passes(silent, 6, "teacher.x")


def test_probabilities_of_a_config():
    """Heads that classify nothing are left out: with these alone, nothing would drop."""
    assert dropout_fields(config_of("bert")) == {
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1
    }  # fmt: skip
    names = {"dropout", "attention_dropout", "seq_classif_dropout"}
    assert dropout_fields(config_of("distilbert")).keys() == names
    assert dropout_fields(config_of("gpt2")).keys() == {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    for kind in (*BY_ROW, "deberta-v2"):
        refuse_without_dropout(config_of(kind), 16, "teacher")
        config = config_of(kind)
        before = dropout_fields(config)
        assert set(dropout_fields(with_dropout(config, 0.25)).values()) == {0.25}
        assert dropout_fields(config) == before
        with pytest.raises(ConfigError, match="set passes to 1"):
            refuse_without_dropout(with_dropout(config, 0.0), 2, "teacher")
