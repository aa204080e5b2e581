"""The losses where numbers or graphs get difficult."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dskd.batch import Dense, TopK
from dskd.errors import ConfigError
from dskd.losses import cross_entropy, cross_entropy_and_kl, kl, topk_kl
from tests.plain_losses import MODES, plain_topk, top_k
from tests.test_losses import agree, ce_pair, gradient, kl_pair, make, topk_pair

LOSSES = {
    "ce": lambda s, z, y: cross_entropy(s, y),
    "kl": lambda s, z, y: kl(s, z, 2.0),
    "topk": lambda s, z, y: topk_kl(s, top_k(z, 3, 2.0), 2.0),
    "ce+kl": lambda s, z, y: sum(cross_entropy_and_kl(s, y, Dense(z), 2.0)),
    "ce+topk": lambda s, z, y: sum(cross_entropy_and_kl(s, y, top_k(z, 3, 3.0), 3.0)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def extreme(dtype):
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (2, 6, 9), generator=generator) * 2.0 - 1
    student, teacher = (signs * 1e4 + torch.arange(9) * 8.0).to(dtype)  # exact in fp16, too
    return student, teacher, torch.arange(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 3.0])
def test_extreme_logits_dense(t, dtype):
    student, teacher, labels = extreme(dtype)
    agree(ce_pair(labels), student, 1e-3)
    agree(kl_pair(teacher, t), student, 1e-3)
    value, grad = gradient(
        lambda s: sum(cross_entropy_and_kl(s, labels, Dense(teacher), t)), student
    )
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_topk(t, k, mode, dtype):
    student, teacher, labels = extreme(dtype)
    agree(topk_pair(teacher, k, t, mode), student, 1e-3)
    signal = top_k(teacher.double(), k, t)
    value, grad = gradient(lambda s: sum(cross_entropy_and_kl(s, labels, signal, t, mode)), student)
    assert value.isfinite()
    assert grad.isfinite().all()


def test_tail_mass_far_below_float32_resolution():
    """Both tails are far below 2^-24: as ``1 - sum`` each would be 0 or noise."""
    teacher, student = torch.zeros(1, 50), torch.zeros(1, 50)
    teacher[0, :2] = 40.0
    student[0, 1:3] = torch.tensor([60.0, 7.0])
    agree(topk_pair(teacher, 2, 1.0), student, 1e-6)
    student[0, :2] = 30.0  # the kept tokens agree exactly: the tail is all there is
    expected = plain_topk(student.double(), teacher.double(), 2, 1.0, "tail").item()
    value = topk_kl(student.double(), top_k(teacher.double(), 2, 1.0), 1.0)
    assert 0 < expected < 1e-10
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_a_common_offset_costs_nothing(t):
    student = torch.randint(-256, 256, (6, 30)) / 64.0  # exact in fp32 with the offset, too
    teacher = torch.randint(-256, 256, (6, 30)) / 64.0
    labels, signal = torch.arange(6), top_k(teacher, 5, t)
    for loss in (
        lambda s: cross_entropy(s, labels),
        lambda s: kl(s, teacher, t),
        lambda s: topk_kl(s, signal, t),
    ):
        moved, still = gradient(loss, student + 8192.0), gradient(loss, student)
        torch.testing.assert_close(moved, still, rtol=2e-6, atol=1e-6)


def test_impossible_tokens():
    """A token that the student rules out costs infinity only if the teacher believes in it."""
    student, teacher, _ = make(n=2)
    student[:, 4] = -math.inf
    assert kl(student, teacher, 2.0) == math.inf
    assert topk_kl(student, top_k(teacher, 9, 2.0), 2.0) == math.inf
    assert cross_entropy(student, torch.full((2,), 4)) == math.inf
    teacher[:, 4] = -math.inf
    agree(topk_pair(teacher, 2, 2.0), student, 1e-11)
    agree(topk_pair(teacher, 9, 2.0), student, 1e-11)
    agree(kl_pair(teacher, 2.0), student, 1e-11)


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_is_never_hidden(where, mode):
    student, teacher, labels = make(n=2)
    (student if where == "student" else teacher)[1, :] = math.nan
    assert kl(student, teacher, 2.0).isnan()
    assert topk_kl(student, top_k(teacher, 3, 2.0), 2.0, mode).isnan()
    assert cross_entropy(student, labels).isnan() == (where == "student")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", [0, 1], ids=["ce", "kl"])
def test_unused_slots_do_not_count(mode, part):
    student, teacher, labels = make(n=4)
    exact = top_k(teacher, 3, 2.0)
    unused = torch.full((4, 2), -1)
    padded = TopK(
        torch.cat((exact.ids_NK, unused), 1),
        torch.cat((exact.logprobs_NK, unused * math.inf), 1),
        exact.tail_N,
    )
    ours = gradient(lambda s: cross_entropy_and_kl(s, labels, padded, 2.0, mode)[part], student)
    plain = gradient(lambda s: cross_entropy_and_kl(s, labels, exact, 2.0, mode)[part], student)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("t", [0.7, 1.0, 2.0])
def test_equal_logits_have_no_divergence(t):
    student, _, _ = make(n=6, v=50, dtype=torch.float32)
    value, grad = gradient(lambda s: kl(s, student.clone(), t), student)
    assert value == 0.0
    assert grad.abs().max() < 1e-6
    value, grad = gradient(lambda s: topk_kl(s, top_k(student, 7, t), t), student)
    assert abs(value) < 1e-5
    assert grad.abs().max() < 1e-6


@every_loss
def test_no_rows_give_exactly_zero_with_a_graph(loss):
    head = torch.nn.Linear(4, 9)
    logits_NV = head(torch.randn(0, 4))
    value = loss(logits_NV, torch.randn(0, 9), torch.zeros(0, dtype=torch.int64))
    assert value.dtype == torch.float32
    assert value.item() == 0.0
    value.backward()
    assert (head.weight.grad == 0).all()
    assert (head.bias.grad == 0).all()


@every_loss
def test_a_second_derivative_is_refused(loss):
    student, teacher, labels = make()
    student.requires_grad_()
    value = loss(student, teacher, labels) + student.square().sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, student, create_graph=True)


@every_loss
def test_teacher_gets_no_gradient_and_backward_repeats(loss):
    student, teacher, labels = make(dtype=torch.float32)
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher, labels)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    second = torch.autograd.grad(4.0 * value, student, retain_graph=True)[0]
    torch.testing.assert_close(second, 4 * first, rtol=1e-6, atol=1e-7)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


@every_loss
def test_autocast_checkpointing_and_no_grad_change_nothing(loss):
    student, teacher, labels = make(dtype=torch.float32)
    plain = gradient(lambda s: loss(s, teacher, labels), student)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradient(lambda s: loss(s, teacher, labels), student)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    again = gradient(lambda s: checkpoint(loss, s, teacher, labels, use_reentrant=False), student)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    leaf = student.clone().requires_grad_()
    checkpoint(loss, leaf, teacher, labels, use_reentrant=True).backward()
    torch.testing.assert_close(leaf.grad, plain[1], rtol=0, atol=0)
    with torch.no_grad():
        assert loss(student, teacher, labels) == plain[0]


@every_loss
def test_sliced_logits(loss):
    """A vocabulary cut out of a wider head: rows that are not contiguous."""
    student, teacher, labels = make(v=12)
    labels, narrow = labels % 9, teacher[:, :9].contiguous()
    cut = gradient(lambda s: loss(s[:, :9], teacher[:, :9], labels), student)
    whole = gradient(lambda s: loss(s, narrow, labels), student[:, :9].contiguous())
    assert cut[0] == whole[0]
    torch.testing.assert_close(cut[1], F.pad(whole[1], (0, 3)), rtol=0, atol=0)


def test_a_temperature_that_was_not_stored_is_refused():
    student, teacher, _ = make()
    with pytest.raises(ConfigError, match=r"temperature 3\.0.*1\.0, 2\.0"):
        topk_kl(student, top_k(teacher, 2, 1.0, 2.0), 3.0)
