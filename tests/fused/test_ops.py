"""The public losses: autograd, checkpointing, autocast, precisions and chunks."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from dskd import ops
from dskd.fused import reference
from dskd.ops import DenseTeacher, LinearMixture, LinearTeacher, LinearTeachers, LogitMap
from tests.fused.cases import (
    COMMON,
    FORMS,
    KINDS,
    LABELS,
    REVERSE,
    WEIGHT,
    D,
    N,
    V,
    W,
    gradients,
    head,
    kept,
    linear_mixture,
    linear_teacher,
    linear_teachers,
    logits_of,
    normal,
    same,
)
from tests.heads import small_chunks


def plain(logits_NV, teacher, *, kind="forward_kl", temperature=1.0, mode="tail", reverse=None):
    """``sum weight * divergence + label_weight * label`` by the references; row 3 is ignored."""
    heat = {"temperature": temperature}
    if isinstance(teacher, tuple):
        ids_NK, logprobs_NK, tail_N = teacher
        tail_N = tail_N if mode == "tail" else None
        found = reference.topk_divergence(logits_NV, ids_NK, logprobs_NK, tail_N, mode, **heat)
    elif kind == "mixed":
        found = reference.divergence(logits_NV, teacher, "forward_kl", **heat)
    else:
        found = reference.divergence(logits_NV, teacher, kind, beta=0.3, **heat)
    labelled = LABELS >= 0
    total = (WEIGHT * found)[labelled].sum()
    if reverse is not None:
        backward = reference.divergence(logits_NV, teacher, "reverse_kl", **heat)
        total = total + (reverse * backward)[labelled].sum()
    return total + 0.7 * reference.cross_entropy(logits_NV, LABELS)[labelled].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_dense_kd_is_the_reference_and_passes_gradcheck(kind, temperature):
    narrow = kind not in ("reverse_kl", "mixed")
    student_NV, teacher_NW = normal(N, V).requires_grad_(), normal(N, W if narrow else V, seed=1)
    reverse = REVERSE if kind == "mixed" else None

    def total(student_NV):
        how = {"kind": kind, "beta": 0.3, "temperature": temperature, "reverse_weight": reverse}
        return ops.dense_kd(student_NV, teacher_NW, **how, **COMMON).total

    expected = plain(student_NV, teacher_NW, kind=kind, temperature=temperature, reverse=reverse)
    same(3 * total(student_NV), 3 * expected, student_NV)
    if kind != "total_variation":  # it has kinks
        assert gradcheck(total, student_NV)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mode", ops.MODES)
def test_topk_kd_is_the_reference_and_passes_gradcheck(mode, temperature):
    student_NV, teacher = normal(N, V).requires_grad_(), kept(normal(N, V, seed=1), temperature)
    parts = (*teacher[:2], teacher[2] if mode == "tail" else None)

    def total(student_NV):
        options = {"mode": mode, "temperature": temperature}
        return ops.topk_kd(student_NV, *parts, **options, **COMMON).total

    expected = plain(student_NV, teacher, mode=mode, temperature=temperature)
    same(total(student_NV), expected, student_NV)
    assert gradcheck(total, student_NV)


def test_mixture_kd_passes_gradcheck():
    student_NV = normal(N, V).requires_grad_()
    teachers, firsts = [normal(N, 5, seed=1), normal(N, 6, seed=2), normal(N, V, seed=3)], [0, 5, 0]
    weights_Nn = normal(N, 3, seed=4).abs()
    weights_Nn[2], weights_Nn[3, 1] = 0.0, 0.0

    def total(student_NV):
        how = {"firsts": firsts, "temperature": 1.5}
        return ops.mixture_kd(student_NV, teachers, weights_Nn, **how).total

    found = reference.mixture_divergence(student_NV, teachers, firsts, weights_Nn, temperature=1.5)
    expected = (weights_Nn.sum(1) * found).sum()
    torch.testing.assert_close(total(student_NV), expected, rtol=1e-10, atol=1e-12)
    assert gradcheck(total, student_NV)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(
    ("student", "teachers"),
    [
        (torch.float32, (torch.bfloat16, torch.float16)),
        (torch.bfloat16, (torch.float32, torch.bfloat16)),
        (torch.float16, (torch.float16, torch.bfloat16)),
    ],
)
def test_mixture_kd_takes_teachers_of_other_types(monkeypatch, student, teachers, triton):
    """The values of each, not rounded to another's type; read 2 tokens at a time, and in place."""
    small_chunks(monkeypatch, 2)
    student_NV = normal(N, V, dtype=student).requires_grad_()
    several = [normal(N, V, seed=k, dtype=dtype) for k, dtype in enumerate(teachers, start=1)]
    exact_NV, weights_Nn = student_NV.detach().double().requires_grad_(), normal(N, 2).abs().float()
    wide = [logits_NV.double() for logits_NV in several]
    how = {"temperature": 1.5}
    wanted_N = reference.mixture_divergence(exact_NV, wide, [0, 0], weights_Nn.double(), **how)
    (grad_NV,) = gradients((weights_Nn.sum(1) * wanted_N).sum(), exact_NV)
    with ops.triton_everywhere() if triton else nullcontext():
        found = ops.mixture_kd(student_NV, several, weights_Nn, **how)
        (found_NV,) = gradients(found.total, student_NV)
        placed_NV = student_NV.detach().clone()
        again = ops.mixture_kd(placed_NV, several, weights_Nn, out=placed_NV, **how)
    torch.testing.assert_close(found.divergence_N.double(), wanted_N, rtol=1e-5, atol=1e-6)
    assert found.divergence_N.dtype == torch.float32 and found_NV.dtype == student
    torch.testing.assert_close(again.total, found.total.detach(), rtol=1e-6, atol=0)
    rounding = 1e-5 if student == torch.float32 else 1e-2
    for mine in (found_NV, placed_NV):
        torch.testing.assert_close(mine.double(), grad_NV, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 99, None])
