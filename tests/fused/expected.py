"""What the row functions of both backends must give: by the references and autograd, in float64.

Rows without any weight are not read; their losses and gradients are 0.
"""

import math

import torch

from dskd.fused import reference

PLAIN = (1.0, 0.0)


def gradient_of(loss, student_NV):
    """Gradient, by autograd in float64, of a scalar of the student's logits."""
    leaf = student_NV.detach().double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient


def dense_expected(
    student, teacher, labels, weight, reverse, label_weight, kind, beta=0.3, temperature=1.0,
    maps=(PLAIN, PLAIN),
):  # fmt: skip
    """Divergence (``mixed``: weighted), label loss (None without labels) and gradient."""
    label_weight = None if labels is None else label_weight
    vectors = [v for v in (weight, reverse, label_weight) if v is not None]
    rows = sum(vector != 0 for vector in vectors) > 0
    teacher = reference.mapped(teacher[rows].double(), *maps[1])
    weight, reverse, labels, label_weight = (
        v if v is None else v[rows] for v in (weight, reverse, labels, label_weight)
    )

    def parts(leaf):
        z = reference.mapped(leaf, *maps[0])

        def one(kind):
            return reference.divergence(z, teacher, kind, beta=beta, temperature=temperature)

        if kind == "mixed":
            total = divergence = weight * one("forward_kl") + reverse * one("reverse_kl")
        else:
            divergence = one(kind)
            total = weight * divergence
            divergence = divergence * (weight != 0)
        if labels is None:
            return total.sum(), divergence
        loss = reference.cross_entropy(z, labels.where(label_weight != 0, -1))
        return (total + label_weight * loss).sum(), divergence, loss

    def everywhere(of_rows):
        whole = of_rows.new_zeros(len(rows), *of_rows.shape[1:])
        whole[rows] = of_rows
        return whole

    _, divergence, *loss = parts(student[rows].double())
    gradient = gradient_of(lambda leaf: parts(leaf)[0], student[rows])
    return everywhere(divergence), everywhere(loss[0]) if loss else None, everywhere(gradient)


def kept(teacher_NV, k, temperature=1.0, dtype=torch.float32):
    """Ids, log-probabilities and tail as a cache gives them, computed in float64."""
    logprobs_NV = (teacher_NV.double() / temperature).log_softmax(1)
    logprobs_NK, ids_NK = logprobs_NV.topk(k, 1)
    tail_N = logprobs_NV.scatter(1, ids_NK, -math.inf).logsumexp(1)
    return ids_NK, logprobs_NK.to(dtype), tail_N.to(dtype)


def topk_expected(
    student, signal, labels, weight, label_weight, mode, temperature=1.0, student_map=PLAIN
):
    """Divergence, label loss (None without labels) and gradient; ``signal``: ids, logs, tail."""
    label_weight = None if labels is None else label_weight
    used = weight != 0 if label_weight is None else (weight != 0) | (label_weight != 0)
    ids, logprobs, tail = (
        p if p is None else p.where(used.view(-1, *[1] * (p.ndim - 1)), -1) for p in signal
    )
    tail = None if tail is None else tail.double()

    def both(leaf):
        z = reference.mapped(leaf, *student_map)
        found = reference.topk_divergence(
            z, ids, logprobs.double(), tail, mode, temperature=temperature
        )
        return found, None if labels is None else reference.cross_entropy(z, labels)

    def total(leaf):
        divergence, label = both(leaf)
        counted = weight.double() @ divergence.where(weight != 0, 0.0)
        return counted if labels is None else counted + label_weight.double() @ label

    student = student.where(used[:, None], 0.0)
    divergence, label = both(student.double())
    label = None if labels is None else label * (label_weight != 0)
    return divergence.where(weight != 0, 0.0), label, gradient_of(total, student)


def mixture_expected(student, teachers, firsts, weight, temperature=1.0, student_map=PLAIN):
    """Divergence and the gradient of its sum over rows, each times its weights' sum."""
    read = weight != 0
    student = student.where(read.any(1, keepdim=True), 0.0).double()
    teachers = [t.where(read[:, k : k + 1], 0.0).double() for k, t in enumerate(teachers)]
    weight = weight.double()

    def divergence(leaf):
        z = reference.mapped(leaf, *student_map)
        return reference.mixture_divergence(z, teachers, firsts, weight, temperature=temperature)

    gradient = gradient_of(lambda leaf: weight.sum(1) @ divergence(leaf), student)
    return divergence(student), gradient


def poisoned(like, dtype=None):
    """NaN of the same shape, to be written over."""
    return torch.full(like.shape, math.nan, dtype=dtype or like.dtype)


def agree(got, grad, wanted, tolerance):
    """The losses and the gradient are as wanted, None where nothing is."""
    for found, right in zip((*got, grad), wanted, strict=True):
        if right is None:
            assert found is None
        else:
            torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
