"""What batches are worth when a model generates: 32 prompts at a time against one after another.

    python launch/bench/generate.py [--rounds N] [--models NAMES] [--results FOLDER]

Every variant goes on with the same prompts by the same number of tokens, since no token ends a row.
``loop`` takes one prompt at a time, with its cache of keys and values; ``batched`` all of them;
``transformers`` is its own ``generate`` on the same batch, which draws from a generator. Every
round times each variant once, in an order of its own, and ratios are taken within a round.

Peak memory is what a call adds: on a CPU to the resident set of a fork, on a GPU what PyTorch
allocates.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import random
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dskd.models.generate import Decoding, Sampling, continuations
from dskd.system.device import on_gpu
from launch.bench import measure
from launch.bench.measure import markdown, over, show, slug, spread

ROOT = Path(__file__).resolve().parents[2]
ROWS, NEW = 32, 24
SHORTEST, LONGEST = 8, 40
"""Tokens of a prompt."""
TOP_K = 20
LEAST = 10.0
"""Times as many tokens a second as the loop, at least."""

MODELS: dict[str, dict[str, Any]] = {
    "toys": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
    },
    "llama_3m": {  # the student of launch/ki/quickstart.yaml until 2026-11-30
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
"""Shapes; the weights are random."""

WAYS = {"greedy": None, f"top-k {TOP_K}": Sampling(seed=0, top_k=TOP_K)}
VARIANTS = ("loop", "batched", "transformers")


def variant(model: PreTrainedModel, way: str, name: str) -> Callable[[], None]:
    """A function that goes on with all prompts in one way."""
    chance = random.Random(0)
    size, positions = model.config.vocab_size, model.config.max_position_embeddings
    lengths = [chance.randint(SHORTEST, LONGEST) for _ in range(ROWS)]
    prompts = [[chance.randrange(size) for _ in range(length)] for length in lengths]
    if name == "transformers":
        return _own(model, prompts, WAYS[way])
    decoding = Decoding(NEW, positions, size, ends=(), pad=0, sampling=WAYS[way])
    batch = 1 if name == "loop" else ROWS
    return lambda: _check(continuations(model, prompts, decoding, numbers=range(ROWS), batch=batch))


def _own(
    model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling | None
) -> Callable[[], None]:
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    how = {"do_sample": False} if sampling is None else {"do_sample": True, "top_k": TOP_K}
    how |= {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}

    def call() -> None:
        there = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
        _check(model.generate(**there, **how)[:, width:].tolist())

    return call


def _check(rows: list[list[int]]) -> None:
    assert [len(row) for row in rows] == [NEW] * ROWS, "a row has another number of tokens"


def build(name: str, device: torch.device) -> PreTrainedModel:
    """A random model, in bf16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.for_model(**MODELS[name], bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


def peak(name: str, way: str, which: str, device: torch.device) -> int | str:
    """Bytes that a variant's call adds."""
    if device.type == "cuda":
        return measure.peak_on_cuda(variant(build(name, device), way, which))
    return measure.peak_in_child(lambda one: variant(build(name, device), way, one), which)


def measured(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """All figures of one model: peaks first, for a fork cannot use threads that have run."""
    peaks = {way: {one: peak(name, way, one, device) for one in VARIANTS} for way in WAYS}
    model = build(name, device)
    calls = {(way, one): variant(model, way, one) for way in WAYS for one in VARIANTS}
    for call in calls.values():
        call()
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    # The host's clock on a GPU, too: each call ends with the tokens on the host.
    samples = measure.interleave(
        calls, measure.HostClock(), before=done, rounds=rounds, seconds=0.0
    )
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for way in WAYS:
        wall, cores = (
            {one: samples[key][way, one] for one in VARIANTS} for key in ("wall_ms", "cpu_ms")
        )
        gain = over(wall, "loop", "batched")
        found[way] = {
            "wall_ms": wall,
            "cpu_ms": cores,
            "peak_bytes": peaks[way],
            "loop_over_batched": {**gain, "least": LEAST, "met": gain["median"] >= LEAST},
            "cpu_loop_over_batched": over(cores, "loop", "batched"),
            "batched_over_transformers": over(wall, "batched", "transformers"),
        }
    return found


def table(result: Mapping[str, Any]) -> str:
    """The page: a table, and whether the target is met."""
    rows, lines = [], []
    for name, of in result["models"].items():
        for way in WAYS:
            figures = of[way]
            for one in VARIANTS:
                wall = figures["wall_ms"][one]
                bytes_ = figures["peak_bytes"][one]
                rows.append(
                    [
                        f"{name} ({of['parameters']:,} parameters)",
                        way,
                        one,
                        show(spread(wall), 1),
                        f"{1e3 * ROWS * NEW / median(wall):,.0f}",
                        bytes_ if isinstance(bytes_, str) else f"{bytes_ / 2**20:.1f}",
                    ]
                )
            gain, cores = figures["loop_over_batched"], figures["cpu_loop_over_batched"]
            lines.append(
                f"- {name}, {way}: batched is {show(gain, 1)} times the loop, by CPU time "
                f"{show(cores, 1)}; at least {LEAST:.0f}: {'met' if gain['met'] else 'MISSED'}; "
                f"time over transformers' {show(figures['batched_over_transformers'], 2)}"
            )
    header = ["model", "decoding", "variant", "ms, median [quartiles]", "tokens/s", "peak, MiB"]
    about = (
        f"{result['date']}, {result['device']} ({result['cpu']}), {result['threads']} threads; "
        f"{ROWS} prompts of {SHORTEST} to {LONGEST} tokens, {NEW} new ones each; "
        f"{result['rounds']} rounds; load {result['load'][0]:.1f}."
    )
    return "\n".join([about, "", *markdown(header, rows), "", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="toys,llama_3m", help=", ".join(MODELS))
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    words = parser.parse_args()
    names = words.models.split(",")
    if words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    device = torch.device("cuda" if on_gpu() else "cpu")
    result = {**measure.about(device, ("torch", "transformers")), "rounds": words.rounds}
    result["models"] = {name: measured(name, device, words.rounds) for name in names}
    page = table(result)
    print(page, flush=True)
    measure.write(
        words.results, f"{result['date']}-generate-{slug(result['device'])}", result, page
    )


if __name__ == "__main__":
    main()
