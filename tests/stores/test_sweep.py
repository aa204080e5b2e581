"""The sweep: the same bytes at any world size and after any interruption, and ranks in lockstep."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from dskd.errors import NonFiniteError, StoreError
from dskd.stores.logits import LogitCache, LogitLayout
from dskd.stores.store import Writer, shard_path
from dskd.stores.sweep import Scored, Stopped, Work, sweep
from tests.ranks import run_ranks
from tests.stores.caches import ToyMasks, ToyRows, ToyTeacher, encoded, files, read

CPU = torch.device("cpu")
PRINTS = {"teacher": "T", "data": "D"}
LAYOUT = LogitLayout(
    k=5, vocabulary=50, temperatures=(1.0, 2.0), values="fp32", block_size=16, masked=True
)


def _score(batch, signal):
    return Scored(batch.counts_B.numpy(), encoded(LAYOUT, batch, signal.logits_NV))


def fill(folder, *, rows=None, domain=None, forward=None, view=None, score=_score, **options):
    """Sweep a toy teacher over toy rows: 23 rows, 2 draws, 12 shards of at most 4 rows."""
    rows = rows or ToyRows()
    view = view or ToyMasks()
    spec = LAYOUT.spec(rows=len(rows), draws=2, rows_per_shard=4, fingerprints=PRINTS)
    present = None if domain is None else rows.domains_B(np.arange(len(rows))) == domain
    teacher = forward or ToyTeacher()
    options = {"micro_batch": 3, "device": CPU, "score": score, "present_R": present, **options}
    sweep(teacher, rows, view, Writer(folder, spec), **options)
    return teacher


def everything(folder, rows):
    """All that a complete cache gives, row after row."""
    cache = LogitCache(folder, PRINTS)
    row_ids = np.tile(np.arange(len(rows)), 2)
    inputs, labels, columns = read(cache, rows.rows(row_ids, np.repeat([0, 1], len(rows))))
    return {"inputs": inputs, "labels": labels, **columns}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of an undisturbed sweep of one rank."""
    folder = tmp_path_factory.mktemp("reference") / "store"
    fill(folder)
    return folder


def _fill_rank(rank, folder, domains, domain):
    del rank
    return fill(folder, rows=ToyRows(domains=domains), domain=domain).calls


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, reference, world):
    run_ranks(_fill_rank, tmp_path / "s", 1, None, world=world)
    assert files(tmp_path / "s") == files(reference)


