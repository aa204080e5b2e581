"""Prepared rows: token ids in memory-mapped files, made once and reused by fingerprint.

A prepared folder holds, for each of the splits ``train`` and ``validation``,

    <split>.ids       uint16 or uint32, the rows' tokens one behind the other
    <split>.offsets   int64 [rows + 1], where each row begins
    <split>.domains   uint16 [rows], each row's domain

the tokenizer, and ``manifest.json`` with the settings and a checksum of every file. It is built
under a temporary name and renamed, so it is whole or absent. The folder is named by the *key*, a
hash of the settings and of the sources' bytes; ``fingerprint`` is a hash of the rows themselves and
is what caches are bound to.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dskd.data import sources
from dskd.data.preparing import FORMAT, MANIFEST, build_rows
from dskd.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from dskd.errors import DataError
from dskd.settings.data import Data, HubSource, PretrainedTokenizer, Source
from dskd.system.files import file_hash, fingerprint, read_manifest, sync_to_disk


class RowBatch(NamedTuple):
    """Some rows of a split as the data holds them, and the epoch that each of them is read in.

    Attributes:
        ids_B: int64, row ids, in any order, repeated or not.
        epochs_B: int64, the epoch of each row, on which its view depends.
        domains_B: int64, index of each row's domain in ``Prepared.domains``.
        tokens_BT: int64, the rows' own tokens, right-padded.
        lengths_B: int64, number of tokens of each row without padding.
    """

    ids_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]
    domains_B: NDArray[np.int64]
    tokens_BT: NDArray[np.int64]
    lengths_B: NDArray[np.int64]

    @property
    def real_BT(self) -> NDArray[np.bool_]:
        """Bool, true for tokens and false for padding."""
        return np.arange(self.tokens_BT.shape[1]) < self.lengths_B[:, None]

    def select(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> RowBatch:
        """The rows at some places of the batch (integers, or bools [B]); T stays as it is."""
        return RowBatch(*(array[index] for array in self))


class RowSet:
    """The rows of one split; row i is its i-th, whatever the number of ranks.

    Attributes:
        fingerprint: of the rows' content and the vocabulary that it is written in.
        content: of the rows' tokens alone, whatever their domains are called.
        block_size: most tokens of a row.
        tokens: number of tokens of all rows, special tokens included.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        entry = manifest["splits"][split]
        self.fingerprint: str = entry["fingerprint"]
        files = manifest["files"]
        self.content = fingerprint([files[f"{split}.{n}"]["xxh3"] for n in ("ids", "offsets")])
        self.block_size: int = manifest["block_size"]
        self.tokens: int = entry["tokens"]
        self._pad: int = manifest["pad"]
        self._ids = _mapped(folder / f"{split}.ids", manifest["dtype"])
        self._offsets = _mapped(folder / f"{split}.offsets", "int64")
        self._domains = _mapped(folder / f"{split}.domains", "uint16")

    def __len__(self) -> int:
        return len(self._domains)

    def rows(self, row_ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> RowBatch:
        """The rows with these ids, each to be read in its epoch.

        T is the longest row's length rounded up to a multiple of 8, but at most ``block_size``.
        """
        begins_B = self._offsets[row_ids_B]
        lengths_B = self._offsets[row_ids_B + 1] - begins_B
        width = min(-(-int(lengths_B.max()) // 8) * 8, self.block_size)
        tokens_BT = np.full((len(row_ids_B), width), self._pad, dtype=np.int64)
        spans = zip(begins_B.tolist(), lengths_B.tolist(), strict=True)
        for b, (begin, length) in enumerate(spans):
            tokens_BT[b, :length] = self._ids[begin : begin + length]
        return RowBatch(row_ids_B, epochs_B, self.domains_B(row_ids_B), tokens_BT, lengths_B)

    def domains_B(self, row_ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of each row's domain in ``Prepared.domains``, int64."""
        return self._domains[row_ids_B].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An opened prepared folder."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    domains: list[str]
    train: RowSet
    validation: RowSet


def prepare(data: Data, progress: bool = True) -> Path:
    """The folder of the prepared rows; built unless it is there already.

    Only one process of a run calls this. Two runs that build the same rows at the same time both
    do, and the first to end wins.

    Args:
        data: the settings; masking plays no part.
        progress: show a progress bar if the standard error is a terminal.

    Raises:
        DataError, ConfigError: see ``sources.documents`` and ``tokenizers.load_tokenizer``; also
            when there is less text than one row, or no row to validate on.
    """
    pretrained = isinstance(data.tokenizer, PretrainedTokenizer)
    tokenizer = load_tokenizer(data, ()) if pretrained else None
    key = _key(data, tokenizer)
    folder = data.folder / key[:16]
    if folder.exists():
        return folder
    data.folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(data.folder)
    temporary = data.folder / f".{key[:16]}.{socket.gethostname()}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _bar(progress) as bar:
            build_rows(data, tokenizer, key, temporary, bar)
        if _key(data, tokenizer) != key:
            raise DataError("data.sources: a file changed while it was read; start again")
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def open_prepared(folder: Path, verify: bool = True) -> Prepared:
    """Open a folder of :func:`prepare`.

    Args:
        verify: compare the checksums of the rows, too (else only their sizes; the manifest and the
            tokenizer are always compared).

    Raises:
        DataError: a file is missing or changed; the message names it.
    """
    manifest = read_manifest(folder / MANIFEST, DataError)
    if manifest.get("kind") != "rows" or manifest.get("format") != FORMAT:
        raise DataError(f"{folder / MANIFEST}: not of prepared rows that this dskd can read")
    for name, expected in manifest["files"].items():
        _check(folder / name, expected, verify or name.startswith("tokenizer/"))
    return Prepared(
        folder=folder,
        tokenizer=AutoTokenizer.from_pretrained(str(folder / "tokenizer")),
        fingerprint=manifest["fingerprint"],
        tokenizer_fingerprint=manifest["tokenizer"],
        domains=manifest["domains"],
        train=RowSet(folder, "train", manifest),
        validation=RowSet(folder, "validation", manifest),
    )


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

    def described(source: Source) -> dict[str, Any]:
        # Where local text lies does not matter; a HubSource's path may name a builder or a hub id.
        left_out = set() if isinstance(source, HubSource) else {"path"}
        settings = source.model_dump(mode="json", exclude=left_out)
        return {**settings, "content": sources.content_hash(source)}

    return fingerprint(
        {
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
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            pass  # alive, and another user's


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not (progress and console.is_terminal), transient=True)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A read-only view of a file; a plain array, whose slices cost less than a memmap's."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
