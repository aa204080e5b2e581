"""fairseq's binary files: both layouts and all widths read alike, and what is wrong is named."""

import struct
from pathlib import Path

import numpy as np
import pytest

from dskd.data import indexed
from dskd.data.indexed import Indexed, corpus_files, corpus_prefixes
from dskd.errors import DataError
from tests.data.fairseq_corpora import CODES, GOLDEN, LAYOUTS, write_cached, write_mmap
from tests.goldens import golden

EXPECTED = golden("bridges/corpus/expected")
ITEMS = [[5, 9, 2], [2], [7, 2], [2], [2], [9, 8, 7, 6, 2]]


def items_of(corpus: Indexed) -> list[list[int]]:
    return [corpus.ids(k, k + 1).tolist() for k in range(len(corpus))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["train", "train1", "valid"])
def test_golden_items(layout: str, name: str) -> None:
    corpus = Indexed(GOLDEN / layout / name, "x")
    assert items_of(corpus) == EXPECTED[name]
    assert corpus.tokens == sum(map(len, EXPECTED[name]))
    assert corpus.ids(1, 3).tolist() == EXPECTED[name][1] + EXPECTED[name][2]


@pytest.mark.parametrize("name", ["train", "train1", "valid"])
def test_the_writers_of_these_tests_are_fairseqs(tmp_path: Path, name: str) -> None:
    """Byte for byte; all other files of these tests are theirs."""
    written = [(write_mmap, "u2"), (write_mmap, "i4"), (write_cached, "i4")]
    for layout, (write, dtype) in zip(LAYOUTS, written, strict=True):
        write(tmp_path / "a", EXPECTED[name], dtype)
        for ending in (".bin", ".idx"):
            original = (GOLDEN / layout / (name + ending)).read_bytes()
            assert (tmp_path / f"a{ending}").read_bytes() == original


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("write", [write_mmap, write_cached])
def test_every_width(tmp_path: Path, write, dtype: str) -> None:
    write(tmp_path / "a", ITEMS, dtype)
    assert items_of(Indexed(tmp_path / "a", "x")) == ITEMS


@pytest.mark.parametrize(
    ("write", "dtype", "top"),
    [(write_mmap, "u2", 65499), (write_mmap, "u2", 65535), (write_mmap, "i4", 70000),
     (write_cached, "i4", 65536), (write_cached, "u2", 65499)],
)  # fmt: skip
def test_ids_at_the_ends_of_their_width(tmp_path: Path, write, dtype: str, top: int) -> None:
    """fairseq takes uint16 below a vocabulary of 65500."""
    items = [[32767, 32768, top, 2], [2], [top, 2]]
    write(tmp_path / "a", items, dtype)
    corpus = Indexed(tmp_path / "a", "x")
    assert items_of(corpus) == items and corpus.ids(0, 1).dtype == np.int64
    assert corpus.sampled().tolist() == [32767, 2]


