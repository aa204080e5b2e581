"""The store of teachers' scores, what training reads of several side by side, and a file of
confidences from elsewhere: by row id, whole, and of the right teachers and rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pytest import approx

from dskd.data.views import Shown
from dskd.errors import NonFiniteError, StoreError
from dskd.stores.manifest import MANIFEST
from dskd.stores.store import Writer
from dskd.stores.uncertainty import (
    PANEL_CONFIDENCE,
    PANEL_PRESENT,
    ConfidenceFile,
    PanelPresence,
    StoredPanel,
    Uncertainty,
    UncertaintyLayout,
    confidence,
    panel_logits,
)
from tests.batches import batch_of
from tests.data.row_batches import row_batch

ROWS = 7
LABELS = ("art", "law", "war")
LAYOUT = UncertaintyLayout(LABELS, 16, 0.1, 42)
PRINTS = {"teacher": "T", "data": "D"}


def values_of(row, classes=3):
    """The columns of one row, which say which row it is."""
    generator = np.random.RandomState(row)
    mean_C = generator.dirichlet(np.ones(classes)).astype(np.float32)
    entropy = -(mean_C * np.log(mean_C)).sum()
    logits_C = generator.randn(classes).astype(np.float32)
    return {"logits": logits_C, "mean": mean_C, "entropy": entropy, "mean_entropy": entropy / 2}


def write(folder, layout=LAYOUT, *, absent=(), draw=0, **settings):
    """A store without a model; ``settings``: others than the layout has."""
    spec = layout.spec(rows=ROWS, rows_per_shard=3, fingerprints=PRINTS)
    spec = replace(spec, settings={**spec.settings, **settings})
    writer = Writer(folder, spec)
    writer.prepare()
    for shard in range(spec.shards):
        _, begin, end = spec.span(shard)
        ids = [row for row in range(begin, end) if row not in absent]
        rows = [values_of(row + 100 * draw, len(layout.labels)) for row in ids]
        present = np.array([row in ids for row in range(begin, end)])
        columns = {
            name: column.joined([np.asarray([row[name]], np.float32) for row in rows])
            for name, column in spec.columns.items()
        }
        writer.write_shard(shard, present.astype(np.int64), present, columns)
    writer.finish(writer.records)
    return folder


def shown(rows):
    """A row's first place is where its class is."""
    labels = np.full((len(rows.ids_B), 4), -100)
    labels[:, 0] = 0
    return Shown(rows.tokens_BT, labels)


def rows_of(*ids):
    return row_batch(list(ids), 0, np.zeros((len(ids), 4), np.int64), [4] * len(ids))


def test_rows_are_read_by_id(tmp_path):
    store = Uncertainty(write(tmp_path / "s"), PRINTS, layout=LAYOUT)
    assert store.layout == LAYOUT
    ids = [5, 0, 5, 3]
    read = store.read(np.array(ids), "logits", "mean", "entropy", "mean_entropy")
    for name, values in read.items():
        wanted = np.array([values_of(row)[name] for row in ids], np.float32)
        assert np.array_equal(values, wanted), name


def test_a_panel_of_stores(tmp_path):
    """Of other classes each; a row of a domain that one is not asked about is the other's."""
    pair = UncertaintyLayout(("x", "y"), 1)
    stores = [
        Uncertainty(write(tmp_path / "a", absent=(2, 3)), PRINTS),
        Uncertainty(write(tmp_path / "b", pair, absent=(0,), draw=1), PRINTS),
    ]
    heard_Dn = np.array([[False, True], [True, False], [True, True]])
    rows = rows_of(3, 0, 6)._replace(domains_B=np.array([0, 1, 2]))
    assert PanelPresence(heard_Dn)(rows, shown(rows)) == {PANEL_PRESENT: approx(heard_Dn)}
    columns = StoredPanel(stores, confident=True, heard_Dn=heard_Dn)(rows, shown(rows))
    assert columns.keys() == {panel_logits(0), panel_logits(1), PANEL_CONFIDENCE}
    assert columns[panel_logits(0)].dtype == columns[PANEL_CONFIDENCE].dtype == np.float32
    assert np.array_equal(columns[panel_logits(0)][2], values_of(6)["logits"])
    assert np.array_equal(columns[panel_logits(1)][0], values_of(103, 2)["logits"])
    assert not columns[panel_logits(0)][0].any() and not columns[panel_logits(1)][1].any()
    for place, teacher, row, classes in ((2, 0, 6, 3), (0, 1, 103, 2), (2, 1, 106, 2)):
        wanted = 1 - values_of(row, classes)["entropy"] / np.log(classes)
        assert columns[PANEL_CONFIDENCE][place, teacher] == approx(wanted, abs=1e-6)
    rows = rows_of(6, 5, 4)
    columns = StoredPanel(stores, confident=False)(rows, shown(rows))
    assert columns.keys() == {panel_logits(0), panel_logits(1)}
    wanted = np.array([values_of(100 + row, 2)["logits"] for row in (6, 5, 4)])
    assert np.array_equal(columns[panel_logits(1)], wanted)


