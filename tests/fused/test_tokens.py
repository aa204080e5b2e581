"""Tokens along several axes, masks as weights, labels of 32 bits, and what no argument may be."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dskd import ops
from dskd.fused import reference
from dskd.ops import (
    DenseTeacher,
    LinearMixture,
    LinearTeacher,
    LinearTeachers,
    MixedTopK,
    MixtureRule,
    TopKTeacher,
)
from tests.fused.cases import gradients, normal, same
from tests.ranks import run_ranks

B, T, V, D, E = 2, 3, 11, 4, 5
S_BTV, Z_BTV = normal(B, T, V), normal(B, T, V, seed=1)
H_BTD, W_VD = normal(B, T, D, seed=2), normal(V, D, seed=3)
LABELS_BT = torch.tensor([[3, 0, -100], [10, 7, 2]])
WEIGHT_BT = torch.tensor([[0.5, 1.0, 2.0], [0.0, 1.5, 3.0]], dtype=torch.float64)
HEAT = 2.0


def flat(value):
    """[N, ...] of [B, T, ...] in what a loss takes; what has no tokens stays as it is."""
    if isinstance(value, torch.Tensor) and value.shape[:2] == (B, T):
        return value.reshape(B * T, *value.shape[2:])
    if isinstance(value, list):
        return [flat(each) for each in value]
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    if isinstance(value, DenseTeacher | LinearTeacher | TopKTeacher | LinearMixture | MixedTopK):
        return type(value)(**{name: flat(each) for name, each in vars(value).items()})
    return value


def heads(count=1):
    several = [
        LinearTeacher(normal(B, T, E, seed=s), normal(V, E, seed=s + 5), normal(V, seed=s + 9))
        for s in range(20, 20 + count)
    ]
    return several if count > 1 else several[0]


KEPT = ops.topk_teacher(Z_BTV, 4, [1.0, HEAT])
RULE = MixtureRule((1.0, 2.0), 0.3)
LABELLED = {"labels_N": LABELS_BT, "label_weight": 0.7, "weight": WEIGHT_BT}
linear = partial(ops.linear_kd, weight_VD=W_VD, temperature=HEAT, **LABELLED)
LOSSES = {
    "dense": partial(ops.dense_kd, teacher_NW=Z_BTV, kind="jsd", temperature=HEAT, **LABELLED),
    "mixed kind": partial(
        ops.dense_kd, teacher_NW=Z_BTV, kind="mixed", reverse_weight=2 * WEIGHT_BT, **LABELLED
    ),
    "topk": partial(
        ops.topk_kd,
        ids_NK=KEPT.ids_NK,
        logprobs_NK=KEPT.logprobs_NK,
        tail_N=KEPT.tail_N[1.0],
        **LABELLED,
    ),
    "mixture": partial(
        ops.mixture_kd, teachers=[Z_BTV, S_BTV.flip(2)], weights_Nn=normal(B, T, 2, seed=4).abs()
    ),
    "labels": partial(ops.label_ce, labels_N=LABELS_BT, label_weight=WEIGHT_BT),
    "linear, labels": partial(ops.linear_kd, weight_VD=W_VD, teacher=None, labels_N=LABELS_BT),
    "linear, dense": partial(linear, teacher=DenseTeacher(Z_BTV)),
    "linear, linear": partial(linear, teacher=heads()),
    "linear, topk": partial(linear, teacher=KEPT),
    "linear, mixture": partial(linear, teacher=LinearMixture(heads(2), RULE)),
    "linear, topk mixture": partial(linear, teacher=MixedTopK([KEPT, KEPT], RULE, V)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_along_two_axes_are_those_along_one(name: str) -> None:
    """The same losses and gradients to the last bit, and of the shape that the labels have."""
    loss = LOSSES[name]
    student = (H_BTD if "linear" in name else S_BTV).clone().requires_grad_()
    found = loss(student)
    wanted = partial(loss.func, **flat(loss.keywords))(flat(student))
    assert found.total == wanted.total and found.total.ndim == 0
    assert found.divergence_N.shape == (B, T)
    assert torch.equal(flat(found.divergence_N), wanted.divergence_N)
    assert found.label_N.shape == ((0,) if name == "mixture" else (B, T))
    assert torch.equal(found.label_N.flatten(), wanted.label_N)
    assert torch.equal(*gradients(found.total, student), *gradients(wanted.total, student))


def test_the_values_are_those_of_the_references() -> None:
    """In float64: dense, top-k, mixture and labels of [B, T, V]."""
    student = S_BTV.clone().requires_grad_()
    counted_N = flat(LABELS_BT) >= 0
    student_NV, teacher_NV, weight_N = flat(student), flat(Z_BTV), flat(WEIGHT_BT) * counted_N

    def labels_of(logits_NV):
        return reference.cross_entropy(logits_NV, flat(LABELS_BT)) * counted_N

    divergence_N = reference.divergence(student_NV, teacher_NV, "jsd", temperature=HEAT)
    wanted = (weight_N * divergence_N + 0.7 * labels_of(student_NV)).sum()
    same(LOSSES["dense"](student).total, wanted, student)
    same(LOSSES["labels"](student).total, (weight_N * labels_of(flat(student))).sum(), student)
    student_NV = flat(student)
    kept = (*map(flat, (KEPT.ids_NK, KEPT.logprobs_NK, KEPT.tail_N[1.0])), "tail")
    divergence_N = reference.topk_divergence(student_NV, *kept)
    wanted = (weight_N * divergence_N + 0.7 * labels_of(student_NV)).sum()
    same(LOSSES["topk"](student).total, wanted, student)
    given = flat(LOSSES["mixture"].keywords)
    weights_Nn, student_NV = given["weights_Nn"], flat(student)
    divergence_N = reference.mixture_divergence(student_NV, given["teachers"], [0, 0], weights_Nn)
    wanted = (weights_Nn.sum(1) * divergence_N).sum()
    same(LOSSES["mixture"](student).total, wanted, student)
    hidden = H_BTD.clone().requires_grad_()
    wanted = labels_of(flat(hidden) @ W_VD.t()).sum()
    same(LOSSES["linear, labels"](hidden).total, wanted, hidden)


def test_teachers_with_a_share_each_have_places_through_all_axes() -> None:
    several = [LinearTeacher(normal(M, E, seed=M), normal(V, E, seed=9)) for M in (2, 4)]
    teacher = LinearTeachers(several, torch.tensor([3, 0, 4, 1, 2, 5]))
    found, wanted = linear(H_BTD, teacher=teacher), LOSSES["linear, dense"].func
    wanted = wanted(flat(H_BTD), W_VD, teacher=teacher, temperature=HEAT, **flat(LABELLED))
    assert found.total == wanted.total and torch.equal(flat(found.label_N), wanted.label_N)


def test_a_top_k_teacher_has_the_axes_of_its_logits() -> None:
    wanted = ops.topk_teacher(flat(Z_BTV), 4, HEAT)
    found = ops.topk_teacher(Z_BTV, 4, HEAT)
    assert found.ids_NK.shape == found.logprobs_NK.shape == (B, T, 4)
    assert torch.equal(flat(found.ids_NK), wanted.ids_NK)
    assert torch.equal(flat(found.logprobs_NK), wanted.logprobs_NK)
    assert torch.equal(found.tail_N[HEAT], wanted.tail_N[HEAT].view(B, T))


def test_masks_are_weights_and_labels_may_have_32_bits() -> None:
    mask_BT = WEIGHT_BT > 0.7
    exact = {"weight": mask_BT.double(), "label_weight": 2.0, "labels_N": LABELS_BT}
    wanted = ops.dense_kd(S_BTV, Z_BTV, **exact)
    assert wanted.total > 0
    for kind in (torch.bool, torch.int64, torch.uint8):
        less = {"weight": mask_BT.to(kind), "labels_N": LABELS_BT.int()}
        assert ops.dense_kd(S_BTV, Z_BTV, **(exact | less)).total == wanted.total
    wanted = ops.label_ce(S_BTV, LABELS_BT, label_weight=mask_BT.double()).total
    assert ops.label_ce(S_BTV, LABELS_BT.int(), label_weight=mask_BT).total == wanted > 0
    unweighted = ops.label_ce(S_BTV, LABELS_BT.int(), label_weight=0)
    assert unweighted.total == 0
    every = torch.ones(B, T, 2, dtype=torch.bool)
    pair = [Z_BTV, S_BTV.flip(2)]
    found, wanted = (ops.mixture_kd(S_BTV, pair, w).total for w in (every, every.double()))
    assert found == wanted > 0


def test_labels_alone_count_once_and_beside_a_teacher_as_it_is_said() -> None:
    alone = ops.linear_kd(H_BTD, W_VD, teacher=None, labels_N=LABELS_BT)
    labelled = LABELS_BT >= 0
    wanted = nn.functional.cross_entropy(
        (H_BTD @ W_VD.t())[labelled], LABELS_BT[labelled], reduction="sum"
    )
    torch.testing.assert_close(alone.total, wanted, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"label_weight: missing; .* beside the teacher\? \(0: "):
        ops.dense_kd(S_BTV, Z_BTV, LABELS_BT)
    masked = ops.dense_kd(S_BTV, Z_BTV, LABELS_BT, label_weight=0)
    assert masked.label_N.shape == (0,)
    assert masked.total == ops.dense_kd(S_BTV, Z_BTV, weight=labelled).total


def test_the_gradient_goes_to_its_place_or_nowhere() -> None:
    leaf = S_BTV.clone().requires_grad_()
    (wanted,) = gradients(ops.dense_kd(leaf, Z_BTV).total, leaf)
    room_BTV = torch.empty(B, T, V + 2, dtype=torch.float64)[..., :V]
    ops.dense_kd(S_BTV, Z_BTV, out=room_BTV)
    torch.testing.assert_close(room_BTV, wanted, rtol=0, atol=0)
    own_BTV = S_BTV.clone()
    ops.dense_kd(own_BTV, Z_BTV, out=own_BTV)
    torch.testing.assert_close(own_BTV, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"out: its tokens have no common stride in memory"):
        ops.dense_kd(S_BTV, Z_BTV, out=torch.empty(B, T + 1, V, dtype=torch.float64)[:, 1:])


def test_slices_of_longer_logits_are_taken() -> None:
    """``logits[:, :-1]`` as for a causal LM, whose gradient reaches the right rows."""
    student = normal(B, T + 1, V).requires_grad_()
    found = ops.label_ce(student[:, :-1], LABELS_BT).total
    moved_BT = nn.functional.pad(LABELS_BT, (0, 1), value=-100)
    wanted = ops.label_ce(student, moved_BT).total
    same(found, wanted, student)


def test_no_tokens() -> None:
    student = S_BTV[:0].clone().requires_grad_()
    kept = ops.topk_teacher(Z_BTV[:0], 4, 1.0)
    found = ops.topk_kd(student, kept.ids_NK, kept.logprobs_NK, kept.tail_N[1.0])
    assert kept.ids_NK.shape == (0, T, 4) and found.divergence_N.shape == (0, T)
    assert found.total == 0 and gradients(found.total, student)[0].shape == (0, T, V)


def on_rank(rank: int) -> list:
    """Total, losses and gradient of this rank's columns, along two axes and along one."""
    mine = (slice(0, 5), slice(5, V), slice(V, V))[rank]
    how = {**LABELLED, "labels_N": LABELS_BT.int(), "temperature": HEAT}
    results = []
    for prepared in (lambda x: x, flat):
        student = S_BTV[..., mine].clone().requires_grad_()
        arguments = (prepared(student), prepared(Z_BTV[..., mine]))
        found = ops.vocab_parallel_kd(*arguments, group=dist.group.WORLD, **prepared(how))
        found.total.backward()
        results.append([found.total.item(), *map(torch.Tensor.numpy, [*found[1:], student.grad])])
    return results


