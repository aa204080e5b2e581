"""Teachers that are mixed token by token: one visit of all heads, the mixture made by chunks."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from dskd import ops
from dskd.batch import MixedTeachers, Positions, ProjectedTeacher
from dskd.fused import reference
from dskd.fused.mixed_logits import MIXTURE_BUFFERS, Mixture
from dskd.models.families import LinearProjection
from dskd.ops import DenseTeacher, LinearMixture, LinearTeacher, LogitMap, MixtureRule
from tests import heads
from tests.fused.cases import (
    COMMON,
    REVERSE,
    RULES,
    D,
    N,
    V,
    W,
    gradients,
    head,
    linear_mixture,
    logits_of,
    mixture_of,
    normal,
    same,
)

INF, NAN = math.inf, math.nan


def options_of(kind):
    reverse = {"reverse_weight": REVERSE} if kind == "mixed" else {}
    return {"kind": kind, "beta": 0.3, **COMMON, **reverse}


# ---- the reference -------------------------------------------------------------------------------


def test_shares_by_hand():
    """Two tokens: an even teacher (confidence 0) beside one that gives 9 of 10 to a token."""
    even, sure = (torch.tensor([p]).double().log() for p in ([0.5, 0.5], [0.9, 0.1]))
    confidence = 1 + (0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    found_Nn = reference.confidences([even, sure])
    assert found_Nn.tolist() == [pytest.approx([0.0, confidence], abs=1e-7)]
    odds = {
        MixtureRule((1.0, 1.0)): 1.0,
        MixtureRule((1.0, 3.0)): 3.0,
        MixtureRule((1.0, 1.0), 0.2): math.exp(confidence / 0.2),
        MixtureRule((1.0, 3.0), 0.2): 3 * math.exp(confidence / 0.2),
        MixtureRule((1.0, 1.0), 0.0): INF,
        MixtureRule((1.0, 0.0), 0.0): 0.0,
    }
    for rule, odd in odds.items():
        share = reference.mixture_shares(found_Nn, rule)[0, 1].item()
        assert share == pytest.approx(1.0 if odd == INF else odd / (1 + odd), abs=1e-6), rule


def test_equally_sure_teachers_leave_all_to_the_first():
    confidence_Nn = torch.tensor([[0.3, 0.7, 0.7], [0.5, 0.5, 0.5]])
    found_Nn = reference.mixture_shares(confidence_Nn, MixtureRule((1.0, 1.0, 1.0), 0.0))
    assert found_Nn.tolist() == [[0, 1, 0], [1, 0, 0]]


# ---- the fused loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ops.KINDS)
def test_it_is_the_loss_of_the_mixtures_logits(kind, rule, temperature):
    """Value and gradients, for every divergence."""
    teacher = linear_mixture(rule, rows=V if kind in ("reverse_kl", "mixed") else W)
    inputs, how = head(), {"temperature": temperature, **options_of(kind)}
    wanted = ops.dense_kd(nn.functional.linear(*inputs), mixture_of(teacher, temperature), **how)
    expected = gradients(wanted.total, *inputs)
    for chunk in (1, 2, None):
        found = ops.linear_kd(*inputs, teacher=teacher, chunk=chunk, **how)
        torch.testing.assert_close(found.total, wanted.total, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients(found.total, *inputs), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.label_N, wanted.label_N, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_values_against_the_reference(rule):
    inputs, teacher = head(), linear_mixture(rule)
    found_N = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0).divergence_N
    several = [logits_of(part) for part in teacher.parts]
    share_Nn = reference.mixture_shares(reference.confidences(several), teacher.rule)
    assert rule != "confidence_hard" or share_Nn.argmax(1).unique().numel() > 1
    wanted_N = reference.mixture_divergence(
        nn.functional.linear(*inputs), several, [0, 0, 0], share_Nn, temperature=2.0
    )
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-10, atol=0)
    assert gradcheck(lambda *x: ops.linear_kd(*x, teacher=teacher, chunk=2, **COMMON).total, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_twice_the_same_teacher_is_that_teacher(rule):
    inputs, alone = head(), linear_mixture().parts[0]
    both = LinearMixture([alone, alone, alone], RULES[rule])
    how = {"temperature": 2.0, **COMMON}
    found = ops.linear_kd(*inputs, teacher=both, **how).total
    same(found, ops.linear_kd(*inputs, teacher=alone, **how).total, *inputs)


def test_the_weights_count_relative_to_each_other_and_0_is_nothing():
    inputs, parts = head(), linear_mixture().parts
    loss = partial(ops.linear_kd, *inputs, temperature=2.0, **COMMON)
    one = loss(teacher=LinearMixture(parts, MixtureRule((1.0, 2.0, 0.5))))
    ten = loss(teacher=LinearMixture(parts, MixtureRule((10.0, 20.0, 5.0))))
    same(one.total, ten.total, *inputs)
    parts[1].weight_VE[:] = parts[2].hidden_NE[:] = NAN
    alone = loss(teacher=parts[0])
    first = loss(teacher=LinearMixture(parts, MixtureRule((3.0, 0.0, 0.0))))
    same(first.total, alone.total, *inputs)


def test_a_sharp_rule_is_the_hard_one_and_overflows_nothing():
    teacher = linear_mixture("confidence_hard", torch.float32)
    sharp = LinearMixture(teacher.parts, MixtureRule((1.0, 1.0, 1.0), 1e-5))
    inputs = head(torch.float32)
    wanted, found = (ops.linear_kd(*inputs, teacher=each).divergence_N for each in (teacher, sharp))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_where_no_teacher_believes_in_a_token_fp32_can_hold_the_reverse_kl_is_finite():
    """Probabilities of e^-200, which fp32 has not got; their logarithms it has."""
    weight_VE = normal(V, 2, seed=1).float()
    weight_VE[3] = -200.0
    part = LinearTeacher(torch.ones(N, 2).float() / 2, weight_VE)
    teacher = LinearMixture([part, part], MixtureRule((1.0, 1.0), 0.2))
    found_N = ops.linear_kd(*head(torch.float32), teacher=teacher, kind="reverse_kl").divergence_N
    exact = ops.linear_kd(
        *head(), teacher=DenseTeacher(logits_of(part).double()), kind="reverse_kl"
    )
    assert found_N.isfinite().all() and found_N.max() > 1
    torch.testing.assert_close(found_N.double(), exact.divergence_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_teachers_of_other_types_than_the_student(rule, triton):
    """bf16, fp16 and fp32 beside an fp32 student; the mixture is that of their values in fp64."""
    teacher = linear_mixture(rule)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    parts = [
        LinearTeacher(*(x if x is None else x.to(dtype) for x in vars(part).values()))
        for part, dtype in zip(teacher.parts, dtypes, strict=True)
    ]
    exact = [
        LinearTeacher(*(x if x is None else x.double() for x in vars(part).values()))
        for part in parts
    ]
    how = {"temperature": 2.0, **COMMON}
    inputs = head(torch.float32)
    wanted = ops.linear_kd(
        *(x.double() for x in inputs), teacher=LinearMixture(exact, teacher.rule), **how
    )
    with ops.triton_everywhere() if triton else torch.enable_grad():
        found = ops.linear_kd(*inputs, teacher=LinearMixture(parts, teacher.rule), chunk=2, **how)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), wanted.total, rtol=1e-5, atol=0)
    for mine, other in zip(
        gradients(found.total, *inputs), gradients(wanted.total, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("rule", ["uniform", "confidence_soft", "confidence_hard"])
def test_a_teacher_that_is_no_number_is_not_hidden(rule, place):
    teacher = linear_mixture(rule)
    teacher.parts[place].hidden_NE[2] = NAN
    found_N = ops.linear_kd(*head(), teacher=teacher).divergence_N
    assert found_N.isnan().tolist() == [False, False, True, False, False]


def test_masked_logits_of_a_teacher_are_tokens_of_probability_0():
    parts = [LinearTeacher(p.hidden_NE, p.weight_VE, normal(W)) for p in linear_mixture().parts]
    parts[0].bias_V[1] = -INF
    for k in range(3):
        parts[k].bias_V[5] = -INF
    for rule in RULES.values():
        teacher = LinearMixture(parts, rule)
        found = ops.linear_kd(*(inputs := head()), teacher=teacher, temperature=2.0, **COMMON)
        logits_NV = nn.functional.linear(*inputs)
        wanted = ops.dense_kd(logits_NV, mixture_of(teacher, 2.0), temperature=2.0, **COMMON)
        same(found.total, wanted.total, *inputs)


A, B, C = linear_mixture().parts
UNEQUAL = LinearTeacher(C.hidden_NE, C.weight_VE[1:])
EVEN = MixtureRule((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("teacher", "how", "message"),
    [
        (LinearMixture([], EVEN), {}, r"weights: 3 for 0 teachers"),
        (LinearMixture([], MixtureRule(())), {}, r"weights: must be at least 0, finite and not"),
        (LinearMixture([A, B], EVEN), {}, r"weights: 3 for 2 teachers"),
        (LinearMixture([A, B, C], MixtureRule((1.0, -1.0, 1.0))), {}, r"weights: must be at least"),
        (LinearMixture([A, B], MixtureRule((0.0, 0.0))), {}, r"weights: .*not all 0"),
        (LinearMixture([A, B], MixtureRule((1.0, NAN))), {}, r"weights: .*nan"),
        (LinearMixture([A, B, C], MixtureRule((1.0,) * 3, -0.1)), {}, r"sharpness: .*-0\.1"),
        (LinearMixture([A, B, C], MixtureRule((1.0,) * 3, NAN)), {}, r"sharpness: must be .*nan"),
        (LinearMixture([A, B, UNEQUAL], EVEN), {}, r"teachers: have 9, 9, 8 columns"),
        (LinearMixture([A, LinearTeacher(B.hidden_NE[:3], B.weight_VE), C], EVEN), {},
         r"teachers\[1\]'s hidden: has 3 rows where there are 5 tokens"),
        (LinearMixture([A, B, C], EVEN), {"teacher_map": LogitMap(2.0)}, r"teacher_map: the tea"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(teacher, how, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_kd(*head(), teacher=teacher, **how)


def test_a_mixture_is_not_made_in_16_bits():
    with pytest.raises(ValueError, match=r"logits_dtype: a mixture is made in fp32, .*bfloat16"):
        ops.linear_kd(*head(torch.bfloat16), teacher=linear_mixture(), logits_dtype=torch.bfloat16)


def test_each_teachers_logits_stand_alone():
    """Only the next teacher's are made once one's are mixed: so many matrices as were said."""
    made = []
    wrote = [lambda into, k=k: made.append(into.data_ptr()) or into.fill_(k) for k in range(5)]
    buffers = [_Room(2, 3) for _ in range(MIXTURE_BUFFERS)]
    out_CW = torch.empty(2, 3)
    Mixture(0.2, *[1.0] * 5, temperature=2.0).make(out_CW, wrote, buffers)
    assert len(made) == 5 and len({*made}) == 1
    torch.testing.assert_close(out_CW.softmax(1), torch.full((2, 3), 1 / 3))


class _Room:
    def __init__(self, rows, columns):
        self._whole = torch.empty(rows, columns)

    def first(self, rows):
        return self._whole[:rows]


# ---- through the heads of modules ----------------------------------------------------------------


class Noted(LinearProjection):
    """A head that notes when it is entered and left, as one that gathers its weights would."""

    def __init__(self, name, notes, width, columns):
        super().__init__(width, columns)
        self.name, self.notes = name, notes

    def forward(self, *args, **kwargs):
        self.notes.append(f"{self.name} {len(args[0])}")
        found = super().forward(*args, **kwargs)
        self.notes.append(f"/{self.name}")
        return found


def panel(tokens=N, columns=V, rule="confidence_soft"):
    """Positions of a student, and its teachers, whose heads have padding columns; their notes."""
    torch.manual_seed(3)
    notes = []
    student = Noted("student", notes, D, V)
    parts = [
        ProjectedTeacher(torch.randn(tokens, D + k), Noted(name, notes, D + k, columns), W)
        for k, name in enumerate("abc")
    ]
    hidden_ND = torch.randn(tokens, D, requires_grad=True)
    positions = Positions(hidden_ND, student, torch.arange(tokens) % W)
    return positions, MixedTeachers(parts, RULES[rule]), notes


@pytest.mark.parametrize("kind", ops.KINDS)
def test_positions_kd_is_that_of_the_logits_mixed(kind):
    """Padding columns of the teachers' heads count for nothing, not in the confidences either."""
    positions, signal, notes = panel()
    how = {"kind": kind, "beta": 0.3, "temperature": 1.7, "label_weight": 0.7}
    if kind == "mixed":
        how["reverse_weight"] = REVERSE.float()
    leaves = (positions.hidden_ND, *positions.projection.parameters())
    several = [heads.logits_of(part).double() for part in signal.parts]
    mixed = reference.mixture_logits(several, signal.rule, temperature=1.7).float()
    wanted = ops.positions_kd(positions, DenseTeacher(mixed), **how)
    notes.clear()
    found = ops.positions_kd(positions, signal, **how)
    assert notes == ["a 5", "b 5", "c 5", "student 5", "/student", "/c", "/b", "/a"]
    torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.label_N, wanted.label_N, rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        gradients(found.total, *leaves), gradients(wanted.total, *leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_without_a_position_every_head_is_entered_still():
    positions, signal, notes = panel(tokens=0)
    found = ops.positions_kd(positions, signal, temperature=1.0, label_weight=1.0)
    assert [note for note in notes if note[0] != "/"] == ["a 0", "b 0", "c 0", "student 0"]
    assert found.total == 0
    assert not any(g.any() for g in gradients(found.total, *positions.projection.parameters()))


@pytest.mark.parametrize("rule", RULES)
def test_no_more_logits_exist_than_of_a_chunk(monkeypatch, rule):
    """400 tokens of 2,000 columns, 16 at a time; the closed forms have scratch of 5 such chunks."""
    positions, signal, _ = panel(400, 2000, rule)
    student = LinearProjection(D, 2000)
    positions = Positions(positions.hidden_ND, student, positions.labels_N)
    parts = [ProjectedTeacher(p.hidden_NE, p.projection, 2000) for p in signal.parts]
    heads.small_chunks(monkeypatch, 16)
    with heads.Largest(monkeypatch) as largest:
        losses = ops.positions_kd(
            positions, MixedTeachers(parts, signal.rule), temperature=2.0, label_weight=0.5
        )
        losses.total.backward()
    assert losses.total.isfinite() and student.weight.grad.any()
    assert 16 * 2000 <= largest.elements <= 5 * 16 * 2000
