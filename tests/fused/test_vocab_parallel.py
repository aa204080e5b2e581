"""The vocabulary spread over gloo ranks against the whole one, and against DeepSpeed."""

import math
from contextlib import nullcontext
from importlib import import_module
from itertools import accumulate
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from dskd.fused.arguments import KINDS
from dskd.fused.backend import triton_everywhere
from dskd.fused.vocab_parallel import vocab_parallel_kd
from tests.fused.expected import dense_expected
from tests.ranks import run_ranks

N, BETA = 5, 0.3
LABELS = torch.tensor([3, -100, 40, 69, 12])
WEIGHT = torch.tensor([0.7, 1.0, 0.0, 1.3, 0.4], dtype=torch.float64)
REVERSE = torch.tensor([0.5, 1.0, 0.0, 0.0, 1.1], dtype=torch.float64)
LABEL_WEIGHT = torch.tensor([0.6, 1.0, 0.9, 0.0, 0.3], dtype=torch.float64)
SUMMED = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def logits(seed, columns=70):
    """Row 1 is ignored, row 2 has a label only, row 4 has masked columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, columns, generator=generator, dtype=torch.float64) * 4
    rows[0] -= 400
    rows[1] = math.nan
    rows[4, 20:40] = -math.inf
    return rows


def whole(student, teacher, kind, temperature, labelled):
    """Total, divergence, label loss and gradient from the references; rows of weight 0 left out."""
    weight, reverse, label_weight = (w * (LABELS >= 0) for w in (WEIGHT, REVERSE, LABEL_WEIGHT))
    vectors = weight, reverse if kind == "mixed" else None, label_weight
    labels = LABELS if labelled else None
    divergence_N, label_N, grad_NV = dense_expected(
        student, teacher, labels, *vectors, kind, BETA, temperature
    )
    total = divergence_N.sum() if kind == "mixed" else weight @ divergence_N
    total = total + label_weight @ label_N if labelled else total
    label_N = label_N if labelled else torch.empty(0, dtype=torch.float64)
    return total, divergence_N[[0, 3, 4]], label_N, grad_NV


def on_rank(rank, widths, teacher_columns, cases, dtype, triton):
    """This rank's total, divergence, label loss and gradient of three times the total, per case."""
    bounds = [0, *accumulate(widths)]
    first, beyond = bounds[rank], bounds[rank + 1]
    found = []
    kernels = import_module("dskd.kernels.vocab_parallel")
    kernels.gradient_rows = launches = Mock(wraps=kernels.gradient_rows)  # in a process of its own
    for kind, temperature, labelled in cases:
        student = logits(0)[:, first:beyond].to(dtype).requires_grad_()
        teacher = logits(1)[:, first : max(first, min(beyond, teacher_columns))].to(dtype)
        with triton_everywhere() if triton else nullcontext():
            how = {"kind": kind, "beta": BETA, "temperature": temperature, "weight": WEIGHT}
            how["reverse_weight"] = REVERSE if kind == "mixed" else None
            how["label_weight"] = LABEL_WEIGHT if labelled else 0.0
            result = vocab_parallel_kd(student, teacher, LABELS, group=dist.group.WORLD, **how)
            (result.total * 3).backward()
        assert not result.divergence_N.requires_grad
        assert not result.label_N.requires_grad
        found.append((*(each.detach().numpy() for each in result), student.grad.numpy()))
    assert launches.call_count == (len(cases) if triton else 0)
    return found


def compare(widths, teacher_columns, cases, dtype, tolerance, triton=False):
    ranks = run_ranks(
        on_rank, widths, teacher_columns, cases, dtype, triton, world=len(widths), timeout=200
    )
    for case, *found in zip(cases, *ranks, strict=True):
        results = [[torch.from_numpy(each) for each in one] for one in found]
        for result in results[1:]:
            for one, other in zip(result[:3], results[0][:3], strict=True):
                assert torch.equal(one, other), f"{case}: the ranks do not agree"
        total_and_losses = results[0][:3]
        total_and_losses[1] = total_and_losses[1][[0, 3, 4]]
        assert results[0][1][1] == 0
        together = torch.cat([result[3] for result in results], 1)
        student, teacher = logits(0).to(dtype), logits(1)[:, :teacher_columns].to(dtype)
        *truth, grad = whole(student, teacher, *case)
        for one, true in zip((*total_and_losses, together), (*truth, 3 * grad), strict=True):
            assert one.isfinite().all(), case
            assert one.shape == true.shape, case
            if one.numel():
                error = ((one - true).abs() / (1 + true.abs())).max().item()
                assert error < tolerance, f"{case}: {error}"


EVERY = [
    (kind, temperature, labelled)
    for kind in KINDS
    for temperature, labelled in ((1.0, True), (2.0, True), (0.7, False))
]


def test_ragged_shards_equal_the_whole():
    """All kinds in float64; one rank has no columns."""
    compare((30, 0, 40), 70, EVERY, torch.float64, 1e-10)


def test_a_smaller_teacher():
    """The teacher's vocabulary ends within a rank, or before it."""
    cases = [case for case in EVERY if case[0] not in ("reverse_kl", "mixed")]
    compare((45, 25), 61, cases, torch.float64, 1e-10)
    compare((45, 25), 45, cases[::4], torch.float64, 1e-10)


