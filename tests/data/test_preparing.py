"""Building: the rows hold the corpus, whatever it comes from, and unusable text is refused."""

import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dskd.data import preparing
from dskd.data.packing import complete, complete_doc
from dskd.data.prepared import open_prepared, prepare
from dskd.errors import DataError
from dskd.settings.data import Data, HubSource, JsonlSource, PretrainedTokenizer, TextSource
from tests.data.conftest import all_rows, make_corpus, settings


def split_documents(corpus: Path) -> tuple[list[str], list[str]]:
    texts = (corpus / "corpus.txt").read_text().strip().split("\n\n")
    held = {text for text in texts if preparing._held_out(text, 0.2)}
    return [text for text in texts if text not in held], [text for text in texts if text in held]


@pytest.mark.parametrize("packing", ["complete", "complete_doc", "contiguous"])
def test_masked_rows_hold_the_corpus(corpus: Path, packing: str) -> None:
    prepared = open_prepared(prepare(settings(corpus, packing=packing)))
    tokenizer = prepared.tokenizer
    splits = (prepared.train, prepared.validation)
    for rows, texts in zip(splits, split_documents(corpus), strict=True):
        stream: list[int] = []
        sizes: list[int] = []
        for text in texts:
            for line in text.split("\n"):
                stream += [*tokenizer.encode(line, add_special_tokens=False), 2]
                sizes.append(len(stream) - sum(sizes))
            stream.append(2)
            sizes.append(1)
        if packing == "contiguous":
            want = [stream[i : i + 31] for i in range(0, len(stream), 31)]
        else:
            pack = complete if packing == "complete" else complete_doc
            want = [stream[a:b] for a, b in pack(sizes, 31)]
        assert len(want) > 15
        got = all_rows(rows)
        assert got == [[0, *row] for row in want]
        assert max(map(len, got)) <= 32 and rows.tokens == sum(map(len, got))


@pytest.mark.parametrize("packing", ["complete", "complete_doc", "contiguous"])
def test_causal_rows_hold_the_corpus(corpus: Path, packing: str) -> None:
    prepared = open_prepared(prepare(settings(corpus, packing=packing, objective="causal")))
    tokenizer = prepared.tokenizer
    texts, _ = split_documents(corpus)
    rows = all_rows(prepared.train)
    assert all(row[0] == 0 for row in rows) and all(0 not in row[1:] for row in rows)
    body = [token for row in rows for token in row[1:]]
    assert tokenizer.decode(body).split("</s>") == [*texts, ""]
    if packing == "complete_doc":
        assert all(2 not in row[:-1] for row in rows)
    if packing == "contiguous":
        assert {len(row) for row in rows[:-1]} == {32}


