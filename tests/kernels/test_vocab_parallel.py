"""The kernels of a vocabulary shard, three shards in one process, against float64."""

import math
from itertools import pairwise

import pytest
import torch

from dskd.kernels import vocab_parallel
from tests.fused.expected import dense_expected

BETA = 0.3
CUTS = (0, 300, 300, 1003)
"""Shards of 300, 0 and 703 columns."""
LABELS = torch.tensor([7, -100, -100, 900])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}
"""Of a gradient, relative to its row's largest number. fp32: logits of 100 leave a softmax five
digits. bf16: the interpreter cuts off where a GPU rounds."""
TILTED = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def logits(dtype, columns, seed, device):
    """Rows: far below 0; NaN, to be ignored; large; the first shard masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, columns, generator=generator, dtype=torch.float64) * 3
    rows[0] -= 150
    rows[1] = math.nan
    rows[2] *= 30
    rows[3, :300] = -math.inf
    rows[3, 400::7] = -math.inf
    return rows.to(dtype).to(device)


def weights(kind, labelled, device):
    """Of the divergence, its reverse part, the label; row 1 does not count, nor row 2's label."""
    divergence = torch.tensor([0.7, 0.0, 1.3, 0.4])
    reverse = torch.tensor([0.5, 0.0, 0.0, 1.1]) if kind == "mixed" else None
    label = torch.tensor([0.6, 0.0, 0.0, 0.9]) if labelled else None
    return [None if each is None else each.to(device) for each in (divergence, reverse, label)]


