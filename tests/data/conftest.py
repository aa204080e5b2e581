"""A small corpus with known sentences, and its prepared rows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dskd.data.counter import below
from dskd.data.prepared import Prepared, RowSet, open_prepared, prepare
from dskd.settings.data import Data, TextSource, TrainedTokenizer

NOBODY = 65534
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "small", "dogs", "ran", "round"]
WORDS += ["every", "old", "garden", "wall"]


def make_corpus(path: Path, documents: int = 120) -> list[str]:
    """Write documents of 1..5 sentences of 3..12 words; return their texts."""
    texts = []
    for d in range(documents):
        sentences = [
            " ".join(WORDS[below(len(WORDS), d, s, w)] for w in range(3 + below(10, 7, d, s)))
            for s in range(1 + below(5, 8, d))
        ]
        texts.append("\n".join(sentences))
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return texts


def settings(where: Path, **changes: object) -> Data:
    """Settings of a corpus at ``where/corpus.txt``, prepared in ``where/rows``."""
    values: dict = {
        "sources": [TextSource(kind="text", path=str(where / "corpus.txt"))],
        "tokenizer": TrainedTokenizer(vocab_size=320),
        "validation_fraction": 0.2,
        "block_size": 32,
        "folder": where / "rows",
    }
    return Data(**(values | changes))


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom file modes bind: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the corpus; do not write into it."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder / "corpus.txt")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path) -> Prepared:
    return open_prepared(prepare(settings(corpus)))


@pytest.fixture
def table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def all_rows(rows: RowSet) -> list[list[int]]:
    """Every row without its padding."""
    every = rows.rows(np.arange(len(rows)), np.zeros(len(rows), np.int64))
    return [ids[:n].tolist() for ids, n in zip(every.tokens_BT, every.lengths_B, strict=True)]