def test_a_vocabulary_over_three_ranks_of_which_one_has_none() -> None:
    wanted = ops.dense_kd(S_BTV, Z_BTV, temperature=HEAT, **LABELLED)
    for several, one in run_ranks(on_rank, world=3):
        assert several[1].shape == several[2].shape == (B, T)
        for mine, other in zip(several[1:], one[1:], strict=True):
            assert (mine.ravel() == other.ravel()).all()
        assert several[0] == one[0] == pytest.approx(wanted.total.item(), rel=1e-12)
        assert several[1] == pytest.approx(wanted.divergence_N.numpy(), rel=1e-10)


NO = "must be a tensor, not"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dense_kd(S_BTV.tolist(), Z_BTV), f"student: {NO} list"),
        (lambda: ops.dense_kd(S_BTV, None), f"teacher: {NO} NoneType"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, [1, 2]), f"labels: {NO} list"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, weight="1"), "weight: must be a number, or a tensor"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, weight=[1.0]), "weight: .* not list"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, temperature="2"), "temperature: must be a number"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, beta=None), "beta: must be a number, not NoneType"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, weight=WEIGHT_BT + 0j), "weight: must be floating"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, out=[]), f"out: {NO} list"),
        (lambda: ops.label_ce(S_BTV, LABELS_BT.bool()), "labels: must be int64 or int32, not"),
        (lambda: ops.topk_kd(S_BTV, [1], KEPT.logprobs_NK), f"ids: {NO} list"),
        (lambda: ops.topk_kd(S_BTV, KEPT.ids_NK, KEPT.logprobs_NK, [1.0]), "tail: .* not list"),
        (lambda: ops.mixture_kd(S_BTV, iter([Z_BTV]), Z_BTV), "teachers: must be a list"),
        (lambda: ops.mixture_kd(S_BTV, [None], Z_BTV), rf"teachers\[0\]: {NO} NoneType"),
        (lambda: ops.mixture_kd(S_BTV, [Z_BTV], 1.0), f"weights: {NO} float"),
        (lambda: ops.linear_kd(H_BTD, nn.Linear(D, V), teacher=None), f"weight: {NO} Linear"),
        (lambda: ops.linear_kd(H_BTD, W_VD, True, teacher=None), f"bias: {NO} bool"),
        (lambda: linear(H_BTD, teacher=DenseTeacher(None)), f"teacher: {NO} NoneType"),
        (lambda: linear(H_BTD, teacher=LinearTeacher(H_BTD, None)), f"teacher's weight: {NO} None"),
        (lambda: linear(H_BTD, teacher=Z_BTV), "teacher: must be a DenseTeacher, .* not Tensor"),
        (lambda: ops.topk_teacher([], 2, 1.0), f"logits: {NO} list"),
    ],
)  # fmt: skip
def test_what_is_of_a_wrong_kind_is_named(call, message) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dense_kd(S_BTV, Z_BTV[:, 1:]),
         r"teacher: has shape \(2, 2, 11\), not \[2, 3, \.\.\.\]"),
        (lambda: ops.dense_kd(S_BTV, flat(Z_BTV)), r"teacher: has shape \(6, 11\), not"),
        (lambda: ops.label_ce(S_BTV, flat(LABELS_BT)), r"labels: has shape \(6,\), not \[2, 3\]"),
        (lambda: ops.dense_kd(S_BTV, Z_BTV, weight=WEIGHT_BT[0]), r"weight: has shape \(3,\), not"),
        (lambda: linear(H_BTD, teacher=ops.topk_teacher(flat(Z_BTV), 4, HEAT)),
         r"teacher's tail: has shape \(6,\), not"),
        (lambda: ops.mixture_kd(S_BTV, [Z_BTV, Z_BTV], WEIGHT_BT),
         r"weights: has shape \(2, 3\), not \[2, 3, \.\.\.\]"),
    ],
)  # fmt: skip
def test_what_does_not_have_the_tokens_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
