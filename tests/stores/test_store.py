"""The row store: what is written is read, and nothing else ever is."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from dskd.errors import DiskError, StoreError
from dskd.stores import store as store_module
from dskd.stores.shard import Column, StoreSpec
from dskd.stores.store import MANIFEST, Store, Writer, is_complete, read_spec, shard_path
from dskd.system.files import read_manifest, write_manifest
from tests.disks import limited
from tests.stores.caches import files, flip

ROWS, DRAWS = 7, 2
ABSENT = 3
COLUMNS = ("a", "b")


def spec_of(**changes):
    fields = {
        "kind": "test",
        "columns": {"a": Column("float16", (3,)), "b": Column("uint8")},
        "rows": ROWS,
        "draws": DRAWS,
        "rows_per_shard": 4,
        "fingerprints": {"teacher": "T1", "data": "D1"},
        "settings": {"k": 3, "temperatures": [1.0, 2.5]},
    }
    return StoreSpec(**{**fields, **changes})


def values_of(draw, row):
    """A row's columns; row 5 has no position."""
    count = 0 if row == 5 else 1 + row % 3
    draw, row = int(draw), int(row)  # an np.int64 would widen the float16 values
    a = np.arange(count * 3, dtype=np.float16).reshape(count, 3) + 100 * draw + 10 * row
    return {"a": a, "b": np.full(count, 16 * draw + row, np.uint8)}


def write_shard(writer, shard):
    draw, begin, end = writer.spec.span(shard)
    present = np.arange(begin, end) != ABSENT
    # one that is left out has no position, as row 5
    rows = [values_of(draw, 5 if row == ABSENT else row) for row in range(begin, end)]
    columns = {name: np.concatenate([row[name] for row in rows]) for name in COLUMNS}
    writer.write_shard(shard, np.array([len(row["b"]) for row in rows]), present, columns)


def write(folder, spec=None, shards=None):
    """A store; with ``shards`` an interrupted one that has only these."""
    writer = Writer(folder, spec or spec_of())
    writer.prepare()
    for shard in range(writer.spec.shards) if shards is None else shards:
        write_shard(writer, shard)
    if shards is None:
        writer.finish(writer.records)
    return folder


def open_store(folder, **options):
    return Store(folder, **{"kind": "test", "expect": {}, **options})


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store")


def test_reads_rows_in_any_order_and_draw(folder):
    rows = np.array([6, 0, 6, 5, 2, 1])
    draws = np.array([1, 0, 0, 1, 1, 0])
    counts, columns = open_store(folder).read(rows, draws, COLUMNS)
    wanted = [values_of(draw, row) for row, draw in zip(rows, draws, strict=True)]
    assert counts.tolist() == [len(row["b"]) for row in wanted] == [1, 1, 1, 0, 3, 2]
    for name, column in columns.items():
        np.testing.assert_array_equal(column, np.concatenate([row[name] for row in wanted]))
        assert column.dtype == wanted[0][name].dtype


def test_reads_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    store = open_store(write(tmp_path / "s", spec_of(rows_per_shard=1)))
    rows = np.array([0, 1, 2, 4, 5, 6] * 2)
    _, columns = store.read(rows, rows % 2, COLUMNS)
    wanted = np.concatenate([values_of(row % 2, row)["b"] for row in rows])
    np.testing.assert_array_equal(columns["b"], wanted)


def test_only_the_columns_that_are_named_are_read(folder):
    store, rows = open_store(folder), np.array([2, 4])
    counts, columns = store.read(rows, rows * 0, ["b"])
    assert columns.keys() == {"b"} and len(columns["b"]) == counts.sum()
    assert store.read(rows, rows * 0, [])[1] == {}


def test_reads_no_rows(folder):
    counts, columns = open_store(folder).read(np.empty(0, np.int64), np.empty(0, np.int64), COLUMNS)
    assert counts.shape == (0,) and columns["a"].shape == (0, 3)


@pytest.mark.parametrize(
    ("row", "draw", "message"),
    [
        (ABSENT, 1, "row 3 was left out"),
        (7, 0, "no row 7 of draw 0"),
        (-1, 0, "no row -1"),
        (2, 2, "no row 2 of draw 2"),
    ],
)
def test_row_that_is_not_there_is_named(folder, row, draw, message):
    with pytest.raises(StoreError, match=message):
        open_store(folder).read(np.array([0, row]), np.array([0, draw]), COLUMNS)


