"""Text files: everything below a folder or pattern is read, or refused by name."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from glob import glob
from pathlib import Path

import pyarrow
import pytest

from dskd.data.sources import content_hash, documents, files, hidden, size
from dskd.errors import DataError
from dskd.settings.data import JsonlSource, TextSource
from tests.data.conftest import without_rights


def read(path: object) -> list[str]:
    return list(documents(TextSource(kind="text", path=str(path))))


def read_json(path: object) -> list[str]:
    return list(documents(JsonlSource(kind="jsonl", path=str(path))))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A corpus of four documents, two of them behind links, and with links that go in circles."""
    corpus, far = tmp_path / "corpus", tmp_path / "far"
    for folder in (corpus / "a", far / "deep", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (corpus / "a" / "one.txt").write_text("one")
    (corpus / "two.txt").write_text("two")
    (far / "deep" / "three.txt").write_text("three")
    (tmp_path / "elsewhere" / "four").write_text("four")
    (corpus / "four.txt").symlink_to(tmp_path / "elsewhere" / "four")
    (corpus / "far").symlink_to(far)
    (far / "deep" / "up").symlink_to(corpus)
    (corpus / "a" / "self").symlink_to(".")
    (corpus / "far-too").symlink_to(far)
    return corpus


def test_links_are_followed_and_each_folder_is_read_once(linked: Path) -> None:
    assert read(linked) == ["one", "three", "four", "two"]
    assert read(linked / "**" / "*.txt") == ["one", "three", "four", "two"]
    assert read(linked / "far*" / "deep" / "*.txt") == ["three", "three"], "the pattern names both"
    before = content_hash(TextSource(kind="text", path=str(linked)))
    (linked / "far" / "deep" / "three.txt").write_text("3")
    assert content_hash(TextSource(kind="text", path=str(linked))) != before


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "*/gone"])
@pytest.mark.parametrize("target", ["gone", "nowhere/gone"])
def test_a_link_to_nothing_is_named(linked: Path, pattern: str, target: str) -> None:
    (linked / "a" / target).parent.mkdir(exist_ok=True)
    (linked / "a" / "gone").symlink_to(target if "/" in target else "gone")
    where = linked / pattern if pattern else linked
    if pattern == "*/*.txt":
        assert read(where) == ["one"], "it does not match"
        return
    with pytest.raises(DataError, match=r"a/gone: "):
        read(where)


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus below the current folder, where another user can go."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "one.txt").write_text("one")
    (tmp_path / "corpus" / "sub" / "two.txt").write_text("two")
    return Path("corpus")


@pytest.mark.parametrize("path", ["corpus", "corpus/**/*.txt", "corpus/*/*.txt"])
@pytest.mark.parametrize("mode", [0o311, 0o644, 0])
def test_a_folder_that_cannot_be_read_is_named(plain: Path, path: str, mode: int) -> None:
    (plain / "sub").chmod(mode)
    with without_rights():
        with pytest.raises(DataError, match=r"data.sources: text: .*sub.*: cannot be read"):
            read(path)
        assert read("corpus/*.txt") == ["one"], "the pattern does not look there"


def test_a_file_that_cannot_be_read_is_named(plain: Path) -> None:
    (plain / "one.txt").chmod(0)
    with without_rights():
        for use in (read, lambda path: content_hash(TextSource(kind="text", path=path))):
            with pytest.raises(DataError, match=r"corpus/one\.txt: cannot be read .Permission"):
                use("corpus")


def test_what_is_no_file_is_named(linked: Path) -> None:
    os.mkfifo(linked / "pipe.txt")
    for path in (linked, linked / "*.txt"):
        with pytest.raises(DataError, match=r"pipe\.txt: neither a file nor a folder"):
            read(path)


