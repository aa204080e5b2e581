"""Masks of hard tokens by their numbers, from real stores."""

from pathlib import Path

import numpy as np
import pytest

from dskd.batch import IGNORE
from dskd.data.loader import Loader
from dskd.data.views import MaskedView, at_random
from dskd.errors import ConfigError
from dskd.hardness.criterion import select
from dskd.hardness.masks import HARD_LABELS, HardCausalView, HardView, hard_view
from dskd.hardness.scoring import ScoringPlan, ScoringView
from dskd.hardness.store import Hardness, encode, hardness_spec
from dskd.settings.data import Data, HardTokens
from tests.data.row_batches import PlainRows
from tests.data.test_views import SIZE, SPECIAL, TOKENIZER, rows_of, tokenizer_of
from tests.stores.caches import write_store

ROWS, WIDTH = 400, 64


def store_of(folder, rows, nll_RT, wrong_RT=None, shown="token"):
    """A hardness store that holds given answers for every place that is asked about."""
    plan = ScoringPlan(shown)
    masking = HardTokens(kind="hard_tokens", rows_per_shard=150)
    spec = hardness_spec(masking, rows, ScoringView(plan, TOKENIZER), {"data": "rows"})

    def content(draw, row_ids):
        asked_BT = plan.draw_of(rows.rows(row_ids, row_ids * 0)) == draw
        wrong_BT = np.zeros_like(asked_BT) if wrong_RT is None else wrong_RT[row_ids]
        nll_N = nll_RT[row_ids][asked_BT].astype(np.float32)
        return asked_BT.sum(1), encode(nll_N, wrong_BT[asked_BT])

    write_store(folder, spec, content)
    return Hardness(folder, {"data": "rows"})


ALL = PlainRows(*rows_of(ROWS, WIDTH, seed=1))
NLL_RT = np.random.default_rng(2).exponential(0.2, (ROWS, WIDTH))
NLL_RT = NLL_RT.astype(np.float16).astype(np.float64)  # what a store can hold
WRONG_RT = np.random.default_rng(3).random((ROWS, WIDTH)) < 0.25
MASKABLE_RT = ~np.isin(ALL.ids_RT, SPECIAL)


