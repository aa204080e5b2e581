"""torch.compile, and the operators as PyTorch wants them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dskd import ops
from dskd.ops import DenseTeacher, LinearTeacher
from tests.fused.cases import (
    COMMON,
    FORMS,
    LABELS,
    WEIGHT,
    D,
    N,
    V,
    gradients,
    head,
    linear_mixture,
    linear_teacher,
    linear_teachers,
    normal,
    parts_of,
)


@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_the_whole_function(form):
    inputs, (teacher, _) = head(), FORMS[form]()

    def total(*inputs):
        hidden_ND, *rest = inputs
        how = {"teacher": teacher, "temperature": 2.0, **COMMON}
        return 2 * ops.linear_kd(hidden_ND * 1.5, *rest, **how).total

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected, found = total(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(found, *inputs), gradients(expected, *inputs), rtol=1e-12, atol=1e-14
    )


def test_torch_compile_takes_tokens_along_two_axes():
    """In one graph, whatever their number is, with a mask and labels of 32 bits."""
    weight_VD, calls = normal(V, D), []
    for T in (2, 3, 5):
        labels_BT = torch.arange(2 * T, dtype=torch.int32).view(2, T)
        calls.append((normal(2, T, D, seed=T).requires_grad_(), normal(2, T, V), labels_BT))

    def total(hidden_BTD, teacher_BTV, labels_BT):
        how = {"teacher": DenseTeacher(teacher_BTV), "labels_N": labels_BT}
        return ops.linear_kd(
            hidden_BTD, weight_VD, weight=labels_BT > 1, label_weight=1.0, **how
        ).total

    assert compilations(total, calls) <= 2


def compilations(function, calls):
    """How often a function is compiled for several calls, each as good as without."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for call in calls:
        expected, found = (
            torch.autograd.grad(each(*call), [x for x in call if isinstance(x, torch.Tensor)][:1])
            for each in (function, compiled)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    return counter.frame_count


def _label(hidden_ND, weight_VD):
    labels_N = torch.zeros(hidden_ND.shape[0], dtype=torch.long)
    return ops.linear_kd(hidden_ND, weight_VD, teacher=None, labels_N=labels_N, label_weight=1.0)


def _topk(hidden_ND, weight_VD):
    logits_NV = (hidden_ND @ weight_VD.t()).detach() * 0.7
    logprobs_NK, ids_NK = logits_NV.log_softmax(1).topk(3, 1)
    return ops.topk_kd(hidden_ND @ weight_VD.t(), ids_NK, logprobs_NK, mode="truncated")


@pytest.mark.parametrize(
    "loss",
    [
        lambda h, w: ops.linear_kd(h, w, teacher=LinearTeacher(h.detach() + 1, w.detach())),
        _label,
        lambda h, w: ops.dense_kd(h @ w.t(), (h @ w.t()).detach() * 0.7, kind="jsd"),
        lambda h, w: ops.mixture_kd(
            h @ w.t(), [(h @ w.t()).detach() * 0.7], torch.ones_like(h[:, :1])
        ),
        _topk,
    ],
    ids=["linear", "label", "dense", "mixture", "topk"],
)
def test_any_number_of_tokens_is_compiled_twice_at_most(loss):
    """Once for the first number and once for any: no number of tokens is in the code."""
    weight_VD = normal(V, D, seed=1)
    calls = [(normal(n, D).requires_grad_(),) for n in (6, 7, 9, 11, 13, 14, 15, 16, 17, 18)]
    assert compilations(lambda hidden_ND: loss(hidden_ND, weight_VD).total, calls) <= 2


def test_a_weight_that_falls_is_compiled_twice_at_most():
    """As Knowledge TeacherSetup's alpha does at every step."""
    hidden_ND, weight_VD, teacher = normal(N, D).requires_grad_(), normal(V, D), normal(N, V)

    def total(hidden_ND, alpha):
        how = {"teacher": DenseTeacher(teacher), "labels_N": LABELS}
        how |= {"weight": alpha * 4.0, "label_weight": 1.0 - alpha}
        return ops.linear_kd(hidden_ND, weight_VD, **how).total

    assert compilations(total, [(hidden_ND, 0.9 - step / 20) for step in range(12)]) <= 2


def test_transposed_hidden_states_have_the_gradient_that_the_compiler_expects():
    hidden_ND, weight_VD = normal(D, N).t().requires_grad_(), normal(V, D).requires_grad_()
    weight_N, labels_N, label_N = torch.ones(N).double(), LABELS.clamp_min(0), WEIGHT.clone()
    rest = (
        weight_N,
        None,
        labels_N,
        label_N,
        "label",
        "forward_kl",
        0.5,
        1.0,
        [1.0, 0.0] * 2,
        None,
    )
    arguments = (hidden_ND, weight_VD, None, [], *rest, torch.float64, 0, [True, True, False])
    tests = ("test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.dskd.linear_kd, arguments, test_utils=tests)


def test_operators_are_registered_as_pytorch_wants_them():
    """Schema, autograd registration and fake results, by torch's own check."""
    student_NV, teacher_NV = normal(N, V).requires_grad_(), normal(N, V, seed=1)
    weight_N, maps = WEIGHT.clone(), [1.0, 0.0, 1.0, 0.0]
    labels_N, label_N = LABELS.clamp_min(0), torch.ones(N, dtype=torch.float64)
    form = ("dense", [teacher_NV], "jsd", 0.5, 2.0, maps)
    dense = (student_NV, weight_N, label_N, None, labels_N, *form)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for gradient in (True, False):
        torch.library.opcheck(torch.ops.dskd.logit_loss, (*dense, gradient), test_utils=tests)
    common, kind = (weight_N, None, labels_N, label_N), ("forward_kl", 0.5, 2.0, maps)
    mixture = linear_mixture()
    for form, teachers, how in (
        ("linear", [linear_teacher()], None),
        ("linear", linear_teachers().parts, None),
        ("mixed", mixture.parts, [mixture.rule.sharpness, *mixture.rule.weights]),
    ):
        rest = (*common, form, *kind, how, torch.float64, 2, [True] * 3)
        linear = (*head(), parts_of(teachers), *rest)
        torch.library.opcheck(torch.ops.dskd.linear_kd, linear, test_utils=tests)
