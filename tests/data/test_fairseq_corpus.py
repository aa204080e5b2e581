"""Corpora of fairseq as rows: its blocks, in one vocabulary, held out by documents."""

import shutil
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dskd.data import fairseq_corpus, indexed
from dskd.data.counter import below
from dskd.data.fairseq_corpus import Corpus
from dskd.data.fairseq_vocabulary import read_dictionary, read_merges, tokenizer_of
from dskd.data.packing import complete, complete_doc, contiguous
from dskd.data.prepared import open_further, open_prepared, prepare, prepare_further, what_was_read
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.errors import ConfigError, DataError
from dskd.settings.data import TextSource
from tests.data.conftest import all_rows, make_corpus
from tests.data.fairseq_corpora import (
    GOLDEN,
    LAYOUTS,
    golden_corpus,
    settings,
    source,
    symbols_of,
    tokenizer_without_merges,
    write_cached,
    write_dictionary,
    write_mmap,
)
from tests.goldens import golden

EXPECTED = golden("bridges/corpus/expected")
BLOCKING = golden("ki")["blocking"]
VALID = [[0, 24, 25, 26, 2, 2, 27, 28, 29, 2, 4, 4, 4, 2]]


def flat(items: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(items))


def rows_of(data) -> tuple[list[list[int]], list[list[int]]]:
    opened = open_prepared(prepare(data))
    return all_rows(opened.train), all_rows(opened.validation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packing", ["complete", "complete_doc"])
def test_rows_are_fairseqs(tmp_path: Path, layout: str, packing: str) -> None:
    folder = golden_corpus(tmp_path, layout)
    train, validation = rows_of(settings(folder, packing=packing))
    assert train == EXPECTED[f"rows_block16_{packing}"]
    if packing == "complete":
        assert validation == VALID


def test_contiguous_rows_are_the_stream(tmp_path: Path) -> None:
    train, _ = rows_of(settings(golden_corpus(tmp_path), packing="contiguous"))
    stream = flat(EXPECTED["train"])
    assert train == [[0, *stream[n : n + 15]] for n in range(0, len(stream), 15)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_one_stream(tmp_path: Path, layout: str) -> None:
    """A row goes on in the next part, and so does a document that no blank line ends."""
    train, _ = rows_of(settings(golden_corpus(tmp_path, layout, parts=2)))
    *rows, last = EXPECTED["rows_block16_complete"]
    assert train == [*rows, [*last, 17, 18, 2, 2, 19, 22, 23, 2]]
    train, _ = rows_of(settings(tmp_path, packing="complete_doc"))
    rows = EXPECTED["rows_block16_complete_doc"]
    assert train == [*rows[:-1], [0, 15, 16, 2, 17, 18, 2], [0, 19, 22, 23, 2]]


@pytest.mark.parametrize("case", BLOCKING[:2], ids=lambda case: case["name"])
def test_golden_blocks(tmp_path: Path, case: dict) -> None:
    """The slices that the original makes of these sizes, without a blank line at the end."""
    items = [
        [*(4 + (7 * k + j) % 40 for j in range(n - 1)), 2] for k, n in enumerate(case["sizes"])
    ]
    folder = golden_corpus(tmp_path)
    write_mmap(folder / "train", items)
    ids = flat(items)
    for packing in ("complete", "complete_doc"):
        data = settings(folder, packing=packing, block_size=case["block_size"] + 1)
        assert rows_of(data)[0] == [[0, *ids[a:b]] for a, b in case[packing]]


@pytest.mark.parametrize("packing", ["complete", "complete_doc", "contiguous"])
def test_the_same_corpus_as_text(tmp_path: Path, packing: str) -> None:
    """In a whole BPE: where a blank line ends every document, both ways make the same rows."""
    texts = make_corpus(tmp_path / "a.txt", 30)
    symbols = read_dictionary(GOLDEN.parent / "bpe/dict.txt")
    tokenizer = tokenizer_of(symbols, read_merges(GOLDEN.parent / "bpe/vocab.bpe"), "d")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_dictionary(tmp_path, symbols)
    items = []
    for text in texts:
        items += [tokenizer(line)["input_ids"][1:] for line in text.splitlines()] + [[2]]
    write_mmap(tmp_path / "train", items)
    write_mmap(tmp_path / "valid", items[:9])
    text = TextSource(kind="text", path=str(tmp_path / "a.txt"))
    both = [
        settings(tmp_path, packing=packing, sources=own, block_size=64)
        for own in ([source(tmp_path)], [text])
    ]
    one, other = (open_prepared(prepare(data)).train for data in both)
    assert len(one) > 30 and one.content == other.content


def random_items(documents: int, seed: int) -> list[list[int]]:
    """Documents of lines, also long ones, with one or two blank lines between them and before."""
    items = [[2]] * below(2, seed)
    for d in range(documents):
        for s in range(1 + below(6, seed, d)):
            length = 1 + below(40 if below(8, seed, d, s) == 0 else 9, 1, seed, d, s)
            items.append([*(4 + int(n) for n in below(40, 2, seed, d, s, np.arange(length))), 2])
        items += [[2]] * (1 + below(2, 3, seed, d))
    return items[:-1] if seed % 3 else items


def sides_of(items: list[list[int]], fraction: float) -> tuple[list[list[int]], list[list[int]]]:
    """The items of both splits, written down from what a document is."""
    begins = [k for k, item in enumerate(items) if item != [2] and (k == 0 or items[k - 1] == [2])]
    bounds = [0, *begins[1:], len(items)]
    sides: tuple = ([], [])
    for a, b in pairwise(bounds):
        ids = np.array([i for item in items[a:b] if item != [2] for i in item], dtype="<i8")
        held = xxhash.xxh3_64_intdigest(ids.tobytes()) < fraction * 2**64
        sides[held].extend(items[a:b])
    return sides


def blocks(items: list[list[int]], packing: str, block: int) -> list[list[int]]:
    """Rows of items, of which a long one is cut in pieces of a block and a rest of two or more."""
    sizes = []
    for item in items:
        full, rest = divmod(len(item), block)
        pieces = [block] * full + [rest] * (rest > 0)
        if full and rest == 1:
            pieces[-2:] = [block - 1, 2]
        sizes += pieces
    ids = flat(items)
    slices = {
        "complete": lambda: complete(sizes, block),
        "complete_doc": lambda: complete_doc(sizes, block),
        "contiguous": lambda: contiguous(len(ids), block),
    }[packing]()
    return [[0, *ids[a:b]] for a, b in slices]


@pytest.mark.parametrize("packing", ["complete", "complete_doc", "contiguous"])
@pytest.mark.parametrize("stretch", [1, 37, 400, 1 << 20])
def test_stretch_by_stretch_equals_one_go(tmp_path, monkeypatch, stretch: int, packing) -> None:
    """Also where a document is longer than a stretch, and where documents are held out."""
    monkeypatch.setattr(fairseq_corpus, "_TOKENS", stretch)
    monkeypatch.setattr(fairseq_corpus, "_ITEMS", 50)
    folder = golden_corpus(tmp_path)
    for seed in range(2):
        items = random_items(60, seed)
        third = len(items) // 3
        write_mmap(folder / "train", items[:third])
        write_cached(folder / "train1", items[third : third + 5])
        write_mmap(folder / "train2", items[third + 5 :], "i4")
        for held in (False, True):
            given = {"validation": None, "validation_fraction": 0.3} if held else {}
            sides = sides_of(items, 0.3) if held else (items, EXPECTED["valid"])
            name = tmp_path / f"rows-{seed}-{held}"
            data = settings(folder, packing=packing, folder=name, block_size=13, **given)
            want = tuple(blocks(side, packing, 12) for side in sides)
            assert min(map(len, want)) > (10 if held else 0)
            assert rows_of(data) == want


def test_a_document_of_all_lines(tmp_path: Path, monkeypatch) -> None:
    """A corpus without blank lines is one document, of any length."""
    monkeypatch.setattr(fairseq_corpus, "_TOKENS", 50)
    items = [item for item in random_items(60, 1) if item != [2]]
    folder = golden_corpus(tmp_path)
    write_mmap(folder / "train", items)
    for packing in ("complete", "complete_doc"):
        assert rows_of(settings(folder, packing=packing))[0] == blocks(items, packing, 15)
    with pytest.raises(DataError, match=r"validation_fraction: no document was held out"):
        prepare(settings(folder, validation=None, validation_fraction=1e-9))


def test_a_number_of_documents(tmp_path: Path, monkeypatch) -> None:
    folder = golden_corpus(tmp_path)
    for stretch in (1, 1 << 20):
        monkeypatch.setattr(fairseq_corpus, "_TOKENS", stretch)
        for count, items in {1: 3, 2: 7, 3: 9, 4: 10, 9: 10}.items():
            own = [source(folder / "train", documents=count)]
            data = settings(folder, sources=own, folder=tmp_path / f"rows-{stretch}", block_size=8)
            want = blocks(EXPECTED["train"][:items], "complete", 7)
            folder_of_rows = prepare(data)
            assert all_rows(open_prepared(folder_of_rows).train) == want
            assert f"fairseq: {min(count, 4) + 2} documents" in what_was_read(folder_of_rows)[1]


def test_beside_text_and_further_sources(tmp_path: Path) -> None:
    """Domains, and rows of a named set in the tokens of the run."""
    folder = golden_corpus(tmp_path)
    (tmp_path / "a.txt").write_text("012\n\n34\n")
    text = TextSource(kind="text", path=str(tmp_path / "a.txt"))
    bio = source(folder / "train", domain="bio")
    opened = open_prepared(prepare(settings(folder, sources=[text, bio])))
    assert opened.domains == ["text", "bio", "fairseq"]
    assert opened.train.domains_B(np.arange(5)).tolist() == [0, 1, 1, 1, 1]
    own = [0, 19, 20, 21, 2, 2, 22, 23, 2, 2]
    assert all_rows(opened.train) == [own, *EXPECTED["rows_block16_complete"]]
    further = prepare_further(settings(folder), [source(folder / "valid", domain="bio")], opened)
    assert all_rows(open_further(further)) == VALID


def test_what_is_said_of_it(tmp_path: Path) -> None:
    folder = golden_corpus(tmp_path)
    lines = what_was_read(prepare(settings(folder)))
    tokens = stored_tokenizer(str(folder / "tokenizer"), "x").decode([10, 11, 12, 4, 5, 44])
    assert lines[1].startswith(
        f"  fairseq: 6 documents, 2 held out, the longest 16 tokens; the first: {tokens}"
    )
    assert len(lines) == 2


def test_no_bits_per_byte_of_tokens(tmp_path: Path) -> None:
    """A causal LM has the same rows; nobody knows how many bytes they stand for."""
    folder = golden_corpus(tmp_path)
    data = settings(folder, objective="causal", packing="complete")
    rows = prepare(data)
    opened = open_prepared(rows)
    assert all_rows(opened.train) == EXPECTED["rows_block16_complete"]
    assert opened.validation.text is None
    reason = "  no bits per byte: fairseq: read as tokens (kind: fairseq), without their text"
    assert what_was_read(rows)[-1] == reason
    make_corpus(tmp_path / "a.txt")
    text = TextSource(kind="text", path=str(tmp_path / "a.txt"))
    mixed = prepare(data.model_copy(update={"validation": [text, *data.validation]}))
    assert open_prepared(mixed).validation.text is None
    assert what_was_read(mixed)[-1] == reason


def test_the_key_is_of_the_files(tmp_path: Path) -> None:
    """Wherever they lie; each file counts, the dictionary's counts, too."""
    (tmp_path / "a").mkdir()
    folder = golden_corpus(tmp_path / "a", parts=2)
    shutil.copytree(folder, tmp_path / "b")
    data = settings(folder, folder=tmp_path / "rows")
    first = prepare(data)
    assert prepare(settings(tmp_path / "b", folder=tmp_path / "rows")) == first
    found = {first}
    write_mmap(tmp_path / "b/train1", [[9, 2]])
    found.add(prepare(settings(tmp_path / "b", folder=tmp_path / "rows")))
    write_dictionary(tmp_path / "b", [*symbols_of(46)[:-1], "madeupword9999"])
    with pytest.raises(ConfigError):  # and not the rows of before
        prepare(settings(tmp_path / "b", folder=tmp_path / "rows"))
    assert len(found) == 2


def refused(folder: Path, error: type, message: str, **changes) -> None:
    with pytest.raises(error, match=message):
        prepare(settings(folder, **changes))
    assert not list((folder / "rows").iterdir())


def test_another_dictionary(tmp_path: Path) -> None:
    folder = golden_corpus(tmp_path)
    symbols = symbols_of(46)
    symbols[5], symbols[9] = symbols[9], symbols[5]
    write_dictionary(folder, symbols)
    refused(folder, ConfigError, r"id 9 is '\*' in .*dict\.txt, '&' in data\.tokenizer")
    shutil.copy(GOLDEN / "mmap_int32/dict.txt", folder)
    refused(folder, ConfigError, r"dict\.txt: symbol 262 is beyond the 0 merges")
    write_dictionary(folder, ["the"])
    refused(folder, ConfigError, r"'the' is no number of a token: not a GPT-2 BPE dictionary")
    (folder / "dict.txt").unlink()
    refused(folder, DataError, r"fairseq: .*dict\.txt: cannot be read \(No such file")


def test_further_special_tokens_are_allowed_and_other_ends_are_not(tmp_path: Path) -> None:
    folder = golden_corpus(tmp_path)
    tokenizer = stored_tokenizer(str(folder / "tokenizer"), "x")
    tokenizer.add_tokens(["<WB>", "<news>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    assert rows_of(settings(folder))[0] == EXPECTED["rows_block16_complete"]
    tokenizer.sep_token = "<unk>"
    tokenizer.save_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "rows")
    refused(folder, ConfigError, r"data.tokenizer: its end token is 3, fairseq's is 2")
    tokenizer.sep_token, tokenizer.cls_token = "</s>", "<unk>"
    tokenizer.save_pretrained(folder / "tokenizer")
    refused(folder, ConfigError, r"data.tokenizer: rows would begin with 3, fairseq's do with 0")


@pytest.mark.parametrize("write", [write_mmap, write_cached])
def test_ids_beyond_the_dictionary(tmp_path: Path, monkeypatch, write) -> None:
    folder = golden_corpus(tmp_path)
    write(folder / "train", [[4, 45, 2]])
    rows_of(settings(folder, block_size=8, packing="contiguous", sources=[source(folder)] * 3))
    shutil.rmtree(folder / "rows")
    message = r"train\.bin: it holds id 46, but .*dict\.txt makes 46 \(4 special"
    write(folder / "train", [[4, 5, 2]] * 9 + [[4, 46, 2], [4, 5, 2]])
    refused(folder, DataError, message)
    # What the samples find comes before the long work.
    monkeypatch.setattr(indexed, "_AT_ONCE", 8)
    write(folder / "train", [[4, 5, 2]] * 5 + [[4, 46, 2]] + [[4, 5, 2]] * 9)
    monkeypatch.setattr(Corpus, "beginning", None)
    refused(folder, DataError, message)


def test_lines_without_an_end(tmp_path: Path) -> None:
    folder = golden_corpus(tmp_path)
    write_mmap(folder / "train", [[4, 5, 2]] * 9 + [[4, 6], [4, 5, 2]])
    message = r"train\.bin: item 9 ends with 6, not with </s> \(2\); it was written without ends"
    refused(folder, DataError, message)
    write_mmap(folder / "train", [[2], [2]])
    refused(folder, DataError, r"data.sources: fairseq: .*train: no text in it")


def test_a_bin_that_is_cut_off(tmp_path: Path) -> None:
    folder = golden_corpus(tmp_path)
    raw = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(raw[:-1])
    message = rf"train\.bin: {len(raw) - 1} bytes, but train\.idx needs {len(raw)} for 44 tokens"
    refused(folder, DataError, message)


def test_the_largest_id_of_sixteen_bits(tmp_path: Path) -> None:
    """65499 is the last that fairseq writes as uint16."""
    symbols = symbols_of(65500)
    write_dictionary(tmp_path, symbols)
    items = [[65499, 32768, 65498, 2], [2], [4, 32767, 2]]
    write_mmap(tmp_path / "train", items)
    corpus = Corpus(source(tmp_path), tokenizer_without_merges(symbols), "masked")
    (group, last) = corpus.stretches(8, lambda held: "all", None)
    found = [stretch.items["all"].ids.tolist() for stretch in (group, last)]
    assert found == [[*items[0], 2], items[2]]
    write_mmap(tmp_path / "train", [[65500, 2]])
    with pytest.raises(DataError, match=r"holds id 65500, but .* makes 65500"):
        Corpus(source(tmp_path), tokenizer_without_merges(symbols), "masked")