@pytest.fixture(scope="module")
def hardness(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store"), ALL, NLL_RT, WRONG_RT)


def view_of(
    hardness, objective="masked", seed=1, scores="S", rows=ALL, tokenizer=TOKENIZER, **masking
):
    data = Data(objective=objective, masking=HardTokens(kind="hard_tokens", **masking))
    hardness_of = hardness if callable(hardness) else lambda _: hardness
    return hard_view(data, tokenizer, seed, hardness_of, scores=scores, rowset=rows)


def seen(view, epoch=0, row_ids=None):
    row_ids = np.arange(ROWS) if row_ids is None else row_ids
    return view(ALL.rows(row_ids, np.full(len(row_ids), epoch)))


# Which tokens


def test_select_against_a_loop():
    random = np.random.default_rng(4)
    shape = (300, 40)
    hard_BT, maskable_BT = random.random(shape) < 0.3, random.random(shape) < 0.9
    nll_BT = random.integers(0, 6, shape).astype(np.float32)  # many ties
    nll_BT[~maskable_BT] = np.nan
    keys_BT = random.integers(0, 2**63, shape).astype(np.uint64)
    least_B = random.integers(0, 20, 300)
    most_B = least_B + random.integers(0, 20, 300)
    chosen_BT = select(hard_BT, nll_BT, maskable_BT, least_B, most_B, keys_BT)
    for b in range(300):
        places = np.flatnonzero(maskable_BT[b]).tolist()
        hard = [t for t in places if hard_BT[b, t]]
        hard.sort(key=lambda t, b=b: (-nll_BT[b, t], keys_BT[b, t]))
        others = sorted(set(places) - set(hard), key=lambda t, b=b: keys_BT[b, t])
        want = hard[: most_B[b]]
        want += others[: max(least_B[b] - len(want), 0)]
        assert set(np.flatnonzero(chosen_BT[b]).tolist()) == set(want)


def test_equally_hard_tokens_are_chosen_evenly(tmp_path):
    rows = PlainRows(*(np.repeat(array[:1], ROWS, axis=0) for array in rows_of(1, WIDTH)))
    answers = store_of(tmp_path / "s", rows, np.full((ROWS, WIDTH), 3.0))
    view = view_of(answers, least=0.25, most=0.25, rows=rows)
    assert isinstance(view, HardView)
    row_ids = np.tile(np.arange(ROWS), 10)
    labels_BT = view(rows.rows(row_ids, np.repeat(np.arange(10), ROWS))).labels_BT
    rate_T = (labels_BT != IGNORE).mean(0)[1:63]
    assert abs(rate_T - 0.25).max() < 5 * (0.25 * 0.75 / len(row_ids)) ** 0.5


@pytest.mark.parametrize("metric", ["confidence", "correctness", "quantile"])
def test_unbounded_masks_are_exactly_the_hard_tokens(hardness, metric):
    view = view_of(hardness, metric=metric, threshold=0.3, quantile=0.25, least=0, most=1)
    hard_RT = {"confidence": NLL_RT > 0.3, "correctness": WRONG_RT}.get(metric)
    if metric == "quantile":
        nll_N = np.sort(NLL_RT[MASKABLE_RT])[::-1]
        cut = nll_N[len(nll_N) // 4]  # the first value that is not in the hardest quarter
        hard_RT = cut < NLL_RT
        share = hard_RT[MASKABLE_RT].mean()
        assert 0.24 < share <= 0.25 + 1e-9
        assert view.criterion.cut(0) == cut
    hard_RT = hard_RT & MASKABLE_RT
    assert 0.15 < hard_RT[MASKABLE_RT].mean() < 0.35
    for epoch in (0, 5):
        inputs_BT, labels_BT = seen(view, epoch)
        assert ((labels_BT != IGNORE) == hard_RT).all()
        assert (labels_BT[hard_RT] == ALL.ids_RT[hard_RT]).all()
        assert (inputs_BT[~hard_RT] == ALL.ids_RT[~hard_RT]).all()


def test_between_least_and_most(hardness):
    view = view_of(hardness, threshold=0.3, least=0.15, most=0.25)
    _, labels_BT = seen(view, epoch=3)
    chosen_RT = labels_BT != IGNORE
    hard_RT = (NLL_RT > 0.3) & MASKABLE_RT
    number_R, hard_R, c_R = chosen_RT.sum(1), hard_RT.sum(1), MASKABLE_RT.sum(1)
    few_R, many_R = hard_R < 0.15 * c_R - 1, hard_R > 0.25 * c_R + 1
    assert few_R.sum() > 10 and many_R.sum() > 50 and (~few_R & ~many_R).sum() > 50
    assert (number_R >= 0.15 * c_R - 1).all() and (number_R <= 0.25 * c_R + 1).all()
    assert chosen_RT[few_R][hard_RT[few_R]].all()  # all hard ones, and others
    assert (abs(number_R - 0.15 * c_R)[few_R] < 1).all()
    assert not (chosen_RT & ~hard_RT)[many_R].any()  # hard ones only, the hardest
    assert (abs(number_R - 0.25 * c_R)[many_R] < 1).all()
    for row in np.flatnonzero(many_R):
        left = NLL_RT[row][hard_RT[row] & ~chosen_RT[row]]
        assert NLL_RT[row][chosen_RT[row]].min() >= left.max()
    assert not (chosen_RT & ~MASKABLE_RT).any()


def test_without_hard_tokens_the_masks_are_the_random_ones(hardness):
    view = view_of(hardness, threshold=1000.0)
    plain = MaskedView(at_random(HardTokens(kind="hard_tokens")), TOKENIZER, 1)
    for epoch in (0, 7):
        for ours, theirs in zip(seen(view, epoch), seen(plain, epoch), strict=True):
            assert (ours == theirs).all()
    # and with hard tokens each row loses as many
    number_R = (seen(view_of(hardness, threshold=0.3))[1] != IGNORE).sum(1)
    assert (number_R == (seen(plain)[1] != IGNORE).sum(1)).all()


@pytest.mark.parametrize(("replacement", "share"), [("bert", 0.7), ("all_mask", 1.0)])
def test_replacement(hardness, replacement, share):
    masking = {"threshold": 0.1, "most": 1.0, "keep": 0.2, "replacement": replacement}
    inputs_BT, labels_BT = seen(view_of(hardness, **masking))
    chosen_BT = labels_BT != IGNORE
    total = chosen_BT.sum()
    assert total > 10_000
    error = 5 * (0.25 / total) ** 0.5 * (share < 1)
    assert abs((inputs_BT[chosen_BT] == SIZE - 1).mean() - share) <= error
    kept = 0.2 if replacement == "bert" else 0.0
    assert abs((inputs_BT[chosen_BT] == labels_BT[chosen_BT]).mean() - kept) <= error
    assert not np.isin(inputs_BT[chosen_BT], SPECIAL[:-1]).any()


@pytest.mark.parametrize("sampler", ["counter", "original"])
def test_a_mask_depends_on_its_own_row_epoch_and_seed_only(hardness, sampler):
    view = view_of(hardness, sampler=sampler, threshold=0.6)
    row_ids_B = np.random.default_rng(5).permutation(ROWS)
    epochs_B = row_ids_B % 3
    inputs_BT, labels_BT = view(ALL.rows(row_ids_B, epochs_B))
    for b in range(30):
        row = ALL.rows(row_ids_B[b : b + 1], epochs_B[b : b + 1])
        lengths_B = row.lengths_B
        alone = view(row._replace(tokens_BT=row.tokens_BT[:, : lengths_B[0]]))
        assert (alone[0][0] == inputs_BT[b, : lengths_B[0]]).all()
        assert (alone[1][0] == labels_BT[b, : lengths_B[0]]).all()
    other = seen(view_of(hardness, sampler=sampler, threshold=0.6, seed=2))
    assert (seen(view)[0] != other[0]).any()
    assert (seen(view)[0] != seen(view, epoch=1)[0]).any()
    drawn = view_of(hardness, sampler=sampler, threshold=0.6, draws=3)
    assert drawn.draws == 3 and view.draws is None
    assert (seen(drawn, epoch=4)[0] == seen(view, epoch=1)[0]).all()


# ScoringPlan again


def test_refresh_reads_the_store_of_the_epoch(tmp_path, hardness):
    later = store_of(tmp_path / "later", ALL, NLL_RT[::-1])
    opened = []

    def hardness_of(refresh_index):
        opened.append(refresh_index)
        return {0: hardness, 1: later}[refresh_index]

    settings = {"metric": "quantile", "quantile": 0.2, "least": 0, "most": 1, "refresh": 2}
    view = view_of(hardness_of, **settings)
    assert not opened  # nothing before there are rows to mask
    row_ids_B = np.arange(ROWS)
    epochs_B = row_ids_B % 4  # a batch over the border
    _, labels_BT = view(ALL.rows(row_ids_B, epochs_B))
    assert set(opened) == {0, 1}
    for nll_RT, refresh_index in ((NLL_RT, 0), (NLL_RT[::-1], 1)):
        hard_RT = (nll_RT > view.criterion.cut(refresh_index)) & MASKABLE_RT
        here_R = epochs_B // 2 == refresh_index
        assert ((labels_BT != IGNORE)[here_R] == hard_RT[here_R]).all()


# Causal


@pytest.mark.parametrize("most", [None, 0.1])
def test_causal_labels_say_which_are_hard(tmp_path, most):
    hardness = store_of(tmp_path / "s", ALL, NLL_RT, WRONG_RT, shown="next")
    view = view_of(hardness, objective="causal", threshold=0.3, most=most)
    assert isinstance(view, HardCausalView) and view.draws == 1
    kwargs = {"batch": 8, "micro_batch": 8, "rank": 0, "world": 1, "seed": 1}
    loader = Loader(ALL, view, readers=(view.read_hard,), **kwargs)
    batches = [loader.next_step()[0].batch for _ in range(60)]
    loader.close()
    again: dict[int, list[float]] = {}
    for batch in batches:
        hard_N, row_ids = batch.columns[HARD_LABELS].numpy(), batch.row_ids_B.numpy()
        assert hard_N.dtype == np.float32 and len(hard_N) == (batch.labels_BT != IGNORE).sum()
        asked_BT = batch.labels_BT.numpy() != IGNORE
        assert (asked_BT.sum(1) == ALL.lengths_R[row_ids] - 1).all()
        labels_N = batch.labels_BT.numpy()[asked_BT]
        hard_BT = (NLL_RT[row_ids] > 0.3) & asked_BT & ~np.isin(batch.labels_BT.numpy(), SPECIAL)
        if most is None:
            assert (hard_N == hard_BT[asked_BT]).all()
        else:
            countable_B = (asked_BT & ~np.isin(batch.labels_BT.numpy(), SPECIAL)).sum(1)
            placed_BT = np.zeros(asked_BT.shape)
            placed_BT[asked_BT] = hard_N
            assert (placed_BT.sum(1) <= 0.1 * countable_B + 1).all()
            assert not (placed_BT.astype(bool) & ~hard_BT).any()
            assert placed_BT.sum() > 0.08 * countable_B.sum()
        assert not hard_N[np.isin(labels_N, SPECIAL)].any()
        ends = asked_BT.sum(1).cumsum()
        for row, end, length in zip(row_ids.tolist(), ends, asked_BT.sum(1), strict=True):
            found = hard_N[end - length : end].tolist()
            assert again.setdefault(row, found) == found  # in every epoch
    assert len(again) == ROWS


def test_causal_needs_no_mask_token():
    bare = tokenizer_of(SIZE)
    bare.mask_token = None
    view_of(None, "causal", tokenizer=bare)
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        view_of(None, tokenizer=bare)


# Fingerprints and refusals


def test_fingerprint_covers_what_masks_depend_on():
    def of(**settings):
        return view_of(None, **settings).fingerprint

    base = of()
    alike = [{"draws": 4}, {"micro_batch": 2}, {"rows_per_shard": 9}, {"store": Path("x")}]
    alike += [{"shown": "mask"}]  # the store's own fingerprint says it
    for same in [*alike, {"quantile": 0.5}]:
        assert of(**same) == base, same
    different = [
        {"scores": "T"}, {"seed": 2}, {"threshold": 0.2}, {"metric": "correctness"},
        {"metric": "quantile"}, {"metric": "quantile", "quantile": 0.5}, {"least": 0.1},
        {"most": 0.5}, {"probability": 0.2}, {"keep": 0.2}, {"replacement": "all_mask"},
        {"sampler": "original"}, {"refresh": 1}, {"objective": "causal"},
    ]  # fmt: skip
    assert len({base, *(of(**settings) for settings in different)}) == len(different) + 1
    assert of(replacement="all_mask", keep=0.2) == of(replacement="all_mask")
    assert of(objective="causal", keep=0.2) == of(objective="causal")