@pytest.mark.parametrize("form", FORMS)
def test_linear_kd_is_the_reference_for_any_chunk(form, chunk):
    """Values, and the gradients of hidden states, weight and bias."""
    inputs, (teacher, known) = head(), FORMS[form]()
    total = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0, chunk=chunk, **COMMON).total
    same(total, plain(torch.nn.functional.linear(*inputs), known, temperature=2.0), *inputs)


def test_linear_kd_passes_gradcheck():
    def total(*inputs):
        how = {"teacher": linear_teacher(), "kind": "jsd", "temperature": 1.3, "chunk": 2}
        return ops.linear_kd(*inputs, **how, **COMMON).total

    assert gradcheck(total, head())


def test_labels_alone():
    inputs = head()
    found = ops.linear_kd(*inputs, teacher=None, labels_N=LABELS, label_weight=1.0, chunk=2)
    logits_NV = torch.nn.functional.linear(*inputs)
    expected = reference.cross_entropy(logits_NV, LABELS)
    same(found.total, expected.sum(), *inputs)
    torch.testing.assert_close(found.label_N, expected, rtol=1e-10, atol=1e-12)
    assert not found.divergence_N.any()
    direct = ops.label_ce(logits_NV.detach().requires_grad_(), LABELS)
    torch.testing.assert_close(direct.total, expected.sum(), rtol=1e-10, atol=1e-12)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    _, weight_VD, _ = head()
    first = torch.arange(N)
    total = ops.linear_kd(weight_VD[first], weight_VD, teacher=linear_teacher(), **COMMON).total
    same(total, plain(weight_VD[first] @ weight_VD.t(), logits_of(linear_teacher())), weight_VD)


def test_only_what_is_asked_for_gets_a_gradient():
    hidden_ND, weight_VD, bias_V = head()
    frozen = weight_VD.detach()
    total = ops.linear_kd(hidden_ND, frozen, bias_V.detach(), teacher=linear_teacher()).total
    (grad_ND,) = gradients(total, hidden_ND)
    whole = ops.linear_kd(hidden_ND, weight_VD, bias_V, teacher=linear_teacher()).total
    torch.testing.assert_close(grad_ND, gradients(whole, hidden_ND)[0], rtol=0, atol=0)
    with torch.no_grad():
        found = ops.linear_kd(hidden_ND, weight_VD, bias_V, teacher=linear_teacher())
    assert not found.total.requires_grad
    assert found.total == whole


def test_the_upstream_gradient_counts_and_backward_may_run_again():
    inputs = head()
    total = ops.linear_kd(*inputs, teacher=linear_teacher(), **COMMON).total
    once = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total * 2.5, inputs)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(second, 2.5 * first, rtol=1e-14, atol=0)
    student_NV = normal(N, V).requires_grad_()
    total = ops.dense_kd(student_NV, normal(N, V, seed=1)).total
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(total, student_NV, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_rounded_once(dtype):
    """1/3 is no 16-bit number: multiplying by it in 16 bits would round it as well."""
    student_NV = normal(N, V, dtype=dtype).requires_grad_()
    teacher_NV, third = normal(N, V, seed=1, dtype=dtype), torch.tensor(1 / 3)
    saved_NV = torch.empty(N, V)
    ops.dense_kd(student_NV.detach(), teacher_NV, out=saved_NV)
    (found,) = gradients(ops.dense_kd(student_NV, teacher_NV).total * third, student_NV)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (saved_NV.float() * third).to(dtype), rtol=0, atol=0)