def test_shards_are_plain_safetensors_of_known_bytes(folder, tmp_path):
    arrays = safetensors.numpy.load_file(shard_path(folder, 1))
    assert arrays["row_ptr"].tolist() == [0, 2, 2, 3]  # rows 4, 5, 6
    assert arrays["present"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(arrays["a"][:2], values_of(0, 4)["a"])
    found = files(folder)
    assert sorted(found) == [MANIFEST, *(f"shard-0000{i}.safetensors" for i in range(4))]
    assert files(write(tmp_path / "again")) == found


def test_spec_survives_the_manifest(folder):
    spec, records = read_spec(folder)
    assert spec == spec_of() and spec.fingerprint == spec_of().fingerprint
    sizes = [shard_path(folder, shard).stat().st_size for shard in range(4)]
    assert [record.nbytes for record in records] == sizes
    assert sum(record.positions for record in records) == 2 * (1 + 2 + 3 + 2 + 0 + 1)


def test_flipped_bytes_of_a_shard_are_found(folder):
    path = shard_path(folder, 2)
    store = open_store(folder)
    for place in range(0, path.stat().st_size, 3):
        flip(path, place)
        with pytest.raises(StoreError, match=r"shard-00002.safetensors: (damaged|foreign)"):
            store.verify([2])
        flip(path, place)
    store.verify([2])


def test_flipped_bytes_of_the_manifest_are_found(folder):
    path = folder / MANIFEST
    for place in range(0, path.stat().st_size, 3):
        flip(path, place)
        with pytest.raises(StoreError, match=r"manifest.json: damaged"):
            read_spec(folder)
        flip(path, place)
    read_spec(folder)


def test_flipped_bytes_of_an_interrupted_store_are_redone(tmp_path):
    folder = write(tmp_path / "s", shards=[0, 2])
    whole = shard_path(folder, 2).read_bytes()
    for place in range(0, len(whole), 2):
        flip(shard_path(folder, 2), place)
        writer = Writer(folder, spec_of())
        assert writer.missing(range(4)) == [1, 2, 3]
        assert not shard_path(folder, 2).exists()
        shard_path(folder, 2).write_bytes(whole)
    assert writer.missing(range(4)) == [1, 3]


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_shard(folder, size):
    path = shard_path(folder, 0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"shard-00000.safetensors: truncated, \d+ bytes of"):
        open_store(folder)
    (folder / MANIFEST).unlink()
    assert Writer(folder, spec_of()).missing(range(4)) == [0]


def test_missing_shard(folder):
    shard_path(folder, 3).unlink()
    with pytest.raises(StoreError, match=r"shard-00003.safetensors: missing"):
        open_store(folder)


def test_shard_of_another_store(folder, tmp_path):
    other = write(tmp_path / "other", spec_of(fingerprints={"teacher": "T2", "data": "D1"}))
    shutil.copy(shard_path(other, 0), shard_path(folder, 0))
    with pytest.raises(StoreError, match=r"shard-00000.safetensors: foreign, .* another store"):
        open_store(folder)
    with pytest.raises(StoreError, match=r"shard-00000.safetensors: foreign, .* another store"):
        Writer(folder, spec_of()).missing(range(4))


def test_shard_of_another_place(folder):
    shutil.copy(shard_path(folder, 0), shard_path(folder, 2))  # the same rows of another draw
    with pytest.raises(StoreError, match=r"shard-00002.safetensors: foreign, it is shard 0"):
        open_store(folder)


def test_foreign_manifests(folder, tmp_path):
    other = write(tmp_path / "other", spec_of(fingerprints={"teacher": "T2", "data": "D1"}))
    shutil.copy(other / MANIFEST, folder / MANIFEST)
    with pytest.raises(StoreError, match=r"made with another teacher .*T2.*T1"):
        open_store(folder, expect={"data": "D1", "teacher": "T1"})
    with pytest.raises(StoreError, match=r"shard-00000.safetensors: foreign"):
        open_store(folder)
    with pytest.raises(StoreError, match="holds 'test', not 'logits'"):
        open_store(folder, kind="logits")
    write_manifest(folder / MANIFEST, {"kind": "rows", "format": 1})
    with pytest.raises(StoreError, match=r"manifest.json: foreign"):
        open_store(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(StoreError, match=r"manifest.json: no such file"):
        open_store(folder)


def test_an_expected_fingerprint_must_be_there(folder):
    open_store(folder, expect={"teacher": "T1"})
    with pytest.raises(StoreError, match="made with another masking"):
        open_store(folder, expect={"masking": "M"})


def test_verification_is_shared_by_ranks(folder):
    flip(shard_path(folder, 2))
    open_store(folder, share=(1, 2))
    open_store(folder, share=(0, 3))
    for share in [(0, 2), (2, 3)]:
        with pytest.raises(StoreError, match="shard-00002"):
            open_store(folder, share=share)


def test_interrupted_store(tmp_path):
    folder = write(tmp_path / "s", shards=[1])
    (folder / ".shard-00002.safetensors.77.tmp").write_bytes(b"half")
    with pytest.raises(StoreError, match="not complete"):
        open_store(folder)
    assert not is_complete(folder, spec_of())
    writer = Writer(folder, spec_of())
    writer.prepare()
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, shard_path(folder, 1).name]
    assert writer.missing(range(4)) == [0, 2, 3]
    for shard in (0, 2, 3):
        write_shard(writer, shard)
    writer.finish(writer.records)
    assert files(folder) == files(write(tmp_path / "undisturbed"))
    assert is_complete(folder, spec_of())


def test_finish_checks_that_all_shards_are_still_there(tmp_path):
    folder = write(tmp_path / "s", shards=range(4))
    writer = Writer(folder, spec_of())
    assert writer.missing(range(4)) == []
    shard_path(folder, 1).unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors: missing"):
        writer.finish(writer.records)
    with pytest.raises(StoreError, match="not complete"):
        open_store(folder)


def test_damage_is_mended_by_capturing_again_without_the_manifest(folder):
    flip(shard_path(folder, 1))
    with pytest.raises(StoreError, match=r"shard-00001.*: damaged.*; remove manifest.json beside"):
        open_store(folder)
    (folder / MANIFEST).unlink()
    writer = Writer(folder, spec_of())
    writer.prepare()
    assert writer.missing(range(4)) == [1]


@pytest.mark.parametrize("shards", [[0], None])
def test_another_store_is_refused_by_what_differs(tmp_path, shards):
    folder = write(tmp_path / "s", shards=shards)
    other = spec_of(
        fingerprints={"teacher": "T2", "data": "D1"}, settings={"k": 4, "temperatures": [1.0, 2.5]}
    )
    for refuse in (Writer(folder, other).prepare, lambda: is_complete(folder, other)):
        with pytest.raises(StoreError) as refused:
            refuse()
        assert str(refused.value).splitlines()[1:] == [
            "  fingerprints.teacher is 'T1' there and 'T2' here",
            "  settings.k is 3 there and 4 here",
        ]


def test_size_of_shards_matters_only_while_they_are_written(tmp_path):
    other = spec_of(rows_per_shard=5)
    assert is_complete(write(tmp_path / "whole"), other)
    with pytest.raises(StoreError, match="rows_per_shard is 4 there and 5 here"):
        is_complete(write(tmp_path / "part", shards=[0]), other)


def test_metadata_cannot_pass_for_another_shards(folder):
    """The digest covers the metadata, so that an edited one is damage, not another shard."""
    path = shard_path(folder, 1)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["dskd"])["shard"] == 1
    path.write_bytes(data.replace(b'\\"shard\\": 1', b'\\"shard\\": 2'))
    assert path.read_bytes() != data
    (folder / MANIFEST).unlink()
    assert Writer(folder, spec_of()).missing([1]) == [1]


