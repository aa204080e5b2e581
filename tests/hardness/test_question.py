"""Self-questioning: the original's scores, a real model's, and the same bytes whatever happens."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dskd.batch import Positions
from dskd.data.loader import make_batch
from dskd.data.prepared import open_prepared
from dskd.data.tokenizers import special_ids
from dskd.errors import NonFiniteError, StoreError
from dskd.hardness import question as question_module
from dskd.hardness.question import question, token_scores
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness, describe_scores
from dskd.settings.data import Data, HardTokens, TextSource
from dskd.stores.store import shard_path
from tests.data.conftest import make_corpus
from tests.data.row_batches import PlainRows
from tests.data.test_views import tokenizer_of
from tests.goldens import golden
from tests.heads import small_chunks
from tests.models.tiny import zero3
from tests.ranks import run_ranks
from tests.stores.caches import files
from tests.stores.real import fill_while_another_does, no_model, prepared_folders, random_model

STAGE1 = golden("self_evolution")["stage1"]
KINDS = [("masked", "token"), ("masked", "mask"), ("causal", "token")]
PRINTS = {"model": "M", "tokenizer": "V", "data": "D", "blocking": "B", "scoring": "S"}
CPU = torch.device("cpu")
NEAR = {"rtol": 1e-3, "atol": 1e-4}  # float16 to its last bit


def masking_of(**changes):
    return HardTokens(
        kind="hard_tokens", **{"rows_per_shard": 16, "micro_batch": 5, "probability": 0.3} | changes
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared rows, by objective."""
    where = tmp_path_factory.mktemp("data")
    make_corpus(where / "a.txt", 60)
    return prepared_folders(where, [TextSource(kind="text", path=str(where / "a.txt"))])


def model_of(prepared, objective, ds=None):
    """A random model with a column of padding, far from uniform."""
    return random_model(prepared, objective, ds, vocab_multiple=7, initializer_range=0.3)


def run_question(folder, prepared, objective, *, ds=None, masking=None, model=None, **options):
    masking = masking or masking_of()
    view = scoring_view(Data(objective=objective, masking=masking), prepared.tokenizer, 1)
    model = model or (lambda: model_of(prepared, objective, ds))
    options = {"fingerprints": PRINTS, "device": CPU} | options
    question(masking, model, prepared, view, folder, **options)
    return view


def everything(folder, prepared):
    row_ids = np.arange(len(prepared.train))
    return Hardness(folder, PRINTS).read(prepared.train.rows(row_ids, row_ids * 0))


# ---- the original's numbers ----------------------------------------------------------------------


def golden_forward(batch):
    logits_RTV = torch.tensor(STAGE1["logits"])
    return logits_RTV[batch.row_ids_B][batch.supervised_BT]


def through_a_head(logits_NV, labels_N):
    """The positions of a model whose head changes nothing: its hidden states are the logits."""
    weight_VV = torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)
    return Positions(logits_NV, lambda hidden_ND, use: use(hidden_ND, weight_VV, None), labels_N)


@pytest.fixture
def score_golden(monkeypatch):
    """Fills the store of the golden rows by a forward pass that stands for a model's."""

    def score(folder, prepared, forward=golden_forward):
        def positions_of(model, batch):
            del model
            return through_a_head(forward(batch), batch.labels_N)

        monkeypatch.setattr(question_module, "positions_of", positions_of)
        ids_RT = np.array(STAGE1["tokens"])
        rows = PlainRows(ids_RT, (ids_RT != STAGE1["pad"]).sum(1), "golden")
        prepared = replace(prepared, train=rows, tokenizer=tokenizer_of(8))
        masking = masking_of(rows_per_shard=3, micro_batch=2)
        run_question(folder, prepared, "masked", masking=masking, model=torch.nn.Identity)
        return prepared

    return score


def test_golden_scores(tmp_path, folders, score_golden):
    """Every place of the four rows, special tokens too, at every threshold."""
    prepared = score_golden(tmp_path / "s", open_prepared(folders["masked"]))
    nll_BT, wrong_BT = everything(tmp_path / "s", prepared)
    expected = STAGE1["expected"]
    want_BT = np.array(expected["token_nll"])
    asked_BT = np.array(STAGE1["tokens"]) != STAGE1["pad"]
    assert asked_BT.sum() == expected["sample_size"] == 20
    assert np.isnan(nll_BT[~asked_BT]).all()
    np.testing.assert_allclose(nll_BT[asked_BT], want_BT[asked_BT], rtol=1 / 2048, atol=3e-8)
    assert nll_BT[asked_BT].sum() == pytest.approx(expected["loss_sum"], rel=1 / 2048)

    def places(chosen_BT):
        return [np.flatnonzero(row_T).tolist() for row_T in chosen_BT]

    assert places(nll_BT > STAGE1["threshold"]) == expected["hard_confidence"]
    assert places(wrong_BT) == expected["hard_correctness"]
    for threshold, want in STAGE1["threshold_sweep"].items():
        assert places(nll_BT > float(threshold)) == want, threshold


