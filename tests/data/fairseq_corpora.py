"""Corpora in fairseq's two layouts, and tokenizers of their dictionaries."""

import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import RobertaTokenizer

from dskd.data.fairseq_vocabulary import tokens_in_order
from dskd.settings.data import Data, FairseqSource, PretrainedTokenizer

GOLDEN = Path(__file__).parents[1] / "golden/bridges/corpus"
LAYOUTS = ["mmap_uint16", "mmap_int32", "cached_int32"]
CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8, "u4": 9, "u8": 10}

ItemList = list[list[int]]


def write_mmap(prefix: Path, items: ItemList, dtype: str = "u2") -> None:
    """``prefix.bin`` and ``prefix.idx`` as fairseq's MMapIndexedDatasetBuilder writes them."""
    sizes = np.array([len(item) for item in items], dtype="<i4")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, CODES[dtype], len(items))
    Path(f"{prefix}.idx").write_bytes(head + sizes.tobytes() + pointers.astype("<i8").tobytes())
    Path(f"{prefix}.bin").write_bytes(_flat(items).astype(f"<{dtype}").tobytes())


def write_cached(prefix: Path, items: ItemList, dtype: str = "i4") -> None:
    """The same as its IndexedDatasetBuilder does: ids plus one."""
    sizes = np.array([len(item) for item in items], dtype="<i8")
    count, width = len(items), np.dtype(dtype).itemsize
    head = b"TNTIDX\0\0" + struct.pack("<QQQQQ", 1, CODES[dtype], width, count, count)
    places = [np.arange(count + 1), np.append(0, np.cumsum(sizes)), sizes]
    raw = head + b"".join(array.astype("<i8").tobytes() for array in places)
    Path(f"{prefix}.idx").write_bytes(raw)
    Path(f"{prefix}.bin").write_bytes((_flat(items) + 1).astype(f"<{dtype}").tobytes())


def _flat(items: ItemList) -> np.ndarray:
    return np.array([index for item in items for index in item], dtype=np.int64)


def symbols_of(vocabulary: int) -> list[str]:
    """The symbols of a dictionary that makes so many ids: bytes, then made-up words."""
    lines = vocabulary - 5
    bytes_ = [str(k) for k in range(min(lines, 256))]
    return bytes_ + [f"madeupword{k:04}" for k in range(lines - len(bytes_))]


def write_dictionary(folder: Path, symbols: Iterable[str]) -> None:
    (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))


def tokenizer_without_merges(symbols: list[str]) -> RobertaTokenizer:
    """A tokenizer that has a dictionary's tokens at its ids."""
    vocab = {token: index for index, token in enumerate(tokens_in_order(symbols, [], "d"))}
    return RobertaTokenizer(vocab=vocab, merges=[])


def golden_corpus(folder: Path, layout: str = "mmap_uint16", parts: int = 1) -> Path:
    """The golden files with a dictionary of bytes in the place of theirs, which no whole BPE has,
    and its tokenizer in ``tokenizer``; returns the folder."""
    symbols = symbols_of(46)
    for name in ["valid", "train", "train1"][: parts + 1]:
        for ending in (".bin", ".idx"):
            shutil.copy(GOLDEN / layout / (name + ending), folder)
    write_dictionary(folder, symbols)
    tokenizer_without_merges(symbols).save_pretrained(folder / "tokenizer")
    return folder


def settings(where: Path, **changes: object) -> Data:
    """Settings of ``where/train`` and ``valid``, with the tokenizer there, prepared in ``rows``."""
    values: dict = {
        "sources": [source(where / "train")],
        "validation": [source(where / "valid")],
        "tokenizer": PretrainedTokenizer(kind="pretrained", path=str(where / "tokenizer")),
        "block_size": 16,
        "folder": where / "rows",
    }
    return Data(**(values | changes))


def source(path: Path, **changes: object) -> FairseqSource:
    return FairseqSource(kind="fairseq", path=str(path), **changes)
