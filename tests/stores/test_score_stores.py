"""Stores of scores by a real model: the same bytes for any number of ranks, and refused where
something else would have given other ones."""

import numpy as np
import pytest
import torch

from dskd.batch import IGNORE
from dskd.data.loader import make_batch
from dskd.data.views import Shown
from dskd.engine.engine import shard_teacher
from dskd.errors import ConfigError, StoreError
from dskd.models.families import positions_of
from dskd.stores.dropout_scores import DropoutScorer, layout_of, score
from dskd.stores.uncertainty import Uncertainty, UncertaintyLayout
from tests.models import tiny
from tests.ranks import run_ranks
from tests.stores.caches import ToyRows, files
from tests.stores.test_dropout_scores import config_of

CPU = torch.device("cpu")
PRINTS = {"teacher": "T", "data": "D"}
CLASSES = ("air", "earth", "fire", "water", "wood")


class FirstPlace:
    """Each row as it is, of a class that stands at its first place."""

    draws = 1
    fingerprint = "first-place"

    def __call__(self, rows):
        labels_BT = np.full_like(rows.tokens_BT, IGNORE)
        labels_BT[:, 0] = 0
        return Shown(rows.tokens_BT, labels_BT)


def model():
    return tiny.make("bert", classes=list(CLASSES)).eval().requires_grad_(False)


def settings(**changed):
    return {"passes": 4, "dropout": None, "seed": 3, "micro_batch": 3, "at_once": 2, **changed}


def fill(folder, *, built=model, prints=PRINTS, config=None, rows=None, **changed):
    how = settings(**changed)
    config = built().config if config is None else config
    layout = layout_of(config, CLASSES, where="teacher.model", **how)
    sizes = {name: how[name] for name in ("seed", "micro_batch", "at_once")}
    return score(
        built, rows or ToyRows(vocabulary=43), FirstPlace(), folder, layout, fingerprints=prints,
        rows_per_shard=4, device=CPU, where="teacher.model", **sizes,
    )  # fmt: skip


def never():
    raise AssertionError("the store is complete")


def read(folder):
    columns = Uncertainty(folder, PRINTS).read(
        np.arange(23), "logits", "mean", "entropy", "mean_entropy"
    )
    return {name: torch.from_numpy(values) for name, values in columns.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of one rank's store."""
    folder = tmp_path_factory.mktemp("reference") / "scores"
    assert fill(folder)
    return folder


def _fill_rank(rank, folder, sharded):
    del rank
    return fill(folder, built=sharded_model if sharded else model, config=model().config)


def sharded_model():
    ds = tiny.zero3(2)
    built = tiny.make("bert", classes=list(CLASSES), ds=ds).eval().requires_grad_(False)
    return shard_teacher(built, ds)


def test_two_ranks_write_the_same_bytes(tmp_path, reference):
    assert run_ranks(_fill_rank, tmp_path / "s", False) == [True, True]
    assert files(tmp_path / "s") == files(reference)


def test_a_sharded_model_has_the_same_scores(tmp_path, reference):
    """All ranks make equally many passes, with its parameters gathered for each."""
    run_ranks(_fill_rank, tmp_path / "s", True)
    torch.testing.assert_close(read(tmp_path / "s"), read(reference), atol=1e-6, rtol=1e-6)


def test_the_store_holds_what_the_scorer_says(reference):
    built, rows, view = model(), ToyRows(vocabulary=43), FirstPlace()
    batch = make_batch(rows, view, np.array([9]), np.array([0]))
    ask = DropoutScorer(
        built, lambda b: positions_of(built, b).logits_NV, passes=4, at_once=4, seed=3
    )
    wanted, found = ask(batch), read(reference)
    for name in ("logits", "mean", "entropy", "mean_entropy"):
        ours = getattr(wanted, f"{name}_{'NC' if found[name].dim() == 2 else 'N'}")
        torch.testing.assert_close(ours, found[name][9:10], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("changed", [{"micro_batch": 8}, {"at_once": 4}, {"at_once": 1}], ids=str)
def test_rows_and_passes_at_a_time_change_rounding_only(tmp_path, reference, changed):
    """So a complete store is taken, whatever they were."""
    fill(tmp_path / "s", **changed)
    torch.testing.assert_close(read(tmp_path / "s"), read(reference), atol=1e-6, rtol=1e-6)
    assert not fill(reference, config=model().config, built=never, **changed)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"passes": 5}, "passes is 4 there and 5 here"),
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"dropout": 0.2}, "dropout is None there and 0.2 here"),
        ({"passes": 1}, "passes is 4 there and 1 here"),
        ({"prints": PRINTS | {"teacher": "U"}}, "teacher is 'T' there and 'U' here"),
        ({"prints": PRINTS | {"data": "E"}}, "data is 'D' there and 'E' here"),
        ({"rows": ToyRows(rows=24, vocabulary=43)}, "rows is 23 there and 24 here"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_store_of_something_else_is_refused(reference, changed, told):
    before = files(reference)
    with pytest.raises(StoreError, match=f"holds another store(.|\n)*{told}"):
        fill(reference, config=model().config, built=never, **changed)
    assert files(reference) == before


def test_what_scores_depend_on_is_in_the_layout():
    """A seed and sizes only where they change what is stored."""
    how, where = settings(), {"where": "teacher.model"}
    by_row = layout_of(config_of("bert"), "ab", **how, **where)
    assert by_row == UncertaintyLayout(("a", "b"), 4, None, 3)
    together = layout_of(config_of("deberta-v2"), "ab", **how, **where)
    assert together == UncertaintyLayout(("a", "b"), 4, None, 3, micro_batch=3, at_once=2)
    one = layout_of(config_of("llama"), "ab", **settings(passes=1), **where)
    assert one == UncertaintyLayout(("a", "b"), 1)
    with pytest.raises(ConfigError, match=r"teacher\.model: a llama without dropout"):
        layout_of(config_of("llama"), "ab", **how, **where)


def test_a_model_that_drops_nothing_leaves_no_store(tmp_path):
    def silent():
        return tiny.without_dropout(model())

    with pytest.raises(ConfigError, match=r"teacher\.model: 4 passes with dropout all gave the"):
        fill(tmp_path / "s", built=silent)
    assert not list((tmp_path / "s").glob("shard-*"))
