"""Capturing a real model on real rows: what the cache gives is what the live teacher gives."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from dskd.data.loader import make_batch
from dskd.data.prepared import open_prepared
from dskd.data.views import view_for
from dskd.errors import ConfigError, StoreError
from dskd.settings.data import Data, Masking, TextSource
from dskd.settings.teachers import CachedTeacher
from dskd.stores.logits import CachedLogits, CachedMasks, LogitCache, describe_cache
from dskd.stores.store import shard_path
from dskd.teachers.capture import capture
from dskd.teachers.teacher import FrozenTeacher, StoredTeacher
from tests.data.conftest import make_corpus
from tests.heads import logits_of
from tests.models.tiny import zero3
from tests.ranks import run_ranks
from tests.stores.caches import flip, read
from tests.stores.real import (
    OBJECTIVES,
    fill_while_another_does,
    no_model,
    prepared_folders,
    random_model,
)

PRINTS = {"teacher": "T", "tokenizer": "V", "data": "D", "masking": "M"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared rows of two domains, by objective."""
    where = tmp_path_factory.mktemp("data")
    make_corpus(where / "a.txt", 60)
    make_corpus(where / "b.txt", 40)
    paths = {domain: str(where / f"{domain}.txt") for domain in "ab"}
    sources = [TextSource(kind="text", path=path, domain=name) for name, path in paths.items()]
    return prepared_folders(where, sources)


def data_of(objective, draws=2):
    return Data(objective=objective, masking=Masking(draws=draws))


def cached(**changes):
    fields = {"kind": "cached", "k": 8, "values": "fp32", "rows_per_shard": 16, "micro_batch": 5}
    return CachedTeacher(**{**fields, **changes})


def run_capture(folder, prepared, objective, *, settings=None, ds=None, model=None, **options):
    view = view_for(data_of(objective), prepared.tokenizer, 1)
    model = model or (lambda: random_model(prepared, objective, ds))
    options = {"fingerprints": PRINTS, "device": CPU, **options}
    capture(settings or cached(), model, prepared, view, folder, **options)
    return view


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cached_signal_is_the_live_one_when_all_is_kept(tmp_path, folders, objective):
    prepared = open_prepared(folders[objective])
    vocabulary = len(prepared.tokenizer)
    settings = cached(k=vocabulary, temperatures=[2.0])
    view = run_capture(tmp_path / "c", prepared, objective, settings=settings)
    cache = LogitCache(tmp_path / "c", PRINTS)
    live = FrozenTeacher(random_model(prepared, objective), vocabulary)
    row_ids, epochs = np.array([5, 0, len(prepared.train) - 1]), np.array([0, 1, 2])
    with_view = make_batch(prepared.train, view, row_ids, epochs)
    masks, logits = CachedMasks(cache), CachedLogits(cache, None, 2.0)
    with_cache = make_batch(prepared.train, masks, row_ids, epochs, (logits,))
    for name in ("row_ids_B", "domains_B", "ids_BT", "mask_BT", "labels_BT"):
        assert torch.equal(getattr(with_cache, name), getattr(with_view, name)), name
    signal = StoredTeacher(2.0)(with_cache)
    dense = torch.log_softmax(logits_of(live(with_view)), 1)
    assert (signal.tail_N[2.0] == -math.inf).all() and len(dense) > 0
    found = torch.zeros_like(dense).scatter(1, signal.ids_NK, signal.logprobs_NK)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


def _capture_rank(rank, folder, prepared_folder, objective, ds):
    del rank
    run_capture(folder, open_prepared(prepared_folder), objective, ds=ds)


@pytest.mark.parametrize("ds", [None, zero3(2)], ids=["replicated", "zero3"])
def test_two_ranks_capture_what_one_does(tmp_path, folders, ds):
    prepared = open_prepared(folders["masked"])
    run_capture(tmp_path / "one", prepared, "masked")
    run_ranks(_capture_rank, tmp_path / "two", folders["masked"], "masked", ds)
    row_ids = np.arange(len(prepared.train))
    rows = prepared.train.rows(row_ids, row_ids * 0 + 1)
    one, two = (read(LogitCache(tmp_path / name, PRINTS), rows) for name in ("one", "two"))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    for name, array in one[2].items():
        np.testing.assert_allclose(two[2][name], array, rtol=1e-5, atol=1e-5)


