"""Building prepared rows: documents -> splits -> tokens -> rows -> files and a manifest.

One stretch of text after the other is read, split, tokenized, packed and written, so memory does
not grow with the corpus. ``prepared.py`` says what the files are and gives the folder its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from dskd.data import sources
from dskd.data.bytes_of_text import SplitText, TextCounter
from dskd.data.examples import Example, examples
from dskd.data.fairseq_corpus import Corpus
from dskd.data.foreign import raised_as
from dskd.data.labelled import ExampleEncoder, LabelSet, label_set
from dskd.data.layouts import QuestionEncoder
from dskd.data.packing import Encoder, Items, Packer
from dskd.data.questions import AnyQuestionSource, Question, questions
from dskd.data.text_files import Advance
from dskd.data.tokenizers import load_tokenizer, start_id, tokenizer_fingerprint, vocabulary_size
from dskd.data.what_was_read import DomainRead
from dskd.data.written import Written, written_rows
from dskd.errors import DataError
from dskd.settings.data import (
    Data,
    FairseqSource,
    LabelledSource,
    Source,
    TextSource,
)
from dskd.settings.examples import ReplayedSource
from dskd.system.files import file_hash, fingerprint, write_manifest
from dskd.system.log import say

FORMAT = 2
MANIFEST = "manifest.json"
_CHUNK_CHARACTERS = 2_000_000  # of text in memory at a time
SPLITS = ("train", "validation")
"""Of a run's own rows."""
FURTHER = "rows"
"""The only split of rows of further sources."""
_NOT_OF_ROWS = {"folder": True, "masking": True, "memory": True, "questions": {"modelling"}}
"""Settings that play no part in the rows."""
_FILES = ("ids", "offsets", "domains")
_LABEL_FILES = ("labels", "seconds")
"""The further files of labelled rows."""


