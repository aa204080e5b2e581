"""fairseq's corpora on the disk: ``.idx`` says where the items of ``.bin`` begin and end.

An item is a line of the text as ids, of which the last is the end token 2; a blank line is that
token alone. All numbers are little-endian. Two kinds are read: ``mmap``, the one that
``fairseq-preprocess`` writes by default, and ``cached`` (also ``lazy``; once TorchNet's), whose ids
are stored plus one. Both are memory-mapped, and nothing here grows with a corpus.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd.data.unpacking import readable
from dskd.errors import DataError

_MMAP, _CACHED = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HUFFMAN = b"HUFFIDX\0\0"
_DTYPES = {
    1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f8", 8: "<u2", 9: "<u4",
    10: "<u8",
}  # fmt: skip
_AT_ONCE = 1 << 20
"""Items that are looked at together."""
_MEND = "write it again by fairseq-preprocess --dataset-impl mmap"


class _Layout(NamedTuple):
    """What an ``.idx`` says: of each item its tokens and where they begin, in steps of ``unit``
    bytes of a ``.bin`` of such ids."""

    sizes: NDArray[np.integer]
    begins: NDArray[np.int64]
    dtype: np.dtype
    unit: int


class Indexed:
    """One ``.bin`` with its ``.idx``, whose sizes and places are right and cover all of it.

    Attributes:
        sizes: int32 or int64 [items], tokens of each.
        tokens: of all items.

    Raises:
        DataError: a file is missing, of another kind, damaged or without any item; it is named.
    """

    def __init__(self, prefix: Path, where: str) -> None:
        self._bin = prefix.with_name(prefix.name + ".bin")
        self._idx = prefix.with_name(prefix.name + ".idx")
        with readable(where):
            raw = self._mapped(self._idx, "<u1")
            head = raw[:48].tobytes()
            if head.startswith(_MMAP):
                layout, self._less = self._mmap(raw, head), 0
            elif head.startswith(_CACHED):
                layout, self._less = self._cached(raw, head), 1
            else:
                kind = "huffman-coded" if head.startswith(_HUFFMAN) else "of no known kind"
                raise DataError(f"{self._idx}: {kind}, it begins with {head[:9]!r}; {_MEND}")
            self.sizes = layout.sizes
            self._begins = layout.begins
            self._step = layout.dtype.itemsize // layout.unit
            size = self._bin.stat().st_size
            if not len(self.sizes):
                raise DataError(f"{self._idx}: it has no items")
            self.tokens = self._checked(size, layout.dtype.itemsize)
            self._ids = self._mapped(self._bin, layout.dtype.str)

    def __len__(self) -> int:
        return len(self.sizes)

    def ids(self, first: int, last: int) -> NDArray[np.int64]:
        """The tokens of the items from ``first`` up to ``last``, one behind the other."""
        begin = int(self._begins[first]) // self._step
        end = int(self._begins[last - 1]) // self._step + int(self.sizes[last - 1])
        return self._ids[begin:end].astype(np.int64) - self._less

    def sampled(self) -> NDArray[np.int64]:
        """Tokens from all over the file: the first, every 2^20th, the last."""
        places = np.append(np.arange(0, self.tokens, _AT_ONCE), self.tokens - 1)
        return self._ids[places].astype(np.int64) - self._less

    def _mapped(self, path: Path, dtype: str) -> np.ndarray:
        """A read-only view of a file; an empty one cannot be mapped."""
        if not path.stat().st_size:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

    def _mmap(self, raw: np.ndarray, head: bytes) -> _Layout:
        if len(head) < 26:
            raise DataError(f"{self._idx}: it ends within its first numbers; it is cut off")
        version, code, count = struct.unpack("<QBQ", head[9:26])
        self._refuse_length(len(raw), 26 + 12 * count, count)
        dtype = self._dtype(version, code)
        sizes = raw[26 : 26 + 4 * count].view("<i4")
        return _Layout(sizes, raw[26 + 4 * count :].view("<i8"), dtype, 1)

    def _cached(self, raw: np.ndarray, head: bytes) -> _Layout:
        if len(head) < 48:
            raise DataError(f"{self._idx}: it ends within its first numbers; it is cut off")
        version, code, width, count, dims = struct.unpack("<QQQQQ", head[8:48])
        self._refuse_length(len(raw), 48 + 16 * (count + 1) + 8 * dims, count)
        dtype = self._dtype(version, code)
        if width != dtype.itemsize:
            raise DataError(f"{self._idx}: ids of {width} bytes, but dtype {code} has not as many")
        places = raw[48 : 48 + 16 * (count + 1)].view("<i8").reshape(2, count + 1)
        if dims != count or not _counts_up(places[0]):
            raise DataError(f"{self._idx}: its items are no lines of ids but of other shapes")
        return _Layout(raw[48 + 16 * (count + 1) :].view("<i8"), places[1][:-1], dtype, width)

    def _dtype(self, version: int, code: int) -> np.dtype:
        if version != 1:
            raise DataError(f"{self._idx}: version {version}; only 1 is known")
        if code not in _DTYPES:
            raise DataError(f"{self._idx}: dtype {code} is not known")
        dtype = np.dtype(_DTYPES[code])
        if dtype.kind == "f":
            raise DataError(f"{self._idx}: dtype {code}, floating-point numbers and no ids")
        return dtype

    def _refuse_length(self, found: int, expected: int, count: int) -> None:
        if found != expected:
            text = f"{found} bytes, but {count} items need {expected}; it is cut off or damaged"
            raise DataError(f"{self._idx}: {text}")

    def _checked(self, size: int, width: int) -> int:
        """The number of tokens; refuses sizes and places that do not cover ``size`` bytes of ids
        of ``width`` bytes without a gap."""
        end = 0
        for first in range(0, len(self.sizes), _AT_ONCE):
            sizes = self.sizes[first : first + _AT_ONCE].astype(np.int64)
            if (sizes < 1).any():
                item = first + int(np.argmax(sizes < 1))
                raise DataError(f"{self._idx}: item {item} has {self.sizes[item]} tokens; damaged")
            ends = end + np.cumsum(sizes)
            right = self._begins[first : first + _AT_ONCE] == (ends - sizes) * self._step
            if not right.all():
                item = first + int(np.argmin(right))
                text = f"item {item} does not begin where the one before it ends; damaged"
                raise DataError(f"{self._idx}: {text}")
            end = int(ends[-1])
        if size != end * width:
            text = f"{size} bytes, but {self._idx.name} needs {end * width} for {end} tokens"
            raise DataError(f"{self._bin}: {text}; it is cut off or damaged")
        return end


def _counts_up(values: NDArray[np.int64]) -> bool:
    """Whether these are 0, 1, 2 ..."""
    return all(
        bool((values[n : n + _AT_ONCE] == np.arange(n, min(n + _AT_ONCE, len(values)))).all())
        for n in range(0, len(values), _AT_ONCE)
    )


def corpus_prefixes(path: str, where: str) -> list[Path]:
    """The parts of a corpus: ``train``, ``train1``, ``train2`` ..., without the files' endings.

    Args:
        path: that of the first part, or a folder, whose ``train`` is taken. One that ends with a
            digit is a part alone.
        where: the source, for messages.

    Raises:
        DataError: there is none, or it is of a kind that has no ``.idx``, or a part is missing.
    """
    root = Path(path).expanduser()
    with readable(where):
        if root.is_dir():
            root = root / "train"
        if root.suffix in (".bin", ".idx"):
            raise DataError(f"{where}: without its ending, as {root.with_suffix('')}")
        if not _exists(root, ".idx") and not _exists(root, ".bin"):
            raise DataError(f"{where}: {_missing(root)}")
        parts = [root]
        while not root.name[-1].isdigit():
            following = root.with_name(f"{root.name}{len(parts)}")
            if not _exists(following, ".idx") and not _exists(following, ".bin"):
                _refuse_gap(root, len(parts), where)
                break
            parts.append(following)
        for part in parts:
            for ending in (".idx", ".bin"):
                if not _exists(part, ending):
                    raise DataError(f"{where}: {part.name}{ending} is missing beside the other")
    return parts


def dictionary_of(prefix: Path) -> Path:
    """The dictionary that lies beside a corpus."""
    return prefix.with_name("dict.txt")


def corpus_files(path: str, where: str) -> list[Path]:
    """All files of a corpus: its dictionary, then ``.idx`` and ``.bin`` of every part.

    Raises:
        DataError: see :func:`corpus_prefixes`.
    """
    parts = corpus_prefixes(path, where)
    files = [part.with_name(part.name + end) for part in parts for end in (".idx", ".bin")]
    return [dictionary_of(parts[0]), *files]


def _exists(prefix: Path, ending: str) -> bool:
    return prefix.with_name(prefix.name + ending).is_file()


def _missing(root: Path) -> str:
    if _exists(root, ".fasta"):
        return f"{root.name}.fasta is fairseq's fasta, which is not read; {_MEND}"
    if root.is_file():
        return f"{root} is a file itself: raw text (fairseq's raw) is of kind text"
    return f"no {root}.idx and no {root}.bin"


def _refuse_gap(root: Path, number: int, where: str) -> None:
    """Refuse parts behind a missing one, which fairseq would leave out without a word."""
    for path in sorted(root.parent.glob("*.idx")):
        if re.fullmatch(re.escape(root.name) + r"[1-9]\d*\.idx", path.name):
            later = int(path.name[len(root.name) : -len(".idx")])
            if later > number:
                text = f"{path.name} is there, but part {root.name}{number} before it is missing"
                raise DataError(f"{where}: {text}")
