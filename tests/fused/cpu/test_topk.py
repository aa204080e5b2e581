"""The CPU's top-k row function against the references' autograd in float64."""

import math

import pytest
import torch

from dskd.fused.cpu import chunks
from dskd.fused.cpu.topk import topk_rows
from dskd.fused.reference import divergence
from tests.fused.expected import PLAIN as SAME
from tests.fused.expected import agree, poisoned
from tests.fused.expected import kept as kept_of
from tests.fused.expected import topk_expected as expected
from tests.fused.plain_losses import MODES

FP64, FP32 = (torch.float64, 1e-10), (torch.float32, 1e-5)


def kept(teacher, k, temperature, mode="tail"):
    """What a teacher's K largest logits say at a temperature: ids, log-probabilities, tail."""
    wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    ids, values, tail = kept_of(teacher, k, temperature, wide)
    return [ids, values, tail if mode == "tail" else None]


def ours(s, signal, labels, w, lw, mode, temperature, student_map=SAME, grad=None):
    how = {"mode": mode, "temperature": temperature, "student_map": student_map}
    return topk_rows(s, *signal, labels, w, None if labels is None else lw, **how, grad_NV=grad)


def make(n, v, dtype=torch.float64, labelled=True):
    s, t = (torch.randn(n, v) * 2).to(dtype), (torch.randn(n, v) * 2).to(dtype)
    weights = torch.rand(2, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return s, t, torch.randint(0, v, (n,)) if labelled else None, *(weights + 0.1)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("k", [1, 6, 23])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, k, labelled, dtype, tolerance):
    for temperature in (1.0, 2.0, 0.7):
        s, t, labels, w, lw = make(5, 23, dtype, labelled)
        signal = kept(t, k, temperature, mode)
        if labelled:
            labels[0], labels[1] = signal[0][0, 0], t[1].argmin()
        want = expected(s, signal, labels, w, lw, mode, temperature)
        signal[0] = signal[0].int()
        grad = poisoned(s)
        got = ours(s.clone(), signal, labels, w, lw, mode, temperature, grad=grad)
        agree(got, grad, want, tolerance)
        alone = ours(s.clone(), signal, labels, w, lw, mode, temperature)
        torch.testing.assert_close(alone[0], got[0], rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("mode", MODES)
def test_unused_slots(mode, dtype, tolerance):
    """Padding at the end, in between, a row without any slot, the token 0 kept and dropped."""
    s, t, labels, w, lw = make(4, 17, dtype)
    t[0, 0], t[1, 0], t[2, 0] = 9.0, -9.0, 9.0
    ids, values, tail = signal = kept(t, 5, 2.0, mode)
    for row, slots in ((0, [3, 4]), (1, [1, 3]), (3, [0, 1, 2, 3, 4])):
        ids[row, slots] = -1
        if tail is not None:
            tail[row] = values[row, slots].logsumexp(0).logaddexp(tail[row])
        values[row, slots] = -math.inf
    want = expected(s, signal, labels, w, lw, mode, 2.0)
    assert want[0][3].abs() < 1e-6
    grad = poisoned(s)
    got = ours(s, signal, labels, w, lw, mode, 2.0, grad=grad)
    assert got[0][3] == 0
    agree(got, grad, want, tolerance)


@pytest.mark.parametrize("student_map", [(0.5, 0.0), (1.3, 4.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("mode", MODES)
def test_maps_and_masked_logits(mode, dtype, tolerance, student_map):
    s, t, labels, w, lw = make(4, 19, dtype)
    t[:, 5:8], s[:, 5:8] = -math.inf, -math.inf
    labels[:] = 1
    signal = kept(t, 4, 2.0, mode)
    want = expected(s, signal, labels, w, lw, mode, 2.0, student_map)
    agree(ours(s, signal, labels, w, lw, mode, 2.0, student_map, s), s, want, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_rows(mode, dtype, tolerance):
    """Nothing left for the others, nothing left for the kept, offsets, kept logits at -1e4."""
    s, t, labels, w, lw = make(5, 21, dtype)
    signal = kept(t, 3, 2.0, mode)
    ids = signal[0]
    s[0, ids[0]] += 300.0
    s[1, ids[1]] -= 300.0
    s[2] += 4096.0
    s[3, ids[3, 0]], s[3, ids[3, 1]] = 1e4, -1e4
    labels[:4] = ids[:4, 0]
    want = expected(s, signal, labels, w, lw, mode, 2.0)
    grad = poisoned(s)
    agree(ours(s, signal, labels, w, lw, mode, 2.0, grad=grad), grad, want, tolerance)


def test_all_kept_is_the_dense_divergence():
    s, t, _, w, _ = make(3, 11)
    want = divergence(s, t, temperature=2.0)
    for mode in MODES:
        loss, _ = ours(s.clone(), kept(t, 11, 2.0, mode), None, w, None, mode, 2.0)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)


def test_the_tail_is_no_difference_to_one():
    """The teacher's and the student's tails are 1e-9 and 2e-9 of the mass: fp32 still sees them."""
    s, t = torch.zeros(1, 4), torch.zeros(1, 4)
    s[0, 0], t[0, 0] = math.log(3 / 2e-9), math.log(3 / 1e-9)
    one, grad = torch.ones(1), torch.empty(1, 4)
    ours(s, kept(t, 1, 1.0), None, one, None, "tail", 1.0, grad=grad)
    torch.testing.assert_close(grad[0, 1:], torch.full((3,), 1e-9 / 3), rtol=1e-4, atol=0)


def test_an_infinite_divergence_has_a_finite_gradient():
    s, t, labels, w, lw = make(2, 9, torch.float32)
    signal = kept(t, 3, 2.0)
    s[1, signal[0][1, 1]] = -math.inf
    labels[1] = signal[0][1, 0]
    want = expected(s, signal, labels, w, lw, "tail", 2.0)
    assert want[0][1] == math.inf
    grad = poisoned(s)
    agree(ours(s, signal, labels, w, lw, "tail", 2.0, grad=grad), grad, want, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_weight_are_not_looked_at(mode, monkeypatch):
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda *_: 3)
    s, t, labels, w, lw = make(10, 13)
    dead = torch.tensor([0, 2, 5, 6, 9])
    w[dead], lw[dead] = 0.0, 0.0
    w[3], lw[4], labels[4] = 0.0, 0.0, -100
    signal = kept(t, 4, 2.0, mode)
    want = expected(s, signal, labels, w, lw, mode, 2.0)
    s[dead], labels[dead] = math.nan, -100
    signal[1][3] = math.nan  # only the label of this row counts
    agree(ours(s, signal, labels, w, lw, mode, 2.0, grad=s), s, want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_into_a_strided_gradient(dtype):
    s, t, labels, w, lw = make(4, 31, dtype)
    signal = kept(t.float(), 5, 2.0)
    want = expected(s, signal, labels, w, lw, "tail", 2.0)
    room = torch.full((4, 40), math.nan, dtype=dtype)
    got = ours(s.clone(), signal, labels, w, lw, "tail", 2.0, grad=room[:, 2:33])
    for found, true in zip(got, want[:2], strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)
    exact = torch.finfo(dtype).eps
    torch.testing.assert_close(room[:, 2:33].double(), want[2], rtol=exact, atol=1e-5)
    assert room[:, :2].isnan().all() and room[:, 33:].isnan().all()
    assert ours(s[:0], [x[:0] for x in signal], None, w[:0], None, "tail", 2.0)[0].shape == (0,)