# ---- manifests that were edited: their checksum is right -----------------------------------------


def edited(folder, change):
    """Change the content of a manifest and make its checksum anew."""
    content = read_manifest(folder / MANIFEST, StoreError)
    change(content)
    write_manifest(folder / MANIFEST, content)


COUNTS = (0, -1, 1.0, 2.5, 1e18, True, "2", None, [2], 10**30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("rows", "draws", "rows_per_shard") for value in COUNTS),
        ("kind", 3),
        *(("fingerprints", value) for value in (None, [], {"teacher": 3})),
        *(("settings", value) for value in (None, [], "k")),
        *(("columns", value) for value in (None, [], {"a": None}, {"a": {"dtype": "uint8"}})),
        *(("columns", {"a": {"dtype": d, "shape": []}}) for d in ("object", "float128", 3, None)),
        *(("columns", {"a": {"dtype": "uint8", "shape": s}}) for s in (3, [-1], [1.5], None)),
        ("more", 1),
    ],
    ids=repr,
)
def test_a_manifest_that_says_what_cannot_be_is_refused(folder, name, value):
    edited(folder, lambda content: content["store"].update({name: value}))
    for read in (lambda: read_spec(folder), lambda: is_complete(folder, spec_of())):
        with pytest.raises(StoreError, match=r"manifest\.json: damaged, .*; remove it and make"):
            read()


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 8), ("draws", 3), ("rows_per_shard", 3), ("rows_per_shard", 7)]
)
def test_shards_must_be_those_of_the_rows(folder, name, value):
    """So many of them; and a number that leaves as many is not that in the shards."""
    edited(folder, lambda content: content["store"].update({name: value}))
    with pytest.raises(StoreError, match=r"has not the \d shards|foreign, it belongs to another"):
        open_store(folder)