def test_kernels_on_ranks():
    """Triton in its interpreter; the second rank has no column of the teacher."""
    cases = [("forward_kl", 2.0, True), ("jsd", 1.0, True)]
    compare((45, 25), 45, cases, torch.float32, 4e-5, triton=True)


def _calls(rank, kinds):
    """What goes over the wire: (operation, bytes of this rank) of each call."""
    seen = []

    def watched(name, operation, position):
        def call(*args, **kwargs):
            seen.append((name, args[position].numel() * args[position].element_size()))
            return operation(*args, **kwargs)

        return call

    dist.all_gather_into_tensor = watched("gather", dist.all_gather_into_tensor, 1)
    dist.all_reduce = watched("sum", dist.all_reduce, 0)
    student = torch.randn(6, 9)
    found = {}
    for kind in kinds:
        for label_weight in (0.0, 1.0):
            seen.clear()
            how = {"kind": kind, "label_weight": label_weight, "group": dist.group.WORLD}
            how["reverse_weight"] = 1.0 if kind == "mixed" else None
            vocab_parallel_kd(student, student + 1, torch.arange(6), **how)
            found[kind, label_weight] = list(seen)
    return found


def test_how_often_the_ranks_talk():
    for found in run_ranks(_calls, KINDS):
        for (kind, label_weight), calls in found.items():
            expected = [("gather", 8)] if label_weight else []
            expected += [("gather", 6 * 8 * 4)]
            expected += [("sum", 6 * 2 * 4)] if kind in SUMMED else []
            assert calls == expected, kind


def _peer(rank):
    """DeepSpeed's and our losses and gradients: forward KL, reverse KL, cross entropy."""
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy
    from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_kl_div

    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    whole_student, whole_teacher = torch.randn(2, 7, 64, generator=generator) * 3
    shard = slice(32 * rank, 32 * (rank + 1))
    teacher = whole_teacher[:, shard].contiguous()
    labels = torch.tensor([0, 63, -100, 31, 32, 5, 40])
    pairs = []
    for kind in ("forward_kl", "reverse_kl", "label"):
        theirs, ours = (whole_student[:, shard].clone().requires_grad_() for _ in range(2))
        if kind == "label":
            how = {"tp_group": group, "reduction": "none"}
            per_token = vocab_parallel_cross_entropy(theirs, labels, **how)
            how = {"group": group, "weight": 0.0, "label_weight": 1.0}
            result = vocab_parallel_kd(ours, teacher, labels, **how)
            mine = result.label_N
        else:
            per_token = vocab_parallel_kl_div(theirs, teacher, kind == "reverse_kl", group)
            result = vocab_parallel_kd(ours, teacher, group=group, kind=kind)
            mine = result.divergence_N
        per_token.sum().backward()
        result.total.backward()
        pairs += [(kind, per_token.detach(), mine), (f"{kind} gradient", theirs.grad, ours.grad)]
    return [(name, one.numpy(), other.numpy()) for name, one, other in pairs]


def test_the_same_as_deepspeed():
    for found in run_ranks(_peer):
        for name, theirs, ours in found:
            error, bound = abs(theirs - ours).max(), 8e-6 * max(1.0, abs(theirs).max())
            assert error < bound, f"{name}: {error}"


def _edges(rank):
    """Refusals, no rows, no gradient wanted, a second backward pass."""
    group = dist.group.WORLD
    logits_NR = torch.randn(4, 6, dtype=torch.float64)
    labels_N = torch.tensor([0, 1, 12, 3])
    for message, arguments, settings in (
        ("labels: 12 at", (logits_NR, logits_NR, labels_N), {"label_weight": 1.0}),
        ("teacher: has 7 columns", (logits_NR, torch.randn(4, 7)), {}),
        ("teacher: has 3 rows", (logits_NR, logits_NR[:3]), {}),
        ("kind: reverse_kl is infinite", (logits_NR, logits_NR[:, :5]), {"kind": "reverse_kl"}),
        ("student: must have two axes", (logits_NR[0], logits_NR), {}),
    ):
        with pytest.raises(ValueError, match=message):
            vocab_parallel_kd(*arguments, group=group, **settings)
    none = vocab_parallel_kd(logits_NR[:0], logits_NR[:0], group=group, kind="jsd")
    assert none.total == 0
    assert none.divergence_N.shape == (0,)
    student = logits_NR.clone().requires_grad_()
    with torch.no_grad():
        without = vocab_parallel_kd(student, logits_NR * 2, group=group)
    assert not without.total.requires_grad
    result = vocab_parallel_kd(student, logits_NR * 2, group=group)
    assert torch.equal(result.total, without.total)
    result.total.backward(retain_graph=True)
    once = student.grad.clone()
    result.total.backward()
    assert torch.equal(student.grad, 2 * once)
    half = logits_NR.bfloat16().requires_grad_()
    vocab_parallel_kd(half, logits_NR.bfloat16() * 2, group=group).total.backward()
    assert half.grad.dtype == torch.bfloat16
    error = (half.grad.double() - once).abs().max().item()
    assert 0 < error < 0.02 * once.abs().max().item(), error
    with pytest.raises(RuntimeError, match="create_graph"):
        again = vocab_parallel_kd(student, logits_NR * 2, group=group)
        torch.autograd.grad(again.total, student, create_graph=True)


def test_edges():
    run_ranks(_edges)
