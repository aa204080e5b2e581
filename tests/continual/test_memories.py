"""Which rows of earlier tasks are looked at before a step, and how the ranks share them."""

import numpy as np
import pytest
import torch

from dskd.batch import IGNORE
from dskd.continual.gradients import has_pieces, load_pieces, save_pieces
from dskd.continual.memories import RowMemory, drawn_rows
from dskd.data.views import CausalView
from dskd.errors import CheckpointError
from dskd.system import dist
from tests.data.row_batches import PlainRows
from tests.narrowing.toy import SHAPES, Pieces, drawn

LENGTHS = np.random.default_rng(3).integers(2, 9, 40)
WEIGHT = "weight_N"


class Rows(PlainRows):
    """40 rows of 2 to 8 tokens, whose first token is their id."""

    def __init__(self):
        ids_RT = np.arange(40)[:, None] + np.arange(8)[None] * 100
        super().__init__(ids_RT, LENGTHS)

    def lengths_B(self, row_ids_B):
        return self.lengths_R[row_ids_B]


def weights(rows, shown):
    """A reader of a number for each supervised position."""
    return {WEIGHT: np.ones((shown.labels_BT != IGNORE).sum(), np.float32)}


def memory(rows=31, **changes):
    """The first rows of the data, 7 of them before each step."""
    plain = {"per_step": 7, "micro_batch": 2, "seed": 5, "task": 1, "readers": [weights]}
    of = {"rows_M": np.arange(rows), "rowset": Rows(), "view": CausalView()}
    return RowMemory(**{**of, **plain, **changes})


def test_rows_are_a_function_of_seed_task_and_step():
    rows = drawn_rows(1000, 50, 1, 2, 3)
    assert len(np.unique(rows)) == 50
    assert (rows == np.sort(rows)).all()
    assert (rows == drawn_rows(1000, 50, 1, 2, 3)).all()
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert len(np.intersect1d(rows, drawn_rows(1000, 50, *other))) < 15  # 2.5 are expected
    means = [drawn_rows(1000, 50, 1, 2, step).mean() for step in range(200)]
    assert abs(np.mean(means) - 499.5) < 10  # standard error 2.8
    with pytest.raises(ValueError, match="7 rows of 6"):
        drawn_rows(6, 7, 1)


def seen_by(monkeypatch, world, **changes):
    """Of each rank, the rows of each micro-batch in which something is supervised."""
    monkeypatch.setattr(dist, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        batches = memory(**changes).batches(step=4)
        for batch in batches:
            assert len(batch.columns[WEIGHT]) == batch.supervised
            assert 1 <= len(batch.row_ids_B) <= 2
        found.append([b.row_ids_B.tolist() if b.supervised else [] for b in batches])
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_ranks_share_the_same_rows_in_as_many_passes(monkeypatch, world):
    expected = np.arange(31)[drawn_rows(31, 7, 5, 1, 4)]
    found = seen_by(monkeypatch, world)
    assert len({len(batches) for batches in found}) == 1
    assert len(found[0]) == -(-7 // (2 * world))
    rows = [row for batches in found for rows in batches for row in rows]
    assert sorted(rows) == expected.tolist()
    by_length = [row for rows in zip(*found, strict=True) for share in rows for row in share]
    assert sorted(by_length, key=lambda row: (LENGTHS[row], row)) == by_length


def test_all_rows_are_taken_unless_a_number_is_given(monkeypatch):
    found = seen_by(monkeypatch, 2, per_step=None)
    assert sorted(row for batches in found for rows in batches for row in rows) == [*range(31)]


CUTS = {1: [(0.0, 1.0)], 2: [(0.0, 0.31), (0.31, 1.0)], 3: [(0.0, 0.5), (0.5, 0.5), (0.5, 1.0)]}


def shares(world):
    """What each of some ranks holds of parameters and of their gradients."""
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for name, value in drawn(9, dtype=torch.float32).items():
        parameters[name].grad = value
    optimizer = torch.optim.SGD(parameters.values())
    return [Pieces(parameters, optimizer, gradients=True, share=share) for share in CUTS[world]]


@pytest.mark.parametrize("there", CUTS)
@pytest.mark.parametrize("here", CUTS)
def test_kept_gradients_are_read_by_any_number_of_ranks(monkeypatch, tmp_path, here, there):
    kept = [drawn(seed, dtype=torch.float32) for seed in (1, 2)]
    assert not has_pieces(tmp_path)
    for rank, weights in enumerate(shares(there)):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        starts = {shard.name: shard.start for shard in weights.shards()}
        ends = {s.name: s.start + len(s.weight) for s in weights.shards()}
        own = [{n: g.flatten()[starts[n] : ends[n]] for n, g in each.items()} for each in kept]
        save_pieces(tmp_path, own, starts)
    assert has_pieces(tmp_path)
    for weights in shares(here):
        found = load_pieces(tmp_path, 2, weights)
        for shard in weights.shards():
            part = slice(shard.start, shard.start + len(shard.weight))
            for gradient, wanted in zip(found, kept, strict=True):
                assert torch.equal(gradient[shard.name], wanted[shard.name].flatten()[part])


def test_kept_gradients_with_a_gap_are_refused(tmp_path):
    (weights,) = shares(1)
    kept = {name: value.flatten() for name, value in drawn(1, dtype=torch.float32).items()}
    starts = dict.fromkeys(kept, 0)
    kept["base"] = kept["base"][:20]
    save_pieces(tmp_path, [kept], starts)
    with pytest.raises(CheckpointError, match="4 entries of the kept gradients are missing"):
        load_pieces(tmp_path, 1, weights)
