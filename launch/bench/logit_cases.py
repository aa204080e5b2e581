"""The measured cases of losses of logits, and what a case is.

The loss of every case is a mean over its tokens, with gradients to the student's logits.

Shape letters: N tokens, C of them in a chunk, V columns, K kept logits, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dskd import ops
from dskd.fused import reference
from dskd.fused.backend import row_functions
from launch.bench import peers
from launch.bench.peers import Outcome, Peer
from launch.bench.truth import Truth, stream, through_logits

OURS, FLOOR = "ours", "floor"


def _nothing() -> None:
    """Nothing is overwritten."""


@dataclass
class Case:
    """One row of shapes: ``variants`` holds ours and the peers, ``floor`` what they are held to.

    ``restore`` makes good, unmeasured, what calls overwrite. It runs before every variant and the
    floor alike: on a GPU it is work for the device while the host queues the call, which must not
    be some variants' alone.
    """

    op: str
    name: str
    shape: dict[str, int]
    variants: dict[str, Peer]
    floor: Callable[[], object]
    truth: Truth
    restore: Callable[[], object] = _nothing


def dense(
    tokens: int,
    columns: int,
    kind: str,
    dtype: torch.dtype,
    kept: int,
    device: torch.device,
    *,
    compiled: bool,
) -> Case:
    """Two logits matrices; bf16 in place, fp32 into a new bf16 gradient."""
    del kept
    student_NV, teacher_NV = (random_logits(tokens, columns, dtype, device) for _ in range(2))
    in_place = dtype == torch.bfloat16
    work_NV = student_NV.clone() if in_place else student_NV
    arguments = {"kind": kind, "weight": 1 / tokens}

    def ours() -> Outcome:
        grad_NV = work_NV if in_place else torch.empty_like(student_NV, dtype=torch.bfloat16)
        return Outcome(
            ops.dense_kd(work_NV, teacher_NV, out=grad_NV, **arguments).total, (grad_NV,)
        )

    return Case(
        "dense",
        f"{kind} {_short(dtype)}",
        {"N": tokens, "V": columns},
        {OURS: ours} | peers.dense_peers(student_NV, teacher_NV, kind, compiled=compiled),
        stream(tokens * columns * (2 * student_NV.element_size() + 2), reads=2, device=device),
        through_logits(student_NV, partial(_dense_per_token, teacher_NV, kind)),
        restore=partial(work_NV.copy_, student_NV) if in_place else _nothing,
    )


def label(tokens: int, columns: int, kept: int, device: torch.device, *, compiled: bool) -> Case:
    """Cross entropy of bf16 logits, in place."""
    del kept
    student_NV = random_logits(tokens, columns, torch.bfloat16, device)
    labels_N = torch.randint(columns, (tokens,), device=device)
    work_NV = student_NV.clone()

    def ours() -> Outcome:
        found = ops.label_ce(work_NV, labels_N, label_weight=1 / tokens, out=work_NV)
        return Outcome(found.total, (work_NV,))

    return Case(
        "label",
        "cross entropy bf16",
        {"N": tokens, "V": columns},
        {OURS: ours} | peers.label_peers(student_NV, work_NV, labels_N, compiled=compiled),
        stream(tokens * columns * 4, reads=1, device=device),
        through_logits(
            student_NV, lambda z_CV, rows: reference.cross_entropy(z_CV, labels_N[rows])
        ),
        restore=partial(work_NV.copy_, student_NV),
    )


def topk(tokens: int, columns: int, kept: int, device: torch.device, *, compiled: bool) -> Case:
    """The tail mode on bf16 logits, in place."""
    student_NV = random_logits(tokens, columns, torch.bfloat16, device)
    teacher = kept_of(random_logits(tokens, columns, torch.float32, device), kept)
    work_NV = student_NV.clone()

    def ours() -> Outcome:
        found = ops.topk_kd(work_NV, *teacher, weight=1 / tokens, out=work_NV)
        return Outcome(found.total, (work_NV,))

    return Case(
        "topk",
        f"tail bf16, K {kept}",
        {"N": tokens, "V": columns, "K": kept},
        {OURS: ours}
        | peers.logits_peers(
            student_NV, lambda x: reference.topk_divergence(x, *teacher).mean(), compiled=compiled
        ),
        stream(tokens * columns * 4, reads=1, device=device),
        through_logits(student_NV, partial(topk_per_token, teacher)),
        restore=partial(work_NV.copy_, student_NV),
    )


def mixture(tokens: int, columns: int, kept: int, device: torch.device, *, compiled: bool) -> Case:
    """Two teachers of the whole vocabulary, bf16, in place."""
    del kept
    student_NV, *teachers = (
        random_logits(tokens, columns, torch.bfloat16, device) for _ in range(3)
    )
    weights_N2 = torch.rand(tokens, 2, device=device)
    weights_N2 /= weights_N2.sum(1, keepdim=True)
    work_NV = student_NV.clone()

    def ours() -> Outcome:
        found = ops.mixture_kd(work_NV, teachers, weights_N2 / tokens, out=work_NV)
        return Outcome(found.total, (work_NV,))

    def divergence(logits_CV: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        others = [logits_NV[rows].to(dtype) for logits_NV in teachers]
        return reference.mixture_divergence(logits_CV, others, (0, 0), weights_N2[rows].to(dtype))

    def eager(logits_NV: Tensor) -> Tensor:
        return divergence(logits_NV, slice(None), torch.float32).mean()

    return Case(
        "mixture",
        "two teachers bf16",
        {"N": tokens, "V": columns},
        {OURS: ours} | peers.logits_peers(student_NV, eager, compiled=compiled),
        stream(tokens * columns * 8, reads=2, device=device),
        through_logits(student_NV, partial(divergence, dtype=torch.float64)),
        restore=partial(work_NV.copy_, student_NV),
    )


def vocab_parallel(
    tokens: int, columns: int, kind: str, kept: int, device: torch.device, *, compiled: bool
) -> Case:
    """The row passes over a shard that is the whole vocabulary of one rank, bf16, without labels.

    What the ranks say to each other in between is left out. The floor reads the logits once, as
    that of the dense loss; the passes read them twice, three times for the JSD.
    """
    del kept
    student_NV, teacher_NV = (
        random_logits(tokens, columns, torch.bfloat16, device) for _ in range(2)
    )
    rows = row_functions("vocab_parallel", student_NV)
    weight_N = torch.full((tokens,), 1 / tokens, device=device)
    given = (student_NV, teacher_NV)
    vectors = (weight_N, None, None)  # no reverse part, no labels

    def ours() -> Outcome:
        parts_N8 = rows.statistics_rows(*given, *vectors, kind=kind, temperature=1.0)
        parts_PN8, sums_N2 = parts_N8[None], None
        options = {"kind": kind, "temperature": 1.0, "beta": 0.5}
        if kind == "jsd":
            sums_N2 = rows.divergence_rows(*given, parts_PN8, *vectors, **options)
        grad_NV = torch.empty_like(student_NV)
        divergence_N, _ = rows.gradient_rows(
            *given, parts_PN8, sums_N2, None, *vectors, grad_NR=grad_NV, **options
        )
        return Outcome(divergence_N @ weight_N, (grad_NV,))

    return Case(
        "vocab_parallel",
        f"{kind} bf16, one rank",
        {"N": tokens, "V": columns},
        {OURS: ours} | peers.dense_peers(student_NV, teacher_NV, kind, compiled=compiled),
        stream(tokens * columns * 6, reads=2, device=device),
        through_logits(student_NV, partial(_dense_per_token, teacher_NV, kind)),
    )


def random_logits(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of a standard deviation of 3."""
    return torch.randn(tokens, columns, dtype=dtype, device=device).mul_(3.0)


def kept_of(teacher_NV: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and tail of a top-k teacher."""
    total_N1 = teacher_NV.logsumexp(1, keepdim=True)
    values_NK, ids_NK = teacher_NV.topk(kept, 1)
    tail_N = teacher_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(1) - total_N1[:, 0]
    return ids_NK.int(), values_NK - total_N1, tail_N


def topk_per_token(
    teacher: tuple[Tensor, Tensor, Tensor], logits_CV: Tensor, rows: slice
) -> Tensor:
    """The divergence from a top-k teacher, of a slice of the tokens."""
    ids_NK, logprobs_NK, tail_N = teacher
    return reference.topk_divergence(
        logits_CV, ids_NK[rows].long(), logprobs_NK[rows].double(), tail_N[rows].double()
    )


def _dense_per_token(teacher_NV: Tensor, kind: str, logits_CV: Tensor, rows: slice) -> Tensor:
    return reference.divergence(logits_CV, teacher_NV[rows].double(), kind)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