def test_stretches_do_not_show(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    whole = open_prepared(prepare(settings(corpus)))
    monkeypatch.setattr(preparing, "_CHUNK_CHARACTERS", 100)
    pieces = open_prepared(prepare(settings(corpus, folder=tmp_path)))
    assert pieces.fingerprint == whole.fingerprint


def test_domains(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a.txt", 40)
    (tmp_path / "b.jsonl").write_text('{"text": "old dogs ran round the wall"}\n' * 30)
    sources = [
        TextSource(kind="text", path=str(tmp_path / "a.txt"), domain="plain"),
        JsonlSource(kind="jsonl", path=str(tmp_path / "b.jsonl"), domain="lines"),
        TextSource(kind="text", path=str(tmp_path / "a.txt"), domain="plain", documents=2),
    ]
    validation = [TextSource(kind="text", path=str(tmp_path / "a.txt"), domain="other")]
    prepared = open_prepared(prepare(settings(tmp_path, sources=sources, validation=validation)))
    assert prepared.domains == ["plain", "lines", "other"]
    rows = prepared.train
    domains_B = rows.domains_B(np.arange(len(rows)))
    assert domains_B.dtype == np.int64
    changes = np.flatnonzero(np.diff(domains_B))
    assert domains_B[[0, *(changes + 1)]].tolist() == [0, 1, 0]
    mine = [row for row, domain in zip(all_rows(rows), domains_B, strict=True) if domain == 1]
    lines = [prepared.tokenizer.decode(row, skip_special_tokens=True) for row in mine]
    assert mine
    assert all("old dogs ran round the wall" in line and "cat" not in line for line in lines)
    held = prepared.validation
    assert held.domains_B(np.arange(len(held))).tolist() == [2] * len(held)


def test_table_source_streamed_or_not(tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    texts = make_corpus(tmp_path / "corpus.txt")
    plain = open_prepared(prepare(settings(tmp_path)))
    lines = [f'{i},"{t}"\n' for i, t in enumerate(texts)]
    (tmp_path / "a.csv").write_text("id,body\n" + "".join(lines))
    for streaming in (False, True):
        about = {"path": "csv", "data_files": [str(tmp_path / "a.csv")], "field": "body"}
        source = HubSource(kind="datasets", **about, streaming=streaming, domain="text")
        prepared = open_prepared(prepare(settings(tmp_path, sources=[source])))
        assert prepared.folder != plain.folder
        assert prepared.fingerprint == plain.fingerprint


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(70_000)), "<mask>"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path / "tok")
    texts = [f"w{69_000 + i} w{i}" for i in range(300)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    source = PretrainedTokenizer(kind="pretrained", path=str(tmp_path / "tok"))
    prepared = open_prepared(prepare(settings(tmp_path, tokenizer=source)))
    found = {token for row in all_rows(prepared.train) for token in row} - {0, 2}
    texts, _ = split_documents(tmp_path)
    want = {4 + int(word[1:]) for text in texts for word in text.split()}
    assert found == want and max(found) > 2**16


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"the cat\n\n" * 2, "shorter than one row .data.block_size: 32"),
        (b"the cat sat on a mat by the wall " * 40, "no document was held out"),
        (b"", r"corpus.txt: no text in it"),
        (b"the cat sat\n\n" * 40 + b"na\xefve\n", r"corpus.txt: not UTF-8 at byte \d+ .line \d+."),
    ],
)
def test_unusable_corpus(tmp_path: Path, text: bytes, problem: str) -> None:
    """It is refused, and leaves nothing."""
    (tmp_path / "corpus.txt").write_bytes(text)
    with pytest.raises(DataError, match=problem):
        prepare(settings(tmp_path))
    assert list((tmp_path / "rows").iterdir()) == []


@pytest.mark.parametrize("line", ["a mat by the wall %d", "the cat sat %d"])
def test_a_document_a_line_is_called_one_document(tmp_path: Path, line: str) -> None:
    """Whichever side of the split the one document falls on."""
    (tmp_path / "corpus.txt").write_text("\n".join(line % i for i in range(200)))
    with pytest.raises(DataError, match="held out") as caught:
        prepare(settings(tmp_path, validation_fraction=0.5))
    assert "corpus.txt: it is ONE document" in str(caught.value)
    assert "blank lines" in str(caught.value) and "kind: jsonl" in str(caught.value)
    (tmp_path / "corpus.txt").rename(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("a")
    folder = [TextSource(kind="text", path=str(tmp_path))]
    with pytest.raises(DataError, match="each of its 2 files is ONE document"):
        prepare(settings(tmp_path, sources=folder, validation_fraction=1e-9))


def test_both_sides_of_the_split_are_tried() -> None:
    lines = ("a mat by the wall %d", "the cat sat %d")
    texts = ["\n".join(line % i for i in range(200)) for line in lines]
    assert {preparing._held_out(text, 0.5) for text in texts} == {False, True}


def test_documents_of_a_file_that_are_left_out_are_not_missed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus.txt")
    source = TextSource(kind="text", path=str(tmp_path / "corpus.txt"), documents=1)
    with pytest.raises(DataError) as caught:
        prepare(settings(tmp_path, sources=[source]))
    assert "ONE document" not in str(caught.value)


def test_builtin_corpus_by_default(tmp_path: Path) -> None:
    began = time.monotonic()
    prepared = open_prepared(prepare(Data(folder=tmp_path)))
    assert time.monotonic() - began < 30
    assert len(prepared.train) > 1000 and len(prepared.validation) > 20
    assert prepared.train.tokens / len(prepared.train) > 0.75 * 64  # little of a row is padding
    assert prepared.domains == ["builtin"] and len(prepared.tokenizer) == 2048


def test_share_held_out_is_the_fraction() -> None:
    texts = [f"text {i}" for i in range(5000)]
    for fraction in (0.05, 0.5):
        share = sum(preparing._held_out(text, fraction) for text in texts) / 5000
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 5000) ** 0.5
    less = {text for text in texts if preparing._held_out(text, 0.05)}
    assert less < {text for text in texts if preparing._held_out(text, 0.5)}