FORMS_OF_LOGITS = {
    "dense": (
        lambda s, t, y: ops.dense_kd(s, t, kind="jsd"),
        lambda s, t, y: reference.divergence(s, t, "jsd"),
    ),
    "topk": (
        lambda s, t, y: ops.topk_kd(s, *_kept(t)),
        lambda s, t, y: reference.topk_divergence(s, *_kept(t)),
    ),
    "label": (lambda s, t, y: ops.label_ce(s, y), lambda s, t, y: reference.cross_entropy(s, y)),
    "mixture": (
        lambda s, t, y: ops.mixture_kd(s, [t, t.flip(1)], torch.ones(len(s), 2)),
        lambda s, t, y: 2 * reference.mixture_divergence(s, [t, t.flip(1)], [0, 0], _halves(s)),
    ),
}


def _kept(teacher_NV):
    kept = ops.topk_teacher(teacher_NV, 16, 1.0)
    return kept.ids_NK, kept.logprobs_NK, kept.tail_N[1.0]


def _halves(logits_NV):
    return torch.full((len(logits_NV), 2), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS_OF_LOGITS)
def test_a_16_bit_gradient_is_as_exact_as_that_of_eager_torch(form, dtype):
    """By a third from upstream, against float64; rounded twice, bf16 had half as much again."""
    ours, eager = FORMS_OF_LOGITS[form]
    student_NV, teacher_NV = 2 * normal(64, 1000, dtype=dtype), 2 * normal(64, 1000, seed=1)
    teacher_NV, labels_N = teacher_NV.to(dtype), torch.arange(64)
    exact_NV = student_NV.double().requires_grad_()
    loss = eager(exact_NV, teacher_NV.double(), labels_N).sum()
    (expected,) = gradients(loss / 3, exact_NV)
    student_NV.requires_grad_()
    third, error = torch.tensor(1 / 3), []
    for total in (
        ours(student_NV, teacher_NV, labels_N).total,
        eager(student_NV, teacher_NV, labels_N).sum(),
    ):
        (found,) = gradients(total * third, student_NV)
        error.append(((found.double() - expected).norm() / expected.norm()).item())
    assert error[0] < 1.001 * error[1] < (3e-3 if dtype == torch.bfloat16 else 3e-4)


def test_the_loss_scale_saves_an_fp16_gradient():
    """1e-9 and less of 1000 columns: nothing is left of it if rounded before the scale of 65536."""
    student_NV = normal(4, 1000, dtype=torch.float16).requires_grad_()
    teacher_NV = student_NV.detach().float() + 1e-3 * normal(4, 1000, seed=1).float()
    exact_NV = student_NV.detach().double().requires_grad_()
    loss = reference.divergence(exact_NV, teacher_NV.double(), temperature=4.0).sum()
    (expected,) = gradients(loss * 65536.0, exact_NV)
    for loss in (
        lambda: ops.dense_kd(student_NV, teacher_NV, temperature=4.0),
        lambda: ops.topk_kd(student_NV, *_all_kept(teacher_NV / 4.0), temperature=4.0),
    ):
        (found,) = gradients(loss().total * 65536.0, student_NV)
        assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def _all_kept(teacher_NV):
    logprobs_NV = teacher_NV.log_softmax(1)
    ids_NV = torch.arange(logprobs_NV.shape[1]).expand_as(logprobs_NV)
    return ids_NV, logprobs_NV, torch.full((len(logprobs_NV),), -torch.inf)


def test_fp32_logits_keep_the_gradient_of_a_student_close_to_its_teacher():
    """The reason for the default: rounded to bf16, the logits hide what is left to learn."""
    weight_VD, hidden_ND = normal(500, 64, seed=1), normal(16, 64, seed=2) / 2
    student_ND = (hidden_ND + 0.02 * normal(16, 64, seed=3)).bfloat16().requires_grad_()
    weight_VD = weight_VD.bfloat16()
    teacher = LinearTeacher(hidden_ND.bfloat16(), weight_VD)
    exact_ND, wide_VD = student_ND.detach().double().requires_grad_(), weight_VD.double()
    loss = reference.divergence(exact_ND @ wide_VD.t(), teacher.hidden_NE.double() @ wide_VD.t())
    (expected,) = gradients(loss.sum(), exact_ND)
    error = {}
    for dtype in (torch.float32, torch.bfloat16):
        total = ops.linear_kd(student_ND, weight_VD, teacher=teacher, logits_dtype=dtype).total
        (found,) = gradients(total, student_ND)
        error[dtype] = ((found.double() - expected).norm() / expected.norm()).item()
    assert error[torch.float32] < 0.01
    assert error[torch.bfloat16] > 5 * error[torch.float32]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    inputs = head()

    def total(*inputs):
        return ops.linear_kd(*inputs, teacher=linear_teacher(), **COMMON).total

    # reentrant checkpointing works with backward() only
    checkpoint(total, *inputs, use_reentrant=reentrant).backward()
    found = tuple(leaf.grad for leaf in inputs)
    torch.testing.assert_close(found, gradients(total(*inputs), *inputs), rtol=0, atol=0)