def test_golden_scores_before_rounding():
    logits_NV = torch.tensor(STAGE1["logits"]).flatten(0, 1)
    labels_N = torch.tensor(STAGE1["tokens"]).flatten()
    found = token_scores(through_a_head(logits_NV, labels_N), 8)
    real_N = labels_N != STAGE1["pad"]
    want_N = torch.tensor(STAGE1["expected"]["token_nll"]).flatten()
    assert found.nll_N.dtype == torch.float32 and found.wrong_N.dtype == torch.bool
    torch.testing.assert_close(found.nll_N[real_N], want_N[real_N], rtol=0, atol=1e-6)
    predictions_N = torch.tensor(STAGE1["expected"]["predictions"]).flatten()
    assert torch.equal(found.wrong_N[real_N], (predictions_N != labels_N)[real_N])


def test_a_tie_is_not_wrong():
    found = token_scores(through_a_head(torch.tensor([[1.0, 1.0, 0.0]] * 3), torch.arange(3)), 3)
    assert found.wrong_N.tolist() == [False, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(tmp_path, folders, value, score_golden):
    def forward(batch):
        logits_NV = golden_forward(batch)
        row_N = batch.row_ids_B.repeat_interleave(batch.supervised_BT.sum(1))
        logits_NV[row_N == 2, 5] = value
        return logits_NV

    with pytest.raises(NonFiniteError, match="logits are not finite in row 2"):
        score_golden(tmp_path / "s", open_prepared(folders["masked"]), forward)


def test_a_token_that_the_model_rules_out_is_as_hard_as_can_be(tmp_path, folders, score_golden):
    def forward(batch):
        logits_NV = golden_forward(batch)
        logits_NV[:, 5] = -1e30  # as good as ruled out; the head would make NaN of infinities
        return logits_NV

    prepared = score_golden(tmp_path / "s", open_prepared(folders["masked"]), forward)
    nll_BT, wrong_BT = everything(tmp_path / "s", prepared)
    fives_BT = np.array(STAGE1["tokens"]) == 5
    assert (nll_BT[fives_BT] == 65504).all() and wrong_BT[fives_BT].all()
    assert (nll_BT[~fives_BT & ~np.isnan(nll_BT)] < 10).all()


# ---- a real model --------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "shown"), KINDS)
def test_store_holds_what_the_model_says(tmp_path, folders, objective, shown):
    """Against HuggingFace's own forward of one row at a time, with all its logits."""
    prepared = open_prepared(folders[objective])
    masking = masking_of(shown=shown)
    model = model_of(prepared, objective)
    every = np.arange(len(prepared.train))
    ids_BT, lengths_B = prepared.train.rows(every, every * 0)[3:5]
    if objective == "masked":  # it guesses one token right; llama does so untrained
        model.lm_head.bias.data[np.bincount(ids_BT[ids_BT > 5]).argmax()] += 9
    fill = partial(run_question, tmp_path / "s", prepared, objective)
    view = fill(masking=masking, model=lambda: model)
    assert not model.training
    nll_BT, wrong_BT = everything(tmp_path / "s", prepared)
    size = len(prepared.tokenizer)
    assert model.config.vocab_size == 301 > size == 300
    want_BT, want_wrong_BT = np.full(nll_BT.shape, np.nan), np.zeros(wrong_BT.shape, bool)
    for row in range(0, len(prepared.train), 3):
        for draw in range(view.draws):
            batch = make_batch(prepared.train, view, np.array([row]), np.array([draw]))
            with torch.no_grad():
                logits_TV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits[0]
            places = batch.supervised_BT[0].nonzero()[:, 0].numpy()
            logits_NV, labels_N = logits_TV[places, :size], batch.labels_BT[0, places]
            want_BT[row, places] = cross_entropy(logits_NV, labels_N, reduction="none")
            want_wrong_BT[row, places] = logits_NV.argmax(1) != labels_N
    np.testing.assert_allclose(nll_BT[::3], want_BT[::3], **NEAR)
    np.testing.assert_array_equal(wrong_BT[::3], want_wrong_BT[::3])
    assert 0 < (~wrong_BT & ~np.isnan(nll_BT)).sum() < wrong_BT.sum()
    asked = (~special_ids(prepared.tokenizer)[ids_BT]).sum() if shown == "mask" else lengths_B.sum()
    asked -= len(lengths_B) if objective == "causal" else 0
    assert (~np.isnan(nll_BT)).sum() == describe_scores(tmp_path / "s")["tokens"] == asked


@pytest.mark.parametrize(("objective", "shown"), KINDS)
def test_chunks_do_not_matter(tmp_path, folders, monkeypatch, objective, shown):
    prepared = open_prepared(folders[objective])
    masking = masking_of(shown=shown)
    run_question(tmp_path / "one", prepared, objective, masking=masking)
    small_chunks(monkeypatch, 7)
    run_question(tmp_path / "seven", prepared, objective, masking=masking)
    one, seven = (everything(tmp_path / name, prepared) for name in ("one", "seven"))
    np.testing.assert_allclose(one[0], seven[0], **NEAR)
    np.testing.assert_array_equal(one[1], seven[1])


def test_half_precision_logits_are_summed_in_float32():
    """Of bfloat16 logits; a log-softmax in bfloat16 would be off by up to 0.03 here."""
    logits_NV = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels_N = torch.arange(50) * 7
    want_N = cross_entropy(logits_NV.double(), labels_N, reduction="none").float()
    found = token_scores(through_a_head(logits_NV, labels_N), 3000)
    torch.testing.assert_close(found.nll_N, want_N, rtol=1e-6, atol=1e-6)


# ---- the same bytes ------------------------------------------------------------------------------


def _question_rank(rank, folder, prepared_folder, objective, ds, masking):
    del rank
    run_question(folder, open_prepared(prepared_folder), objective, masking=masking, ds=ds)


def test_a_sharded_model_says_the_same(tmp_path, folders):
    """Of two ranks of ZeRO-3, whose shards in a round differ: 60 rows are 3 passes, 23 are one."""
    prepared = open_prepared(folders["masked"])
    assert len(prepared.train) == 143
    masking = masking_of(shown="mask", probability=0.5, rows_per_shard=60, micro_batch=25)
    run_question(tmp_path / "one", prepared, "masked", masking=masking)
    run_ranks(_question_rank, tmp_path / "two", folders["masked"], "masked", zero3(2), masking)
    one, two = (everything(tmp_path / name, prepared) for name in ("one", "two"))
    np.testing.assert_allclose(two[0], one[0], **NEAR)
    np.testing.assert_array_equal(two[1], one[1])


def test_a_complete_store_needs_no_model(tmp_path, folders, monkeypatch):
    prepared = open_prepared(folders["masked"])
    said = []
    monkeypatch.setattr("dskd.stores.fill.say", said.append)
    run_question(tmp_path / "s", prepared, "masked")
    assert f"holds the NLL of {prepared.train.tokens:,} tokens in 3.74 bytes" in said[-1]
    before = files(tmp_path / "s")
    other = masking_of(rows_per_shard=7)
    run_question(tmp_path / "s", prepared, "masked", masking=other, model=no_model)
    assert said[-1] == f"question: {tmp_path / 's'} is complete"
    assert files(tmp_path / "s") == before


def test_while_another_job_asks_one_waits(tmp_path, folders):
    """Two runs that name one store: the second needs no model, and finds the store whole."""
    prepared = open_prepared(folders["masked"])
    fill = partial(run_question, tmp_path / "s", prepared, "masked")
    fill_while_another_does(fill, lambda: model_of(prepared, "masked"))
    Hardness(tmp_path / "s", PRINTS)


def test_a_foreign_store_is_refused_by_name(tmp_path, folders):
    prepared = open_prepared(folders["masked"])
    run_question(tmp_path / "s", prepared, "masked")
    shard_path(tmp_path / "s", 0).unlink()
    for name in PRINTS:
        other = {**PRINTS, name: "other"}
        with pytest.raises(StoreError, match=f"fingerprints.{name} is '.' there and 'other' here"):
            run_question(tmp_path / "s", prepared, "masked", fingerprints=other)
    with pytest.raises(StoreError, match=r"settings.shown is 'token' there and 'mask' here"):
        run_question(tmp_path / "s", prepared, "masked", masking=masking_of(shown="mask"))
