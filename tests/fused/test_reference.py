"""The reference losses against golden values, their definitions and finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dskd.fused.reference import (
    cross_entropy,
    divergence,
    mapped,
    mixture_divergence,
    topk_divergence,
)
from tests.fused.plain_losses import MODES, at_temperature, top_k
from tests.goldens import golden

GOLDEN = golden("ki")
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
TEMPERATURES = [0.7, 1.0, 2.0]
KINDS = [
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
]  # fmt: skip


def make(n=5, v=9, w=None):
    student = torch.randn(n, v, dtype=torch.float64) * 2
    teacher = torch.randn(n, w or v, dtype=torch.float64) * 2
    return student, teacher, torch.randint(0, w or v, (n,))


def topk_of(student, teacher, k, t, mode="tail"):
    """The loss with all of a cache's view of the teacher."""
    signal = top_k(teacher, k, t)
    return topk_divergence(student, signal.ids_NK, *at_temperature(signal, t), mode, temperature=t)


# Definitions on lists of probabilities, one row at a time, with nothing but `math`.


def softmax(logits_V, t):
    powers = [math.exp(x / t) for x in logits_V.tolist()]
    return [x / sum(powers) for x in powers]


def kl_of(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x)


def mean_of(beta, a, b):
    return [beta * x + (1 - beta) * y for x, y in zip(a, b, strict=True)]


def defined(kind, p, q, beta):
    m = mean_of(beta, p, q)
    return {
        "forward_kl": lambda: kl_of(p, q),
        "reverse_kl": lambda: kl_of(q, p),
        "jsd": lambda: beta * kl_of(p, m) + (1 - beta) * kl_of(q, m),
        "skew_forward_kl": lambda: kl_of(p, m),
        "skew_reverse_kl": lambda: kl_of(q, mean_of(beta, q, p)),
        "total_variation": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    }[kind]()


def defined_topk(mode, p, q, k):
    kept = sorted(range(len(p)), key=lambda j: -p[j])[:k]
    a, b = ([x[j] for j in kept] for x in (p, q))
    if mode == "tail":
        rest = [j for j in range(len(p)) if j not in kept]
        return kl_of([*a, sum(p[j] for j in rest)], [*b, sum(q[j] for j in rest) or 1.0])
    a = [x / sum(a) for x in a]
    return kl_of(a, b if mode == "renormalised" else [x / sum(b) for x in b])


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN["topk"]["cases"], ids=lambda c: f"T{c['T']}-K{c['K']}")
def test_topk_golden(case, mode, dtype, rtol):
    student, teacher = (
        torch.tensor(GOLDEN["topk"][f"{name}_logits"], dtype=dtype)
        for name in ("student", "teacher")
    )
    t, lse_N1 = case["T"], teacher.logsumexp(1, True)
    signal = top_k(teacher, case["K"], t)
    assert signal.ids_NK.tolist() == case["ids"]
    kept_NK = torch.tensor(case["vals"], dtype=dtype) - lse_N1
    torch.testing.assert_close(signal.logprobs_NK, kept_NK)
    lse_t_N = torch.logaddexp((kept_NK / t).logsumexp(1), signal.tail_N[t]) + lse_N1[:, 0] / t
    assert lse_t_N.tolist() == pytest.approx(case["lse_T"], rel=rtol)
    value = t**2 * topk_of(student, teacher, case["K"], t, mode).sum()
    assert value.item() == pytest.approx(case[MODES[mode]], rel=rtol, abs=rtol)
    dense = t**2 * divergence(student, teacher, temperature=t).sum()
    assert dense.item() == pytest.approx(case["full_kl"], rel=rtol)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_what_they_are_called(kind, beta, t):
    student, teacher, _ = make()
    value_N = divergence(student, teacher, kind, beta=beta, temperature=t)
    expected = [
        defined(kind, softmax(z, t), softmax(s, t), beta)
        for s, z in zip(student, teacher, strict=True)
    ]
    assert value_N.tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("mode", MODES)
def test_topk_divergences_are_what_they_are_called(mode, k, t):
    student, teacher, _ = make()
    expected = [
        defined_topk(mode, softmax(z, t), softmax(s, t), k)
        for s, z in zip(student, teacher, strict=True)
    ]
    value_N = topk_of(student, teacher, k, t, mode)
    assert value_N.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-14)


def teachers(n=5):
    """Two over all nine columns, and one each over the first four and the last three."""
    widths, firsts = (9, 9, 4, 3), (0, 0, 0, 6)
    weight_Nn = torch.rand(n, 4, dtype=torch.float64)
    weight_Nn[0, 1] = weight_Nn[1, :3] = weight_Nn[2] = 0.0
    return [make(n, w)[1] for w in widths], firsts, weight_Nn


@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_mixture_is_the_weighted_mean_of_its_teachers(t):
    student, _, _ = make()
    logits, firsts, weight_Nn = teachers()
    value_N = mixture_divergence(student, logits, firsts, weight_Nn, temperature=t)
    for n, (value, weights) in enumerate(zip(value_N.tolist(), weight_Nn.tolist(), strict=True)):
        pbar = [0.0] * 9
        for weight, teacher, first in zip(weights, logits, firsts, strict=True):
            for column, p in enumerate(softmax(teacher[n], t), first):
                pbar[column] += p * weight / (sum(weights) or 1.0)
        assert value == pytest.approx(kl_of(pbar, softmax(student[n], t)), rel=1e-11)
    assert value_N[2] == 0.0