def same(one, other):
    """To the last bit; NaN is NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def sharded(student, teacher, labels, vectors, kind, temperature, *, gradient=True):
    """What the ranks would do, one after the other: losses, and the gradient in one piece."""
    settings = {"kind": kind, "temperature": temperature}
    parts, columns, shards = [], [], []
    for first, beyond in pairwise(CUTS):
        width = min(beyond, teacher.shape[1]) - min(first, teacher.shape[1])
        shard = student[:, first:beyond].clone(), teacher[:, first : first + width].clone()
        part = vocab_parallel.statistics_rows(*shard, *vectors, **settings)
        column = None
        if labels is not None:
            column = labels - first
            here = (vectors[2] != 0) & (column >= 0) & (column < beyond - first)
            column = column.where(here, -1)
            for row in here.nonzero().flatten().tolist():
                part[row, 7] = shard[0][row, column[row]]
        parts.append(part)
        columns.append(column)
        shards.append(shard)
    parts, sums = torch.stack(parts), None
    if kind in TILTED:
        sums = sum(
            vocab_parallel.divergence_rows(*shard, parts, *vectors, beta=BETA, **settings)
            for shard in shards
        )
    gradients, found = [], []
    for shard, column in zip(shards, columns, strict=True):
        grad = torch.full_like(shard[0], math.nan) if gradient else None
        found.append(
            vocab_parallel.gradient_rows(
                *shard, parts, sums, column, *vectors, beta=BETA, grad_NR=grad, **settings
            )
        )
        gradients.append(grad)
    for divergence, label in found[1:]:
        assert same(divergence, found[0][0])
        assert label is None or same(label, found[0][1])
    return *found[0], torch.cat(gradients, 1) if gradient else None


def whole(student, teacher, labels, vectors, kind, temperature):
    return dense_expected(student, teacher, labels, *vectors, kind, BETA, temperature)


def check(student, teacher, labels, vectors, kind, temperature):
    arguments = (student, teacher, labels, vectors, kind, temperature)
    divergence, label, grad = sharded(*arguments)
    true_divergence, true_label, true_grad = whole(*arguments)
    torch.testing.assert_close(divergence.double(), true_divergence, rtol=2e-5, atol=3e-6)
    if labels is not None:
        torch.testing.assert_close(label.double(), true_label, rtol=3e-6, atol=3e-6)
    for row, (one, true) in enumerate(zip(grad.double(), true_grad, strict=True)):
        largest = true.abs().max() + (0.3 if row == 2 else 0.0)  # that row's may cancel to nothing
        error, bound = (one - true).abs().max(), TOLERANCE[student.dtype] * largest
        assert error <= bound, f"gradient of row {row}: {error} > {bound}"


@pytest.mark.parametrize(
    ("kind", "temperature", "labelled", "dtype", "teacher_columns"),
    [
        ("forward_kl", 1.0, True, torch.float32, 1003),
        ("forward_kl", 2.0, True, torch.bfloat16, 900),
        ("reverse_kl", 2.0, True, torch.float32, 1003),
        ("mixed", 1.5, True, torch.float16, 1003),
        ("jsd", 1.0, True, torch.bfloat16, 310),
        ("skew_forward_kl", 3.0, True, torch.float32, 901),
        ("skew_reverse_kl", 1.0, False, torch.float32, 1003),
        ("total_variation", 2.0, False, torch.float16, 1003),
    ],
)
def test_shards_equal_the_whole(kind, temperature, labelled, dtype, teacher_columns, device):
    student = logits(dtype, 1003, 0, device)
    teacher = logits(dtype, 1003, 1, device)[:, :teacher_columns]
    labels = LABELS.to(device) if labelled else None
    vectors = weights(kind, labelled, device)
    check(student, teacher, labels, vectors, kind, temperature)


def test_even_rows_and_strides(device):
    """Shards whose rows start on 16 bytes, in a wider buffer."""
    student, teacher = torch.randn(2, 2, 1024, device=device)
    vectors = weights("forward_kl", True, device)
    vectors = [None if each is None else each[[0, 3]].clone() for each in vectors]
    settings = {"kind": "forward_kl", "temperature": 1.0}
    shards = [(student[:, :512], teacher[:, :512]), (student[:, 512:], teacher[:, 512:])]
    parts = [vocab_parallel.statistics_rows(*shard, *vectors, **settings) for shard in shards]
    labels = torch.tensor([511, 512], device=device)
    parts[0][0, 7], parts[1][1, 7] = student[0, 511], student[1, 512]
    columns = torch.tensor([[511, -1], [-1, 0]], device=device)
    grad = torch.full_like(student, math.nan)
    for number, shard in enumerate(shards):
        settings["grad_NR"] = grad[:, 512 * number : 512 * (number + 1)]
        divergence, label = vocab_parallel.gradient_rows(
            *shard, torch.stack(parts), None, columns[number], *vectors, beta=BETA, **settings
        )
    truth = whole(student, teacher, labels, vectors, "forward_kl", 1.0)
    for one, true in zip((divergence, label, grad), truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=3e-6, atol=2e-6)


def test_a_row_without_a_softmax_and_no_gradient(device):
    """Nothing but -inf: losses NaN, gradient 0, other rows as ever; losses are the same without."""
    student, teacher = (logits(torch.float32, 1003, seed, device) for seed in (0, 1))
    student[0] = -math.inf
    teacher[3] = -math.inf
    vectors = weights("jsd", True, device)
    arguments = (student, teacher, LABELS.to(device), vectors, "jsd", 1.0)
    divergence, label, grad = sharded(*arguments)
    assert divergence.isnan().tolist() == [True, False, False, True]
    assert label.isnan().tolist() == [True, False, False, False]
    assert not grad[:2].any()
    true = whole(student[2:3], teacher[2:3], None, [vectors[0][2:3], None, None], "jsd", 1.0)
    torch.testing.assert_close(grad[2:3].double(), true[2], rtol=1e-5, atol=1e-6)
    # the label of row 3 needs no teacher
    q = student[3].double().softmax(0)
    q[900] -= 1
    torch.testing.assert_close(grad[3].double(), 0.9 * q, rtol=1e-5, atol=1e-7, check_dtype=False)
    again = sharded(*arguments, gradient=False)
    assert same(again[0], divergence)
    assert same(again[1], label)


def test_infinite_divergence_has_a_finite_gradient(device):
    student, teacher = torch.randn(2, 4, 1003, device=device)
    student[:, 5] = -math.inf
    vectors = [torch.ones(4, device=device), None, None]
    divergence, _, grad = sharded(student, teacher, None, vectors, "forward_kl", 1.0)
    assert (divergence == math.inf).all()
    assert grad.isfinite().all()


def test_no_rows(device):
    empty = torch.empty(0, 1003, device=device)
    vectors = [torch.empty(0, device=device), None, None]
    divergence, label, grad = sharded(empty, empty, None, vectors, "jsd", 1.0)
    assert divergence.shape == (0,)
    assert label is None
    assert grad.shape == (0, 1003)