def test_what_is_looked_at_together_does_not_matter(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(indexed, "_AT_ONCE", 2)
    for write in (write_mmap, write_cached):
        write(tmp_path / "a", ITEMS)
        corpus = Indexed(tmp_path / "a", "x")
        assert items_of(corpus) == ITEMS
        flat = [index for item in ITEMS for index in item]
        assert corpus.sampled().tolist() == [*flat[::2], 2]


def changed(path: Path, offset: int, form: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, offset, value)
    path.write_bytes(raw)


WRONG = {  # offset, form and value of what is written into the .idx, and the message
    "mmap version": (write_mmap, 9, "<Q", 2, r"a\.idx: version 2; only 1 is known"),
    "mmap dtype": (write_mmap, 17, "<B", 77, r"a\.idx: dtype 77 is not known"),
    "mmap floats": (write_mmap, 17, "<B", 7, r"a\.idx: dtype 7, floating-point numbers and no ids"),
    "mmap count": (write_mmap, 18, "<Q", 9, r"98 bytes, but 9 items need 134; it is cut off"),
    "mmap huge": (write_mmap, 18, "<Q", 2**63, r"98 bytes, but 9223372036854775808 items need"),
    "mmap size 0": (write_mmap, 26 + 4, "<i", 0, r"a\.idx: item 1 has 0 tokens; damaged"),
    "mmap size": (write_mmap, 26 + 4, "<i", 2, r"item 2 does not begin where the one before it"),
    "mmap last": (write_mmap, 26 + 20, "<i", 6, r"a\.bin: 26 bytes, but a\.idx needs 28 for 14"),
    "mmap pointer": (write_mmap, 26 + 24, "<q", 2, r"item 0 does not begin where"),
    "mmap width": (write_mmap, 17, "<B", 4, r"item 1 does not begin where"),
    "cached version": (write_cached, 8, "<Q", 3, r"version 3; only 1 is known"),
    "cached dtype": (write_cached, 16, "<Q", 8, r"ids of 4 bytes, but dtype 8 has not as many"),
    "cached count": (write_cached, 32, "<Q", 5, r"208 bytes, but 5 items need 192"),
    "cached shape": (write_cached, 48 + 8, "<q", 2, r"no lines of ids but of other shapes"),
    "cached place": (write_cached, 48 + 56 + 8, "<q", 4, r"item 1 does not begin where"),
    "cached last": (write_cached, 48 + 112 + 40, "<q", 4, r"a\.bin: 52 bytes, but a\.idx needs 48"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_index(tmp_path: Path, case: str) -> None:
    write, offset, form, value, message = WRONG[case]
    write(tmp_path / "a", ITEMS)
    changed(tmp_path / "a.idx", offset, form, value)
    with pytest.raises(DataError, match=message):
        Indexed(tmp_path / "a", "x")


@pytest.mark.parametrize("write", [write_mmap, write_cached])
@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("more", [-1, 1])
def test_one_byte_too_few_or_too_many(tmp_path: Path, write, ending: str, more: int) -> None:
    write(tmp_path / "a", ITEMS)
    path = tmp_path / f"a{ending}"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if more < 0 else raw + b"\0")
    with pytest.raises(DataError, match=rf"a\{ending}: {len(raw) + more} bytes, but .*cut off or"):
        Indexed(tmp_path / "a", "x")


@pytest.mark.parametrize("write", [write_mmap, write_cached])
@pytest.mark.parametrize(
    ("cut", "message"),
    [(0, "of no known kind, it begins with b''"), (20, "it ends within its first numbers")],
)
def test_a_beginning_only(tmp_path: Path, write, cut: int, message: str) -> None:
    write(tmp_path / "a", ITEMS)
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:cut])
    with pytest.raises(DataError, match=message):
        Indexed(tmp_path / "a", "x")


@pytest.mark.parametrize("write", [write_mmap, write_cached])
def test_nothing_in_it(tmp_path: Path, write) -> None:
    write(tmp_path / "a", [])
    with pytest.raises(DataError, match=r"a\.idx: it has no items"):
        Indexed(tmp_path / "a", "x")


@pytest.mark.parametrize(
    ("head", "message"),
    [(b"HUFFIDX\0\0", r"a\.idx: huffman-coded, .*--dataset-impl mmap"),
     (b"\x93NUMPY\1\0v", r"a\.idx: of no known kind, it begins with b'\\x93NUMPY")],
)  # fmt: skip
def test_other_kinds(tmp_path: Path, head: bytes, message: str) -> None:
    write_mmap(tmp_path / "a", ITEMS)
    (tmp_path / "a.idx").write_bytes(head + (tmp_path / "a.idx").read_bytes()[9:])
    with pytest.raises(DataError, match=message):
        Indexed(tmp_path / "a", "x")


def test_parts_of_a_split(tmp_path: Path) -> None:
    for name in ["train", "train1", "train2", "train3", "valid", "trainer1"]:
        write_mmap(tmp_path / name, ITEMS)
    names = ["train", "train1", "train2", "train3"]
    for path in (tmp_path, tmp_path / "train"):
        assert [part.name for part in corpus_prefixes(str(path), "x")] == names
    assert [part.name for part in corpus_prefixes(str(tmp_path / "train1"), "x")] == ["train1"]
    files = [path.name for path in corpus_files(str(tmp_path / "valid"), "x")]
    assert files == ["dict.txt", "valid.idx", "valid.bin"]


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    for name in ["train", "train1", "train3"]:
        write_mmap(tmp_path / name, ITEMS)
    message = r"x: train3\.idx is there, but part train2 before it is missing"
    with pytest.raises(DataError, match=message):
        corpus_prefixes(str(tmp_path), "x")
    (tmp_path / "train3.idx").unlink()
    (tmp_path / "train1.bin").unlink()
    with pytest.raises(DataError, match=r"x: train1\.bin is missing beside the other"):
        corpus_prefixes(str(tmp_path), "x")


def test_what_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a line\n")
    (tmp_path / "genes.fasta").write_text(">\n")
    write_mmap(tmp_path / "valid", ITEMS)
    for name, message in {
        "raw": "raw is a file itself: raw text (fairseq's raw) is of kind text",
        "genes": "genes.fasta is fairseq's fasta, which is not read",
        "": "no {folder}/train.idx and no {folder}/train.bin",
        "valid.bin": "without its ending, as {folder}/valid",
    }.items():
        with pytest.raises(DataError) as error:
            corpus_prefixes(str(tmp_path / name), "x")
        assert str(error.value).startswith("x: ")
        assert message.format(folder=tmp_path) in str(error.value)
