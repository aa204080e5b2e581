"""Teachers of a share of the tokens each: one visit of the student's head, all in token order."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from dskd import ops
from dskd.batch import Positions, ProjectedTeacher, ProjectedTeachers
from dskd.fused import per_token, reference
from dskd.models.families import LinearProjection
from dskd.ops import LinearTeacher, LinearTeachers
from tests import heads
from tests.fused.cases import (
    COMMON,
    REVERSE,
    WEIGHT,
    D,
    N,
    V,
    W,
    error_of,
    gradients,
    head,
    linear_teacher,
    linear_teachers,
    logits_of,
    same,
)


def options_of(kind):
    reverse = {"reverse_weight": REVERSE} if kind == "mixed" else {}
    return {"kind": kind, "beta": 0.3, "temperature": 1.7, **reverse}


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
@pytest.mark.parametrize("kind", ops.KINDS)
def test_each_token_has_its_teachers_divergence(kind, chunk):
    """Value and gradients of dense logits that are put together; with chunks of 3, one of them has
    tokens of two teachers."""
    inputs = head()
    teacher = linear_teachers(rows=V if kind in ("reverse_kl", "mixed") else W)
    how = {**options_of(kind), **COMMON}
    found = ops.linear_kd(*inputs, teacher=teacher, chunk=chunk, **how)
    wanted = ops.dense_kd(nn.functional.linear(*inputs), logits_of(teacher), **how)
    same(found.total, wanted.total, *inputs)
    torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.label_N, wanted.label_N, rtol=1e-10, atol=1e-12)


def test_values_against_the_reference():
    inputs, teacher = head(), linear_teachers()
    found_N = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0).divergence_N
    logits_NV = nn.functional.linear(*inputs)
    wanted_N = reference.divergence(logits_NV, logits_of(teacher), temperature=2.0)
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-10, atol=0)
    assert gradcheck(lambda *x: ops.linear_kd(*x, teacher=teacher, chunk=2, **COMMON).total, inputs)


def test_the_kernels_take_them_in_16_bits():
    inputs, teacher = head(torch.bfloat16), linear_teachers(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = [
        LinearTeacher(*(x if x is None else x.double() for x in vars(part).values()))
        for part in teacher.parts
    ]
    how = {"temperature": 2.0, "chunk": 3, **COMMON}
    wanted = ops.linear_kd(*exact, teacher=LinearTeachers(parts, teacher.places_N), **how)
    with ops.triton_everywhere():
        found = ops.linear_kd(*inputs, teacher=teacher, **how)
    torch.testing.assert_close(found.total.double(), wanted.total, rtol=1e-5, atol=0)
    for mine, exactly in zip(
        gradients(found.total, *inputs), gradients(wanted.total, *exact), strict=True
    ):
        torch.testing.assert_close(mine.double(), exactly, rtol=2e-2, atol=2e-2)


def test_one_of_all_tokens_in_order_is_the_only_one():
    inputs, teacher = head(), linear_teacher()
    alone = ops.linear_kd(*inputs, teacher=teacher, **COMMON)
    listed = LinearTeachers([teacher], torch.arange(N))
    found = ops.linear_kd(*inputs, teacher=listed, **COMMON)
    assert found.total == alone.total and found.divergence_N.equal(alone.divergence_N)
    for a, b in zip(gradients(found.total, *inputs), gradients(alone.total, *inputs), strict=True):
        assert a.equal(b)


def with_parts(*parts, places=None):
    return LinearTeachers(parts, linear_teachers().places_N if places is None else places)


A, B, C = linear_teachers().parts


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (with_parts(), r"teachers: there are none"),
        (with_parts(A, B), r"teachers: have 2 rows where there are 5 tokens"),
        (with_parts(A, B, LinearTeacher(C.hidden_NE, C.weight_VE[1:])),
         r"teachers: have 9, 9, 8 columns; if those beyond are padding, .*vocabulary="),
        (with_parts(A, LinearTeacher(B.hidden_NE, C.weight_VE), C),
         r"teachers\[1\]'s weight: has 4 columns, the hidden states 5"),
        (with_parts(A, B, C, places=torch.tensor([3, 0, 4, 1, 1])), r"places: are not each of the"),
        (with_parts(A, B, C, places=torch.arange(4)), r"places: has shape \(4,\) where there are"),
        (with_parts(A, B, C, places=torch.arange(5).int()), r"places: must be int64, not torch"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(teacher, message):
    with pytest.raises(error_of(message), match=message):
        ops.linear_kd(*head(), teacher=teacher)


def test_a_weight_that_is_not_finite_is_named_by_its_token(monkeypatch):
    monkeypatch.setattr(per_token, "looks", lambda values: False)
    weight_N = torch.ones(N).index_fill(0, torch.tensor([1]), torch.nan)
    with per_token.weights_kept() as kept:
        ops.linear_kd(*head(), teacher=linear_teachers(), weight=weight_N)
    assert per_token.first_non_finite(kept) == "weight: nan at [1]"


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


def routed(sizes=(2, 0, 3), places=(3, 0, 4, 1, 2), columns=V):
    """Positions of a student, and its teachers, whose heads have padding columns; their notes."""
    torch.manual_seed(3)
    notes = []
    student = Noted("student", notes, D, V)
    teachers = [Noted(name, notes, D + k, columns) for k, name in enumerate("abc")]
    hidden_ND = torch.randn(sum(sizes), D, requires_grad=True)
    labels_N = torch.arange(sum(sizes)) % W
    parts = [
        ProjectedTeacher(torch.randn(size, D + k), teacher, W)
        for k, (size, teacher) in enumerate(zip(sizes, teachers, strict=True))
    ]
    return (
        Positions(hidden_ND, student, labels_N),
        ProjectedTeachers(parts, torch.tensor(places, dtype=torch.int64)),
        notes,
    )


@pytest.mark.parametrize("kind", ops.KINDS)
def test_positions_kd_is_that_of_the_logits_put_together(kind):
    positions, signal, notes = routed()
    how = {**options_of(kind), "weight": WEIGHT.float(), "label_weight": 0.7}
    if kind == "mixed":
        how["reverse_weight"] = REVERSE.float()
    leaves = (positions.hidden_ND, *positions.projection.parameters())
    whole = ops.DenseTeacher(heads.logits_of(signal))
    wanted = ops.positions_kd(positions, whole, **how)
    notes.clear()
    found = ops.positions_kd(positions, signal, **how)
    assert notes == ["a 2", "b 0", "c 3", "student 5", "/student", "/c", "/b", "/a"]
    torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.label_N, wanted.label_N, rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        gradients(found.total, *leaves), gradients(wanted.total, *leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_without_a_position_every_head_is_entered_still():
    positions, signal, notes = routed((0, 0, 0), ())
    found = ops.positions_kd(positions, signal, temperature=1.0, label_weight=1.0)
    assert [note for note in notes if note[0] != "/"] == ["a 0", "b 0", "c 0", "student 0"]
    assert found.total == 0
    assert not any(g.any() for g in gradients(found.total, *positions.projection.parameters()))


def test_no_more_logits_exist_than_of_a_chunk(monkeypatch):
    """400 tokens of 2,000 columns, 16 at a time; the closed forms have scratch of 5 such chunks."""
    sizes = (190, 0, 210)
    torch.manual_seed(4)
    positions, signal, _ = routed(sizes, torch.randperm(400).tolist(), columns=2000)
    student = LinearProjection(D, 2000)
    positions = Positions(positions.hidden_ND, student, positions.labels_N)
    parts = [ProjectedTeacher(p.hidden_NE, p.projection, 2000) for p in signal.parts]
    signal = ProjectedTeachers(parts, signal.places_N)
    heads.small_chunks(monkeypatch, 16)
    with heads.Largest(monkeypatch) as largest:
        losses = ops.positions_kd(positions, signal, temperature=2.0, label_weight=0.5)
        losses.total.backward()
    assert losses.total.isfinite() and student.weight.grad.any()
    assert 16 * 2000 <= largest.elements <= 5 * 16 * 2000
