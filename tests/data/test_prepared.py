"""Prepared rows: made once, whole or absent, and refused when a byte changed."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dskd.data import prepared, preparing
from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Masking, PretrainedTokenizer, TextSource, TrainedTokenizer
from dskd.system.files import write_manifest
from tests.data.conftest import all_rows, make_corpus, settings
from tests.stores.caches import flip


def test_read_pads_to_a_multiple_of_eight(prepared: Prepared) -> None:
    rows = prepared.train
    lengths = np.array([len(row) for row in all_rows(rows)])
    short = np.flatnonzero(lengths <= 24)[:3]
    _, epochs_B, domains_B, ids_BT, lengths_B = rows.rows(short, short + 7)
    assert (epochs_B == short + 7).all() and (domains_B == rows.domains_B(short)).all()
    assert ids_BT.dtype == lengths_B.dtype == np.int64
    assert lengths_B.tolist() == lengths[short].tolist()
    assert ids_BT.shape == (3, -(-lengths_B.max() // 8) * 8) and ids_BT.shape[1] < 32
    assert (ids_BT[np.arange(ids_BT.shape[1]) >= lengths_B[:, None]] == 1).all()
    backwards = rows.rows(short[::-1], short)
    assert (backwards.tokens_BT == ids_BT[::-1]).all()


def test_row_is_never_wider_than_a_block(corpus: Path) -> None:
    prepared = open_prepared(prepare(settings(corpus, block_size=30, packing="contiguous")))
    *_, ids_BT, lengths_B = prepared.train.rows(np.arange(4), np.zeros(4, np.int64))
    assert ids_BT.shape == (4, 30) and lengths_B.tolist() == [30] * 4


def test_second_call_only_reads(corpus: Path, monkeypatch) -> None:
    folder = prepare(settings(corpus))

    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(prepared, "build_rows", never)
    assert prepare(settings(corpus)) == folder
    # How the rows are masked does not change them.
    assert prepare(settings(corpus, masking=Masking(probability=0.5))) == folder


def test_every_setting_of_the_rows_names_another_folder(corpus: Path, tmp_path: Path) -> None:
    changes = [
        {}, {"objective": "causal"}, {"block_size": 40}, {"packing": "complete_doc"},
        {"validation_fraction": 0.3}, {"tokenizer": TrainedTokenizer(vocab_size=310)},
        {"sources": [TextSource(kind="text", path=str(corpus / "corpus.txt"), documents=100)]},
        {"sources": [TextSource(kind="text", path=str(corpus / "corpus.txt"), domain="x")]},
        {"validation": [TextSource(kind="text", path=str(corpus / "corpus.txt"), documents=5)]},
    ]  # fmt: skip
    folders = [prepare(settings(corpus, folder=tmp_path, **change)) for change in changes]
    assert len(set(folders)) == len(changes)
    opened = [open_prepared(folder) for folder in folders]
    assert len({p.fingerprint for p in opened}) == len(changes)


def test_moved_corpus_is_the_same_and_changed_one_another(corpus: Path, tmp_path: Path) -> None:
    first = prepare(settings(corpus))
    shutil.copy(corpus / "corpus.txt", tmp_path / "corpus.txt")
    stamp = os.stat(corpus / "corpus.txt")
    moved = prepare(settings(tmp_path))
    assert moved.name == first.name
    assert open_prepared(moved).fingerprint == open_prepared(first).fingerprint
    raw = bytearray((corpus / "corpus.txt").read_bytes())
    raw[raw.index(b"garden")] ^= 1  # same size, same times
    (tmp_path / "corpus.txt").write_bytes(raw)
    os.utime(tmp_path / "corpus.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = prepare(settings(tmp_path))
    assert changed.name != first.name
    assert open_prepared(changed).fingerprint != open_prepared(first).fingerprint


def test_corpus_that_changes_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    make_corpus(tmp_path / "corpus.txt")
    original = preparing._write_manifest

    def meanwhile(*args: object) -> None:
        original(*args)
        make_corpus(tmp_path / "corpus.txt", 100)

    monkeypatch.setattr(preparing, "_write_manifest", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(settings(tmp_path))
    assert list((tmp_path / "rows").iterdir()) == []


FILES = [f"{split}.{part}" for split in ("train", "validation") for part in preparing._FILES]
FILES += ["manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


def test_every_file_is_checked(prepared: Prepared) -> None:
    paths = [p for p in prepared.folder.rglob("*") if p.is_file()]
    assert {p.relative_to(prepared.folder).as_posix() for p in paths} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_file_is_named(prepared: Prepared, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(prepared.folder, folder)
    path = folder / name
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, -1) if damage == "flip" else (0,):
        path.write_bytes(whole[:-1] if damage == "cut" else whole)
        if damage == "flip":
            flip(path, place)
        elif damage == "remove":
            path.unlink()
        with pytest.raises(DataError, match=f"{name}: "):
            open_prepared(folder)


def test_unverified_opening_still_checks_sizes_and_tokenizer(
    prepared: Prepared, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(prepared.folder, folder)
    open_prepared(folder, verify=False)
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"cat", b"car"))
    with pytest.raises(DataError, match=r"tokenizer.json: damaged"):
        open_prepared(folder, verify=False)
    shutil.copy(prepared.folder / "tokenizer" / "tokenizer.json", path)
    with (folder / "train.ids").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match=r"train.ids: it has \d+ bytes, not \d+"):
        open_prepared(folder, verify=False)


def test_other_manifest_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", {"kind": "store", "format": 1})
    with pytest.raises(DataError, match="not of prepared rows"):
        open_prepared(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: no such file"):
        open_prepared(tmp_path / "nowhere")


def test_killed_build_leaves_nothing_that_is_reused(tmp_path: Path, monkeypatch) -> None:
    make_corpus(tmp_path / "corpus.txt")
    rows = tmp_path / "rows"

    def wait(*_: object) -> None:
        (tmp_path / "reached").touch()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_publish", wait)  # everything is written, only the name is missing
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=prepare, args=(settings(tmp_path),))
        child.start()
        deadline = time.monotonic() + 30
        while not (tmp_path / "reached").exists():
            assert time.monotonic() < deadline and child.is_alive()
            time.sleep(0.01)
    # A build that is still alive is left alone by another one.
    other = prepare(settings(tmp_path, block_size=40))
    assert len(list(rows.iterdir())) == 2
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert [p.name for p in rows.iterdir() if not p.name.startswith(".")] == [other.name]
    folder = prepare(settings(tmp_path))
    assert sorted(rows.iterdir()) == sorted([folder, other])
    open_prepared(folder)


def test_two_builders_at_once(tmp_path: Path, monkeypatch) -> None:
    make_corpus(tmp_path / "corpus.txt")
    original = prepared._publish

    def slower(temporary: Path, folder: Path) -> None:
        monkeypatch.setattr(prepared, "_publish", original)
        shutil.copytree(temporary, folder)  # another run was first
        original(temporary, folder)

    monkeypatch.setattr(prepared, "_publish", slower)
    folder = prepare(settings(tmp_path))
    assert [p.name for p in (tmp_path / "rows").iterdir()] == [folder.name]
    open_prepared(folder)


def test_missing_tokenizer_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = PretrainedTokenizer(kind="pretrained", path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path"):
        prepare(settings(tmp_path, tokenizer=source))
    assert not (tmp_path / "rows").exists()
