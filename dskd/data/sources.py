"""Where text comes from: the built-in corpus, text files, JSON, anything `datasets` reads; and the
files of those that are no text (``fairseq_corpus.py`` reads their tokens).

A document is a string whose lines are its sentences. Every source yields its documents in a fixed
order; nothing is ever skipped but documents without any text, which are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import xxhash

from dskd.data.indexed import corpus_files
from dskd.data.json_files import json_texts
from dskd.data.library import library_files, library_texts, module_files
from dskd.data.tables import table_files, table_texts
from dskd.data.text_files import (
    Advance,
    hidden_files,
    matching_files,
    paragraphs,
    single_lines,
    whole_file,
)
from dskd.data.unpacking import PACKED_ENDINGS, readable
from dskd.errors import DataError
from dskd.settings.data import (
    BuiltinSource,
    FairseqSource,
    HubSource,
    JsonlSource,
    Source,
    TextSource,
)
from dskd.settings.labels import GlueSource
from dskd.system.files import file_hash

Found = TypeVar("Found")

_PATTERNS = {
    "text": "*.txt",
    "jsonl": "*.jsonl",
    "csv": "*.csv",
    "tsv": "*.tsv",
    "questions": "*.jsonl",
    "squad": "*.json",
    "replayed": "*.jsonl",
}
"""Names of the files below a folder, by the kind of source."""


_PER = {"paragraph": paragraphs, "line": single_lines, "file": whole_file}
"""What makes documents of a text file, by ``per``."""


def documents(
    source: Source, advance: Advance = int, skipped: Callable[[], object] = int
) -> Iterator[str]:
    """The documents of a source, in its order; those without any text are left out.

    Args:
        source: the settings.
        advance: told what was read.
        skipped: called for each row that is left out.

    Raises:
        DataError: a path is missing or matches nothing, a file is not UTF-8 (byte offset named) or
            not JSON (line named), a field is missing, or there is no text at all.
        ConfigError: `datasets` cannot load what the source names.
    """
    assert not isinstance(source, FairseqSource), "it has tokens: fairseq_corpus.Corpus"
    if isinstance(source, BuiltinSource):
        found = library_texts(advance)
    elif isinstance(source, TextSource):
        found = (text for path in files(source) for text in _PER[source.per](path, advance))
    elif isinstance(source, JsonlSource):
        skip = source.on_bad_rows == "skip"
        each = (json_texts(path, source.field, advance, skip) for path in files(source))
        found = chain.from_iterable(each)
    else:
        found = table_texts(source, source_name(source), advance)
    yield from limited(_with_text(found, skipped), source, "text")


def _with_text(found: Iterator[str], skipped: Callable[[], object]) -> Iterator[str]:
    for text in found:
        if text.strip():
            yield text
        else:
            skipped()


def limited(found: Iterator[Found], source: Source, what: str) -> Iterator[Found]:
    """What a source holds, as much of it as its settings take.

    Args:
        what: its kind, for the message.

    Raises:
        DataError: there is nothing.
    """
    count = 0
    for each in islice(found, source.documents):
        count += 1
        yield each
    if not count:
        raise DataError(f"{source_name(source)}: no {what} in it")


def files(source: Source) -> list[Path]:
    """The local files a source consists of, in the order they are read; empty if it is remote.

    Raises:
        DataError: a path is missing or matches nothing.
    """
    if isinstance(source, BuiltinSource):
        return module_files() if source.labelled else library_files()
    if isinstance(source, HubSource):
        return table_files(source, source_name(source))
    if isinstance(source, FairseqSource):
        return corpus_files(source.path, source_name(source))
    if isinstance(source, GlueSource):
        file = Path(source.path) / f"{source.split}.tsv"
        return matching_files(str(file), "*.tsv", f"{source_name(source)}: {file.name}")
    return matching_files(source.path, _PATTERNS[source.kind], source_name(source))


def hidden(source: Source) -> int:
    """How many hidden files and folders below its folder a source leaves out."""
    if isinstance(source, BuiltinSource | HubSource | FairseqSource | GlueSource):
        return 0
    return hidden_files(source.path, _PATTERNS[source.kind], source_name(source))


def content_hash(source: Source) -> str | None:
    """Hash of the bytes of the source's files; None where only reading tells (remote sources)."""
    paths = files(source)
    if not paths:
        return None
    digest = xxhash.xxh3_128()
    with readable(source_name(source)):
        for path in paths:
            digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def size(source: Source) -> int | None:
    """Bytes that reading the source will report to ``advance``; None if unknown."""
    paths = files(source)
    packed = any(path.suffix in PACKED_ENDINGS for path in paths)
    if isinstance(source, HubSource) or packed or not paths:
        return None
    with readable(source_name(source)):
        return sum(path.stat().st_size for path in paths)


def source_name(source: Source) -> str:
    """What a source is called in messages."""
    if isinstance(source, BuiltinSource):
        return "data.sources: builtin"
    return f"data.sources: {source.kind}: {source.path}"
