"""Prepared rows: made once, whole or absent, and refused when a byte changed."""

import multiprocessing
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from dskd.data import prepared, preparing
from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.errors import ConfigError, DataError, DiskError, DskdError
from dskd.settings.data import (
    JsonlSource,
    Masking,
    PretrainedTokenizer,
    TextSource,
    TrainedTokenizer,
)
from dskd.settings.labels import CsvSource
from dskd.system.files import file_hash, read_manifest, write_manifest
from tests.data.conftest import all_rows, make_corpus, settings, without_rights
from tests.stores.caches import flip


def test_read_pads_to_a_multiple_of_eight(prepared: Prepared) -> None:
    rows = prepared.train
    lengths = np.array([len(row) for row in all_rows(rows)])
    short = np.flatnonzero(lengths <= 24)[:3]
    _, epochs_B, domains_B, ids_BT, lengths_B = rows.rows(short, short + 7)[:5]
    assert (epochs_B == short + 7).all() and (domains_B == rows.domains_B(short)).all()
    assert ids_BT.dtype == lengths_B.dtype == np.int64
    assert lengths_B.tolist() == lengths[short].tolist()
    assert ids_BT.shape == (3, -(-lengths_B.max() // 8) * 8) and ids_BT.shape[1] < 32
    assert (ids_BT[np.arange(ids_BT.shape[1]) >= lengths_B[:, None]] == 1).all()
    backwards = rows.rows(short[::-1], short)
    assert (backwards.tokens_BT == ids_BT[::-1]).all()


def test_row_is_never_wider_than_a_block(corpus: Path) -> None:
    prepared = open_prepared(prepare(settings(corpus, block_size=30, packing="contiguous")))
    ids_BT, lengths_B = prepared.train.rows(np.arange(4), np.zeros(4, np.int64))[3:5]
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
        {"sources": [TextSource(kind="text", path=str(corpus / "corpus.txt"), per="line")]},
    ]  # fmt: skip
    folders = [prepare(settings(corpus, folder=tmp_path, **change)) for change in changes]
    assert len(set(folders)) == len(changes)
    opened = [open_prepared(folder) for folder in folders]
    assert len({p.fingerprint for p in opened}) == len(changes)


def test_keys_of_rows_of_before_are_kept(tmp_path: Path) -> None:
    """Settings that sources got later change the key only where they are given."""
    make_corpus(tmp_path / "corpus.txt")
    (tmp_path / "a.jsonl").write_text('{"text":"x","label":"a"}\n')
    (tmp_path / "a.csv").write_text("text,label\nx,a\n")
    text = TextSource(kind="text", path=str(tmp_path / "corpus.txt"))
    lines = JsonlSource(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    cells = CsvSource(kind="csv", path=str(tmp_path / "a.csv"), label="label")
    kept = [
        (text, "masked", "bb2c4c4fd5422e02581d9f1a3b778d11", {"per": "line"}),
        (lines, "masked", "02ea74aaa9a648e6116ee534290c974a", {"field": "a"}),
        (lines, "masked", "02ea74aaa9a648e6116ee534290c974a", {"on_bad_rows": "skip"}),
        (cells, "classification", "f632222a4b31343501f173cf7dd94e24", {"columns": ["text"]}),
        (cells, "classification", "f632222a4b31343501f173cf7dd94e24", {"on_bad_rows": "skip"}),
    ]
    for source, objective, want, change in kept:
        of = {"objective": objective}
        assert prepared._key(settings(tmp_path, sources=[source], **of), None) == want
        other = source.model_copy(update=change)
        assert prepared._key(settings(tmp_path, sources=[other], **of), None) != want


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


@pytest.mark.parametrize("name", ["../rows.txt", "/etc/hostname", "tokenizer/../../rows.txt"])
def test_a_manifest_names_no_files_outside(prepared: Prepared, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(prepared.folder, folder)
    (tmp_path / "rows.txt").write_text("x")
    content = read_manifest(folder / "manifest.json", DataError)
    path = folder / name
    content["files"][name] = {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
    write_manifest(folder / "manifest.json", content)
    with pytest.raises(DataError, match=r"manifest\.json: names .*, which is not inside"):
        open_prepared(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("files",), []),
        (("files", "train.ids"), {}),
        (("files", "train.ids", "bytes"), -1),
        (("splits", "train", "rows"), 0),
        (("splits", "train", "rows"), 10**18),
        (("splits", "train", "tokens"), "many"),
        (("splits",), {}),
        (("dtype",), "float32"),
        (("block_size",), 0),
        (("pad",), None),
        (("domains",), 3),
    ],
)
def test_a_manifest_of_anything_else_is_refused(
    prepared: Prepared, tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(prepared.folder, folder)
    content = read_manifest(folder / "manifest.json", DataError)
    section = content
    for part in place[:-1]:
        section = section[part]
    section[place[-1]] = value
    write_manifest(folder / "manifest.json", content)
    with pytest.raises(DataError, match=r"manifest\.json: (not as this dskd|train\.\w+ is not of)"):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere"])
def test_folder_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    make_corpus(tmp_path / "corpus.txt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match=rf"data\.folder: .*{name}: cannot write the prepared rows"):
        prepare(settings(tmp_path, folder=tmp_path / name))


@pytest.mark.parametrize("least", [0, 1000, 6000])
def test_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, least: int) -> None:
    """Wherever it is full: at the rows, at the tokenizer."""
    make_corpus(tmp_path / "corpus.txt", 400)
    data = settings(tmp_path)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def build() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, least))
        try:
            prepare(data)
        except DskdError as problem:
            sender.send(str(problem))
        sender.close()

    child = multiprocessing.get_context("fork").Process(target=build)
    child.start()
    child.join()
    assert receiver.poll() and child.exitcode == 0
    message = receiver.recv()
    assert message.startswith("data.") and str(data.folder) in message
    assert "File too large" in message and "\n" not in message
    assert list(data.folder.iterdir()) == []


def test_what_killed_builds_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    """Also if nothing is to be built, and if the killed process had our number."""
    make_corpus(tmp_path / "corpus.txt")
    folder = prepare(settings(tmp_path))
    child = multiprocessing.get_context("fork").Process(target=os.getpid)
    child.start()
    child.join()
    host = socket.gethostname()
    left = [folder.parent / f".{n:016x}.{host}.{n}.tmp" for n in (child.pid, os.getpid())]
    kept = [folder.parent / f".{1:016x}.{host}.1.tmp", folder.parent / f".a.{host}.b.tmp"]
    for path in left + kept:
        path.mkdir()
        (path / "train.ids").write_text("x")
    assert prepare(settings(tmp_path)) == folder
    assert sorted(folder.parent.iterdir()) == sorted([folder, *kept])


def test_rows_that_cannot_be_read_are_named(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    shutil.copytree(prepared.folder, "rows")
    Path("rows/train.ids").chmod(0)
    with without_rights(), pytest.raises(DataError, match=r"rows/train\.ids: cannot be read"):
        open_prepared(Path("rows"))
