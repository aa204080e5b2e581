"""The hardness store: what is read is what was written, in 2 bytes a token, and exact quantiles."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from dskd.errors import StoreError
from dskd.hardness.scoring import ScoringPlan, ScoringView
from dskd.hardness.store import Hardness, describe_scores, encode, hardness_spec, identity, plan_of
from dskd.settings.data import HardTokens
from dskd.stores.store import Writer, shard_path
from tests.data.test_views import tokenizer_of
from tests.stores.caches import ToyRows, flip, write_store

PRINTS = {"model": "M", "tokenizer": "V", "data": "D", "blocking": "B", "scoring": "S"}
SPECIAL = (5, 6, 7)
PLANS = {"token": ScoringPlan("token"), "mask": ScoringPlan("mask", 4, 9, SPECIAL)}
PLANS["next"] = ScoringPlan("next")
LARGEST = 65504.0


def spec_of(plan, rows, rows_per_shard=10):
    masking = HardTokens(kind="hard_tokens", rows_per_shard=rows_per_shard)
    return hardness_spec(masking, rows, ScoringView(plan, tokenizer_of(50)), PRINTS)


def truth(plan, rows, row_ids, seed=3):
    """NLL and wrongness of every place, by row and place alone; NaN and False where not asked."""
    here = rows.rows(row_ids, row_ids * 0)
    random = np.random.RandomState(seed)
    nll_RT = random.exponential(1.0, (len(rows), rows.block_size)).astype(np.float32)
    wrong_RT = random.rand(len(rows), rows.block_size) < 0.3
    asked_BT = plan.draw_of(here) >= 0
    width = here.tokens_BT.shape[1]
    nll_BT = np.where(asked_BT, nll_RT[row_ids, :width], np.nan)
    return nll_BT, wrong_RT[row_ids, :width] & asked_BT, asked_BT


def store_all(folder, plan, rows, rows_per_shard=10, change=lambda nll_N: nll_N):
    """Write a store without a model."""
    spec = spec_of(plan, rows, rows_per_shard)

    def content(draw, row_ids):
        nll_BT, wrong_BT, _ = truth(plan, rows, row_ids)
        asked_BT = plan.draw_of(rows.rows(row_ids, row_ids * 0)) == draw
        return asked_BT.sum(1), encode(change(nll_BT[asked_BT]), wrong_BT[asked_BT])

    write_store(folder, spec, content)
    return Hardness(folder, PRINTS)


@pytest.mark.parametrize("shown", PLANS)
def test_what_was_written_is_read(tmp_path, shown):
    rows, plan = ToyRows(), PLANS[shown]
    hardness = store_all(tmp_path / "s", plan, rows)
    for row_ids in (np.arange(23), np.array([22, 3, 3, 11, 0]), np.array([7])):
        nll_BT, wrong_BT, asked_BT = truth(plan, rows, row_ids)
        found_BT, found_wrong_BT = hardness.read(rows.rows(row_ids, row_ids * 0))
        assert found_BT.dtype == np.float32 and found_wrong_BT.dtype == bool
        np.testing.assert_array_equal(found_BT, nll_BT.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(found_BT, nll_BT, rtol=1 / 2048)
        np.testing.assert_array_equal(found_wrong_BT, wrong_BT)
        assert 0 < wrong_BT.sum() < asked_BT.sum()
    every = rows.rows(np.arange(23), np.zeros(23, int))
    special_BT = np.isin(every.tokens_BT, SPECIAL)
    assert special_BT.any()
    if shown == "mask":
        found_BT, _ = hardness.read(every)
        assert np.isnan(found_BT[special_BT]).all()


def test_extremes(tmp_path):
    """The sign bit says wrong, even of 0; what float16 cannot hold becomes its largest."""
    nll_N = np.array([0.0, -0.0, 0.0, 1e-9, 7.0, 65519.0, 1e6, np.inf], np.float32)
    wrong_N = np.array([True, False, False, True, True, False, True, True])
    stored_N = encode(nll_N, wrong_N)["nll"]
    assert stored_N.dtype == np.float16
    np.testing.assert_array_equal(np.signbit(stored_N), wrong_N)
    want = [0, 0, 0, 0, 7, LARGEST, LARGEST, LARGEST]
    np.testing.assert_array_equal(np.abs(stored_N), np.array(want, np.float16))


@pytest.mark.parametrize("shown", PLANS)
def test_quantiles_are_exact(tmp_path, shown):
    """Against sorting: at most the share is harder, and the next smaller value would be too many.

    The NLLs are rounded to 1/16, so that many are equal.
    """
    rows, plan = ToyRows(rows=1500), PLANS[shown]
    hardness = store_all(tmp_path / "s", plan, rows, 400, lambda nll_N: np.round(nll_N * 16) / 16)
    row_ids = np.arange(len(rows))
    every = rows.rows(row_ids, row_ids * 0)
    special_V = np.isin(np.arange(50), SPECIAL)
    counted_BT = (plan.draw_of(every) >= 0) & ~special_V[plan.targets(every)]
    values_N = hardness.read(every)[0][counted_BT]
    total = len(values_N)
    for share in (0.0, 0.01, 0.2, 0.5, 0.9, 0.999):
        found = hardness.quantile(share, rows, special_V)
        assert (values_N > found).sum() <= share * total
        below_N = values_N[values_N < found]
        if len(below_N):
            assert (values_N > below_N.max()).sum() > share * total
        assert found in values_N
    assert hardness.quantile(0.0, rows, special_V) == values_N.max()
    assert hardness.quantile(1.0, rows, special_V) == -math.inf


def test_share_of_distinct_values_is_met_to_a_token(tmp_path):
    """29 of 100 tokens, though 0.29 * 100 is 28.999999999999996 in floating point."""
    rows = ToyRows(rows=10, block_size=10, equal=True)
    hardness = store_all(tmp_path, PLANS["token"], rows, 10, lambda nll_N: np.argsort(nll_N) / 8)
    special_V = np.zeros(50, bool)
    assert hardness.quantile(0.29, rows, special_V) == (100 - 29 - 1) / 8
    special_V[:] = True
    with pytest.raises(StoreError, match="holds no token that is not special"):
        hardness.quantile(0.29, rows, special_V)


def test_two_bytes_a_token(tmp_path):
    """And a few for each row and shard: 8 + 1 a row, some 400 a shard."""
    rows = ToyRows(rows=600, block_size=512, equal=True)
    store_all(tmp_path / "s", PLANS["token"], rows, rows_per_shard=300)
    about = describe_scores(tmp_path / "s")
    assert about["tokens"] == 600 * 512
    files = sum(path.stat().st_size for path in (tmp_path / "s").glob("shard-*"))
    assert about["bytes"] == files < 2 * about["tokens"] + 600 * 9 + 2 * 500
    assert about["bytes_per_token"] < 2.03


def test_draws_that_ask_nothing_of_a_row_are_not_read(tmp_path, monkeypatch):
    """Of a row with fewer tokens than draws; the first such draw shows that it has no more."""
    rows, plan = ToyRows(), ScoringPlan("mask", 12, 9, SPECIAL)
    hardness = store_all(tmp_path / "s", plan, rows)
    row_ids = np.arange(len(rows))
    read, pairs = hardness.store.read, []

    def counted(row_ids_B, draws_B, columns):
        pairs.extend(zip(row_ids_B.tolist(), draws_B.tolist(), strict=True))
        return read(row_ids_B, draws_B, columns)

    monkeypatch.setattr(hardness.store, "read", counted)
    found_BT, _ = hardness.read(rows.rows(row_ids, row_ids * 0))
    nll_BT, _, asked_BT = truth(plan, rows, row_ids)
    np.testing.assert_array_equal(found_BT, nll_BT.astype(np.float16).astype(np.float32))
    counts_B = asked_BT.sum(1)
    assert counts_B.min() < 11 and counts_B.max() > 12
    assert pairs == [(b, d) for b, n in enumerate(counts_B) for d in range(min(n + 1, 12))]


def test_a_foreign_store_is_refused_by_name(tmp_path):
    rows = ToyRows()
    store_all(tmp_path / "s", PLANS["token"], rows)
    for name in PRINTS:
        with pytest.raises(StoreError, match=f"made with another {name} .*fingerprint"):
            Hardness(tmp_path / "s", {**PRINTS, name: "other"})
    Hardness(tmp_path / "s", {"data": "D"})


def test_other_rows_are_refused(tmp_path):
    rows = ToyRows()
    hardness = store_all(tmp_path / "s", PLANS["token"], rows)
    two = rows.rows(np.array([4, 5]), np.zeros(2, int))
    with pytest.raises(StoreError, match="row 5 has other tokens"):
        hardness.read(two._replace(lengths_B=two.lengths_B - [0, 1]))
    with pytest.raises(StoreError, match="no row 23 of draw 0"):
        hardness.read(two._replace(ids_B=np.array([4, 23])))


def test_damage_and_interruption_are_told(tmp_path):
    rows = ToyRows()
    store_all(tmp_path / "s", PLANS["token"], rows)
    flip(shard_path(tmp_path / "s", 1))
    with pytest.raises(StoreError, match="damaged"):
        Hardness(tmp_path / "s", PRINTS)
    writer = Writer(tmp_path / "t", spec_of(PLANS["token"], rows))
    writer.prepare()
    for look in (lambda: Hardness(tmp_path / "t", PRINTS), lambda: describe_scores(tmp_path / "t")):
        with pytest.raises(StoreError, match="not complete"):
            look()


def test_its_identity_is_known_before_it_is_filled(tmp_path):
    rows = ToyRows()
    known = {}
    for name, plan in PLANS.items():
        known[name] = identity(spec_of(plan, rows, 5))
        assert store_all(tmp_path / name, plan, rows, 10).fingerprint == known[name]
    assert len(set(known.values())) == 3
    assert identity(spec_of(PLANS["token"], ToyRows(rows=24))) != known["token"]


def test_reading_is_fast(tmp_path):
    """16 rows of 512 tokens, which a step of RoBERTa base on a GPU takes 30 ms for."""
    rows = ToyRows(rows=64, block_size=512, equal=True)
    for shown, most in (("token", 0.01), ("mask", 0.03)):
        hardness = store_all(tmp_path / shown, PLANS[shown], rows)
        row_ids = np.arange(0, 64, 4)
        here = rows.rows(row_ids, row_ids * 0)
        hardness.read(here)
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            hardness.read(here)
            times.append(time.perf_counter() - begin)
        assert min(times) < most


@pytest.mark.parametrize("shown", PLANS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("draws", value) for value in (0, 5, 4.0, None, True)),
        *(("shown", value) for value in ("all", None, 3)),
        ("seed", 1.5),
        ("seed", "9"),
        *(("special", value) for value in (5, [-1], ["5"], [1.5])),
        ("more", 1),
    ],
    ids=repr,
)
def test_settings_that_no_store_has_are_refused(tmp_path, shown, name, value):
    """In a manifest that was edited: its checksum is right. Its shards are not looked at."""
    store = store_all(tmp_path / "s", PLANS[shown], ToyRows()).store
    settings = {**store.spec.settings, name: value}
    with pytest.raises(StoreError, match=r"manifest\.json: damaged, no hardness store"):
        plan_of(tmp_path / "s", replace(store.spec, settings=settings))
