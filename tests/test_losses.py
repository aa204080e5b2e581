"""Values and gradients of the losses against golden values and their definitions."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dskd.batch import Dense, TopK
from dskd.losses import cross_entropy, cross_entropy_and_kl, kl, topk_kl
from tests.plain_losses import MODES, plain_ce, plain_kl, plain_topk, top_k

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ki.json").read_text())["topk"]


def make(n=5, v=9, w=None, dtype=torch.float64):
    student = torch.randn(n, v, dtype=torch.float64) * 2
    teacher = torch.randn(n, w or v, dtype=torch.float64) * 2
    return student.to(dtype), teacher.to(dtype), torch.randint(0, w or v, (n,))


# A loss and its definition, as functions of the student's logits.


def ce_pair(labels):
    return lambda s: cross_entropy(s, labels), lambda s: plain_ce(s, labels)


def kl_pair(teacher, t):
    return lambda s: kl(s, teacher, t), lambda s: plain_kl(s, teacher.double(), t)


def topk_pair(teacher, k, t, mode="tail"):
    wide = teacher.double()
    signal = top_k(wide, k, t)
    return lambda s: topk_kl(s, signal, t, mode), lambda s: plain_topk(s, wide, k, t, mode)


def joint_pair(labels, signal, t, mode, plain_divergence):
    """Both terms of the joint loss, with upstream gradients of either sign."""

    def ours(s):
        ce, divergence = cross_entropy_and_kl(s, labels, signal, t, mode)
        return 0.3 * ce - 1.7 * divergence

    return ours, lambda s: 0.3 * plain_ce(s, labels) - 1.7 * plain_divergence(s)


def gradient(loss, student):
    student = student.detach().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


def agree(pair, student, rtol):
    ours, plain = pair
    value, grad = gradient(ours, student)
    assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert grad.dtype == student.dtype
    expected, expected_grad = gradient(plain, student.double())
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"T{c['T']}-K{c['K']}")
def test_topk_golden(case, mode, dtype, rtol):
    student = torch.tensor(GOLDEN["student_logits"], dtype=dtype)
    teacher = torch.tensor(GOLDEN["teacher_logits"], dtype=dtype)
    t, lse_N1 = case["T"], teacher.logsumexp(1, True)
    signal = top_k(teacher, case["K"], t)
    assert signal.ids_NK.tolist() == case["ids"]
    kept_NK = torch.tensor(case["vals"], dtype=dtype) - lse_N1
    torch.testing.assert_close(signal.logprobs_NK, kept_NK)
    lse_t_N = torch.logaddexp((kept_NK / t).logsumexp(1), signal.tail_N[t]) + lse_N1[:, 0] / t
    assert lse_t_N.tolist() == pytest.approx(case["lse_T"], rel=rtol)
    value = topk_kl(student, signal, t, mode)
    assert value.item() == pytest.approx(case[MODES[mode]], rel=rtol, abs=rtol)
    assert kl(student, teacher, t).item() == pytest.approx(case["full_kl"], rel=rtol)


DTYPES = [
    (torch.float64, 1e-11),
    (torch.float32, 2e-5),
    (torch.bfloat16, 8e-3),
    (torch.float16, 1e-3),
]
TEMPERATURES = [0.5, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_dense_losses(dtype, rtol, t):
    student, teacher, labels = make(dtype=dtype)
    agree(ce_pair(labels), student, rtol)
    agree(kl_pair(teacher, t), student, rtol)
    plain = kl_pair(teacher, t)[1]
    agree(joint_pair(labels, Dense(teacher), t, "tail", plain), student, 3 * rtol)


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("mode", MODES)
def test_topk_losses(dtype, rtol, t, k, mode):
    student, teacher, labels = make(dtype=dtype)
    pair = topk_pair(teacher, k, t, mode)
    agree(pair, student, rtol)
    signal = top_k(teacher.double(), k, t)
    agree(joint_pair(labels, signal, t, mode, pair[1]), student, 3 * rtol)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_chunks_of_rows(threads):
    student, teacher, labels = make(n=37, v=4096)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = topk_pair(teacher, 8, 2.0)[1]
        agree(joint_pair(labels, top_k(teacher, 8, 2.0), 2.0, "tail", plain), student, 1e-11)
        plain = kl_pair(teacher, 3.0)[1]
        agree(joint_pair(labels, Dense(teacher), 3.0, "tail", plain), student, 1e-11)
    finally:
        torch.set_num_threads(before)


def ruled_out():
    """Tokens that the student, the teacher or both give no chance at all."""
    student, teacher, labels = make(n=3, v=7)
    student[0, 2] = student[1, 0] = -torch.inf
    teacher[0, 2] = teacher[1, 0] = teacher[1, 1] = -torch.inf
    labels[:2] = 3
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("t", [0.7, 1.0, 2.0])
def test_gradcheck_dense(t):
    student, teacher, labels = ruled_out()
    narrow = teacher[:, :5]
    for loss in (
        lambda s: cross_entropy(s, labels),
        lambda s: kl(s, teacher, t),
        lambda s: kl(s, narrow, t),
        lambda s: cross_entropy_and_kl(s, labels, Dense(teacher), t),
    ):
        assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("t", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_topk(t, k, mode):
    student, teacher, labels = ruled_out()
    signal = top_k(teacher, k, t)
    assert torch.autograd.gradcheck(lambda s: topk_kl(s, signal, t, mode), (student,))
    assert torch.autograd.gradcheck(
        lambda s: cross_entropy_and_kl(s, labels, signal, t, mode), (student,)
    )


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
def test_padded_student_vocabulary(t):
    student, teacher, _ = make(v=12, w=9)
    agree(kl_pair(teacher, t), student, 1e-11)
    narrow = gradient(lambda s: kl(s, teacher, t), student)
    padded = F.pad(teacher, (0, 3), value=-torch.inf)
    torch.testing.assert_close(gradient(lambda s: kl(s, padded, t), student), narrow)
    assert (narrow[1][:, 9:] > 0).all()  # descent lowers the padding's logits
    signal = top_k(teacher, 9, t)  # every real token is kept, the student's tail is its padding
    torch.testing.assert_close(gradient(lambda s: topk_kl(s, signal, t), student), narrow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("part", [0, 1], ids=["ce", "kl"])
def test_everything_kept_is_dense(mode, t, dtype, part):
    student, teacher, labels = make(n=20, v=301, dtype=dtype)
    signal = top_k(teacher, 301, t)
    assert (signal.tail_N[t] == -torch.inf).all()
    topk = gradient(lambda s: cross_entropy_and_kl(s, labels, signal, t, mode)[part], student)
    dense = gradient(lambda s: cross_entropy_and_kl(s, labels, Dense(teacher), t)[part], student)
    torch.testing.assert_close(topk, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_tail_grows_with_k_up_to_the_dense_kl(t):
    student, teacher, _ = make(n=4, v=40)
    values = [topk_kl(student, top_k(teacher, k, t), t).item() for k in range(1, 41)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] < values[20] < values[39]
    assert values[-1] == pytest.approx(kl(student, teacher, t).item(), rel=1e-12)


def test_one_renormalised_token_is_cross_entropy_with_the_teachers_choice():
    student, teacher, _ = make()
    value = topk_kl(student, top_k(teacher, 1, 1.0), 1.0, "renormalised")
    torch.testing.assert_close(value, cross_entropy(student, teacher.argmax(1)))


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
def test_joint_and_separate_losses_are_equal(t):
    student, teacher, labels = make()
    for signal in (Dense(teacher), top_k(teacher, 3, t)):
        ce, divergence = cross_entropy_and_kl(student, labels, signal, t)
        alone = topk_kl(student, signal, t) if isinstance(signal, TopK) else kl(student, teacher, t)
        torch.testing.assert_close(ce, cross_entropy(student, labels), rtol=1e-14, atol=0)
        torch.testing.assert_close(divergence, alone, rtol=1e-14, atol=0)
