"""The measured cases: their order, and those that go through a head.

A case has inputs, our call, its peers, the floor, and the truth in float64. The loss is a mean over
its tokens, with gradients to the student's logits, or to its hidden states and head.

Shape letters: N tokens, C of them in a chunk, V columns, D and E hidden sizes of student and
teacher, K kept logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dskd import ops
from dskd.fused import reference
from launch.bench import peers
from launch.bench.logit_cases import (
    OURS,
    Case,
    dense,
    kept_of,
    label,
    mixture,
    random_logits,
    topk,
    topk_per_token,
    vocab_parallel,
)
from launch.bench.peers import Head, Outcome
from launch.bench.truth import products, through_head

KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Shapes:
    """Sizes of a run.

    ``columns``: vocabularies, and in how many of the first cases peers are compiled as well, which
    takes seconds each; ``hidden``: sizes of student and teacher.
    """

    tokens: int
    columns: dict[int, int]
    kept: int
    hidden: tuple[tuple[int, int], ...]


LARGE = Shapes(8192, {131072: 10, 32768: 1, 151936: 1}, 64, ((4096, 4096), (2048, 4096)))
SMALL = Shapes(4, {1003: 2}, 8, ((64, 64), (32, 64)))
"""For Triton's interpreter."""


def cases(
    wanted: Collection[str], shapes: Shapes, device: torch.device
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """A name and a maker of each case, the most wanted first, for time may run out."""
    wide, narrow = shapes.hidden
    listed = [
        (dense, "forward_kl", torch.bfloat16),
        (linear, "forward_kl", wide),
        (topk,),
        (dense, "jsd", torch.bfloat16),
        (linear, "jsd", wide),
        (dense, "reverse_kl", torch.bfloat16),
        (linear_topk, wide),
        (mixture,),
        (label,),
        *((dense, kind, torch.float32) for kind in KINDS),
        *((vocab_parallel, kind) for kind in ("forward_kl", "jsd")),
        *((linear, kind, narrow) for kind in ("forward_kl", "jsd")),
        (linear_topk, narrow),
    ]
    for columns, compiled in shapes.columns.items():
        for place, (builder, *arguments) in enumerate(listed):
            if builder.__name__ in wanted:
                words = " ".join(map(str, (builder.__name__, *arguments, "V", columns)))
                sizes = (shapes.tokens, columns, *arguments, shapes.kept, device)
                yield words, partial(_seeded, builder, *sizes, compiled=place < compiled)


def _seeded(builder: Callable[..., Case], *sizes: Any, compiled: bool) -> Case:
    torch.manual_seed(0)
    return builder(*sizes, compiled=compiled)


def linear(
    tokens: int,
    columns: int,
    kind: str,
    hidden: tuple[int, int],
    kept: int,
    device: torch.device,
    *,
    compiled: bool,
) -> Case:
    """Two heads, bf16."""
    del kept
    head = head_of(tokens, columns, hidden, torch.bfloat16, device)
    teacher = ops.LinearTeacher(head.teacher_NE, head.teacher_VE)

    return Case(
        "linear",
        f"{kind} bf16, H {hidden[0]}/{hidden[1]}",
        {"N": tokens, "V": columns, "D": hidden[0], "E": hidden[1]},
        {OURS: partial(_linear, head, teacher, kind=kind)}
        | peers.linear_peers(head, kind)
        | peers.liger_chunked(head, kind, chunk=1024, compiled=False)
        | (peers.liger_chunked(head, kind, chunk=1024, compiled=True) if compiled else {})
        | peers.fused_peers(head, kind, compiled=compiled),
        products(head),
        through_head(head, partial(_linear_per_token, head, kind)),
    )


def linear_on_cpu(tokens: int, columns: int, width: int, *, compiled: bool) -> Case:
    """Two heads of one hidden size, forward KL, fp32."""
    torch.manual_seed(0)
    kind, head = (
        "forward_kl",
        head_of(tokens, columns, (width, width), torch.float32, torch.device("cpu")),
    )
    teacher = ops.LinearTeacher(head.teacher_NE, head.teacher_VE)
    # their default makes one chunk of all 512 tokens; a quarter of the tokens makes four
    found = peers.linear_peers(head, kind)
    for chunk in (1024, max(1, tokens // 4)):
        found |= peers.liger_chunked(head, kind, chunk=chunk, compiled=False)
    if compiled:
        found |= peers.liger_chunked(head, kind, chunk=1024, compiled=True)
    return Case(
        "cpu",
        f"linear {kind} fp32, H {width}",
        {"N": tokens, "V": columns, "D": width, "E": width},
        {OURS: partial(_linear, head, teacher, kind=kind)} | found,
        products(head),
        through_head(head, partial(_linear_per_token, head, kind)),
    )


def linear_topk(
    tokens: int,
    columns: int,
    hidden: tuple[int, int],
    kept: int,
    device: torch.device,
    *,
    compiled: bool,
) -> Case:
    """The student's head against a top-k teacher, bf16."""
    head = head_of(tokens, columns, hidden, torch.bfloat16, device)
    teacher = kept_of(random_logits(tokens, columns, torch.float32, device), kept)

    def eager() -> Outcome:
        return peers.differentiate(
            lambda h, w: reference.topk_divergence((h @ w.t()).float(), *teacher).mean(),
            head.hidden_ND,
            head.weight_VD,
        )

    del compiled
    return Case(
        "linear_topk",
        f"tail bf16, K {kept}, H {hidden[0]}",
        {"N": tokens, "V": columns, "D": hidden[0], "K": kept},
        {
            OURS: partial(_linear, head, ops.TopKTeacher(*teacher[:2], {1.0: teacher[2]})),
            "torch eager": eager,
        },
        products(Head(head.hidden_ND, head.weight_VD, None, None, head.labels_N)),
        through_head(head, partial(topk_per_token, teacher)),
    )


def head_of(
    tokens: int, columns: int, hidden: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Head:
    """Random heads whose logits have a standard deviation of 2."""
    student, teacher = hidden

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.randn(rows, width, device=device, dtype=dtype).mul_(scale)

    return Head(
        normal(tokens, student, 1.0),
        normal(columns, student, 2.0 * student**-0.5),
        normal(tokens, teacher, 1.0),
        normal(columns, teacher, 2.0 * teacher**-0.5),
        torch.randint(columns, (tokens,), device=device),
    )


def _linear(head: Head, teacher: ops.LogitTeacher, **arguments: str) -> Outcome:
    def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        each = 1 / len(hidden_ND)
        return ops.linear_kd(hidden_ND, weight_VD, teacher=teacher, weight=each, **arguments).total

    return peers.differentiate(loss, head.hidden_ND, head.weight_VD)


def _linear_per_token(head: Head, kind: str, logits_CV: Tensor, rows: slice) -> Tensor:
    teacher_CV = head.teacher_NE[rows].double() @ head.teacher_VE.double().t()
    return reference.divergence(logits_CV, teacher_CV, kind)
