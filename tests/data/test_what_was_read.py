"""What is said of the rows: how much was read, held out and left out, by domain."""

import json
from pathlib import Path

import numpy as np
import pytest

from dskd.data import preparing
from dskd.data.prepared import open_prepared, prepare, prepare_further, what_was_read
from dskd.errors import DataError
from dskd.settings.data import JsonlSource, TextSource
from dskd.settings.labels import TsvSource
from dskd.system.files import read_manifest, write_manifest
from tests.data.conftest import make_corpus, settings

LONG = "the  old\tgarden\x1b[31m wall " * 9
TEXTS = [LONG, *(f"two small dogs ran round {n}" for n in range(40))]


def mixed(where: Path) -> list:
    """Text with a hidden file beside it, in two sources of one domain, and lines with two nulls."""
    (where / "plain").mkdir(parents=True)
    texts = make_corpus(where / "plain" / "a.txt", 60)
    (where / "plain" / ".b.txt").write_text("hidden")
    (where / "plain" / ".c").mkdir()
    make_corpus(where / "more.txt", 30)
    lines = [None, *TEXTS[:20], "", *TEXTS[20:]]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in lines)
    (where / "lines.jsonl").write_text(rows)
    assert max(map(len, texts)) < len(LONG)
    more = {"kind": "jsonl", "path": str(where / "lines.jsonl"), "on_bad_rows": "skip"}
    return [
        TextSource(kind="text", path=str(where / "plain"), domain="plain"),
        JsonlSource(**more, domain="lines"),
        TextSource(kind="text", path=str(where / "more.txt"), domain="plain", documents=25),
    ]


def test_documents_are_counted_by_domain(tmp_path: Path) -> None:
    sources = mixed(tmp_path)
    folder = prepare(settings(tmp_path, sources=sources))
    opened = open_prepared(folder)
    held = sum(preparing._held_out(text, 0.2) for text in TEXTS)
    corpus = (tmp_path / "plain" / "a.txt").read_text().strip().split("\n\n")
    again = corpus[:25]  # the corpora begin with the same documents
    held_plain = sum(preparing._held_out(text, 0.2) for text in corpus + again)
    assert held and held_plain
    train, validation = opened.train, opened.validation
    longest = max(map(len, corpus))
    first = " ".join(corpus[0].split())
    shown = first if len(first) <= 80 else f"{first[:80].rstrip()} ..."
    assert what_was_read(folder) == [
        f"data: {len(train):,} rows of {train.tokens:,} tokens to train on, "
        f"{len(validation):,} rows of {validation.tokens:,} tokens held out",
        f"  plain: 85 documents, {held_plain} held out, 2 hidden files or folders left out, "
        f"the longest {longest} characters; the first: {shown}",
        f"  lines: 41 documents, {held} held out, 2 without text skipped, the longest {len(LONG)} "
        "characters; the first: the old garden [31m wall the old garden [31m wall the old garden "
        "[31m wall the o ...",
    ]
    assert prepare(settings(tmp_path, sources=sources)) == folder  # only read
    assert len(what_was_read(folder)) == 3


def test_further_rows_and_examples(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus.txt")
    beside = open_prepared(prepare(settings(tmp_path)))
    more = TextSource(kind="text", path=str(tmp_path / "corpus.txt"), domain="more", documents=3)
    lines = what_was_read(prepare_further(settings(tmp_path), [more], beside))
    assert len(lines) == 2 and lines[1].startswith("  more: 3 documents, the longest ")
    assert lines[0].startswith("data: ") and "held out" not in lines[0]
    rows = "".join(f"{'' if n == 4 else f'oak {n}'}\t{'ab'[n % 2]}\n" for n in range(60))
    (tmp_path / "a.tsv").write_text(rows)
    about = {"kind": "tsv", "path": str(tmp_path / "a.tsv"), "label": "is"}
    source = TsvSource(**about, columns=["text", "is"], on_bad_rows="skip")
    of = {"objective": "classification", "sources": [source]}
    folder = prepare(settings(tmp_path, **of))
    assert what_was_read(folder)[1].startswith("  tsv: 59 examples, ")
    assert "1 incomplete skipped, the longest 6 characters; the first: oak 0" in "".join(
        what_was_read(folder)
    )
    opened = open_prepared(folder)
    assert len(opened.train) + len(opened.validation) == 59


def test_rows_of_before_have_one_line_and_the_same_fingerprint(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus.txt")
    folder = prepare(settings(tmp_path))
    opened = open_prepared(folder)
    manifest = read_manifest(folder / "manifest.json", AssertionError)
    assert manifest.pop("read").keys() == {"text"}
    write_manifest(folder / "manifest.json", manifest)
    assert len(what_was_read(folder)) == 1
    older = open_prepared(folder)
    assert older.fingerprint == opened.fingerprint
    same = np.arange(3)
    rows = [each.train.rows(same, same).tokens_BT for each in (older, opened)]
    assert (rows[0] == rows[1]).all()
    write_manifest(folder / "manifest.json", manifest | {"read": {"text": {"skipped": -1}}})
    with pytest.raises(DataError, match=r"not as this dskd writes it: read\.text\.skipped"):
        what_was_read(folder)