@pytest.mark.parametrize("record", [None, 3, [], [1, "x"], [0, "x", 1], [9, 3, 1], [9, "x", -1]])
def test_a_shard_that_cannot_be_is_refused(folder, record):
    edited(folder, lambda content: content["shards"].__setitem__(2, record))
    with pytest.raises(StoreError, match=r"manifest\.json: damaged, shard 2 cannot be"):
        open_store(folder)


def test_one_shard_of_any_number_of_rows_is_not_another_store(tmp_path):
    """All numbers are possible, and yet not those that the shards were written with."""
    folder = write(tmp_path / "s", spec_of(rows_per_shard=ROWS))
    edited(folder, lambda content: content["store"].update(rows_per_shard=10**18))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors: foreign"):
        open_store(folder)


def test_the_positions_of_a_shard_are_those_in_the_manifest(folder):
    edited(folder, lambda content: content["shards"][1].__setitem__(2, 4))
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors: damaged, its arrays"):
        open_store(folder)


@pytest.mark.parametrize("rows", [-1, 5, "4", None, True])
def test_a_shard_holds_as_many_rows_as_it_may(folder, rows):
    edited(folder, lambda content: content["shards"][1].__setitem__(3, rows))
    with pytest.raises(StoreError, match=r"manifest\.json: damaged, shard 1 cannot be"):
        open_store(folder)


def test_the_rows_of_a_shard_are_those_in_the_manifest(folder):
    edited(folder, lambda content: content["shards"][0].__setitem__(3, 1))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors: damaged, its arrays"):
        open_store(folder)


def test_a_store_of_before_rows_were_counted_is_complete(folder):
    """Its shards hold all that was asked for then; one that counts them lacks the one left out."""
    every = np.ones((DRAWS, ROWS), bool)
    held = every & (np.arange(ROWS) != ABSENT)
    assert is_complete(folder, spec_of(), held) and not is_complete(folder, spec_of(), every)
    edited(folder, lambda content: [record.pop() for record in content["shards"]])
    assert is_complete(folder, spec_of(), every)
    assert open_store(folder).read(np.array([6]), np.array([1]), ["b"])[0] == [1]


@pytest.mark.parametrize("name", ["format", "store", "shards"])
def test_an_entry_of_the_manifest_must_be_there(folder, name):
    edited(folder, lambda content: content.pop(name))
    with pytest.raises(StoreError, match=r"manifest\.json: (damaged|foreign)"):
        read_spec(folder)


def test_a_complete_store_is_so_by_the_sizes_of_its_shards(folder):
    assert is_complete(folder, spec_of())
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"shard-00001.*: truncated, .*; remove manifest.json"):
        is_complete(folder, spec_of())
    path.unlink()
    with pytest.raises(StoreError, match=r"shard-00001.*: missing; remove manifest.json"):
        is_complete(folder, spec_of())


def test_what_cannot_be_written_leaves_no_temporary_file(tmp_path):
    """Under a limit of the size of a file, as on a full disk."""
    folder = write(tmp_path / "s", shards=[0])
    writer = Writer(folder, spec_of())
    with limited(100), pytest.raises(DiskError) as caught:
        write_shard(writer, 1)
    assert str(caught.value).startswith(f"{shard_path(folder, 1)}: cannot write a shard of the")
    assert sorted(files(folder)) == [MANIFEST, shard_path(folder, 0).name]