def test_one_domains_rows_only(tmp_path, folders):
    prepared = open_prepared(folders["masked"])
    rows = prepared.train
    row_ids = np.arange(len(rows))
    domain = prepared.domains.index("b")
    mine = row_ids[rows.domains_B(row_ids) == domain]
    assert 0 < len(mine) < len(rows)
    run_capture(tmp_path / "c", prepared, "masked", domain=domain)
    assert describe_cache(tmp_path / "c")["domain"] == "b"
    cache = LogitCache(tmp_path / "c", PRINTS)
    read(cache, rows.rows(mine, mine * 0))
    other = np.setdiff1d(row_ids, mine)[-1:]
    with pytest.raises(StoreError, match=f"row {other[0]} was left out"):
        read(cache, rows.rows(other, other * 0))
    with pytest.raises(StoreError, match=r"settings.domain is 'b' there and None here"):
        run_capture(tmp_path / "c", prepared, "masked")
    prepared.domains.append("empty")
    with pytest.raises(ConfigError, match=r"teacher.domains.empty: no training row"):
        run_capture(tmp_path / "d", prepared, "masked", domain=2)


def test_complete_cache_needs_no_teacher(tmp_path, folders, monkeypatch):
    prepared = open_prepared(folders["causal"])
    said = []
    monkeypatch.setattr("dskd.stores.fill.say", said.append)
    run_capture(tmp_path / "c", prepared, "causal")
    before = shard_path(tmp_path / "c", 0).stat().st_mtime_ns
    assert "rows, top 8 of each in 52 bytes" in said[-1]  # 8 x (2 + 4) and a tail of 4

    again = partial(run_capture, tmp_path / "c", prepared, "causal", model=no_model)
    again(settings=cached(rows_per_shard=7))
    assert shard_path(tmp_path / "c", 0).stat().st_mtime_ns == before
    with pytest.raises(StoreError, match=r"settings.k is 8 there and 9 here"):
        again(settings=cached(k=9))
    with pytest.raises(StoreError, match=r"fingerprints.teacher is 'T' there and 'other' here"):
        again(fingerprints={**PRINTS, "teacher": "other"})


def test_a_complete_cache_that_nobody_opens_is_read_whole(tmp_path, folders):
    """The last stage that is wanted: a flipped bit is found; else a wrong size at least."""
    prepared = open_prepared(folders["causal"])
    again = partial(run_capture, tmp_path / "c", prepared, "causal", model=no_model)
    run_capture(tmp_path / "c", prepared, "causal")
    again(verify=True)
    path = shard_path(tmp_path / "c", 1)
    whole = path.read_bytes()
    flip(path)
    again()
    with pytest.raises(StoreError, match=r"shard-00001.*: damaged, .*; remove manifest\.json"):
        again(verify=True)
    path.write_bytes(whole[:-1])
    for verify in (False, True):
        with pytest.raises(StoreError, match=r"shard-00001.*: truncated, .*; remove manifest"):
            again(verify=verify)


def test_more_logits_than_tokens_are_refused(tmp_path, folders):
    prepared = open_prepared(folders["masked"])
    with pytest.raises(ConfigError, match=r"teacher.k: 301 is not between 1 and the 300 tokens"):
        run_capture(tmp_path / "c", prepared, "masked", settings=cached(k=301))


def test_while_another_job_captures_one_waits(tmp_path, folders):
    """Two runs that name one cache: the second needs no teacher, and finds the cache whole."""
    prepared = open_prepared(folders["masked"])
    fill = partial(run_capture, tmp_path / "c", prepared, "masked")
    fill_while_another_does(fill, lambda: random_model(prepared, "masked"))
    LogitCache(tmp_path / "c", PRINTS)