def test_autocast_casts_as_a_linear_layer_does():
    inputs = head(torch.float32)
    teacher = linear_teacher(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_kd(*inputs, teacher=teacher)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = ops.linear_kd(*halves, teacher=linear_teacher(torch.bfloat16))
    assert found.total.dtype == torch.float32
    assert found.total == expected.total
    for leaf, grad, half in zip(
        inputs, gradients(found.total, *inputs), gradients(expected.total, *halves), strict=True
    ):
        assert grad.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(grad, half.float(), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_take_each_form_of_a_teacher(form):
    inputs, (teacher, _) = head(torch.float32), FORMS[form]()
    makers = {"linear": linear_teacher, "linears": linear_teachers, "mixed": linear_mixture}
    if form in makers:
        teacher = makers[form](dtype=torch.float32)
    plain_total = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0, **COMMON).total
    expected = gradients(plain_total, *inputs)
    with ops.triton_everywhere():
        total = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0, **COMMON).total
        found = gradients(total, *inputs)
    torch.testing.assert_close(total, plain_total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    inputs, (teacher, _) = head(), FORMS[form]()
    hidden_ND = inputs[0].detach()[:0].requires_grad_()
    options = {"labels_N": LABELS[:0], "label_weight": 1.0, "temperature": 2.0}
    found = ops.linear_kd(hidden_ND, *inputs[1:], teacher=_of_no_tokens(teacher), **options)
    assert found.total == 0
    assert len(found.divergence_N) == len(found.label_N) == 0
    for leaf, grad in zip(inputs[1:], gradients(found.total, *inputs[1:]), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def _of_no_tokens(teacher):
    if isinstance(teacher, LinearTeachers):
        return LinearTeachers([*map(_of_no_tokens, teacher.parts)], teacher.places_N[:0])
    if isinstance(teacher, LinearMixture):
        return LinearMixture([*map(_of_no_tokens, teacher.parts)], teacher.rule)
    parts = vars(teacher).copy()
    for name in parts.keys() - {"weight_VE", "bias_V"}:
        tails = name == "tail_N"
        parts[name] = {t: x[:0] for t, x in parts[name].items()} if tails else parts[name][:0]
    return type(teacher)(**parts)


def test_in_place_and_into_another_type():
    student_NV, teacher_NV = normal(N, V, dtype=torch.float32), normal(N, V, seed=1).float()
    leaf = student_NV.clone().requires_grad_()
    (expected,) = gradients(ops.dense_kd(leaf, teacher_NV).total, leaf)
    into_NV = torch.full((N, V + 3), torch.nan, dtype=torch.bfloat16)[:, :V]
    ops.dense_kd(student_NV, teacher_NV, out=into_NV)
    torch.testing.assert_close(into_NV, expected.bfloat16(), rtol=0, atol=0)
    found = ops.dense_kd(student_NV, teacher_NV, out=student_NV)
    torch.testing.assert_close(student_NV, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.total, found.divergence_N.sum())


def test_transposed_and_strided_logits():
    student_NV, teacher_NV = normal(V, N).t().requires_grad_(), normal(N, 2 * V, seed=1)[:, ::2]
    plain_NV = student_NV.detach().contiguous().requires_grad_()
    found = ops.dense_kd(student_NV, teacher_NV).total
    expected = ops.dense_kd(plain_NV, teacher_NV.contiguous()).total
    assert found == expected
    assert torch.equal(*gradients(found, student_NV), *gradients(expected, plain_NV))


@pytest.mark.parametrize("triton", [False, True])
def test_transposed_hidden_states(triton):
    """Their 16-bit gradient is scaled element by element of memory."""
    hidden_ND = normal(D, N, dtype=torch.bfloat16).t().requires_grad_()
    plain_ND = hidden_ND.detach().contiguous().requires_grad_()
    weight_VD = normal(V, D, seed=1, dtype=torch.bfloat16)
    teacher = DenseTeacher(normal(N, V, seed=2).float())
    with ops.triton_everywhere() if triton else nullcontext():
        found, expected = (
            gradients(ops.linear_kd(each, weight_VD, teacher=teacher).total, each)
            for each in (hidden_ND, plain_ND)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_logit_map_is_the_models():
    student_NV, teacher_NV = normal(N, V).requires_grad_(), normal(N, V, seed=1)
    own, other = LogitMap(1.3, 2.0), LogitMap(softcap=1.5)
    found = ops.dense_kd(student_NV, teacher_NV, student_map=own, teacher_map=other).total
    expected = reference.divergence(
        reference.mapped(student_NV, *own), reference.mapped(teacher_NV, *other)
    ).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(found, student_NV), gradients(expected, student_NV))