def test_a_row_that_was_not_scored_is_refused(tmp_path):
    stores = [Uncertainty(write(tmp_path / name, absent=(2, 4)), PRINTS) for name in "ab"]
    rows = rows_of(1, 4, 2)
    with pytest.raises(StoreError, match="row 4 was left out of this store"):
        StoredPanel(stores, confident=True)(rows, shown(rows))


def test_confidence_is_between_certainty_and_nothing():
    uniform = torch.full((4,), 0.25)
    assert confidence(torch.special.entr(uniform).sum(), 4) == approx(0.0, abs=1e-6)
    assert confidence(np.float32(0.0), 4) == 1.0


@pytest.mark.parametrize("name", ["teacher", "data"])
def test_a_store_of_something_else_is_refused_by_name(tmp_path, name):
    folder = write(tmp_path / "s")
    with pytest.raises(StoreError, match=f"made with another {name}"):
        Uncertainty(folder, PRINTS | {name: "other"})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"labels": ("law", "art", "war")}, r"labels is \('art', 'law', 'war'\) there and \('law'"),
        ({"passes": 8}, "passes is 16 there and 8 here"),
        ({"seed": 1}, "seed is 42 there and 1 here"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_other_scores_are_refused(tmp_path, changed, told):
    folder = write(tmp_path / "s")
    with pytest.raises(StoreError, match=told):
        Uncertainty(folder, PRINTS, layout=replace(LAYOUT, **changed))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ["art"]), ("labels", ["art", "law", "law"]), ("labels", ["art", 1, "war"]),
        ("passes", 0), ("passes", 1.5), ("dropout", 1.0), ("dropout", "much"), ("seed", True),
        ("micro_batch", 0), ("at_once", -1), ("more", 1),
    ],
)  # fmt: skip
def test_what_no_writer_writes_is_damage(tmp_path, field, value):
    """Whole, but for its settings."""
    folder = write(tmp_path / "s", **{field: value})
    with pytest.raises(StoreError, match=rf"{MANIFEST}: damaged, no uncertainty store has"):
        Uncertainty(folder, PRINTS)


def test_rows_whose_scores_are_no_numbers_are_named():
    labels_BT = torch.full((3, 4), -100)
    labels_BT[:, 0] = 0
    batch = batch_of(labels_BT, row_ids_B=torch.tensor([8, 5, 2]))
    good_NC, good_N = torch.ones(3, 3), torch.ones(3)
    columns = LAYOUT.encode(batch, logits=good_NC.double(), entropy=good_N)
    assert {each.dtype for each in columns.values()} == {np.dtype("float32")}
    bad_N = torch.tensor([1.0, torch.nan, torch.inf])
    for bad in ({"logits": good_NC * bad_N[:, None]}, {"logits": good_NC, "entropy": bad_N}):
        with pytest.raises(NonFiniteError, match="row 5"):
            LAYOUT.encode(batch, **bad)


def test_a_file_of_confidences(tmp_path):
    values = np.linspace(0, 1, ROWS * 2).reshape(ROWS, 2)
    np.save(tmp_path / "c.npy", values)
    rows = rows_of(4, 0)
    columns = ConfidenceFile(tmp_path / "c.npy", ROWS, 2)(rows, shown(rows))
    assert columns.keys() == {PANEL_CONFIDENCE}
    assert np.array_equal(columns[PANEL_CONFIDENCE], values[[4, 0]].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v[:-1], r"is \[6, 2\], but there are 7 training rows and 2 teachers"),
        (lambda v: v.T, r"is \[2, 7\]"),
        (lambda v: v[:, :1], r"is \[7, 1\]"),
        (lambda v: np.where(v > 0.9, np.nan, v), "row 6 has nan for teacher 0; a confidence is"),
        (lambda v: v + 0.2, r"row 5 has 1.04\d* for teacher 1"),
        (lambda v: v - 0.5, "row 0 has -0.5 for teacher 0"),
        (lambda v: (v * 2).astype(int), "no array of floating point numbers"),
        (lambda v: np.array([None, v], dtype=object), "cannot be read as a .npy file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, told):
    values = np.linspace(0, 1, ROWS * 2).reshape(ROWS, 2)
    np.save(tmp_path / "c.npy", change(values), allow_pickle=True)
    with pytest.raises(StoreError, match=rf"c\.npy: .*({told})"):
        ConfidenceFile(tmp_path / "c.npy", ROWS, 2)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    for content in (None, b"", b"nonsense"):
        if content is not None:
            (tmp_path / "c.npy").write_bytes(content)
        with pytest.raises(StoreError, match=r"c\.npy: cannot be read as a \.npy file"):
            ConfidenceFile(tmp_path / "c.npy", ROWS, 2)


def test_settings_survive_the_manifest(tmp_path):
    layout = UncertaintyLayout(LABELS, 16, None, 3, micro_batch=8, at_once=4)
    assert Uncertainty(write(tmp_path / "s", layout), PRINTS).layout == layout
