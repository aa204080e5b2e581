"""The masks of the original Self-Evolution code, bit for bit, from real stores."""

import numpy as np
import pytest

from dskd.batch import IGNORE
from dskd.errors import ConfigError
from dskd.hardness.scoring import ScoringPlan, ScoringView
from dskd.hardness.store import Hardness, encode, hardness_spec
from dskd.settings.data import HardTokens
from dskd.stores.store import Writer
from tests.data.row_batches import PlainRows
from tests.data.test_views import SIZE, TOKENIZER, tokenizer_of
from tests.goldens import golden
from tests.hardness.test_masks import ALL, NLL_RT, WIDTH, seen, store_of, view_of

GOLDEN = golden("self_evolution")


@pytest.mark.parametrize(
    "case", GOLDEN["stage2_masks"]["cases"], ids=lambda c: f"{c['epoch']}-{c['index']}"
)
def test_golden_masks_of_the_original(tmp_path, case):
    golden = GOLDEN["stage2_masks"]
    ids_RT = np.array(golden["items"])
    rows = PlainRows(ids_RT, np.full(len(ids_RT), ids_RT.shape[1]))
    nll_RT = np.full(ids_RT.shape, 0.05)
    stored = case["stored"] or []
    # A place beyond the row makes the original forget all of the row's places; a store keyed by row
    # cannot hold one (Hardness.read refuses it), so what is left of these rows is an empty entry.
    if max(stored, default=0) < ids_RT.shape[1]:
        nll_RT[case["index"], stored] = 2.0
    answers = store_of(tmp_path / "s", rows, nll_RT)
    tokenizer = tokenizer_of(golden["vocab_size"])
    view = view_of(answers, sampler="original", rows=rows, tokenizer=tokenizer)
    row_ids_B = np.array([case["index"]])
    inputs_BT, labels_BT = view(rows.rows(row_ids_B, np.array([case["epoch"]])))
    assert inputs_BT[0].tolist() == case["source"]
    want = [t if t != golden["pad"] else IGNORE for t in case["target"]]
    assert labels_BT[0].tolist() == want


def test_the_originals_masks_stand_still_where_two_are_hard(tmp_path):
    hardness = store_of(tmp_path / "s", ALL, NLL_RT)
    view = view_of(hardness, sampler="original", threshold=0.6)
    hard_RT = (NLL_RT > 0.6) & (np.arange(WIDTH) < ALL.lengths_R[:, None])
    many_R = hard_RT.sum(1) >= 2
    assert 0.6 < many_R.mean() < 1
    first, second = seen(view), seen(view, epoch=1)
    assert ((first[1] != IGNORE)[many_R] == hard_RT[many_R]).all()  # special tokens, too
    assert (first[0][many_R] == second[0][many_R]).all()
    assert (first[0][hard_RT & many_R[:, None]] == SIZE - 1).all()
    assert not (first[0][~many_R] == second[0][~many_R]).all(1).any()


@pytest.mark.parametrize("rows_per_shard", [1, 3, 150])
def test_what_several_ranks_found_is_merged(tmp_path, rows_per_shard):
    """The original's merge of its ranks' pickles. Here each writes shards of one store, some twice,
    as after an interruption, and a row is found in whatever shard it lies."""
    golden = GOLDEN["merge"]
    hard = [{int(row): places for row, places in part.items()} for part in golden["shards"]]
    rows, plan = PlainRows(ALL.ids_RT[:4], np.full(4, WIDTH)), ScoringPlan("token")
    masking = HardTokens(kind="hard_tokens", rows_per_shard=rows_per_shard)
    spec = hardness_spec(masking, rows, ScoringView(plan, TOKENIZER), {"data": "rows"})
    writers = [Writer(tmp_path / "s", spec) for _ in hard]
    writers[0].prepare()
    every = hard[0] | hard[1] | {2: []}  # of row 2 no token is hard, so the original has no entry
    for writer, part in zip(writers, hard, strict=True):
        for shard in range(spec.shards):
            _, begin, end = spec.span(shard)
            if not part.keys() & range(begin, end) and begin != 2:
                continue
            nll_RT = np.full((end - begin, WIDTH), 0.05, np.float32)
            for row in range(begin, end):
                nll_RT[row - begin, every[row]] = 2.0
            columns = encode(nll_RT.ravel(), np.zeros(nll_RT.size, bool))
            counts_R, present_R = np.full(end - begin, WIDTH), np.ones(end - begin, bool)
            writer.write_shard(shard, counts_R, present_R, columns)
    writers[0].finish(writers[0].records | writers[1].records)
    opened = Hardness(tmp_path / "s", {"data": "rows"})
    row_ids_B = np.array([3, 0, 2, 1, 3])
    nll_BT, _ = opened.read(rows.rows(row_ids_B, row_ids_B * 0))
    found = [np.flatnonzero(nll_T > 0.1).tolist() for nll_T in nll_BT]
    assert found == [golden["merged"].get(str(row), []) for row in row_ids_B]


def test_the_original_needs_its_vocabulary():
    other = tokenizer_of(SIZE)
    other.add_tokens(["more"])
    with pytest.raises(ConfigError, match="sampler: original needs RoBERTa's vocabulary"):
        view_of(None, sampler="original", tokenizer=other)


def test_the_store_rounds_across_the_threshold(tmp_path):
    """0.100005 nats are more than 0.1, but not in float16; the original keeps float32."""
    rows = PlainRows(ALL.ids_RT[:1], np.array([WIDTH]))
    nll_RT = np.full((1, WIDTH), 0.05)
    nll_RT[0, [3, 7, 9, 20]] = 0.100005, 0.10001, 0.2, 0.09999
    view = view_of(store_of(tmp_path / "s", rows, nll_RT), sampler="original", rows=rows)
    _, labels_BT = view(rows.rows(np.array([0]), np.array([0])))
    assert np.flatnonzero(labels_BT[0] != IGNORE).tolist() == [7, 9]
