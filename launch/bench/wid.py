"""What a step of Weight-Inherited Distillation costs: chained, merged first, compacted, and plain.

    python launch/bench/wid.py [--device cpu|cuda] [--tokens 256,1024,4096] [--width H]
                               [--rounds N] [--seconds S] [--results FOLDER]

A step is forward, backward and AdamW of a stack of BERT layers in fp32, from the hidden states on:

* ``chained``: three products a layer and token, ``y = CR (W (CL x) + b)``, as in the original code;
* ``merged``: ours, ``W' = CR W CL`` once a step;
* ``compacted``: ours after the ramp, with three quarters of every group removed;
* ``teacher``: the same stack without compactors;
* ``student``: a plain stack of a quarter of the width, what is left at the end.

All take a step in every round, in a drawn order; ratios are taken within a round. Beside them
stands a cost model: products of the linear layers alone. Before anything is
timed, output and gradients of ``merged`` are compared with those of ``chained``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import copy
import os
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BertConfig, BertForMaskedLM

from dskd.narrowing.heaviest import heaviest, slice_model
from dskd.narrowing.insert import Surgery, insert
from dskd.narrowing.layouts import maps_of
from dskd.narrowing.merge import zero_removed
from dskd.narrowing.widths import Widths
from dskd.settings.run import Run
from dskd.settings.teachers import LiveTeacher
from launch.bench import measure
from launch.bench.measure import markdown, show, slug

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("teacher", "chained", "merged", "compacted", "student")
LAYERS, HEADS, ROW, SHARE = 2, 4, 128, 4
"""Of the stack; tokens of a row; the student has one unit of so many."""
AT_LEAST = {1024: 2.0, 4096: 3.0}
"""By tokens, how many times faster merging first must be than the chain."""
TOLERANCE = 1e-4
"""Largest difference of fp32 outputs and gradients, as a share of their norm."""


class Chained(nn.Module):
    """A linear layer between two square ones, as the original computes it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        outputs, inputs = layer.weight.shape
        self.left = nn.Parameter(torch.eye(inputs))
        self.right = nn.Parameter(torch.eye(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(linear(linear(x, self.left), self.weight, self.bias), self.right)


def teacher_of(width: int) -> BertForMaskedLM:
    """A random BERT without dropout; its vocabulary, which is not measured, is small."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=ROW,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def student_widths(width: int) -> Widths:
    """The stack that is left."""
    small = width // SHARE
    return Widths(small, 4 * small, HEADS, HEADS, small // HEADS)


def chained(teacher: BertForMaskedLM) -> BertForMaskedLM:
    """A copy with the original's compactors in its layers."""
    model = copy.deepcopy(teacher)
    for own in maps_of(model.config):
        model.set_submodule(own.path, Chained(model.get_submodule(own.path)))
    return model


def compacted(teacher: BertForMaskedLM, width: int) -> Surgery:
    """A copy with our compactors, whose removed units are zero and left out."""
    surgery = insert(copy.deepcopy(teacher))
    keep = heaviest(teacher, student_widths(width), "dim")
    zero_removed(surgery, keep)
    surgery.compact(keep)
    return surgery


class Step:
    """A variant, ready to train: calling it takes an optimiser step on the same hidden states."""

    def __init__(self, name: str, width: int, tokens: int, device: torch.device) -> None:
        teacher = teacher_of(width)
        self.surgery: Surgery | None = None
        if name == "student":
            model = slice_model(teacher, student_widths(width), "dim")
        elif name == "chained":
            model = chained(teacher)
        elif name == "teacher":
            model = teacher
        else:
            self.surgery = compacted(teacher, width) if name == "compacted" else insert(teacher)
            model = self.surgery.model
        self.encoder = model.bert.encoder.to(device)
        if self.surgery is not None:
            self.surgery.merging.forget()  # what was merged elsewhere
        generator = torch.Generator().manual_seed(tokens)
        own = width // SHARE if name in ("compacted", "student") else width
        hidden = torch.randn(tokens // ROW, ROW, own, generator=generator)
        self.hidden_BTH = hidden.to(device).requires_grad_()
        self.grad_BTH = torch.randn(hidden.shape, generator=generator).to(device) / tokens
        self._optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=1e-5, fused=True)

    def gradients(self) -> Tensor:
        """Forward and backward; the output."""
        out_BTH = self.encoder(self.hidden_BTH).last_hidden_state
        out_BTH.backward(self.grad_BTH)
        return out_BTH

    def __call__(self) -> None:
        """A whole step."""
        self.gradients()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.hidden_BTH.grad = None
        if self.surgery is not None:
            self.surgery.merging.forget()


def check_equal(width: int, tokens: int, device: torch.device) -> float:
    """Largest relative difference between the chain and ours, on compactors off identity."""
    ours, theirs = (Step(name, width, tokens, device) for name in ("merged", "chained"))
    generator = torch.Generator().manual_seed(1)
    found, expected = (dict(step.encoder.named_parameters()) for step in (ours, theirs))
    with torch.no_grad():
        for name, parameter in found.items():
            if name.rpartition(".")[2] in ("left", "right"):
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
                expected[name].add_(parameter)
    assert found.keys() == expected.keys() and ours.surgery is not None
    ours.surgery.merging.forget()
    errors = [measure.relative_error(ours.gradients().detach(), theirs.gradients().detach())]
    for name, parameter in found.items():
        # Biases of keys do not matter to a softmax: their gradients are rounding.
        if not name.endswith("key.bias"):
            errors.append(measure.relative_error(parameter.grad, expected[name].grad))
    assert max(errors) <= TOLERANCE, f"merged and chained differ by {max(errors):.1e}"
    return max(errors)


def products(width: int, tokens: int) -> dict[str, float]:
    """Multiplications of a step's linear layers by variant.

    Of an N x K layer and M tokens: plain 3 M N K; the chain 3 M (K^2 + N K + N^2); merged first 3 M
    N K + 3 N K (N + K); compacted to n x k 3 M n k + 3 :func:`merging`.
    """
    total = dict.fromkeys(VARIANTS, 0.0)
    for outs, ins in layer_shapes(width) * LAYERS:
        n, k = outs // SHARE, ins // SHARE
        total["teacher"] += 3 * tokens * outs * ins
        total["chained"] += 3 * tokens * (ins * ins + outs * ins + outs * outs)
        total["merged"] += 3 * tokens * outs * ins + 3 * merging(outs, ins, outs, ins)
        total["compacted"] += 3 * tokens * n * k + 3 * merging(outs, ins, n, k)
        total["student"] += 3 * tokens * n * k
    return total


def layer_shapes(width: int) -> list[tuple[int, int]]:
    """Outputs and inputs of the linear layers of one BERT layer."""
    return [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]


def merging(outs: int, ins: int, n: int, k: int) -> float:
    """Multiplications that merge an N x K layer with its compactors to n x k."""
    return min(n * outs * ins + n * ins * k, outs * ins * k + n * outs * k)


# ---- the cost of whole runs ----------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the cost model counts with; letters as in the functions below.

    ``M`` tokens and ``S`` supervised ones of a step, rows of ``T``, ``L`` layers, vocabulary ``V``.
    """

    M: int
    S: float
    T: int
    L: int
    V: int


def sizes_of(run: Run) -> Sizes:
    """Those of a run on full rows of BERT."""
    tokens = run.train.batch * run.data.block_size
    return Sizes(
        tokens,
        tokens * run.data.masking.probability,
        run.data.block_size,
        run.model.config["num_hidden_layers"],
        run.data.tokenizer.vocab_size,
    )


def forward_products(s: Sizes, hidden: int) -> float:
    """Multiplications of a plain forward pass.

    ``L (12 H^2 + 2 T H) M`` of the layers, ``(H^2 + V H) S`` of the head.
    """
    layers = s.L * (12 * hidden**2 + 2 * s.T * hidden) * s.M
    return layers + (hidden**2 + s.V * hidden) * s.S


def wid_products(s: Sizes, hidden: int, small: int, *, compacted: bool) -> float:
    """Multiplications of a WID step: three times those of its forward pass and of its merges.

    Merged (:func:`merging`) are the six maps of a layer and the head's one. The embedding's
    compactor costs ``H h M``, the vocabulary projection's ``H h S``; the projection stays V x H.
    """
    h = small if compacted else hidden
    merges = sum(
        merging(outs, ins, outs * h // hidden, ins * h // hidden)
        for outs, ins in [*layer_shapes(hidden) * s.L, (hidden, hidden)]
    )
    own = forward_products(s, h) - s.V * h * s.S
    return 3 * (own + merges + hidden * h * (s.M + s.S) + s.V * hidden * s.S)


def run_products(run: Run, teacher: Run, steps: int) -> float:
    """Multiplications of a run of ``steps``, the forward passes of its live teacher included.

    Args:
        run: on full rows of BERT; by method ``wid`` from the teacher, or plainly at its own width.
        teacher: what it starts from or learns from; it has the same rows.
        steps: optimiser steps.
    """
    s, hidden = sizes_of(teacher), teacher.model.config["hidden_size"]
    taught = steps * forward_products(s, hidden) if isinstance(run.teacher, LiveTeacher) else 0.0
    if run.method["kind"] != "wid":
        own = run.model
        small = own.slice.hidden_size if own.slice else own.config["hidden_size"]
        return taught + steps * 3 * forward_products(s, small)
    method, small = run.method, run.method["hidden_size"]
    settled = method["every"] * method["ramp"] + method["anneal"] - 1
    before = settled * wid_products(s, hidden, small, compacted=False)
    return taught + before + (steps - settled) * wid_products(s, hidden, small, compacted=True)


# ---- the measurement -----------------------------------------------------------------------------


def peaks_in_children(width: int, tokens: int) -> dict[str, int | str]:
    """Bytes that a step of each variant adds to a process; before this one runs in parallel."""
    make = partial(Step, width=width, tokens=tokens, device=torch.device("cpu"))
    return {name: measure.peak_in_child(make, name) for name in VARIANTS}


def timed(
    width: int,
    tokens: int,
    peaks: Mapping[str, int | str],
    device: torch.device,
    rounds: int | None,
    seconds: float,
) -> dict[str, Any]:
    """Times of all variants at one number of tokens; on a GPU also their peak memory."""
    steps = {name: Step(name, width, tokens, device) for name in VARIANTS}
    for step in steps.values():
        step()  # the optimizer's moments
    if device.type == "cuda":
        peaks = {name: measure.peak_on_cuda(step) for name, step in steps.items()}
    clock = measure.clock_for(device)
    samples = measure.interleave(steps, clock, before=lambda: None, rounds=rounds, seconds=seconds)
    model, wall = products(width, tokens), samples["wall_ms"]
    return {
        "tokens": tokens,
        "samples": samples,
        "variants": {
            name: {
                "ms": measure.spread(wall[name]),
                "cpu_ms": median(samples["cpu_ms"][name]),
                "over_teacher": measure.over(wall, name, "teacher"),
                "predicted_over_teacher": model[name] / model["teacher"],
                "peak_bytes": peaks[name],
            }
            for name in VARIANTS
        },
        "speedup": measure.over(wall, "chained", "merged"),
        "predicted_speedup": model["chained"] / model["merged"],
    }


def verdicts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it does."""
    found = []
    for case in cases:
        tokens, ratio = case["tokens"], case["speedup"]["median"]
        if bound := AT_LEAST.get(tokens):
            text = f"{tokens} tokens: chained / merged, at least {bound}"
            found.append({"text": text, "value": ratio, "met": ratio >= bound})
        ratio = case["variants"]["compacted"]["over_teacher"]["median"]
        text = f"{tokens} tokens: compacted / teacher, below 1"
        found.append({"text": text, "value": ratio, "met": ratio < 1})
    return found


def table(result: Mapping[str, Any]) -> str:
    header = ["tokens", "step", "ms, median [quartiles]", "CPU ms", "times the teacher's step"]
    rows = [
        [
            str(case["tokens"]),
            name,
            show(row["ms"], 1),
            f"{row['cpu_ms']:.1f}",
            show(row["over_teacher"], 2),
            f"{row['predicted_over_teacher']:.2f}",
            peak if isinstance(peak := row["peak_bytes"], str) else f"{peak / 2**20:.0f}",
        ]
        for case in result["cases"]
        for name, row in case["variants"].items()
    ]
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}), {result['threads']} threads, "
        f"load {result['load'][0]:.1f}; BERT layers: {LAYERS} x {result['width']}, fp32, AdamW; "
        f"merged and chained agree to {result['error']:.0e}.",
        "",
        *markdown([*header, "of the products", "peak, MiB"], rows),
        "",
    ]
    lines += [
        f"- {case['tokens']} tokens, chained / merged: {show(case['speedup'], 2)}; "
        f"of the products {case['predicted_speedup']:.2f}"
        for case in result["cases"]
    ]
    lines += [
        f"- {verdict['text']}: {verdict['value']:.2f}, {'met' if verdict['met'] else 'MISSED'}"
        for verdict in result["verdicts"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--tokens", default="256,1024,4096")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    words = parser.parse_args()
    device = torch.device(words.device)
    counts = [int(count) for count in words.tokens.split(",")]
    if any(count % ROW for count in counts):
        parser.error(f"--tokens: multiples of {ROW}")
    on_cpu = device.type == "cpu"
    peaks = {count: peaks_in_children(words.width, count) if on_cpu else {} for count in counts}
    error = check_equal(words.width, counts[0], device)
    when = words.rounds, words.seconds
    cases = [timed(words.width, count, peaks[count], device, *when) for count in counts]
    result = {
        **measure.about(device, ("torch", "transformers")),
        "width": words.width,
        "error": error,
        "cases": cases,
        "verdicts": verdicts(cases),
    }
    print(table(result), flush=True)
    stem = f"{result['date']}-wid-step-{slug(result['device'])}"
    measure.write(words.results, stem, result, table(result))


if __name__ == "__main__":
    main()