@dataclass(frozen=True, kw_only=True)
class _RowBuild:
    """What all steps of one build share.

    Attributes:
        parts: every source with the split it belongs to; None: decided for each document.
        splits: all of them.
        labels: None unless rows are labelled.
        read: by domain, what has been read.
        texts: by split, what text the rows to evaluate on stand for, of causal LMs.
    """

    data: Data
    key: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    domains: list[str]
    labels: LabelSet | None
    parts: list[tuple[Source, str | None]]
    splits: tuple[str, ...] = SPLITS
    read: dict[str, DomainRead] = field(default_factory=dict)
    texts: dict[str, SplitText] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the tokens in the files."""
        return "uint16" if vocabulary_size(self.tokenizer) <= 2**16 else "uint32"

    @property
    def files(self) -> tuple[str, ...]:
        """The files of a split."""
        return _FILES if self.labels is None else _FILES + _LABEL_FILES


class _SplitWriter:
    """Appends rows to the files of a split."""

    def __init__(self, made: _RowBuild, split: str, start: int | None = None) -> None:
        folder, dtype = made.folder, made.dtype
        self.rows = 0
        self.tokens = 0
        self._dtype = dtype
        self._prefix = np.array([] if start is None else [start], dtype=dtype)
        self._files = {name: (folder / f"{split}.{name}").open("wb") for name in made.files}
        self._files["offsets"].write(np.zeros(1, dtype=np.int64).tobytes())

    def write(self, rows: list[NDArray[np.int64]], domain: int, **more: NDArray[Any]) -> None:
        """Append rows of one domain; ``more`` are what further files hold of each."""
        if not rows:
            return
        for name, array in more.items():
            self._files[name].write(array.tobytes())
        pieces = [piece for row in rows for piece in (self._prefix, row.astype(self._dtype))]
        ends = self.tokens + np.cumsum([len(row) + len(self._prefix) for row in rows])
        self._files["ids"].write(np.concatenate(pieces).tobytes())
        self._files["offsets"].write(ends.astype(np.int64).tobytes())
        self._files["domains"].write(np.full(len(rows), domain, dtype=np.uint16).tobytes())
        self.rows += len(rows)
        self.tokens = int(ends[-1])

    def close(self) -> None:
        for stream in self._files.values():
            stream.close()


def build_rows(
    data: Data, tokenizer: PreTrainedTokenizerBase | None, key: str, folder: Path, bar: Progress
) -> None:
    """Fill ``folder`` with the rows, the tokenizer and the manifest (without a key ``classes`` if
    the rows have no labels).

    Args:
        tokenizer: None: train one on the training documents.
        key: what the finished folder is named by; recorded.
        folder: an empty folder.
        bar: shows how far each source is read.

    Raises:
        DataError: there is less text than one row, or no row to validate on; see also
            ``sources.documents``, ``fairseq_corpus.Corpus``, ``examples.examples`` and
            ``labelled.label_set``, or ``questions.questions`` and ``layouts.QuestionEncoder``.
    """
    # First: it is quick, and finds what is wrong with the rows.
    labels = label_set(data) if data.objective == "classification" else None
    tokenizer = _trained_tokenizer(data, bar) if tokenizer is None else tokenizer
    made = _RowBuild(
        data=data,
        key=key,
        folder=folder,
        tokenizer=tokenizer,
        domains=data.domains,
        labels=labels,
        parts=_parts(data),
    )
    writers = _write(made, bar)
    _refuse_small(data, writers)
    _finish(made, writers)


def build_further(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    domains: list[str],
    classes: list[str] | None,
    key: str,
    folder: Path,
    bar: Progress,
) -> None:
    """Fill ``folder`` with the rows of ``data.sources``, none of them held out, beside rows that
    there are: all in one split, :data:`FURTHER`.

    Args:
        tokenizer: of those other rows.
        domains: of them, and behind those that only these rows have.
        classes: of them, if they are labelled.
        key, folder, bar: as of :func:`build_rows`.

    Raises:
        DataError: a row is of none of the classes, or as by :func:`build_rows`.
    """
    labels = None if classes is None else LabelSet(tuple(classes), own="none of the run's classes")
    made = _RowBuild(
        data=data,
        key=key,
        folder=folder,
        tokenizer=tokenizer,
        domains=domains,
        labels=labels,
        parts=[(source, FURTHER) for source in data.sources],
        splits=(FURTHER,),
    )
    writers = _write(made, bar)
    assert writers[FURTHER].rows, "a source without any text is refused, and all end in a row"
    _finish(made, writers)


def _write(made: _RowBuild, bar: Progress) -> dict[str, _SplitWriter]:
    """The rows, in the files of their splits."""
    if made.data.questions is not None:
        return _write_questions(made, bar)
    if made.labels is not None:
        return _write_examples(made, made.labels, bar)
    return _write_rows(made, bar)


def _finish(made: _RowBuild, writers: dict[str, _SplitWriter]) -> None:
    """The tokenizer and the manifest beside the rows."""
    # The Rust library raises a full disk as an Exception.
    with raised_as(DataError, f"data.tokenizer: cannot be written to {made.data.folder}"):
        made.tokenizer.save_pretrained(str(made.folder / "tokenizer"))
    _write_manifest(made, writers)


def _write_rows(made: _RowBuild, bar: Progress) -> dict[str, _SplitWriter]:
    data = made.data
    encode = Encoder(data, made.tokenizer)
    start = start_id(made.tokenizer, data.objective)
    writers = {split: _SplitWriter(made, split, start) for split in made.splits}
    evaluated = [split for split in made.splits if split != "train" and data.objective == "causal"]
    counters = {split: TextCounter(made.tokenizer) for split in evaluated}
    # All of them first, so that what is wrong is told before the long work.
    corpora = {
        part: Corpus(source, made.tokenizer, data.objective)
        for part, (source, _) in enumerate(made.parts)
        if isinstance(source, FairseqSource)
    }
    for part, (source, _) in enumerate(made.parts):
        packers = {name: Packer(data.packing, encode.block) for name in made.splits}
        domain = made.domains.index(source.domain)
        if part in corpora:
            stretches = _read_items(made, corpora[part], encode.block, counters, part, bar)
        else:
            stretches = _encoded(made, encode, counters, part, bar)
        for stretch in stretches:
            for name, items in stretch.items():
                writers[name].write(packers[name].add(items), domain)
        for name, packer in packers.items():
            writers[name].write(packer.finish(), domain)
    for writer in writers.values():
        writer.close()
    for name, counter in counters.items():
        starts = 0 if start is None else writers[name].rows
        if (counted := counter.counted(writers[name].tokens - starts)) is not None:
            made.texts[name] = counted
    return writers


def _encoded(
    made: _RowBuild,
    encode: Encoder,
    counters: dict[str, TextCounter],
    part: int,
    bar: Progress,
) -> Iterator[dict[str, Items]]:
    """A source of text as items by split, stretch by stretch."""
    source, split = made.parts[part]
    for chunk in _chunks(made, source, split, bar):
        found = {name: encode(texts) for name, texts in chunk.items()}
        for name, items in found.items():
            if name in counters:
                counters[name].take(source.domain, chunk[name], items)
        yield found


def _read_items(
    made: _RowBuild,
    corpus: Corpus,
    block: int,
    counters: dict[str, TextCounter],
    part: int,
    bar: Progress,
) -> Iterator[dict[str, Items]]:
    """A source of tokens as items by split, stretch by stretch."""
    source, split = made.parts[part]
    shown = bar.add_task(f"Packing {source.domain}", total=corpus.tokens)
    read = made.read.setdefault(source.domain, DomainRead())
    example = corpus.beginning()
    fraction = None if split else made.data.validation_fraction
    for stretch in corpus.stretches(block, lambda held: split or made.splits[held], fraction):
        for name, count in stretch.documents.items():
            read.take_tokens(name, count, stretch.longest, example)
            if name in counters:
                counters[name].take_tokens(source.domain)
        yield stretch.items
        bar.update(shown, advance=stretch.tokens)
    bar.remove_task(shown)


def _write_examples(made: _RowBuild, labels: LabelSet, bar: Progress) -> dict[str, _SplitWriter]:
    """Each example that the labels take as one row, in the order of the sources."""
    data = made.data
    encode = ExampleEncoder(data, made.tokenizer, labels.classes)
    writers = {split: _SplitWriter(made, split) for split in made.splits}
    for source, split in made.parts:
        domain = made.domains.index(source.domain)
        for chunk in _chunks(made, source, split, bar):
            for name, found in chunk.items():
                taken = [example for example in found if labels.takes(example)]
                rows, labels_R, seconds_R = encode(taken)
                writers[name].write(rows, domain, labels=labels_R, seconds=seconds_R)
    for writer in writers.values():
        writer.close()
    if encode.cut:
        rows = sum(writer.rows for writer in writers.values())
        say(f"data.block_size: {encode.cut} of {rows} rows are cut at {data.block_size} tokens")
    return writers


def _write_questions(made: _RowBuild, bar: Progress) -> dict[str, _SplitWriter]:
    """Each question with its first answer as one row, in the order of the sources."""
    data = made.data
    encode = QuestionEncoder(data, made.tokenizer)
    writers = {split: _SplitWriter(made, split) for split in made.splits}
    for source, split in made.parts:
        domain = made.domains.index(source.domain)
        for chunk in _chunks(made, source, split, bar):
            for name, found in chunk.items():
                writers[name].write(encode(found), domain)
    for writer in writers.values():
        writer.close()
    if encode.cut:
        rows = sum(writer.rows for writer in writers.values())
        where = f", {encode.answers_cut} of them within the answer" if encode.answers_cut else ""
        say(f"data.block_size: {encode.cut} of {rows} rows are cut{where}")
    return writers


def _trained_tokenizer(data: Data, bar: Progress) -> PreTrainedTokenizerBase:
    made = bar.add_task("Training the tokenizer", total=None)
    texts = _training_texts(data)
    first = next(texts, None)
    if first is None:
        raise DataError(
            "data.sources: every document was held out, there is none to train the tokenizer on"
            f"{_single_documents(data)}"
        )
    tokenizer = load_tokenizer(data, chain([first], texts))
    bar.remove_task(made)
    return tokenizer


def _parts(data: Data) -> list[tuple[Source, str | None]]:
    """Every source with the split it belongs to; None: decided for each document."""
    if data.validation is None:
        # What a model wrote says nothing of how well another one does.
        return [(s, "train" if isinstance(s, ReplayedSource) else None) for s in data.sources]
    return [(source, "train") for source in data.sources] + [
        (source, "validation") for source in data.validation
    ]


def _training_texts(data: Data) -> Iterator[str]:
    """The training documents, the sources taking turns."""
    for turn in zip_longest(*(_training_documents(source, data) for source in data.sources)):
        yield from (text for text in turn if text is not None)


def _training_documents(source: Source, data: Data) -> Iterator[str]:
    for found in _documents(source, data):
        if data.validation is not None or not _held_out(_key_text(found), data.validation_fraction):
            yield _whole_text(found)


def _documents(
    source: Source, data: Data, advance: Advance = int, skipped: Callable[[], object] = int
) -> Iterator[str] | Iterator[Example] | Iterator[Question | Written]:
    """What a source holds, in its order: documents, examples or questions."""
    if isinstance(source, ReplayedSource):
        return written_rows(source, advance)
    if data.questions is not None:
        assert isinstance(source, AnyQuestionSource), source  # settings.checks refuses others
        return questions(source, advance)
    if data.objective == "classification":
        assert isinstance(source, LabelledSource), source  # as settings.checks says
        return examples(source, advance, skipped)
    return sources.documents(source, advance, skipped)


def _key_text(found: str | Example | Question) -> str:
    """The text by which a document, example or question is held out."""
    return found.asked if isinstance(found, Question) else _whole_text(found)


def _whole_text(found: str | Example | Question | Written) -> str:
    if isinstance(found, Written):
        return found.text or ""
    if isinstance(found, Question):
        return "\n".join((found.asked, *found.answers))
    return found if isinstance(found, str) else "\n".join(found.texts)


def training_questions(data: Data) -> Iterator[tuple[Source, Question]]:
    """The questions that rows of training are made of, in their order, each with its source; not
    those of replayed rows.

    Raises:
        DataError: see ``questions.questions``.
    """
    for source, split in _parts(data):
        if split == "validation" or isinstance(source, ReplayedSource):
            continue
        assert isinstance(source, AnyQuestionSource), source
        for question in questions(source):
            if split == "train" or not _held_out(question.asked, data.validation_fraction):
                yield source, question


def _held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text: equal ones are on the same side."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def _chunks(
    made: _RowBuild, source: Source, split: str | None, bar: Progress
) -> Iterator[dict[str, list[Any]]]:
    """The documents, examples or questions by split, about ``_CHUNK_CHARACTERS`` at a time."""
    data = made.data
    shown = bar.add_task(f"Tokenizing {source.domain}", total=sources.size(source))
    chunk: dict[str, list[Any]] = {name: [] for name in made.splits}
    held = done = 0
    read = made.read.setdefault(source.domain, DomainRead())
    read.hidden += sources.hidden(source)

    def advance(amount: int) -> None:
        nonlocal done
        done += amount

    for found in _documents(source, data, advance, read.skip):
        name = split or made.splits[_held_out(_key_text(found), data.validation_fraction)]
        chunk[name].append(found)
        text = _whole_text(found)
        read.take(name, text)
        held += len(text)
        if held >= _CHUNK_CHARACTERS:
            yield chunk
            bar.update(shown, completed=done)
            chunk = {name: [] for name in made.splits}
            held = 0
    yield chunk
    bar.remove_task(shown)


def _refuse_small(data: Data, writers: dict[str, _SplitWriter]) -> None:
    tokens = writers["train"].tokens
    if not data.packed and not writers["train"].rows:
        raise DataError("data.sources: no row to train on; is data.validation_fraction too large?")
    if data.packed and tokens < data.block_size:
        raise DataError(
            f"data.sources: {tokens} tokens to train on are shorter than one row "
            f"(data.block_size: {data.block_size}){_single_documents(data)}"
        )
    if not writers["validation"].rows:
        raise DataError(
            "data.validation_fraction: no document was held out, so there are no validation rows; "
            f"raise it, give data.validation, or use a corpus of more documents"
            f"{_single_documents(data)}"
        )


def _single_documents(data: Data) -> str:
    """What to add to a message about too few documents: which text files are one each, as those
    that were meant to hold one a line."""
    for source in data.sources:
        if not isinstance(source, TextSource) or source.per != "paragraph" or source.documents:
            continue
        paths = sources.files(source)
        documents = len(list(islice(sources.documents(source), len(paths) + 1)))
        if documents <= len(paths):
            each = "it is" if len(paths) == 1 else f"each of its {len(paths)} files is"
            return (
                f"\n  {sources.source_name(source)}: {each} ONE document: in text files, documents "
                "are separated by blank lines; `per: line` takes each line as one, and JSON lines "
                "(kind: jsonl) hold one a line"
            )
    return ""


def _write_manifest(made: _RowBuild, writers: dict[str, _SplitWriter]) -> None:
    files = {
        path.relative_to(made.folder).as_posix(): {
            "bytes": path.stat().st_size,
            "xxh3": file_hash(path),
        }
        for path in sorted(path for path in made.folder.rglob("*") if path.is_file())
    }
    written_in = {
        "block_size": made.data.block_size,
        "dtype": made.dtype,
        "domains": made.domains,
        "tokenizer": tokenizer_fingerprint(made.tokenizer),
    }
    if made.labels is not None:
        written_in["classes"] = list(made.labels.classes)
    if made.data.questions is not None:
        written_in["questions"] = made.data.questions.tokens
    splits = {
        split: {
            "rows": writer.rows,
            "tokens": writer.tokens,
            "fingerprint": fingerprint(
                {"files": [files[f"{split}.{name}"]["xxh3"] for name in made.files], **written_in}
            ),
        }
        for split, writer in writers.items()
    }
    content = {
        "kind": "rows",
        "format": FORMAT,
        "key": made.key,
        "fingerprint": fingerprint(splits),
        "settings": made.data.model_dump(mode="json", exclude=_NOT_OF_ROWS),
        "read": {domain: read.model_dump() for domain, read in made.read.items()},
        "texts": {split: text.model_dump() for split, text in made.texts.items()},
        "pad": made.tokenizer.pad_token_id,
        **written_in,
        "splits": splits,
        "files": files,
    }
    write_manifest(made.folder / MANIFEST, content)
