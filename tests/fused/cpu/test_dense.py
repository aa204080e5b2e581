"""The CPU's dense and label row functions against the references' autograd in float64."""

import math

import pytest
import torch

from dskd.fused.cpu import chunks, dense
from dskd.fused.reference import cross_entropy, mapped
from tests.fused.expected import PLAIN as SAME
from tests.fused.expected import agree, poisoned
from tests.fused.expected import dense_expected as expected

KINDS = [*dense.CLOSED_FORMS, "mixed"]
FP64, FP32 = (torch.float64, 1e-10), (torch.float32, 1e-5)


def ours(s, t, labels, w, r, lw, kind, beta=0.3, temperature=1.0, maps=(SAME, SAME), grad=None):
    heat = {"kind": kind, "beta": beta, "temperature": temperature}
    both = {"student_map": maps[0], "teacher_map": maps[1]}
    lw = None if labels is None else lw
    return dense.dense_rows(s, t, labels, w, r, lw, **heat, **both, grad_NV=grad)


def make(n, v, w=None, dtype=torch.float64, kind="forward_kl", labelled=True):
    """Logits of both, labels and the three weights."""
    s, t = torch.randn(n, v) * 2, torch.randn(n, w or v) * 2
    labels = torch.randint(0, v, (n,)) if labelled else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(3, n, dtype=wide) + 0.1
    reverse = weights[1] if kind == "mixed" else None
    return s.to(dtype), t.to(dtype), labels, weights[0], reverse, weights[2]


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, labelled, temperature, dtype, tolerance):
    width = 37 if kind in ("reverse_kl", "mixed") else 30
    arguments = make(5, 37, width, dtype, kind, labelled)
    grad = poisoned(arguments[0])
    got = ours(*arguments, kind, temperature=temperature, grad=grad)
    assert got[0].dtype == dtype
    agree(got, grad, expected(*arguments, kind, temperature=temperature), tolerance)
    alone = ours(*arguments, kind, temperature=temperature)
    torch.testing.assert_close(alone[0], got[0], rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("maps", [((0.5, 0.0), (1.7, 0.0)), ((1.3, 4.0), SAME), (SAME, (0.8, 3.0))])
@pytest.mark.parametrize("kind", KINDS)
def test_maps(kind, maps, dtype, tolerance):
    for offset in (0.0, 60.0):  # the second is out of the range of plain exponentials
        arguments = make(4, 23, None, dtype, kind)
        arguments[1].add_(offset)
        grad = poisoned(arguments[0])
        got = ours(*arguments, kind, temperature=2.0, maps=maps, grad=grad)
        agree(got, grad, expected(*arguments, kind, temperature=2.0, maps=maps), 3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_in_fp32(kind, dtype):
    arguments = make(4, 50, None, dtype, kind)
    grad = poisoned(arguments[0], torch.float32)
    got = ours(*arguments, kind, temperature=2.0, grad=grad)
    agree(got, grad, expected(*arguments, kind, temperature=2.0), 1e-5)
    inside = arguments[0]
    ours(*arguments, kind, temperature=2.0, grad=inside)
    torch.testing.assert_close(inside, grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "mixed"])
def test_in_place_and_into_strided_bf16(kind):
    wide = torch.randn(6, 64)
    _, t, labels, *weights = make(6, 41, None, torch.float32, kind)
    s = wide[:, 3:44]
    want = expected(s, t, labels, *weights, kind, temperature=2.0)
    room = torch.full((6, 50), math.nan, dtype=torch.bfloat16)
    ours(s, t, labels, *weights, kind, temperature=2.0, grad=room[:, :41])
    torch.testing.assert_close(room[:, :41].double(), want[2], rtol=2**-8, atol=1e-6)
    assert room[:, 41:].isnan().all()
    before = wide.clone()
    got = ours(s, t, labels, *weights, kind, temperature=2.0, grad=s)
    agree(got, s, want, 1e-5)
    torch.testing.assert_close(wide[:, :3], before[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(wide[:, 44:], before[:, 44:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weight_are_not_looked_at(kind, monkeypatch):
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda *_: 3)  # several chunks, some gathered
    s, t, labels, w, r, lw = make(11, 19, None, torch.float64, kind)
    dead = torch.tensor([0, 2, 5, 6, 10])
    for weights in (w, r, lw):
        if weights is not None:
            weights[dead] = 0.0
    w[3], r = 0.0, None if r is None else r.index_fill(0, torch.tensor([3]), 0.0)
    lw[4], labels[4] = 0.0, -100
    want = expected(s, t, labels, w, r, lw, kind, temperature=2.0)
    s[dead], t[dead], labels[dead] = math.nan, math.nan, -100
    t[3] = math.nan  # only the label of this row counts
    grad = poisoned(s)
    agree(ours(s, t, labels, w, r, lw, kind, temperature=2.0, grad=grad), grad, want, 1e-10)
    agree(ours(s, t, labels, w, r, lw, kind, temperature=2.0, grad=s), s, want, 1e-10)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary(kind, dtype, tolerance, softcap):
    """-inf on both sides, and where it leaves the divergence finite, on one."""
    arguments = make(4, 29, None, dtype, kind)
    s, t, labels, *_ = arguments
    s[:, 7:11], t[:, 7:11] = -math.inf, -math.inf
    if kind not in ("reverse_kl", "mixed"):
        t[1:, 3] = -math.inf
    if kind not in ("forward_kl", "mixed"):
        s[2:, 5] = -math.inf
    if kind == "reverse_kl":
        t[2:, 5] = -math.inf
    labels[:] = 1
    maps = ((1.0, softcap), SAME)
    grad = poisoned(s)
    got = ours(*arguments, kind, temperature=2.0, maps=maps, grad=grad)
    agree(got, grad, expected(*arguments, kind, temperature=2.0, maps=maps), tolerance)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mixed"])
def test_an_infinite_divergence_has_a_finite_gradient(kind):
    arguments = make(2, 9, None, torch.float32, kind)
    s, t = arguments[:2]
    (s if kind == "forward_kl" else t)[1, 4] = -math.inf
    grad = poisoned(s)
    loss, _ = ours(*arguments, kind, grad=grad)
    assert loss[0].isfinite()
    assert loss[1] == math.inf
    assert grad.isfinite().all()
    want = expected(*arguments, kind)
    torch.testing.assert_close(grad[:1].double(), want[2][:1], rtol=1e-5, atol=1e-5)
    if kind == "forward_kl":
        torch.testing.assert_close(grad.double(), want[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind):
    """1e4 either way, in one of three rows, and a common offset that costs no digits."""
    for dtype, tolerance in (FP64, FP32):
        arguments = make(3, 31, None, dtype, kind)
        s, t = arguments[:2]
        s[1, :4], t[1, 2:6] = 1e4, 1e4
        s[1, 20:], t[1, 25:] = -1e4, -1e4
        s[2] += 4096.0
        t[2] -= 4096.0
        grad = poisoned(s)
        got = ours(*arguments, kind, temperature=2.0, grad=grad)
        agree(got, grad, expected(*arguments, kind, temperature=2.0), tolerance)


def test_nan_logits_stay_visible():
    s, t, labels, w, r, lw = make(3, 9, None, torch.float32)
    s[1, 2] = math.nan
    grad = torch.zeros_like(s)
    loss, label = ours(s, t, labels, w, r, lw, "forward_kl", grad=grad)
    assert loss.isnan().tolist() == label.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_exactly_nothing(kind):
    s, _, _, w, r, lw = make(3, 501, None, torch.float32, kind)
    grad = poisoned(s)
    loss, _ = ours(s, s.clone(), None, w, r, lw, kind, temperature=2.0, grad=grad)
    exact = kind not in ("jsd", "skew_forward_kl", "skew_reverse_kl")
    assert loss.abs().max() <= (0 if exact else 1e-6)
    assert grad.abs().max() <= 1e-7


def test_closed_forms():
    """Two tokens: everything by hand."""
    s = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # q = 3/4, 1/4
    t = torch.zeros(1, 2, dtype=torch.float64)  # p = 1/2, 1/2
    one = torch.ones(1, dtype=torch.float64)
    forward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    jsd = sum(0.25 * math.log(0.5 / m) for m in (0.625, 0.375))
    jsd += 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
    values = {"forward_kl": forward, "reverse_kl": reverse, "jsd": jsd, "total_variation": 0.25}
    for kind, value in values.items():
        assert ours(s, t, None, one, None, one, kind, beta=0.5)[0].item() == pytest.approx(value)
    grad = poisoned(s)
    _, label = ours(s, t, torch.tensor([1]), one, None, 2 * one, "forward_kl", grad=grad)
    assert label.item() == pytest.approx(math.log(4))
    assert grad[0].tolist() == pytest.approx([0.25 + 1.5, -0.25 - 1.5])


def test_no_rows():
    empty = make(0, 9, None, torch.float32)
    divergences, labels = ours(*empty, "forward_kl", grad=empty[0])
    assert divergences.shape == labels.shape == (0,)


@pytest.mark.parametrize("student_map", [SAME, (0.5, 0.0), (1.3, 4.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [FP64, FP32])
def test_label_rows(dtype, tolerance, student_map):
    s, _, labels, _, _, lw = make(6, 33, None, dtype)
    lw[2], labels[2] = 0.0, -100
    s[4] += 1e3
    s[5, 3:9] = -math.inf
    labels[5] = 0
    x = s.double().clone().requires_grad_()
    want = cross_entropy(mapped(x, *student_map), labels)
    (want_grad,) = torch.autograd.grad((want * lw.double()).sum(), x)
    s[2] = math.nan
    loss = dense.label_rows(s, labels, lw, student_map=student_map, grad_NV=s)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(s.double(), want_grad, rtol=tolerance, atol=tolerance)
