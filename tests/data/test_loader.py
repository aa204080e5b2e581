"""The loader: the same rows for every geometry and restart, each once an epoch."""

import numpy as np
import pytest
import torch

from dskd.batch import IGNORE, Batch
from dskd.data.loader import Loader, rows_taken
from dskd.data.prepared import Prepared, RowBatch
from dskd.data.views import Shown, view_for
from dskd.errors import StoreError
from dskd.settings.data import Data

SEED = 3


def loader(prepared: Prepared, **changes: object) -> Loader:
    view = view_for(Data(), prepared.tokenizer, SEED)
    values = {"batch": 8, "micro_batch": 2, "rank": 0, "world": 1, "seed": SEED}
    return Loader(prepared.train, view, **(values | changes))


def steps(source: Loader, count: int) -> list[list[Batch]]:
    try:
        return [[sent.batch for sent in source.next_step()] for _ in range(count)]
    finally:
        source.close()


def content(batches: list[Batch]) -> dict[int, tuple]:
    """Row id -> what the model sees and is asked, without padding."""
    found = {}
    for batch in batches:
        for b, row in enumerate(batch.row_ids_B.tolist()):
            real = batch.mask_BT[b].bool()
            assert (batch.labels_BT[b][~real] == IGNORE).all()
            found[row] = (batch.ids_BT[b][real].tolist(), batch.labels_BT[b][real].tolist())
    return found


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_all_geometries_see_the_same_step(prepared: Prepared, world: int, micro: int) -> None:
    want = [content(step) for step in steps(loader(prepared, micro_batch=4), 20)]
    loaders = [loader(prepared, micro_batch=micro, rank=r, world=world) for r in range(world)]
    ranks = [steps(one, 20) for one in loaders]
    for s in range(20):
        micro_batches = [batch for rank in ranks for batch in rank[s]]
        assert len(ranks[0][s]) == 8 // (micro * world)
        assert {len(batch.row_ids_B) for batch in micro_batches} == {micro}
        assert content(micro_batches) == want[s] and len(want[s]) == 8


def test_every_row_once_an_epoch_in_another_order(prepared: Prepared) -> None:
    rows = len(prepared.train)
    assert rows % 6, "an epoch must end within a batch for this test to say something"
    taken = steps(loader(prepared, batch=6, micro_batch=6), 3 * rows // 6 + 1)
    stream = torch.cat([batch.row_ids_B for step in taken for batch in step]).numpy()
    epochs = [stream[e * rows : (e + 1) * rows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_ends_in_the_step_that_takes_its_last_row(prepared: Prepared) -> None:
    source, rows = loader(prepared, batch=6, micro_batch=6), len(prepared.train)
    seen: set[int] = set()
    for number, step in enumerate(steps(source, rows // 6 + 1), 1):
        seen |= {row for batch in step for row in batch.row_ids_B.tolist()}
        assert source.ends_epoch(number) == (len(seen) == rows)


def test_masks_change_with_the_epoch_within_a_batch(prepared: Prepared) -> None:
    rows = len(prepared.train)
    many = loader(prepared, batch=2 * rows, micro_batch=2 * rows)
    (batch,) = steps(many, 1)[0]
    order = torch.argsort(batch.row_ids_B, stable=True)
    twice = batch.ids_BT[order].reshape(rows, 2, -1)
    labels = batch.labels_BT[order].reshape(rows, 2, -1)
    assert ((twice[:, 0] != twice[:, 1]).any(dim=1)).float().mean() > 0.95
    assert ((labels[:, 0] != labels[:, 1]).any(dim=1)).float().mean() > 0.95


def test_another_seed_is_another_order(prepared: Prepared) -> None:
    one = steps(loader(prepared), 1)[0][0].row_ids_B
    two = steps(loader(prepared, seed=SEED + 1), 1)[0][0].row_ids_B
    assert one.tolist() != two.tolist()


@pytest.mark.parametrize("position", [1, 13, 60])
def test_restart_goes_on_where_it_stopped(prepared: Prepared, position: int) -> None:
    whole = steps(loader(prepared), position + 5)
    restarted = loader(prepared, position=position)
    assert restarted.position == position
    again = steps(restarted, 5)
    assert restarted.position == position + 5
    for one, two in zip(whole[position:], again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.row_ids_B, b.row_ids_B)
            assert torch.equal(a.ids_BT, b.ids_BT)
            assert torch.equal(a.labels_BT, b.labels_BT)


def test_batches_are_what_the_rows_hold(prepared: Prepared) -> None:
    batch = steps(loader(prepared), 1)[0][1]
    row_ids = batch.row_ids_B.numpy()
    rows = prepared.train.rows(row_ids, row_ids * 0)
    ids_BT, lengths_B = rows.tokens_BT, rows.lengths_B
    for tensor in (batch.row_ids_B, batch.domains_B, batch.ids_BT, batch.mask_BT, batch.labels_BT):
        assert tensor.dtype == torch.int64
    assert batch.mask_BT.sum(dim=1).tolist() == lengths_B.tolist()
    asked = batch.supervised_BT
    assert torch.equal(batch.labels_BT[asked], torch.from_numpy(ids_BT)[asked])
    assert torch.equal(batch.ids_BT[~asked], torch.from_numpy(ids_BT)[~asked])


def test_readers_add_columns(prepared: Prepared) -> None:
    seen = []

    def scores(rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        seen.append((rows, shown))
        return {"score": rows.ids_B.astype(np.float32)}

    def labels(rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        del rows
        return {"label": shown.labels_BT[shown.labels_BT != IGNORE]}

    batches = steps(loader(prepared, readers=(scores, labels)), 1)[0]
    for batch, (rows, shown) in zip(batches, seen, strict=False):
        assert batch.columns.keys() == {"score", "label"}
        assert batch.columns["score"].tolist() == batch.row_ids_B.tolist() == rows.ids_B.tolist()
        assert torch.equal(batch.columns["label"], batch.labels_N)
        assert torch.equal(batch.ids_BT, torch.from_numpy(shown.inputs_BT))
        assert batch.domains_B.tolist() == rows.domains_B.tolist() and (rows.epochs_B == 0).all()
    with pytest.raises(AssertionError, match="two readers make the column 'score'"):
        steps(loader(prepared, readers=(scores, scores)), 1)


def test_error_of_the_thread_reaches_the_caller(prepared: Prepared) -> None:
    def reader(*_: object) -> dict[str, np.ndarray]:
        raise StoreError("shard 3 is gone")

    with pytest.raises(StoreError, match="shard 3 is gone"):
        steps(loader(prepared, readers=(reader,)), 1)


@pytest.mark.parametrize("count", [6, 7, 40])
def test_the_rows_that_some_steps_read_are_known_beforehand(prepared: Prepared, count: int) -> None:
    """Of two draws: in half an epoch, in one and a bit, and in many."""
    rows = len(prepared.train)
    batch = rows // 6 - 1
    read = np.zeros((2, rows), bool)
    source = loader(prepared, batch=batch, micro_batch=batch)
    for place, row in enumerate(
        row for step in steps(source, count) for b in step for row in b.row_ids_B.tolist()
    ):
        read[place // rows % 2, row] = True
    np.testing.assert_array_equal(rows_taken(rows, SEED, count * batch, 2), read)
    assert read.all() == (count == 40)
    assert read[0].all() == (count > 6) and read[1].any() == (count > 6)