def test_micro_batch_changes_the_values_by_rounding_only(tmp_path, reference):
    wanted = everything(reference, ToyRows())
    for micro_batch in (1, 2, 4, 50):
        fill(tmp_path / str(micro_batch), micro_batch=micro_batch)
        found = everything(tmp_path / str(micro_batch), ToyRows())
        for name in ("inputs", "labels", "topk_ids"):
            np.testing.assert_array_equal(found[name], wanted[name])
        for name in ("topk_logprobs", "tail"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_ranks_make_equally_many_passes(tmp_path):
    """23 rows in shards of 4 (the last of 3), batches of 3: 2 passes a shard, 1 for the last."""
    assert fill(tmp_path / "one").calls == 2 * (5 * 2 + 1)
    # Rounds of shards 0 1, 2 3, 4 5 | 6 7, ...: each costs both ranks the larger number.
    assert run_ranks(_fill_rank, tmp_path / "two", 1, None) == [12, 12]
    # One domain of nine: rows 2, 11, 20 are in shards 0, 2 and 5 of each draw, the others empty.
    assert run_ranks(_fill_rank, tmp_path / "domain", 9, 2) == [6, 6]
    assert fill(tmp_path / "domain-one", rows=ToyRows(domains=9), domain=2).calls == 6
    assert files(tmp_path / "domain") == files(tmp_path / "domain-one")


def test_rows_of_other_domains_are_left_out(tmp_path, reference):
    rows = ToyRows(domains=3)
    fill(tmp_path / "s", rows=rows, domain=1)
    cache, whole = LogitCache(tmp_path / "s", PRINTS), LogitCache(reference, PRINTS)
    mine = np.arange(1, 23, 3)
    *_, found = read(cache, rows.rows(mine, mine * 0 + 1), temperature=1.0)
    *_, wanted = read(whole, rows.rows(mine, mine * 0 + 1), temperature=1.0)
    np.testing.assert_array_equal(found["topk_ids"], wanted["topk_ids"])
    np.testing.assert_allclose(found["tail"], wanted["tail"], rtol=1e-5, atol=1e-5)
    for other in (0, 2, 21):
        both = rows.rows(np.array([4, other]), np.zeros(2, int))
        with pytest.raises(StoreError, match=f"row {other} was left out"):
            read(cache, both)


def test_progress_counts_all_rows_and_goes_on(tmp_path, reference):
    seen = []
    fill(tmp_path / "s", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {46} and seen[-1][0] == 46
    assert [done for done, _ in seen[:4]] == [3, 4, 7, 8]
    folder = tmp_path / "s"
    (folder / "manifest.json").unlink()
    shard_path(folder, 0).unlink()
    shard_path(folder, 11).unlink()
    seen.clear()
    fill(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [42, 43, 46]
    assert files(folder) == files(reference)


class _FailingTeacher(ToyTeacher):
    """Gives NaN for row 6, which is in shard 1: rank 1's first of two ranks."""

    def __call__(self, batch):
        signal = super().__call__(batch)
        row_N = batch.row_ids_B.repeat_interleave(batch.supervised_BT.sum(1))
        signal.logits_NV[row_N == 6] = torch.nan
        return signal


def _fail_rank(rank, folder):
    del rank
    teacher = _FailingTeacher()
    with pytest.raises(NonFiniteError, match="row 6"):
        fill(folder, forward=teacher)
    return teacher.calls


def test_failure_of_one_rank_ends_all_after_the_round(tmp_path, reference):
    assert run_ranks(_fail_rank, tmp_path / "s") == [2, 2]
    kept = ["manifest.json", shard_path(reference, 0).name]  # rank 0's work is not lost
    assert sorted(files(tmp_path / "s")) == kept
    with pytest.raises(NonFiniteError, match="row 6"):
        fill(tmp_path / "one", forward=_FailingTeacher())
    assert sorted(files(tmp_path / "one")) == kept


def test_values_are_kept_while_the_next_pass_is_made(tmp_path):
    """Of the batch that they are of; with the last pass of a round behind them, at once."""
    events = []

    class Noting(ToyTeacher):
        def __call__(self, batch):
            events.append(("pass", *batch.row_ids_B.tolist()))
            return super().__call__(batch)

    def score(batch, kept):
        events.append(("keep", *batch.row_ids_B.tolist()))
        return _score(batch, kept)

    fill(tmp_path / "s", forward=Noting(), micro_batch=2, score=score)
    first = [("pass", 0, 1), ("pass", 2, 3), ("keep", 0, 1), ("keep", 2, 3)]
    assert events[:5] == [*first, ("pass", 4, 5)]


class _UnreadableMasks(ToyMasks):
    """Cannot show row 6, which is in shard 1: rank 1's first of two ranks."""

    def __call__(self, rows):
        if 6 in rows.ids_B:
            raise StoreError("row 6 is damaged")
        return super().__call__(rows)


def _unreadable_rank(rank, folder):
    del rank
    teacher = ToyTeacher()
    with pytest.raises(StoreError, match="row 6 is damaged"):
        fill(folder, forward=teacher, view=_UnreadableMasks())
    return teacher.calls


def test_a_batch_that_one_rank_cannot_make_ends_all_after_the_round(tmp_path):
    assert run_ranks(_unreadable_rank, tmp_path / "s") == [2, 2]


def _fill_until_stopped(rank, folder):
    """Rank 1 is told to stop after the second round."""
    calls = iter([False, False, True])
    with pytest.raises(Stopped):
        fill(folder, stop=lambda: rank == 1 and next(calls))


def test_told_to_stop_all_ranks_do_after_the_round(tmp_path, reference):
    run_ranks(_fill_until_stopped, tmp_path / "s")
    assert len(list((tmp_path / "s").glob("shard-*"))) == 4
    fill(tmp_path / "s")
    assert files(tmp_path / "s") == files(reference)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        fill(tmp_path / "file" / "s")


def test_no_gradients_are_recorded(tmp_path):
    class Watching(ToyTeacher):
        def __call__(self, batch):
            assert not torch.is_grad_enabled()
            return super().__call__(batch)

    fill(tmp_path / "s", forward=Watching())


class _SlowTeacher(ToyTeacher):
    def __call__(self, batch):
        time.sleep(0.004)
        return super().__call__(batch)


def _fill_slowly(folder):
    fill(folder, forward=_SlowTeacher())
    os._exit(0)


def _fill_until_flush(folder, number, **options):
    """Die by kill -9 at flush ``number`` to disk: while a file is being written or renamed."""
    flush, left = os.fsync, iter(range(number, 0, -1))

    def fsync(handle):
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    os.fsync = fsync
    fill(folder, **options)


def _start(function, *args):
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    return child


def _check_whole_so_far(folder, reference):
    """Every shard under its final name is a whole one."""
    for path in folder.glob("shard-*"):
        assert path.read_bytes() == (reference / path.name).read_bytes()


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path, reference):
    moments, folder, killed = random.Random(3), tmp_path / "s", 0
    for _ in range(12):
        child = _start(_fill_slowly, folder)
        child.join(moments.uniform(0.005, 0.09))
        if child.is_alive():
            child.kill()
            killed += 1
        child.join()
        _check_whole_so_far(folder, reference)
    assert killed >= 5
    fill(folder)
    assert files(folder) == files(reference)


def test_killed_during_any_save_it_goes_on_to_the_same_bytes(tmp_path, reference):
    """A save flushes the file, then the folder: an odd number dies between writing and renaming."""
    for number in (1, 2, 3, 4, 7, 26, 27):  # the manifest, 12 shards, the manifest again
        folder = tmp_path / str(number)
        child = _start(_fill_until_flush, folder, number)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert len(list(folder.glob(".*.tmp"))) == number % 2
        _check_whole_so_far(folder, reference)
        with pytest.raises(StoreError, match=r"no such file|not complete"):
            LogitCache(folder, PRINTS)
        fill(folder)
        assert files(folder) == files(reference)


def some(share: float) -> np.ndarray:
    """Rows of each draw, bool [2, 23]; those of a smaller share are among those of a larger one."""
    return np.random.RandomState(2).rand(2, 23) < share


def _add_rank(rank, folder, number=0):
    """Rows of one share, then more of them; ``number``: of the flush at which the second dies."""
    del rank
    if not shard_path(folder, 0).exists():
        fill(folder, present_R=some(0.3))
    if number:
        _fill_until_flush(folder, number, present_R=some(0.5))
    fill(folder, present_R=some(0.5))


def test_rows_are_added_and_those_that_are_there_are_kept(tmp_path, reference):
    """With equal rows beside or without: the values of a row are its own but for rounding."""
    rows = ToyRows()
    fill(tmp_path / "s", present_R=some(0.3))
    first = {shard: shard_path(tmp_path / "s", shard).read_bytes() for shard in range(12)}
    spent = []
    teacher = fill(tmp_path / "s", present_R=some(0.5), done_with=spent.append)
    added = some(0.5) & ~some(0.3)
    assert sum(work.rows for work in spent) == added.sum() > 0
    assert sum(work.passes for work in spent) == teacher.calls
    assert sum(work.tokens for work in spent) == (added * rows.lengths_R).sum()
    untouched = [s for s in range(12) if not added[s // 6, s % 6 * 4 :][:4].any()]
    for shard in untouched:
        assert shard_path(tmp_path / "s", shard).read_bytes() == first[shard]
    assert 0 < len(untouched) < 12
    cache, whole = LogitCache(tmp_path / "s", PRINTS), LogitCache(reference, PRINTS)
    for draw, row in np.argwhere(some(0.5)).tolist():
        asked = rows.rows(np.array([row]), np.array([draw]))
        for found, wanted in zip(read(cache, asked)[:2], read(whole, asked)[:2], strict=True):
            np.testing.assert_array_equal(found, wanted)
        mine, full = read(cache, asked)[2], read(whole, asked)[2]
        np.testing.assert_array_equal(mine["topk_ids"], full["topk_ids"])
        np.testing.assert_allclose(mine["topk_logprobs"], full["topk_logprobs"], rtol=1e-5)
    for draw, row in np.argwhere(~some(0.5)).tolist():
        with pytest.raises(StoreError, match=f"row {row} was left out"):
            read(cache, rows.rows(np.array([row]), np.array([draw])))
    assert fill(tmp_path / "s", present_R=some(0.4)).calls == 0


def test_rows_are_added_in_the_same_bytes_by_ranks_and_over_kills(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two", "killed")}
    _add_rank(0, folders["one"])
    run_ranks(_add_rank, folders["two"])
    assert files(folders["two"]) == files(folders["one"])
    for number in (2, 3, 4, 5):  # the manifest, and shards
        child = _start(_add_rank, 0, folders["killed"], number)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with pytest.raises(StoreError, match="not complete"):
            LogitCache(folders["killed"], PRINTS)
    _add_rank(0, folders["killed"])
    assert files(folders["killed"]) == files(folders["one"])


def test_what_a_round_was_is_of_all_ranks(tmp_path):
    spent = run_ranks(_note_rounds, tmp_path / "two")
    total = Work(*map(sum, zip(*spent[0], strict=True)))
    assert total == Work(46, int(2 * ToyRows().lengths_R.sum()), 2 * (5 * 2 + 1))
    assert len(spent[0]) == 6 and spent[1] == []


def _note_rounds(rank, folder):
    del rank
    spent = []
    fill(folder, done_with=spent.append)
    return spent
