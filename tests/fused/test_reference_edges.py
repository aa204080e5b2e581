"""The reference losses where numbers get difficult."""

import math

import pytest
import torch

from dskd.fused.reference import (
    cross_entropy,
    divergence,
    mapped,
    mixture_divergence,
    topk_divergence,
)
from tests.fused.cases import error_of
from tests.fused.plain_losses import MODES, at_temperature, top_k
from tests.fused.test_reference import KINDS, make, topk_of

LOSSES = {
    "ce": lambda s, z, y: cross_entropy(s, y),
    **{kind: lambda s, z, y, kind=kind: divergence(s, z, kind, temperature=2.0) for kind in KINDS},
    **{mode: lambda s, z, y, mode=mode: topk_of(s, z, 3, 2.0, mode) for mode in MODES},
    "mixture": lambda s, z, y: mixture_divergence(
        s, [z, z.flip(1)], [0, 0], torch.full((len(s), 2), 0.5)
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradient(loss, student, *others):
    student = student.detach().requires_grad_()
    value_N = loss(student, *others)
    return value_N.detach(), torch.autograd.grad(value_N.sum(), student)[0]


@every_loss
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_narrow_logits_are_computed_in_fp32(loss, dtype, atol):
    student, teacher, labels = make()
    student, teacher = student.to(dtype), teacher.to(dtype)
    value_N, grad_NV = gradient(loss, student, teacher.float(), labels)
    assert value_N.dtype == torch.float32
    assert grad_NV.dtype == dtype
    expected_N, expected_NV = gradient(loss, student.double(), teacher.double(), labels)
    assert expected_N.dtype == torch.float64
    torch.testing.assert_close(value_N.double(), expected_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad_NV.double(), expected_NV, rtol=atol, atol=atol)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits(loss, dtype):
    """Logits of +-1e4: probabilities of 0 and 1, their logarithms finite, no NaN."""
    signs = torch.randint(0, 2, (2, 6, 9)) * 2.0 - 1
    student, teacher = (signs * 1e4 + torch.arange(9) * 8.0).to(dtype)
    value_N, grad_NV = gradient(loss, student, teacher, torch.arange(6))
    assert value_N.isfinite().all()
    assert grad_NV.isfinite().all()
    expected_N, expected_NV = gradient(loss, student.double(), teacher.double(), torch.arange(6))
    torch.testing.assert_close(value_N.double(), expected_N, rtol=1e-6, atol=1e-6)
    # terms of 5e3 cancel in the gradient of the reverse KL
    torch.testing.assert_close(grad_NV.double(), expected_NV, rtol=1e-3, atol=1e-3)


def test_tail_mass_far_below_float32_resolution():
    """Both tails are far below 2^-24: as ``1 - sum`` each would be 0 or noise."""
    teacher, student = torch.zeros(1, 50), torch.zeros(1, 50)
    teacher[0, :2], student[0, :2] = 40.0, 30.0  # the kept tokens agree exactly
    value = topk_of(student.double(), teacher.double(), 2, 1.0)
    p, q = (48 / (48 + 2 * math.exp(x)) for x in (40.0, 30.0))
    kept = 2 * math.exp(40.0) / (48 + 2 * math.exp(40.0)) * (math.log1p(-p) - math.log1p(-q))
    assert value.item() == pytest.approx(p * math.log(p / q) + kept, rel=1e-4)
    assert 0 < value.item() < 1e-10


@every_loss
def test_a_common_offset_costs_nothing(loss):
    student, teacher = torch.randint(-256, 256, (2, 6, 9)) / 64.0  # exact in fp32 with the offset
    labels = torch.arange(6)
    moved = gradient(loss, student + 8192.0, teacher, labels)
    torch.testing.assert_close(moved, gradient(loss, student, teacher, labels), rtol=0, atol=0)


def test_impossible_tokens_cost_infinity_only_where_somebody_believes_in_them():
    student, teacher, _ = make(n=2)
    student[:, 4] = -math.inf
    labels = torch.full((2,), 4)
    infinite = {"ce", "forward_kl", "tail", "mixture"}
    for name, loss in LOSSES.items():
        value_N, grad_NV = gradient(loss, student, teacher.index_fill(1, labels, 20.0), labels)
        assert (value_N == math.inf).all() == (name in infinite | {"renormalised", "truncated"})
        # what the loss has of a finite gradient is there all the same
        assert grad_NV.isfinite().all()
    teacher[:, 4] = -math.inf
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    for kind in KINDS:
        value_N = divergence(student, teacher, kind, temperature=2.0)
        cut_N = divergence(student[:, rest], teacher[:, rest], kind, temperature=2.0)
        torch.testing.assert_close(value_N, cut_N)
    for mode in MODES:
        cut_N = topk_of(student[:, rest], teacher[:, rest], 2, 2.0, mode)
        torch.testing.assert_close(topk_of(student, teacher, 2, 2.0, mode), cut_N)
    student[:, 4] = 0.0
    assert (divergence(student, teacher, "reverse_kl") == math.inf).all()


@every_loss
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_is_never_hidden(loss, where):
    student, teacher, labels = make(n=2)
    (student if where == "student" else teacher)[1, 3] = math.nan
    value_N = loss(student, teacher, labels)
    read = where == "student" or loss is not LOSSES["ce"]
    assert value_N.isnan().tolist() == [False, read]


@pytest.mark.parametrize("mode", MODES)
def test_unused_slots_do_not_count(mode):
    student, teacher, _ = make(n=4)
    signal = top_k(teacher, 3, 2.0)
    logprobs_NK, tail_N = at_temperature(signal, 2.0)
    ids_NK = torch.cat((signal.ids_NK, torch.full((4, 2), -1)), 1)
    padded_NK = torch.cat((logprobs_NK, torch.full((4, 2), -math.inf)), 1)
    # a row with nothing in it: all of the teacher is its tail
    ids_NK[3], padded_NK[3], tail_N[3] = -1, -math.inf, 0.0

    def padded(s):
        return topk_divergence(s, ids_NK, padded_NK, tail_N, mode, temperature=2.0)

    value_N, grad_NV = gradient(padded, student)
    exact_N, exact_NV = gradient(lambda s: topk_of(s, teacher, 3, 2.0, mode), student)
    torch.testing.assert_close((value_N[:3], grad_NV[:3]), (exact_N[:3], exact_NV[:3]))
    torch.testing.assert_close(value_N[3], torch.zeros(()).double())
    torch.testing.assert_close(grad_NV[3], torch.zeros(9).double())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_have_no_divergence(kind):
    student, _, _ = make(n=6, v=50)
    value_N, grad_NV = gradient(lambda s: divergence(s, student.clone(), kind), student)
    assert value_N.abs().max() < 1e-15
    assert grad_NV.abs().max() < 1e-15


@every_loss
def test_no_rows_give_no_losses_with_a_graph(loss):
    head = torch.nn.Linear(4, 9)
    value_N = loss(head(torch.randn(0, 4)), torch.randn(0, 9), torch.zeros(0, dtype=torch.int64))
    assert value_N.shape == (0,)
    value_N.sum().backward()
    assert (head.weight.grad == 0).all()


@every_loss
def test_the_teacher_gets_no_gradient(loss):
    student, teacher, labels = make()
    value_N = loss(student.requires_grad_(), teacher.requires_grad_(), labels)
    assert torch.autograd.grad(value_N.sum(), teacher, allow_unused=True) == (None,)


S, Z = torch.randn(4, 9), torch.randn(4, 9)
IDS, LOGPROBS, TAIL = torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0), torch.full((4,), -0.5)


def tail(student_NV=S, ids_NK=IDS, logprobs_NK=LOGPROBS, tail_N=TAIL, **options):
    return topk_divergence(student_NV, ids_NK, logprobs_NK, tail_N, **options)


def mixture(student_NV=S, teachers=(Z,), firsts=(0,), weight_Nn=None, **options):
    weight_Nn = torch.ones(4, 1) if weight_Nn is None else weight_Nn
    return mixture_divergence(student_NV, teachers, firsts, weight_Nn, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(S[:, :7], Z), "teacher: columns 0 to 9 are not within the student's 7"),
        (lambda: divergence(S, Z[:3]), "teacher: has 3 rows where there are 4 tokens"),
        (lambda: divergence(S[0], Z[0]), "student: must have two axes"),
        (lambda: divergence(S.long(), Z), r"student: must be floating-point, not torch\.int64"),
        (lambda: divergence(S, Z.int()), r"teacher: must be floating-point, not torch\.int32"),
        (lambda: divergence(S, Z, temperature=0.0), "temperature: must be positive and finite"),
        (lambda: divergence(S, Z, temperature=-1.0), r"temperature: .*, not -1\.0"),
        (lambda: divergence(S, Z, temperature=math.nan), "temperature: .*, not nan"),
        (lambda: divergence(S, Z, "jsd", beta=0.0), "beta: must lie between 0 and 1 for jsd"),
        (lambda: divergence(S, Z, "skew_forward_kl", beta=1.5), "beta: .* for skew_forward_kl"),
        (lambda: divergence(S, Z, "skew_reverse_kl", beta=math.nan), "beta: .* not nan"),
        (lambda: divergence(S, Z, "kl"), "kind: .*kl"),
        (lambda: tail(S.long()), "student: must be floating-point"),
        (lambda: tail(temperature=-2.0), r"temperature: .*, not -2\.0"),
        (lambda: tail(ids_NK=IDS.float()), "ids: must be int32 or int64"),
        (lambda: tail(ids_NK=IDS[:3]), r"ids: must be \[4, K\], not \(3, 3\)"),
        (lambda: tail(ids_NK=IDS + 7), r"ids: 9 at \[0, 2\] is not one of the 9 columns"),
        (lambda: tail(logprobs_NK=LOGPROBS[:, :2]), r"logprobs: has shape \(4, 2\), ids \(4, 3\)"),
        (lambda: tail(logprobs_NK=LOGPROBS.long()), "logprobs: must be floating-point"),
        (lambda: tail(tail_N=None), "tail: the mode tail needs one"),
        (lambda: tail(tail_N=TAIL[:3]), r"tail: has shape \(3,\) where there are 4 tokens"),
        (lambda: mixture(S[:, :7]), r"teachers\[0\]: columns 0 to 9 are not within"),
        (lambda: mixture(firsts=(1,)), r"teachers\[0\]: columns 1 to 10 are not within"),
        (lambda: mixture(firsts=(0, 0)), "firsts: 2 for 1 teachers"),
        (lambda: mixture(S.long()), "student: must be floating-point"),
        (lambda: mixture(teachers=(Z.long(),)), r"teachers\[0\]: must be floating-point"),
        (lambda: mixture(temperature=0.0), "temperature: must be positive"),
        (lambda: mixture(weight_Nn=torch.ones(4, 2)), r"weights: must be \[4, 1\], not"),
        (lambda: mixture(weight_Nn=-torch.ones(4, 1)), "weights: a mixture has none below 0"),
        (lambda: cross_entropy(S.long(), IDS[:, 0]), "logits: must be floating-point"),
        (lambda: cross_entropy(S, IDS), r"labels: has shape \(4, 3\) where there are 4"),
        (lambda: cross_entropy(S, S[:, 0]), "labels: must be int64 or int32"),
        (lambda: cross_entropy(S, IDS[:, 0] + 9), r"labels: 9 at \[0\] is not one of the 9"),
        (lambda: mapped(S.long()), "logits: must be floating-point"),
        (lambda: mapped(S, 0.0), r"map\.scale: must be positive"),
        (lambda: mapped(S, 1.0, -1.0), r"map\.softcap: must be finite and at least 0"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(error_of(message), match=message):
        call()


def test_a_loss_that_is_not_defined_here_is_refused():
    student, teacher, _ = make()
    with pytest.raises(ValueError, match=r"kind.*mixed"):
        divergence(student, teacher, "mixed")
    with pytest.raises(ValueError, match=r"mode.*renorm"):
        topk_of(student, teacher, 2, 1.0, "renorm")
