"""The measured cases: their order, those of logits, and those that go through a head.

A case has inputs, our call, its peers, the floor, and the truth in float64. The loss is a mean over
its tokens, with gradients to the student's logits, or to its hidden states and head.

Shape letters: N tokens, C of them in a chunk, V columns, D and E hidden sizes of student and
teacher, K kept logits, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskd import ops
from dskd.fused import reference
from dskd.fused.backend import row_functions
from launch.bench import peers
from launch.bench.measure import Truth, products, stream, through_head, through_logits
from launch.bench.peers import Head, Outcome, Peer

OURS, FLOOR = "ours", "floor"
KINDS = ("forward_kl", "reverse_kl", "jsd")


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


class Sizes(NamedTuple):
    """What the cases of one vocabulary have in common, and whether peers are compiled as well."""

    tokens: int
    columns: int
    kept: int
    device: torch.device
    compiled: bool

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Random ones [N, V] of a standard deviation of 3."""
        shape = (self.tokens, self.columns)
        return torch.randn(*shape, dtype=dtype, device=self.device).mul_(3.0)

    def kept_teacher(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities and tail of a random top-k teacher."""
        teacher_NV = self.logits(torch.float32)
        total_N1 = teacher_NV.logsumexp(1, keepdim=True)
        values_NK, ids_NK = teacher_NV.topk(self.kept, 1)
        tail_N = teacher_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(1) - total_N1[:, 0]
        return ids_NK.int(), values_NK - total_N1, tail_N


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
                sizes = Sizes(shapes.tokens, columns, shapes.kept, device, place < compiled)
                yield words, partial(_seeded, builder, sizes, *arguments)


def _seeded(builder: Callable[..., Case], sizes: Sizes, *arguments: Any) -> Case:
    torch.manual_seed(0)
    return builder(sizes, *arguments)


# ---- of logits -----------------------------------------------------------------------------------


def dense(sizes: Sizes, kind: str, dtype: torch.dtype) -> Case:
    """Two logits matrices; bf16 in place, fp32 into a new bf16 gradient."""
    tokens, columns, *_ = sizes
    student_NV, teacher_NV = (sizes.logits(dtype) for _ in range(2))
    in_place = dtype == torch.bfloat16
    work_NV = student_NV.clone() if in_place else student_NV

    def ours() -> Outcome:
        grad_NV = work_NV if in_place else torch.empty_like(student_NV, dtype=torch.bfloat16)
        found = ops.dense_kd(work_NV, teacher_NV, kind=kind, weight=1 / tokens, out=grad_NV)
        return Outcome(found.total, (grad_NV,))

    return Case(
        "dense",
        f"{kind} {_short(dtype)}",
        {"N": tokens, "V": columns},
        {OURS: ours} | peers.dense_peers(student_NV, teacher_NV, kind, compiled=sizes.compiled),
        stream(tokens * columns * (2 * dtype.itemsize + 2), reads=2, device=sizes.device),
        through_logits(student_NV, partial(_dense_per_token, teacher_NV, kind)),
        restore=partial(work_NV.copy_, student_NV) if in_place else _nothing,
    )


def label(sizes: Sizes) -> Case:
    """Cross entropy of bf16 logits, in place."""
    tokens, columns, _, device, compiled = sizes
    student_NV = sizes.logits(torch.bfloat16)
    labels_N = torch.randint(columns, (tokens,), device=device)
    work_NV = student_NV.clone()
    ours = partial(_in_place, ops.label_ce, work_NV, labels_N, label_weight=1 / tokens)
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


def topk(sizes: Sizes) -> Case:
    """The tail mode on bf16 logits, in place."""
    tokens, columns, kept, device, compiled = sizes
    student_NV, teacher = sizes.logits(torch.bfloat16), sizes.kept_teacher()
    work_NV = student_NV.clone()
    return Case(
        "topk",
        f"tail bf16, K {kept}",
        {"N": tokens, "V": columns, "K": kept},
        {OURS: partial(_in_place, ops.topk_kd, work_NV, *teacher, weight=1 / tokens)}
        | peers.logits_peers(
            student_NV, lambda x: reference.topk_divergence(x, *teacher).mean(), compiled=compiled
        ),
        stream(tokens * columns * 4, reads=1, device=device),
        through_logits(student_NV, partial(topk_per_token, teacher)),
        restore=partial(work_NV.copy_, student_NV),
    )


def mixture(sizes: Sizes) -> Case:
    """Two teachers of the whole vocabulary, bf16, in place."""
    tokens, columns, _, device, compiled = sizes
    student_NV, *teachers = (sizes.logits(torch.bfloat16) for _ in range(3))
    weights_N2 = torch.rand(tokens, 2, device=device)
    weights_N2 /= weights_N2.sum(1, keepdim=True)
    work_NV = student_NV.clone()
    ours = partial(_in_place, ops.mixture_kd, work_NV, teachers, weights_N2 / tokens)

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


def vocab_parallel(sizes: Sizes, kind: str) -> Case:
    """The row passes over a shard that is the whole vocabulary of one rank, bf16, without labels.

    What the ranks say to each other in between is left out. The floor reads the logits once, as
    that of the dense loss; the passes read them twice, three times for the JSD.
    """
    tokens, columns, _, device, compiled = sizes
    student_NV, teacher_NV = (sizes.logits(torch.bfloat16) for _ in range(2))
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


def _in_place(
    loss: Callable[..., ops.Losses], work_NV: Tensor, *given: Any, **weights: float
) -> Outcome:
    return Outcome(loss(work_NV, *given, out=work_NV, **weights).total, (work_NV,))


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


# ---- through a head ------------------------------------------------------------------------------


def linear(sizes: Sizes, kind: str, hidden: tuple[int, int]) -> Case:
    """Two heads, bf16."""
    head = head_of(sizes, hidden, torch.bfloat16)
    fused = peers.fused_peers(head, kind, compiled=sizes.compiled)
    what = ("linear", f"{kind} bf16, H {hidden[0]}/{hidden[1]}")
    return _linear_case(*what, head, kind, fused, compiled=sizes.compiled)


def linear_on_cpu(tokens: int, columns: int, width: int, *, compiled: bool) -> Case:
    """Two heads of one hidden size, forward KL, fp32."""
    torch.manual_seed(0)
    kind, sizes = "forward_kl", Sizes(tokens, columns, 0, torch.device("cpu"), compiled)
    head = head_of(sizes, (width, width), torch.float32)
    # their default makes one chunk of all 512 tokens; a quarter of the tokens makes four
    chunked = peers.liger_chunked(head, kind, chunk=max(1, tokens // 4), compiled=False)
    what = ("cpu", f"linear {kind} fp32, H {width}")
    return _linear_case(*what, head, kind, chunked, compiled=compiled)


def _linear_case(
    op: str, name: str, head: Head, kind: str, more: dict[str, Peer], *, compiled: bool
) -> Case:
    (tokens, own), (columns, _) = head.hidden_ND.shape, head.weight_VD.shape
    found = peers.linear_peers(head, kind)
    found |= peers.liger_chunked(head, kind, chunk=1024, compiled=False)
    if compiled:
        found |= peers.liger_chunked(head, kind, chunk=1024, compiled=True)
    teacher = ops.LinearTeacher(head.teacher_NE, head.teacher_VE)
    return Case(
        op,
        name,
        {"N": tokens, "V": columns, "D": own, "E": head.teacher_NE.shape[1]},
        {OURS: partial(_linear, head, teacher, kind=kind)} | found | more,
        products(head),
        through_head(head, partial(_linear_per_token, head, kind)),
    )


def linear_topk(sizes: Sizes, hidden: tuple[int, int]) -> Case:
    """The student's head against a top-k teacher, bf16."""
    tokens, columns, kept, *_ = sizes
    head, teacher = head_of(sizes, hidden, torch.bfloat16), sizes.kept_teacher()

    def eager(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return reference.topk_divergence((hidden_ND @ weight_VD.t()).float(), *teacher).mean()

    return Case(
        "linear_topk",
        f"tail bf16, K {kept}, H {hidden[0]}",
        {"N": tokens, "V": columns, "D": hidden[0], "K": kept},
        {
            OURS: partial(_linear, head, ops.TopKTeacher(*teacher[:2], {1.0: teacher[2]})),
            "torch eager": partial(peers.differentiate, eager, head.hidden_ND, head.weight_VD),
        },
        products(Head(head.hidden_ND, head.weight_VD, None, None, head.labels_N)),
        through_head(head, partial(topk_per_token, teacher)),
    )


def head_of(sizes: Sizes, hidden: tuple[int, int], dtype: torch.dtype) -> Head:
    """Random heads whose logits have a standard deviation of 2."""
    tokens, columns, _, device, _ = sizes
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
