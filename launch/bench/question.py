"""What self-questioning costs beside a plain evaluation of the same model on the same rows.

    python launch/bench/question.py [--device cpu|cuda] [--dtype fp32|bf16] [--vocabulary V]
                                    [--width H] [--layers L] [--rows R] [--row T] [--micro-batch B]
                                    [--rounds N] [--seconds S] [--results FOLDER]

* ``plain``: HuggingFace's forward with the logits of every token, and their float32 cross entropy;
* ``question``: ours from the rows to the finished store on the disk, everything in it.

Both make their batches from the same rows, none of which is padded, and take turns in a drawn
order; the ratio is taken within a round. Before anything is timed, the store is compared with the
plain cross entropies. Peak memory is what each of them adds to the process (CPU) or device.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # this folder, put first, has a kernels.py, and transformers imports a package of that name
    sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from dskd.data.loader import make_batch
from dskd.data.prepared import Prepared, RowBatch
from dskd.hardness.question import question
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness, describe
from dskd.settings.data import Data, HardTokens
from dskd.system.files import write_atomic
from launch.bench import timing
from launch.bench.wid import about

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AT_MOST = 1.1
"""Time of asking over that of a plain evaluation."""
BYTES = 2.2
"""Most bytes of the store per token: 2, and those of a row (9) and a shard shared out."""
_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


class RandomRows:
    """Rows of ``length`` random tokens, in the place of a :class:`~dskd.data.prepared.RowSet`."""

    fingerprint = "random"

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        random = np.random.RandomState(0)
        self._ids = random.randint(len(_SPECIALS), vocabulary - 1, (rows, length)).astype(np.int64)
        self.block_size, self.tokens = length, rows * length

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, row_ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> RowBatch:
        """The rows with these ids."""
        lengths_B = np.full(len(row_ids_B), self.block_size)
        domains_B = self.domains_B(row_ids_B)
        return RowBatch(row_ids_B, epochs_B, domains_B, self._ids[row_ids_B], lengths_B)

    def domains_B(self, row_ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """All of one domain."""
        return np.zeros(len(row_ids_B), np.int64)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Special tokens and numbers."""
    names = [*_SPECIALS, *(str(i) for i in range(len(_SPECIALS), vocabulary - 1)), "<mask>"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **roles)


class Case:
    """A model, rows, and the two things that are timed."""

    def __init__(self, words: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=words.vocabulary,
            hidden_size=words.width,
            intermediate_size=4 * words.width,
            num_hidden_layers=words.layers,
            num_attention_heads=words.width // 64,
            max_position_embeddings=words.row,
        )
        model = BertForMaskedLM(config).to(device, DTYPES[words.dtype])
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.rows = RandomRows(words.rows, words.row, words.vocabulary)
        self.masking = HardTokens(kind="hard_tokens", micro_batch=words.micro_batch)
        self.device = device
        self.folder = Path(tempfile.mkdtemp()) / "store"
        self.prepared = Prepared(
            folder=self.folder,
            tokenizer=tokenizer_of(words.vocabulary),
            fingerprint="random",
            tokenizer_fingerprint="random",
            domains=["random"],
            train=self.rows,
            validation=self.rows,
        )
        self.view = scoring_view(Data(masking=self.masking), self.prepared.tokenizer, 0)

    @torch.no_grad()
    def plain(self) -> Tensor:
        """The cross entropy of every token, by HuggingFace's forward."""
        found = []
        step = self.masking.micro_batch
        for begin in range(0, len(self.rows), step):
            row_ids = np.arange(begin, min(begin + step, len(self.rows)))
            batch = make_batch(self.rows, self.view, row_ids, row_ids * 0).to(self.device)
            logits_BTV = self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
            logits_NV, labels_N = logits_BTV.flatten(0, 1).float(), batch.labels_BT.flatten()
            found.append(cross_entropy(logits_NV, labels_N, reduction="none"))
        return torch.cat(found).cpu()

    def question(self) -> None:
        """The whole store, from nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            question(
                self.masking,
                lambda: self.model,
                self.prepared,
                self.view,
                self.folder,
                fingerprints={},
                device=self.device,
            )

    def check(self) -> float:
        """Largest relative difference of the store from the plain cross entropy."""
        self.question()
        row_ids = np.arange(len(self.rows))
        nll_BT, _ = Hardness(self.folder, {}).read(self.rows.rows(row_ids, row_ids * 0))
        return float((torch.from_numpy(nll_BT).flatten() / self.plain() - 1).abs().max())

    def peaks(self) -> dict[str, int | str]:
        """Bytes that each adds to what is there."""
        calls = {"plain": self.plain, "question": self.question}
        if self.device.type == "cuda":
            return {name: timing.peak_on_cuda(call) for name, call in calls.items()}
        return {name: timing.peak_in_child(calls.__getitem__, name) for name in calls}

    def measure(self, rounds: int | None, seconds: float) -> dict[str, Any]:
        """Times of both, and their ratio."""
        calls = {"plain": self.plain, "question": self.question}
        clock = timing.HostClock()  # the store is the host's work; both end by copying to it
        samples = timing.interleave(
            calls, clock, before=lambda: None, rounds=rounds, seconds=seconds
        )
        wall = samples["wall_ms"]
        return {
            "samples": samples,
            "ms": {name: timing.spread(wall[name]) for name in calls},
            "cpu_ms": {name: median(samples["cpu_ms"][name]) for name in calls},
            "ratio": timing.over(wall, "question", "plain"),
            "cpu_ratio": timing.over(samples["cpu_ms"], "question", "plain"),
        }


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it does."""
    ratio, nbytes = result["ratio"]["median"], result["bytes_per_token"]
    return [
        {"text": f"question / plain, at most {AT_MOST}", "value": ratio, "met": ratio <= AT_MOST},
        {"text": f"bytes per token, at most {BYTES}", "value": nbytes, "met": nbytes <= BYTES},
    ]


