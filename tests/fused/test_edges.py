"""Masked rows, infinite losses and weights of 0: closed forms and kernels say the same."""

from contextlib import nullcontext

import pytest
import torch

from dskd import ops
from dskd.fused import reference
from tests.fused.expected import kept

N, V = 4, 40
LABELS = torch.tensor([3, 1, 2, 5])
KINDS = [kind for kind in ops.KINDS if kind != "mixed"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=[False, True], ids=["closed forms", "kernels"])
def _implementation(request):
    with ops.triton_everywhere() if request.param else nullcontext():
        yield


def logits(seed):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def only_the_label_counts_in_row_1(student_NV, loss):
    """What the loss gives; there, it has no divergence and the gradient of the cross entropy."""
    leaf_NV = student_NV.clone().requires_grad_()
    found, alone = loss(leaf_NV), ops.label_ce(leaf_NV, LABELS, label_weight=0.7)
    (grad_NV,) = torch.autograd.grad(found.total, leaf_NV)
    (expected_NV,) = torch.autograd.grad(alone.total, leaf_NV)
    assert found.divergence_N[1] == 0
    torch.testing.assert_close(found.label_N, alone.label_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_NV[1], expected_NV[1], rtol=1e-4, atol=1e-6)
    assert grad_NV.isfinite().all() and found.total.isfinite()
    return found


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("kind", ops.KINDS)
def test_where_only_the_label_counts_the_teacher_may_be_anything(kind, temperature, bad):
    student_NV, teacher_NV = logits(0), logits(1)
    teacher_NV[1] = bad
    weight_N = torch.tensor([1.0, 0.0, 1.0, 2.0])
    options = {"kind": kind, "temperature": temperature, "weight": weight_N, "label_weight": 0.7}
    if kind == "mixed":
        options["reverse_weight"] = weight_N
    found = only_the_label_counts_in_row_1(
        student_NV, lambda s_NV: ops.dense_kd(s_NV, teacher_NV, LABELS, **options)
    )
    assert (found.divergence_N[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("mode", ops.MODES)
def test_where_only_the_label_counts_a_top_k_teacher_may_be_anything(mode):
    student_NV, (ids_NK, logprobs_NK, tail_N) = logits(0), kept(logits(1), 4)
    logprobs_NK[1], tail_N[1] = NAN, NAN
    options = {"mode": mode, "weight": torch.tensor([1.0, 0.0, 1.0, 2.0]), "label_weight": 0.7}
    tail_N = tail_N if mode == "tail" else None
    only_the_label_counts_in_row_1(
        student_NV, lambda s_NV: ops.topk_kd(s_NV, ids_NK, logprobs_NK, tail_N, LABELS, **options)
    )


def same(found_N, expected_N):
    torch.testing.assert_close(
        found_N.double(), expected_N.double(), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def masked():
    """Row 0 has its label and most likely tokens masked, row 1 everything."""
    student_NV, teacher_NV = logits(0), logits(1)
    student_NV[0, LABELS[0]] = -INF
    student_NV[0, teacher_NV[0].topk(2).indices] = -INF
    student_NV[1] = -INF
    return student_NV, teacher_NV


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_and_undefined_dense_losses(kind):
    student_NV, teacher_NV = masked()
    if kind == "reverse_kl":
        teacher_NV[2, 7] = -INF
    found = ops.dense_kd(student_NV, teacher_NV, LABELS, kind=kind, label_weight=1.0)
    expected_N = reference.divergence(student_NV, teacher_NV, kind, beta=0.5)
    label_N = reference.cross_entropy(student_NV, LABELS)
    assert expected_N[1].isnan() and label_N.tolist()[0] == INF and label_N[1].isnan()
    assert not (kind == "forward_kl" and expected_N[0] != INF)
    same(found.divergence_N, expected_N)
    same(found.label_N, label_N)
    same(ops.label_ce(student_NV, LABELS).label_N, label_N)
    swapped_N = ops.dense_kd(teacher_NV, student_NV, kind=kind).divergence_N
    same(swapped_N, reference.divergence(teacher_NV, student_NV, kind, beta=0.5))


@pytest.mark.parametrize("mode", ops.MODES)
def test_infinite_and_undefined_top_k_losses(mode):
    student_NV, teacher_NV = masked()
    ids_NK, logprobs_NK, tail_N = kept(teacher_NV, 4)
    tail_N = tail_N if mode == "tail" else None
    found = ops.topk_kd(
        student_NV.clone(), ids_NK, logprobs_NK, tail_N, LABELS, mode=mode, label_weight=1.0
    )
    expected_N = reference.topk_divergence(student_NV, ids_NK, logprobs_NK, tail_N, mode)
    assert expected_N[0] == INF and expected_N[1].isnan()
    same(found.divergence_N, expected_N)
    same(found.label_N, reference.cross_entropy(student_NV, LABELS))


def test_infinite_and_undefined_mixtures():
    student_NV, teacher_NV = masked()
    teachers, weights_Nn = [teacher_NV, logits(2)], torch.ones(N, 2)
    teachers[1][3] = -INF
    found_N = ops.mixture_kd(student_NV, teachers, weights_Nn).divergence_N
    expected_N = reference.mixture_divergence(student_NV, teachers, [0, 0], weights_Nn)
    assert expected_N[0] == INF and expected_N[[1, 3]].isnan().all()
    same(found_N, expected_N)
