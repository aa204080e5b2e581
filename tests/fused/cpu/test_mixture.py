"""The CPU's several-teachers row function against the reference's autograd in float64."""

import math

import pytest
import torch

from dskd.fused.cpu import chunks
from dskd.fused.cpu.mixture import mixture_rows
from dskd.fused.reference import divergence
from tests.fused.expected import PLAIN as SAME
from tests.fused.expected import mixture_expected as expected

FP64, FP32 = (torch.float64, 1e-10), (torch.float32, 1e-5)
RANGES = {
    "shared": [(0, 23)] * 3,
    "disjoint": [(0, 8), (8, 5), (15, 8)],
    "mixed": [(0, 23), (4, 9)],
}


def make(n, v, ranges, dtype=torch.float64):
    s = (torch.randn(n, v) * 2).to(dtype)
    teachers = [(torch.randn(n, columns) * 2).to(dtype) for _, columns in ranges]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return s, teachers, [first for first, _ in ranges], torch.rand(n, len(ranges), dtype=wide) + 0.1


def check(arguments, want, tolerance, temperature, student_map=SAME, grad=None):
    grad = torch.full_like(arguments[0], math.nan) if grad is None else grad
    loss = mixture_rows(*arguments, temperature=temperature, student_map=student_map, grad_NV=grad)
    torch.testing.assert_close(loss.double(), want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), want[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("student_map", [SAME, (0.5, 0.0), (1.3, 4.0)])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_ranges(ranges, student_map, dtype, tolerance):
    for temperature in (1.0, 2.0):
        arguments = make(5, 23, ranges, dtype)
        arguments[3][1, 0] = 0.0
        want = expected(*arguments, temperature, student_map)
        arguments[1][0][1] = math.nan  # the teacher has no weight there
        check(arguments, want, tolerance, temperature, student_map)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
def test_masked_and_extreme_logits(dtype, tolerance):
    arguments = make(4, 23, RANGES["mixed"], dtype)
    s, (first, second), *_ = arguments
    s[:, 2:4], first[:, 2:4], second[:, 1] = -math.inf, -math.inf, -math.inf
    s[1, 7], first[1, 9], second[1, 0] = 1e4, 1e4, -1e4
    s[2] += 4096.0
    check(arguments, expected(*arguments, 2.0), tolerance, 2.0)


def test_mass_on_a_masked_column_is_infinite():
    arguments = make(2, 9, [(0, 9), (3, 4)], torch.float32)
    arguments[0][1, 5] = -math.inf
    want = expected(*arguments, 2.0)
    assert want[0].isinf().tolist() == [False, True]
    check(arguments, want, 1e-5, 2.0)


def test_rows_without_weight_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda *_: 3)
    arguments = make(10, 23, RANGES["shared"])
    s, teachers, _, weights = arguments
    dead = torch.tensor([0, 2, 5, 6, 9])
    weights[dead] = 0.0
    want = expected(*arguments, 2.0)
    assert not want[0][dead].any()
    for logits in (s, *teachers):
        logits[dead] = math.nan
    check(arguments, want, 1e-10, 2.0, grad=s)


def test_one_teacher_is_the_dense_divergence():
    arguments = make(3, 12, [(0, 12)])
    s, (teacher,), _, weights = arguments
    dense = divergence(s, teacher, temperature=2.0)
    check(arguments, (dense, expected(*arguments, 2.0)[1]), 1e-12, 2.0)
    loss = mixture_rows(*arguments, temperature=2.0, student_map=SAME, grad_NV=None)
    torch.testing.assert_close(loss, dense, rtol=1e-12, atol=0)
    weights *= 3  # the divergence is unweighted
    again = mixture_rows(*arguments, temperature=2.0, student_map=SAME, grad_NV=None)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_into_fp32(dtype):
    arguments = make(4, 23, RANGES["mixed"], dtype)
    want = expected(*arguments, 2.0)
    check(arguments, want, 1e-5, 2.0, grad=torch.full((4, 23), math.nan))
    empty = [arguments[0][:0], [t[:0] for t in arguments[1]], arguments[2], arguments[3][:0]]
    assert mixture_rows(*empty, temperature=2.0, student_map=SAME, grad_NV=None).shape == (0,)