def test_the_gradient_of_a_mixture_is_that_of_its_teachers_one_by_one():
    student, _, _ = make()
    student.requires_grad_()
    logits, firsts, weight_Nn = teachers()
    mixture_N = mixture_divergence(student, logits, firsts, weight_Nn, temperature=2.0)
    together = torch.autograd.grad((mixture_N * weight_Nn.sum(1)).sum(), student)[0]
    alone = sum(
        (weight_N * mixture_divergence(student, [z], [a], weight_N[:, None], temperature=2.0)).sum()
        for z, a, weight_N in zip(logits, firsts, weight_Nn.unbind(1), strict=True)
    )
    torch.testing.assert_close(together, torch.autograd.grad(alone, student)[0])


def ruled_out():
    """Tokens that the student, the teacher or both give no chance at all."""
    student, teacher, labels = make(n=3, v=7)
    student[0, 2] = student[1, 0] = -torch.inf
    teacher[0, 2] = teacher[1, 0] = -torch.inf
    labels[:2] = 3
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_divergences(kind, t):
    student, teacher, _ = ruled_out()
    for beta in (0.2, 0.5):
        assert torch.autograd.gradcheck(
            lambda s, b=beta: divergence(s, teacher, kind, beta=b, temperature=t), (student,)
        )
    teacher[1, 1] = -torch.inf  # where the student believes in it: no reverse KL
    if kind != "reverse_kl":
        for z in (teacher, teacher[:, :5]):
            assert torch.autograd.gradcheck(
                lambda s, z=z: divergence(s, z, kind, temperature=t), (student,)
            )


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_topk(mode, k, t):
    student, teacher, _ = ruled_out()
    assert torch.autograd.gradcheck(lambda s: topk_of(s, teacher, k, t, mode), (student,))


def test_gradcheck_cross_entropy_mixture_and_map():
    student, teacher, labels = ruled_out()
    weight_Nn = torch.rand(3, 2, dtype=torch.float64)
    narrow = teacher[:, 3:6]
    for loss in (
        lambda s: cross_entropy(s, labels),
        lambda s: cross_entropy(mapped(s, 0.7, 3.0), labels),
        lambda s: divergence(mapped(s, 2.0), mapped(teacher, 1.5, 4.0)),
        lambda s: mixture_divergence(s, [teacher, narrow], [0, 3], weight_Nn, temperature=2.0),
    ):
        assert torch.autograd.gradcheck(loss, (student,))


def test_cross_entropy_is_the_label_s_surprise_and_nothing_without_a_label():
    student, _, labels = make()
    labels[1] = -100
    value_N = cross_entropy(student.requires_grad_(), labels)
    for n, (label, value) in enumerate(zip(labels.tolist(), value_N.tolist(), strict=True)):
        expected = 0.0 if label < 0 else -math.log(softmax(student[n], 1.0)[label])
        assert value == pytest.approx(expected, rel=1e-12)
    grad_NV = torch.autograd.grad(value_N.sum(), student)[0]
    assert (grad_NV[1] == 0).all()
    torch.testing.assert_close(grad_NV[0], student[0].softmax(0) - F.one_hot(labels[0], 9))


def test_mapped_scales_then_caps():
    x = torch.tensor([-math.inf, -50.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    assert mapped(x).equal(x)
    assert mapped(x, 0.5).tolist() == [-math.inf, -25.0, 0.0, 1.5, 25.0]
    capped = [-math.inf, *(30 * math.tanh(2 * v / 30) for v in (-50.0, 0.0, 3.0, 50.0))]
    assert mapped(x, 2.0, 30.0).tolist() == pytest.approx(capped, rel=1e-14)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_padded_vocabulary_is_pushed_down(t):
    student, teacher, _ = make(v=12, w=9)
    padded = F.pad(teacher, (0, 3), value=-torch.inf)
    for kind in KINDS[:1] + KINDS[2:]:
        value_N = divergence(student, teacher, kind, temperature=t)
        assert value_N.equal(divergence(student, padded, kind, temperature=t))
    student.requires_grad_()
    value_N = divergence(student, teacher, temperature=t)
    assert (torch.autograd.grad(value_N.sum(), student)[0][:, 9:] > 0).all()
    # every real token is kept: the student's tail is its padding
    torch.testing.assert_close(topk_of(student, padded, 9, t), value_N)
    assert (divergence(student, teacher, "reverse_kl") == math.inf).all()


@pytest.mark.parametrize("t", TEMPERATURES)
def test_tail_grows_with_k_up_to_the_dense_kl(t):
    student, teacher, _ = make(n=4, v=40)
    values = [topk_of(student, teacher, k, t).sum().item() for k in range(1, 41)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] < values[20] < values[39]
    dense = divergence(student, teacher, temperature=t).sum().item()
    assert values[-1] == pytest.approx(dense, rel=1e-12)


def test_one_renormalised_token_is_cross_entropy_with_the_teachers_choice():
    student, teacher, _ = make()
    value_N = topk_of(student, teacher, 1, 1.0, "renormalised")
    torch.testing.assert_close(value_N, cross_entropy(student, teacher.argmax(1)))
