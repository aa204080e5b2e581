"""Scale and softcap of a student and of teachers of one kind or several, against plain torch."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from dskd import ops
from dskd.batch import (
    SAME,
    LogitMap,
    MixedTeachers,
    MixtureRule,
    Positions,
    ProjectedTeacher,
    ProjectedTeachers,
)
from dskd.fused.topk_teacher import largest_of
from dskd.models.families import LinearProjection

N, V, D = 7, 11, 5
HEAT = 1.7
OWN, FIRST, SECOND = LogitMap(0.3), LogitMap(1.0, 1.5), LogitMap(2.0, 4.0)
PLACES = torch.tensor([3, 0, 6, 4, 1, 2, 5])


def head(of: LogitMap, seed: int) -> LinearProjection:
    torch.manual_seed(seed)
    made = LinearProjection(D, V).double()
    made.map = of
    return made


def by_hand(projection: LinearProjection, hidden_ND: torch.Tensor) -> torch.Tensor:
    scale, softcap = projection.map
    logits_NV = scale * (hidden_ND @ projection.weight.t() + projection.bias)
    return softcap * (logits_NV / softcap).tanh() if softcap else logits_NV


def positions() -> Positions:
    torch.manual_seed(9)
    hidden_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return Positions(hidden_ND, head(OWN, 1), torch.arange(N) % V)


def part(of: LogitMap, seed: int, tokens: int = N) -> ProjectedTeacher:
    projection = head(of, seed)
    return ProjectedTeacher(2 * torch.randn(tokens, D, dtype=torch.float64), projection, V)


def check(signal, wanted_NV) -> None:
    """The loss of the signal, and its gradients, are those of the teacher's logits."""
    student = positions()
    inputs = [student.hidden_ND, *student.projection.parameters()]
    losses = ops.positions_kd(student, signal, temperature=HEAT, label_weight=0.5)
    found = torch.autograd.grad(losses.total, inputs)
    logits_NV = by_hand(student.projection, student.hidden_ND)
    student_NV, teacher_NV = ((x / HEAT).log_softmax(1) for x in (logits_NV, wanted_NV.detach()))
    loss = kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
    loss = loss + 0.5 * cross_entropy(logits_NV, student.labels_N, reduction="sum")
    torch.testing.assert_close(losses.total, loss)
    torch.testing.assert_close(found, torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("of", [SAME, OWN, FIRST, SECOND])
def test_one_teacher(of):
    signal = part(of, 2)
    check(signal, by_hand(signal.projection, signal.hidden_NE))


@pytest.mark.parametrize("of", [SAME, OWN, FIRST, SECOND])
def test_a_teacher_whose_logits_were_kept(of):
    signal = part(of, 2)
    check(largest_of(signal, V, [HEAT]), by_hand(signal.projection, signal.hidden_NE))


@pytest.mark.parametrize("maps", [(FIRST, SECOND), (FIRST, FIRST), (SAME, OWN), (SAME, SAME)])
def test_several_teachers_of_tokens_of_their_own(maps):
    parts = [part(maps[0], 2, tokens=3), part(maps[1], 3, tokens=4)]
    logits_NV = torch.cat([by_hand(each.projection, each.hidden_NE) for each in parts])
    wanted_NV = torch.empty_like(logits_NV).index_copy(0, PLACES, logits_NV)
    check(ProjectedTeachers(parts, PLACES), wanted_NV)


@pytest.mark.parametrize("sharpness", [math.inf, 0.2, 0.0])
@pytest.mark.parametrize("maps", [(FIRST, SECOND), (FIRST, FIRST), (SAME, OWN), (SAME, SAME)])
def test_teachers_that_are_mixed(maps, sharpness):
    parts = [part(of, 2 + k) for k, of in enumerate(maps)]
    logits = [by_hand(each.projection, each.hidden_NE) for each in parts]
    entropies = [torch.special.entr(x.softmax(1)).sum(1) for x in logits]
    sure_Nn = torch.stack([1 - entropy / math.log(V) for entropy in entropies], 1)
    shares_Nn = torch.tensor([0.4, 0.6]).double().log().expand(N, 2)
    if sharpness == 0.0:
        shares_Nn = torch.nn.functional.one_hot(sure_Nn.argmax(1), 2).double()
    elif sharpness == math.inf:
        shares_Nn = shares_Nn.softmax(1)
    else:
        shares_Nn = (shares_Nn + sure_Nn / sharpness).softmax(1)
    distributions_NVn = torch.stack([(x / HEAT).softmax(1) for x in logits], 2)
    mixed_NV = (distributions_NVn * shares_Nn[:, None]).sum(2)
    signal = MixedTeachers(parts, MixtureRule((0.4, 0.6), sharpness))
    check(signal, HEAT * mixed_NV.log())


def test_a_masked_logit_stays_masked_by_its_own_map():
    parts = [part(FIRST, 2), part(SECOND, 3)]
    for each in parts:
        each.projection.bias.data[4] = -torch.inf
    signal = MixedTeachers(parts, MixtureRule((1.0, 1.0)))
    student = positions()
    losses = ops.positions_kd(student, signal, temperature=HEAT)
    logits = [by_hand(each.projection, each.hidden_NE) for each in parts]
    for logits_NV in logits:
        logits_NV[:, 4] = -torch.inf
    mixed_NV = sum((x / HEAT).softmax(1) for x in logits) / 2
    student_NV = (by_hand(student.projection, student.hidden_ND) / HEAT).log_softmax(1)
    wanted_N = kl_div(student_NV, mixed_NV, reduction="none").sum(1).detach()
    torch.testing.assert_close(losses.divergence_N, wanted_N)


def test_the_logits_of_positions_are_mapped():
    student = replace(positions(), projection=head(SECOND, 1))
    wanted_NV = by_hand(student.projection, student.hidden_ND)
    torch.testing.assert_close(student.logits_NV, wanted_NV)
    assert student.logits_NV.abs().max() <= 4.0
    loss = ops.positions_ce(student).total
    wanted = cross_entropy(wanted_NV, student.labels_N, reduction="sum")
    torch.testing.assert_close(loss, wanted)


def test_maps_of_several_are_checked():
    hidden_ND, weight_VD = torch.randn(N, D), torch.randn(V, D)
    teacher = ops.LinearTeacher(hidden_ND, weight_VD)
    several = ops.LinearTeachers([teacher], torch.arange(N), [SAME, SAME])
    with pytest.raises(ValueError, match=r"^maps: 2 for 1 teachers$"):
        ops.linear_kd(hidden_ND, weight_VD, teacher=several)
    several = replace(several, maps=[LogitMap(-1.0)])
    with pytest.raises(ValueError, match=r"^maps\[0\]\.scale: must be positive and finite"):
        ops.linear_kd(hidden_ND, weight_VD, teacher=several)
    several = replace(several, maps=[SAME])
    with pytest.raises(ValueError, match=r"^teacher_map: each of several has its own$"):
        ops.linear_kd(hidden_ND, weight_VD, teacher=several, teacher_map=OWN)