def table(result: Mapping[str, Any]) -> str:
    """The result as markdown."""
    settings = result["settings"]
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}), {result['threads']} threads, "
        f"load {result['load'][0]:.1f}; BERT {settings['layers']} x {settings['width']}, "
        f"vocabulary {settings['vocabulary']}, {settings['dtype']}, {settings['rows']} rows of "
        f"{settings['row']} tokens, {settings['micro_batch']} at a time; the store differs from "
        f"the plain cross entropy by {result['error']:.0e} (float16: 5e-4).",
        "",
        "| variant | ms, median [quartiles] | CPU ms | us a token | peak, MiB |",
        "|---|---|---|---|---|",
    ]
    tokens = settings["rows"] * settings["row"]
    for name, ms in result["ms"].items():
        peak = result["peak_bytes"][name]
        cells = [
            name,
            timing.show(ms, 1),
            f"{result['cpu_ms'][name]:.1f}",
            f"{1e3 * ms['median'] / tokens:.2f}",
            peak if isinstance(peak, str) else f"{peak / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"- question / plain: {timing.show(result['ratio'], 3)}; "
        f"of the CPU time {timing.show(result['cpu_ratio'], 3)}",
    ]
    lines += [
        f"- {verdict['text']}: {verdict['value']:.3f}, {'met' if verdict['met'] else 'MISSED'}"
        for verdict in result["verdicts"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write it with all numbers into the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--vocabulary", type=int, default=50265 if on_gpu else 8192)
    parser.add_argument("--width", type=int, default=768 if on_gpu else 256)
    parser.add_argument("--layers", type=int, default=12 if on_gpu else 4)
    parser.add_argument("--rows", type=int, default=1024 if on_gpu else 64)
    parser.add_argument("--row", type=int, default=512 if on_gpu else 128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    words = parser.parse_args()
    device = torch.device(words.device)
    case = Case(words, device)
    peaks = case.peaks()
    result: dict[str, Any] = {**about(device), "settings": vars(words) | {"results": None}}
    result |= {"error": case.check(), "peak_bytes": peaks}
    result |= case.measure(words.rounds, words.seconds)
    result["bytes_per_token"] = describe(case.folder)["bytes_per_token"]
    result["verdicts"] = verdicts(result)
    shutil.rmtree(case.folder.parent)
    print(table(result), flush=True)
    stem = f"{result['date']}-question-{result['device'].replace(' ', '-').lower()}"
    write_atomic(words.results / f"{stem}.json", json.dumps(result, indent=1).encode())
    write_atomic(words.results / f"{stem}.md", table(result).encode())


if __name__ == "__main__":
    main()
