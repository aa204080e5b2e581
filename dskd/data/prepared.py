"""Prepared rows: token ids in memory-mapped files, made once and reused by fingerprint.

A prepared folder holds, for each of the splits ``train`` and ``validation``,

    <split>.ids       uint16 or uint32, the rows' tokens one behind the other
    <split>.offsets   int64 [rows + 1], where each row begins
    <split>.domains   uint16 [rows], each row's domain

and of labelled rows also

    <split>.labels    int32 [rows], the index of its class, -1 without one; float32 of numbers
    <split>.seconds   int32 [rows], where its second text begins, or its length

the tokenizer, and ``manifest.json`` with the settings and a checksum of every file. It is built
under a temporary name and renamed, so it is whole or absent. The folder is named by the *key*, a
hash of the settings and of the sources' bytes; ``fingerprint`` is a hash of the rows themselves and
is what caches are bound to.

Rows of further sources (:func:`prepare_further`) lie in folders of their own, in one split,
``rows``.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from dskd.batch import UNLABELLED
from dskd.data import sources
from dskd.data.bytes_of_text import SplitText
from dskd.data.padding import padded_widths
from dskd.data.preparing import FORMAT, FURTHER, MANIFEST, SPLITS, build_further, build_rows
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.tokenizers import load_tokenizer, template_fingerprint, tokenizer_fingerprint
from dskd.data.unpacking import readable
from dskd.data.what_was_read import DomainRead, read_lines
from dskd.errors import DataError, DiskError
from dskd.settings.data import Data, HubSource, PretrainedTokenizer, Source
from dskd.settings.labels import Columns
from dskd.system.files import file_hash, fingerprint, read_manifest, sync_to_disk

_LATER = frozenset({"per", "columns", "on_bad_rows"})
"""Settings of sources that are younger than :data:`FORMAT`: at their defaults they are no part of a
key, so that rows of before are found."""


class RowBatch(NamedTuple):
    """Some rows of a split as the data holds them, and the epoch that each of them is read in.

    Attributes:
        ids_B: int64, row ids, in any order, repeated or not.
        epochs_B: int64, the epoch of each row, on which its view depends.
        domains_B: int64, index of each row's domain in ``Prepared.domains``.
        tokens_BT: int64, the rows' own tokens, right-padded.
        lengths_B: int64, number of tokens of each row without padding.
        labels_B: int64, of labelled rows the index of each one's class, ``UNLABELLED`` without one;
            0 where it has a number.
        seconds_B: int64, of labelled rows where each one's second text begins; the number of its
            tokens, if it has none.
        targets_B: float32, of rows for regression the number of each, nan without one.
    """

    ids_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]
    domains_B: NDArray[np.int64]
    tokens_BT: NDArray[np.int64]
    lengths_B: NDArray[np.int64]
    labels_B: NDArray[np.int64] | None = None
    seconds_B: NDArray[np.int64] | None = None
    targets_B: NDArray[np.float32] | None = None

    @property
    def real_BT(self) -> NDArray[np.bool_]:
        """Bool, true for tokens and false for padding."""
        return np.arange(self.tokens_BT.shape[1]) < self.lengths_B[:, None]

    def repeated(self, count: int) -> RowBatch:
        """All rows once, then all of them again, ``count`` times."""
        return self.select(np.tile(np.arange(len(self.ids_B)), count))

    def select(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> RowBatch:
        """The rows at some places of the batch (integers, or bools [B]); T stays as it is."""
        return RowBatch(*(None if array is None else array[index] for array in self))


class RowSet:
    """The rows of one split; row i is its i-th, whatever the number of ranks.

    Attributes:
        fingerprint: of the rows' content and the vocabulary that it is written in.
        content: of the rows' tokens and labels alone, whatever their domains are called.
        block_size: most tokens of a row.
        tokens: number of tokens of all rows, special tokens included.
        labelled: whether each row is an example of a class, or has a number.
        by_length: whether rows are as long as their texts, each one example or question: those of a
            step are then sorted by length.
        text: what text all rows stand for; None where that is not known: they are no plain text of
            a causal LM, a part of it is hidden, or they were prepared before it was counted.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        entry = manifest["splits"][split]
        self.fingerprint: str = entry["fingerprint"]
        files = manifest["files"]
        content = [files[f"{split}.{n}"]["xxh3"] for n in ("ids", "offsets")]
        if "classes" in manifest:
            content += [files[f"{split}.labels"]["xxh3"], manifest["classes"]]
        self.content = fingerprint(content)
        self.block_size: int = manifest["block_size"]
        self.tokens: int = entry["tokens"]
        counted = manifest.get("texts", {}).get(split)
        text = None if counted is None else SplitText.model_validate(counted)
        self.text = None if text is None or text.hidden else text
        self._pad: int = manifest["pad"]
        self._ids = _mapped(folder / f"{split}.ids", manifest["dtype"])
        self._offsets = _mapped(folder / f"{split}.offsets", "int64")
        self._domains = _mapped(folder / f"{split}.domains", "uint16")
        self.labelled = "classes" in manifest
        self.by_length = self.labelled or "questions" in manifest
        if self.labelled:
            kind = "int32" if manifest["classes"] else "float32"
            self._labels = _mapped(folder / f"{split}.labels", kind)
            self._seconds = _mapped(folder / f"{split}.seconds", "int32")

    def __len__(self) -> int:
        return len(self._domains)

    def rows(self, row_ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> RowBatch:
        """The rows with these ids, each to be read in its epoch.

        T is the longest row's length rounded up to a multiple of 8, but at most ``block_size``.
        """
        begins_B, lengths_B = self._offsets[row_ids_B], self.lengths_B(row_ids_B)
        width = int(padded_widths(lengths_B.max(), self.block_size))
        tokens_BT = np.full((len(row_ids_B), width), self._pad, dtype=np.int64)
        spans = zip(begins_B.tolist(), lengths_B.tolist(), strict=True)
        for b, (begin, length) in enumerate(spans):
            tokens_BT[b, :length] = self._ids[begin : begin + length]
        rows = RowBatch(row_ids_B, epochs_B, self.domains_B(row_ids_B), tokens_BT, lengths_B)
        return self._with_labels(rows) if self.labelled else rows

    def _with_labels(self, rows: RowBatch) -> RowBatch:
        numbers_B = self._labels[rows.ids_B]
        return rows._replace(
            labels_B=self.labels_B(rows.ids_B),
            seconds_B=self._seconds[rows.ids_B].astype(np.int64),
            targets_B=numbers_B if numbers_B.dtype == np.float32 else None,
        )

    def labels_B(self, row_ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """What :class:`RowBatch` has of labelled rows by this name."""
        labels_B = self._labels[row_ids_B]
        if labels_B.dtype == np.float32:
            labels_B = np.where(np.isnan(labels_B), UNLABELLED, 0)
        return labels_B.astype(np.int64)

    def lengths_B(self, row_ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of tokens of each row, int64."""
        return self._offsets[row_ids_B + 1] - self._offsets[row_ids_B]

    def domains_B(self, row_ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of each row's domain in ``Prepared.domains``, int64."""
        return self._domains[row_ids_B].astype(np.int64)


class _File(BaseModel):
    bytes: int
    xxh3: str


class _Split(BaseModel):
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    fingerprint: str


class _Manifest(BaseModel):
    """What is read of a manifest."""

    fingerprint: str
    tokenizer: str
    block_size: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    pad: int
    domains: list[str]
    classes: list[str] | None = None
    questions: list[str] | None = None
    read: dict[str, DomainRead] = {}
    texts: dict[str, SplitText] = {}
    splits: dict[str, _Split]
    files: dict[str, _File]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An opened prepared folder.

    ``classes``: of labelled rows the names of their classes, in the order of the logits; none, if
    they have numbers. None: rows have no labels.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    domains: list[str]
    classes: list[str] | None
    train: RowSet
    validation: RowSet


Made = Callable[[Path, float], object]
"""Called with a folder that was just made, and the seconds that it took."""


def prepare(data: Data, progress: bool = True, made: Made | None = None) -> Path:
    """The folder of the prepared rows; built unless it is there already.

    Only one process of a run calls this. Two runs that build the same rows at the same time both
    do, and the first to end wins.

    Args:
        data: the settings; masking plays no part.
        progress: show a progress bar if the standard error is a terminal.
        made: called if the rows were not there already.

    Raises:
        DataError, ConfigError: see ``sources.documents``, ``fairseq_corpus.Corpus`` and
            ``tokenizers.load_tokenizer``; also when there is less text than one row, or no row to
            validate on.
        DiskError: ``data.folder`` cannot be made or written.
    """
    pretrained = isinstance(data.tokenizer, PretrainedTokenizer)
    tokenizer = load_tokenizer(data, ()) if pretrained else None
    return _made(
        data.folder,
        lambda: _key(data, tokenizer),
        lambda key, folder, bar: build_rows(data, tokenizer, key, folder, bar),
        progress,
        made,
    )


def prepare_further(
    data: Data, sources: Sequence[Source], beside: Prepared, progress: bool = True
) -> Path:
    """The folder of the rows of further sources, none of them held out, as :func:`prepare`.

    Args:
        data: the settings of the rows that there are; what they say of sources, validation rows
            and tokenizer plays no part.
        sources: of rows of the same kind.
        beside: the rows that there are, whose tokenizer, domains and classes these have; domains
            that only these have come behind.

    Raises:
        DataError: a label is none of the classes; or as by :func:`prepare`.
        DiskError: ``data.folder`` cannot be made or written.
    """
    own = data.model_copy(update={"sources": list(sources), "validation": None})
    domains = list(dict.fromkeys([*beside.domains, *(source.domain for source in sources)]))

    def key() -> str:
        about = {"further": _key(own, beside.tokenizer), "classes": beside.classes}
        return fingerprint({**about, "domains": domains})

    def build(key: str, folder: Path, bar: Progress) -> None:
        build_further(own, beside.tokenizer, domains, beside.classes, key, folder, bar)

    return _made(data.folder, key, build, progress)


def _made(
    parent: Path,
    key_of: Callable[[], str],
    build: Callable[[str, Path, Progress], None],
    progress: bool,
    made: Made | None = None,
) -> Path:
    """The folder below ``parent`` that is named by the key; built unless it is there already."""
    begun = time.monotonic()
    key = key_of()
    folder = parent / key[:16]
    temporary = parent / f".{key[:16]}.{socket.gethostname()}.{os.getpid()}.tmp"
    with _writable(parent):
        _remove_abandoned(parent)  # first: the disk may be full of it
        if folder.exists():
            return folder
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            with _bar(progress) as bar:
                build(key, temporary, bar)
            if key_of() != key:
                raise DataError("data.sources: a file changed while it was read; start again")
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if made is not None:
        made(folder, time.monotonic() - begun)
    return folder


def open_prepared(folder: Path, verify: bool = True) -> Prepared:
    """Open a folder of :func:`prepare`.

    Args:
        verify: compare the checksums of the rows, too (else only their sizes; the manifest and the
            tokenizer are always compared).

    Raises:
        DataError: a file is missing or changed; the message names it.
    """
    manifest = _opened(folder, SPLITS, verify)
    return Prepared(
        folder=folder,
        tokenizer=stored_tokenizer(str(folder / "tokenizer"), "data.folder", error=DataError),
        fingerprint=manifest["fingerprint"],
        tokenizer_fingerprint=manifest["tokenizer"],
        domains=manifest["domains"],
        classes=manifest.get("classes"),
        train=RowSet(folder, "train", manifest),
        validation=RowSet(folder, "validation", manifest),
    )


def open_further(folder: Path, verify: bool = True) -> RowSet:
    """The rows in a folder of :func:`prepare_further`, opened as by :func:`open_prepared`.

    Raises:
        DataError: a file is missing or changed; the message names it.
    """
    return RowSet(folder, FURTHER, _opened(folder, (FURTHER,), verify))


def what_was_read(folder: Path) -> list[str]:
    """What is in a folder of :func:`prepare` or :func:`prepare_further`, in a few lines.

    Raises:
        DataError: its manifest is missing or changed.
    """
    path = folder / MANIFEST
    with readable("data.folder"):
        manifest = read_manifest(path, DataError)
    _check_manifest(manifest, path, manifest.get("splits", SPLITS))
    return read_lines(manifest)


def _opened(folder: Path, splits: Sequence[str], verify: bool) -> dict[str, Any]:
    """The manifest of a folder that has these splits, once its files are looked at."""
    with readable("data.folder"):
        manifest = read_manifest(folder / MANIFEST, DataError)
        _check_manifest(manifest, folder / MANIFEST, splits)
        for name, expected in manifest["files"].items():
            _check(folder / name, expected, verify or name.startswith("tokenizer/"))
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path, splits: Sequence[str]) -> None:
    """Refuse a manifest that another program wrote, or that leaves the folder."""
    if manifest.get("kind") != "rows" or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not of prepared rows that this dskd can read")
    try:
        read = _Manifest.model_validate(manifest, strict=True)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not as this dskd writes it: {place}: {first['msg']}") from problem
    for name in read.files:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise DataError(f"{path}: names {name!r}, which is not inside its folder")
    if sorted(read.splits) != sorted(splits):
        found, wanted = ", ".join(read.splits) or "none", ", ".join(splits)
        raise DataError(f"{path}: not as this dskd writes it: splits: {found}, not {wanted}")
    for split, text in read.texts.items():
        if split not in read.splits or not text.domains.keys() <= {*read.domains}:
            raise DataError(f"{path}: not as this dskd writes it: texts.{split}")
    width = np.dtype(read.dtype).itemsize
    for split, of in read.splits.items():
        sizes = {"ids": of.tokens * width, "offsets": 8 * (of.rows + 1), "domains": 2 * of.rows}
        if read.classes is not None:
            sizes |= {"labels": 4 * of.rows, "seconds": 4 * of.rows}
        for part, size in sizes.items():
            entry = read.files.get(f"{split}.{part}")
            if entry is None or entry.bytes != size:
                raise DataError(f"{path}: {split}.{part} is not of {of.rows} rows")


def _check(path: Path, expected: dict[str, Any], content: bool) -> None:
    if not path.is_file():
        problem = "no such file"
    elif (size := path.stat().st_size) != expected["bytes"]:
        problem = f"it has {size} bytes, not {expected['bytes']}"
    elif content and file_hash(path) != expected["xxh3"]:
        problem = "damaged, its checksum does not match"
    else:
        return
    raise DataError(f"{path}: {problem}; delete the folder to prepare the rows again")


def _key(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash of all that decides the rows, as far as it is known before reading."""

    labelled = data.objective == "classification"

    def described(source: Source) -> dict[str, Any]:
        # Where local text lies does not matter; a HubSource's path may name a builder or a hub id.
        left_out = set() if isinstance(source, HubSource) else {"path", "answers"}
        if not labelled:
            left_out |= Columns.model_fields.keys() - {"field", "on_bad_rows"}
        fields = type(source).model_fields
        for name in _LATER & fields.keys():
            if getattr(source, name) == fields[name].default:
                left_out = left_out | {name}
        settings = source.model_dump(mode="json", exclude=left_out)
        return {**settings, "content": sources.content_hash(source)}

    further: dict[str, Any] = {}
    if data.questions is not None:
        of = data.questions
        further = {"questions": {"tokens": of.tokens, "room": of.room, "domains": data.domains}}
    if labelled:
        template = None if tokenizer is None else template_fingerprint(tokenizer)
        further = {"labels": data.model_dump(mode="json")["labels"], "template": template}
    return fingerprint(
        further
        | {
            "format": FORMAT,
            "objective": data.objective,
            "block_size": data.block_size,
            "packing": data.packing,
            "validation_fraction": None if data.validation else data.validation_fraction,
            "sources": [described(source) for source in data.sources],
            "validation": [described(source) for source in data.validation or []],
            "tokenizer": (
                data.tokenizer.model_dump(mode="json")
                if tokenizer is None
                else tokenizer_fingerprint(tokenizer)
            ),
        }
    )


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """What cannot be written is one message; ``folder`` is ``data.folder``."""
    try:
        yield
    except OSError as problem:
        no_folder = isinstance(problem, FileExistsError | NotADirectoryError)
        why = "it is no folder" if no_folder else problem.strerror or str(problem)
        raise DiskError(
            f"data.folder: {folder}: cannot write the prepared rows ({why})"
        ) from problem


def _publish(temporary: Path, folder: Path) -> None:
    """Flush everything and give the folder its name."""
    for path in [temporary, *temporary.rglob("*")]:
        sync_to_disk(path)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # else another run has just built the same
            raise
    sync_to_disk(folder.parent)


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed builds on this machine left behind."""
    for path in parent.glob(f".*.{socket.gethostname()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_building(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_building(process: int) -> bool:
    """Whether a process is alive; one that had our own number is not, for we build nothing yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not (progress and console.is_terminal), transient=True)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A read-only view of a file; a plain array, whose slices cost less than a memmap's."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
