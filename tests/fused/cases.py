"""Logits, teachers, weights and heads for the tests of the public losses."""

import re

import torch

from dskd import ops
from dskd.fused import reference
from dskd.ops import (
    DenseTeacher,
    LinearMixture,
    LinearTeacher,
    LinearTeachers,
    MixtureRule,
    TopKTeacher,
)
from tests.fused import expected

N, V, W, D, E, K = 5, 11, 9, 4, 3, 4
KINDS = [kind for kind in ops.KINDS if kind != "mixed"]
WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], dtype=torch.float64)
REVERSE = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0], dtype=torch.float64)
LABELS = torch.tensor([3, 0, 10, -100, 7])


def error_of(message):
    """The class of an error with this message: what is of a wrong kind is a TypeError."""
    kind = re.search(r"must be (a [A-Z]|a list|a tensor|a number|floating|int)", message)
    return TypeError if kind else ValueError


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def kept(teacher_NV, temperature):
    """Ids, log-probabilities and tail at a temperature, with an unused slot at token 1."""
    ids_NK, logprobs_NK, tail_N = expected.kept(teacher_NV, K, temperature, torch.float64)
    tail_N[1] = tail_N[1].logaddexp(logprobs_NK[1, -1])
    ids_NK[1, -1], logprobs_NK[1, -1] = -1, -torch.inf
    return ids_NK, logprobs_NK, tail_N


def topk_teacher(teacher_NV, temperature):
    """The same as the loss takes it: log-probabilities at temperature 1."""
    ids_NK, _, _ = kept(teacher_NV, temperature)
    logprobs_NV = torch.nn.functional.pad(teacher_NV.log_softmax(1), (0, 1), value=-torch.inf)
    column_NK = ids_NK.where(ids_NK >= 0, V)
    rest_NV = logprobs_NV.scatter(1, column_NK, -torch.inf)
    tail_N = (rest_NV / temperature).logsumexp(1)
    return TopKTeacher(ids_NK, logprobs_NV.gather(1, column_NK), {temperature: tail_N})


def gradients(total, *leaves):
    return torch.autograd.grad(total, leaves)


def same(total, wanted, *leaves):
    """Two totals agree, and so do their gradients, in float64."""
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        gradients(total, *leaves), gradients(wanted, *leaves), rtol=1e-9, atol=1e-11
    )


COMMON = {"labels_N": LABELS, "weight": WEIGHT, "label_weight": 0.7}


def head(dtype=torch.float64, bias=True):
    hidden_ND, weight_VD = normal(N, D, seed=5, dtype=dtype), normal(V, D, seed=6, dtype=dtype)
    bias_V = normal(V, seed=7, dtype=dtype) if bias else None
    return [x if x is None else x.requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]


def linear_teacher(dtype=torch.float64, rows=W):
    parts = (normal(N, E, seed=8), normal(rows, E, seed=9), normal(rows, seed=10))
    return LinearTeacher(*(part.to(dtype) for part in parts))


def linear_teachers(dtype=torch.float64, rows=W):
    """Three: of two tokens, of none, and of three, without a bias and of another hidden size."""
    parts = [(2, E, True), (0, E + 2, True), (3, E + 1, False)]
    made = []
    for seed, (count, width, bias) in enumerate(parts, start=20):
        shapes = [(count, width), (rows, width)] + [(rows,)] * bias
        made.append(LinearTeacher(*(normal(*s, seed=seed + len(s), dtype=dtype) for s in shapes)))
    return LinearTeachers(made, torch.tensor([3, 0, 4, 1, 2]))


RULES = {
    "uniform": MixtureRule((1.0, 1.0, 1.0)),
    "fixed": MixtureRule((0.5, 0.0, 3.0)),
    "confidence_soft": MixtureRule((1.0, 1.0, 1.0), 0.2),
    "confidence_hard": MixtureRule((1.0, 1.0, 1.0), 0.0),
}


def linear_mixture(rule="confidence_soft", dtype=torch.float64, rows=W, tokens=N):
    """Three teachers of all tokens, the second surest of tokens 0 and 3; of other hidden sizes."""
    parts = []
    for seed, (width, bias) in enumerate([(E, True), (E + 2, True), (E + 1, False)], start=30):
        shapes = [(tokens, width), (rows, width)] + [(rows,)] * bias
        tensors = [normal(*shape, seed=seed + len(shape), dtype=dtype) for shape in shapes]
        parts.append(LinearTeacher(*tensors))
    parts[1].hidden_NE[0:4:3] *= 3
    return LinearMixture(parts, RULES[rule])


def mixture_of(teacher, temperature):
    """Logits of the mixture at a temperature, by the reference in float64."""
    several = [logits_of(part).double() for part in teacher.parts]
    return reference.mixture_logits(several, teacher.rule, temperature=temperature)


def parts_of(teachers):
    """Hidden states, weight and bias (empty: none) of each linear teacher."""
    tensors = [(t.hidden_NE, t.weight_VE, t.bias_V) for t in teachers]
    return [torch.empty(0).double() if x is None else x for each in tensors for x in each]


def logits_of(teacher):
    if isinstance(teacher, LinearTeachers):
        logits_NV = torch.cat([logits_of(part) for part in teacher.parts])
        return torch.empty_like(logits_NV).index_copy_(0, teacher.places_N, logits_NV)
    logits_NV = teacher.hidden_NE @ teacher.weight_VE.t()
    return logits_NV if teacher.bias_V is None else logits_NV + teacher.bias_V


FORMS = {
    "linears": lambda: (linear_teachers(), logits_of(linear_teachers())),
    "mixed": lambda: (linear_mixture(), mixture_of(linear_mixture(), 2.0)),
    "linear": lambda: (linear_teacher(), logits_of(linear_teacher())),
    "dense": lambda: (DenseTeacher(normal(N, W, seed=1)), normal(N, W, seed=1)),
    "topk": lambda: (topk_teacher(normal(N, V, seed=1), 2.0), kept(normal(N, V, seed=1), 2.0)),
}
