"""How fast rows are made of a corpus of fairseq: tokens a second of one core.

    python launch/bench/packing.py [--tokens N] [--rounds N] [--results FOLDER]

A synthetic corpus is written to a temporary folder: lines of 22 tokens on average, a blank one
after every 25th, ids as uint16, rows of 512. ``pass`` reads, checks and packs, and drops the rows;
``prepare`` is all that a run does before its first step: the hash of the files before and after,
rows on the disk, their checksums. With ``held out``, every 20th document is one of validation, by
a hash of its ids. Every round times each variant once, in an order of its own. Memory is what
Python and numpy allocate, without the mapped files, whose pages the system drops as it likes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import RobertaTokenizer

from dskd.data.fairseq_corpus import Corpus
from dskd.data.fairseq_vocabulary import tokens_in_order
from dskd.data.packing import Packer
from dskd.data.prepared import prepare
from dskd.data.tokenizers import load_tokenizer
from dskd.settings.data import Data, FairseqSource, PretrainedTokenizer
from launch.bench import measure
from launch.bench.measure import HostClock, markdown, show, spread

ROOT = Path(__file__).resolve().parents[2]
BLOCK, LINE, LINES, VOCABULARY = 512, 22, 25, 1000
HELD_OUT = 0.05
LEAST = 5e6
"""Tokens a second of a core, at least."""
PACKINGS = ("complete", "complete_doc", "contiguous")


def write_corpus(folder: Path, tokens: int) -> int:
    """``train`` and ``valid`` with their dictionary, and its tokenizer; returns the tokens."""
    symbols = [f"madeupword{k:04}" for k in range(VOCABULARY - 5)]
    (folder / "dict.txt").write_text("".join(f"{symbol} 0\n" for symbol in symbols))
    vocab = {token: index for index, token in enumerate(tokens_in_order(symbols, [], "dict.txt"))}
    RobertaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder / "tokenizer")
    chance = np.random.default_rng(0)
    for name, amount in (("train", tokens), ("valid", 10_000)):
        sizes = chance.geometric(1 / (LINE - 2), size=amount // LINE + 1).astype("<i4") + 2
        sizes[LINES :: LINES + 1] = 1
        ids = chance.integers(4, VOCABULARY - 1, size=sizes.sum(), dtype=np.uint16)
        ids[np.cumsum(sizes) - 1] = 2
        pointers = 2 * (np.cumsum(sizes, dtype="<i8") - sizes)
        head = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, len(sizes))
        (folder / f"{name}.idx").write_bytes(head + sizes.tobytes() + pointers.tobytes())
        (folder / f"{name}.bin").write_bytes(ids.astype("<u2").tobytes())
        if name == "train":
            written = int(sizes.sum())
    return written


def settings(folder: Path, packing: str, held_out: bool) -> Data:
    def source(name: str) -> FairseqSource:
        return FairseqSource(kind="fairseq", path=str(folder / name))

    return Data(
        sources=[source("train")],
        validation=None if held_out else [source("valid")],
        validation_fraction=HELD_OUT,
        tokenizer=PretrainedTokenizer(kind="pretrained", path=str(folder / "tokenizer")),
        block_size=BLOCK,
        packing=packing,
        folder=folder / "rows",
    )


def variants(folder: Path) -> dict[str, Callable[[], Any]]:
    """All that is timed, by name."""
    calls: dict[str, Callable[[], Any]] = {}
    for held_out in (False, True):
        for packing in PACKINGS if not held_out else PACKINGS[:1]:
            data = settings(folder, packing, held_out)
            name = f"{packing}, held out" if held_out else packing
            calls[f"pass: {name}"] = lambda data=data: packed(data)
            calls[f"prepare: {name}"] = lambda data=data: prepare(data, progress=False)
    return calls


def packed(data: Data) -> int:
    """The number of rows of the training source, which are made and dropped."""
    source, block = data.sources[0], data.block_size - 1
    assert isinstance(source, FairseqSource)
    corpus = Corpus(source, load_tokenizer(data, ()), data.objective)
    packers = {held: Packer(data.packing, block) for held in ("train", "held out")}
    fraction = data.validation_fraction if data.validation is None else None
    rows = 0
    for stretch in corpus.stretches(block, lambda held: ("train", "held out")[held], fraction):
        rows += sum(len(packers[name].add(items)) for name, items in stretch.items.items())
    return rows + sum(len(packer.finish()) for packer in packers.values())


def measured(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Times, tokens a second and memory of every variant."""
    calls = variants(folder)

    def fresh() -> None:
        shutil.rmtree(folder / "rows", ignore_errors=True)

    samples = measure.interleave(calls, HostClock(), before=fresh, rounds=rounds, seconds=0)
    found = {}
    for name, call in calls.items():
        fresh()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        times = samples["cpu_ms"][name]
        speed = spread([tokens / time / 1e3 for time in times])
        found[name] = {
            "wall_ms": samples["wall_ms"][name],
            "cpu_ms": times,
            "million_tokens_a_second_of_a_core": speed,
            "met": speed["median"] * 1e6 >= LEAST,
            "peak_bytes": peak,
        }
    return found


def table(result: dict[str, Any]) -> str:
    """The page of a measurement."""
    rows = [
        [
            name,
            show(spread(of["wall_ms"]), 0),
            show(of["million_tokens_a_second_of_a_core"], 1),
            "yes" if of["met"] else "NO",
            f"{of['peak_bytes'] / 2**20:.0f}",
        ]
        for name, of in result["variants"].items()
    ]
    header = ["", "ms", "million tokens/s of a core", f"above {LEAST / 1e6:.0f}", "peak, MiB"]
    about = (
        f"{result['date']}, {result['cpu']}; {result['tokens']:,} tokens in rows of {BLOCK}; "
        f"medians and quartiles of {result['rounds']} rounds; load {result['load'][0]:.1f}."
    )
    return "\n".join([about, "", *markdown(header, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    words = parser.parse_args()
    if words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    about = measure.about(torch.device("cpu"), ("numpy", "tokenizers"))
    with tempfile.TemporaryDirectory() as name:
        tokens = write_corpus(Path(name), words.tokens)
        found = measured(Path(name), tokens, words.rounds)
    result = {**about, "rounds": words.rounds, "tokens": tokens, "variants": found}
    page = table(result)
    print(page, flush=True)
    measure.write(words.results, f"{result['date']}-packing-cpu", result, page)


if __name__ == "__main__":
    main()