def test_patterns_match_as_those_of_glob(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/.x.txt", "a/b/y.txt", ".h/z.txt", "a[1]/w.txt", "c.txt", "a/b/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = [
        "**/*.txt",
        "**",
        "a/**",
        "*",
        "*/*",
        "*/.*",
        ".h/*",
        "**/b/**/*.txt",
        "a[[]1]/*.txt",
    ]
    patterns += ["?.txt", "[!a]*", "a/../*.txt", "**/[wy].txt", "a/x.[t]xt", "*/x.txt"]
    for pattern in patterns:
        found = glob(str(tmp_path / pattern), recursive=True)
        want = sorted({Path(path) for path in found if Path(path).is_file()})
        assert files(TextSource(kind="text", path=str(tmp_path / pattern))) == want, pattern


def zstandard(raw: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(raw)
    return packed.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"bzip2": bz2.compress, "xz": lzma.compress}
UNPACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_compressed_file_is_called_so(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(PACKERS[kind](b"some text\n" * 50))
    with pytest.raises(DataError, match=rf"a\.txt: not text but compressed \({kind}\); unpack it"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("ending", UNPACKED)
def test_packed_text_is_read_as_it_is_unpacked(tmp_path: Path, ending: str) -> None:
    pack = UNPACKED[ending]
    text = "".join(f"line {n}\n\n" for n in range(20_000)).encode()
    (tmp_path / f"a.txt{ending}").write_bytes(pack(text) + pack("last \u00fc\n".encode()))
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n'))
    want = [f"line {n}" for n in range(20_000)] + ["last \u00fc"]
    for path in (tmp_path, tmp_path / f"a.txt{ending}", tmp_path / "*.txt.*"):
        assert read(path) == want
    assert read_json(tmp_path) == ["one", "two"]
    assert size(TextSource(kind="text", path=str(tmp_path))) is None  # until it is unpacked
    (tmp_path / f"a.txt{ending}").rename(tmp_path / "misnamed.txt")
    assert read(tmp_path / "misnamed.txt") == want


@pytest.mark.parametrize("ending", UNPACKED)
def test_a_damaged_packed_file_is_named(tmp_path: Path, ending: str) -> None:
    packed = UNPACKED[ending]("".join(f"line {n}\n" for n in range(20_000)).encode())
    path = tmp_path / f"a.txt{ending}"
    middle = len(packed) // 2
    turned = bytes(255 - byte for byte in packed[middle : middle + 40])
    for damaged in (packed[:-9], packed[:middle] + turned + packed[middle + 40 :]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.txt{ending}: .*(damaged|not UTF-8)"):
            read(path)


def test_the_same_file_packed_and_not_is_refused_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    with pytest.raises(DataError, match=r"a\.txt\.gz: beside a\.txt; is it the same text\? move"):
        read(tmp_path)
    assert read(tmp_path / "*.txt") == ["one"]


def test_hidden_files_of_a_folder_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", ".a.txt", ".b.txt.gz", ".c.md", ".git/d.txt", "sub/.e.txt", "sub/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = TextSource(kind="text", path=str(tmp_path))
    assert read(tmp_path) == ["a.txt", "sub/f.txt"]
    assert hidden(source) == 4  # .a.txt, .b.txt.gz, .git and sub/.e.txt; .c.md is no text
    before = content_hash(source)
    (tmp_path / ".a.txt").write_text("changed")
    assert content_hash(source) == before
    assert read(tmp_path / ".a.txt") == ["changed"] and read(tmp_path / ".git") == [".git/d.txt"]
    assert hidden(TextSource(kind="text", path=str(tmp_path / ".a.txt"))) == 0


def test_zip_and_utf16_are_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as packed:
        packed.writestr("a.txt", "text")
    with pytest.raises(DataError, match=r"a\.jsonl: not text but compressed \(zip\)"):
        read_json(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("some text", encoding="utf-16")
    with pytest.raises(DataError, match=r"a\.txt: not text but UTF-16; convert it to UTF-8"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (["a"], "a list"),
        ({"a": "b"}, "an object"),
        (5, "a number"),
        (True, "a boolean"),
    ],
)
def test_what_stands_in_place_of_text_is_named(tmp_path: Path, value: object, kind: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + json.dumps({"text": value}))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: no text under the key 'text' but {kind}$"):
        read_json(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    if not isinstance(value, dict):
        with pytest.raises(DataError, match=rf"a\.jsonl:1: .*it is no object but {kind}$"):
            read_json(tmp_path)


def test_deep_and_long_values_of_json(tmp_path: Path) -> None:
    """A number may be of any length; nesting may not, and is refused by its line."""
    long = '{"text": "long", "n": -' + "9" * 5000 + "}"
    (tmp_path / "a.jsonl").write_text(long)
    assert read_json(tmp_path) == ["long"]
    deep = '{"text": "deep", "n": ' + "[" * 50_000 + "]" * 50_000 + "}"
    (tmp_path / "a.jsonl").write_text(f"{long}\n{deep}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: nested too deep$"):
        read_json(tmp_path)


def test_many_keys_are_not_all_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"key{i:04}": i for i in range(5000)}))
    with pytest.raises(DataError, match=r"its keys are \['key0000', .*, \.\.\.\]$") as caught:
        read_json(tmp_path)
    assert len(str(caught.value)) < 400
