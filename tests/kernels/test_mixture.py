"""The kernel of several teachers against float64: divergence and gradient of every arrangement."""

import math

import pytest
import torch

from dskd.fused import reference
from dskd.kernels import mixture
from tests.fused.expected import PLAIN, mixture_expected
from tests.kernels.cases import GPU, ROUNDING, close, far_apart, logits, surroundings

COLUMNS = 16384 if GPU else 504


def everywhere(columns, teachers=3):
    return [(0, columns)] * teachers


def parts(columns, *widths):
    """Disjoint ranges side by side, the last one up to the end."""
    firsts = [sum(widths[:k]) for k in range(len(widths) + 1)]
    return list(zip(firsts, [*widths, columns - firsts[-1]], strict=True))


def awkward(columns, ranges, device, dtype=torch.float32, padding=0, offset=0, paddings=None):
    """Student, teachers and weights, a row for each difficulty.

    Rows: usual; ignored, all NaN; without the last teacher, whose row is NaN; masked vocabulary;
    far from 0.
    """
    student = logits(5, columns, dtype, padding=padding, offset=offset, device=device)
    paddings = paddings or [columns + padding - width for _, width in ranges]
    teachers = [
        logits(5, width, dtype, padding=extra, offset=(offset + first) % 8, device=device)
        for (first, width), extra in zip(ranges, paddings, strict=True)
    ]
    weight = torch.rand(5, len(ranges), device=device) + 0.1
    student[1], weight[1] = math.nan, 0.0
    weight[2, -1] = 0.0
    for teacher in teachers:
        teacher[1] = math.nan
        teacher[3, 1::3] = -math.inf
        teacher[4] -= 100
    teachers[-1][2] = math.nan
    student[3, columns // 2 :] -= 40
    student[4] += 100
    return student, teachers, [first for first, _ in ranges], weight


def run(student, teachers, firsts, weight, temperature=1.0, logit_map=PLAIN, grad=None):
    """Divergence; the gradient goes to `grad`, if any."""
    how = {"temperature": temperature, "student_map": logit_map, "grad_NV": grad}
    return mixture.mixture_rows(student, teachers, firsts, weight, **how)


def check(
    student, teachers, firsts, weight, *, temperature=1.0, logit_map=PLAIN, grad="other",
    tolerance=3e-5,
):  # fmt: skip
    """Run the kernel into `grad` ("other", "in place", None, a tensor) and compare everything."""
    wanted = mixture_expected(student, teachers, firsts, weight, temperature, logit_map)
    read = [teacher.clone() for teacher in teachers]
    if grad == "in place":
        grad = student
    elif grad == "other":
        grad = torch.empty_like(student)
    divergence = run(student, teachers, firsts, weight, temperature, logit_map, grad)
    close("divergence", divergence, wanted[0], tolerance, tolerance / 10)
    assert (divergence == 0).tolist() == (weight == 0).all(1).tolist()
    if grad is not None:
        close("gradient", grad, wanted[1], tolerance + ROUNDING[grad.dtype], tolerance / 30)
        assert not grad[(weight == 0).all(1)].any()
        assert surroundings(grad).isnan().all()
    for before, after in zip(read, teachers, strict=True):
        assert torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)


ARRANGEMENTS = {
    "one": everywhere(COLUMNS, 1),
    "same": everywhere(COLUMNS),
    "classes": parts(COLUMNS, 104, 200),
    "odd classes": parts(COLUMNS, 37, 200, 1),
    "overlapping": [(8, 96), (0, COLUMNS), (0, COLUMNS - 24)],
    "gap": [(0, 40), (COLUMNS - 40, 32)],
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_arrangements(arrangement, device):
    check(*awkward(COLUMNS, ARRANGEMENTS[arrangement], device), temperature=2.0)


@pytest.mark.parametrize("logit_map", [(0.5, 0.0), (0.8, 5.0)])
def test_maps(logit_map, device):
    check(*awkward(COLUMNS, everywhere(COLUMNS), device), temperature=1.5, logit_map=logit_map)


@pytest.mark.parametrize(
    ("columns", "padding", "offset"),
    [(1040, 8, 0), (7, 0, 0), (261, 6, 3), (50257 if GPU else 1537, 0, 0)],
    ids=["even", "less than a group", "ragged, strided", "ragged"],
)
def test_places_in_memory(columns, padding, offset, device):
    """Rows on 16 bytes or at any phase; teachers that lie as the student does, or each its way."""

    def case(ranges, **how):
        return awkward(columns, ranges, device, padding=padding, offset=offset, **how)

    check(*case(everywhere(columns)), grad="in place")
    check(*case(everywhere(columns, 2), paddings=[padding + 1, padding]), grad=None)
    # classes of a tenth, each in a tensor of its own without gaps
    tenth = max(1, columns // 10)
    check(*case(parts(columns, tenth, tenth), paddings=[0, 0, 0]), grad="in place")
    # another phase than the student's: no 16-byte loads
    elsewhere = logits(5, columns, padding=padding + 1, offset=offset + 1, device=device)
    check(*case(everywhere(columns, 2)), grad=elsewhere)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "ranges"),
    [
        (torch.bfloat16, None, everywhere(COLUMNS)),
        (torch.bfloat16, None, parts(COLUMNS, 99, 160)),
        (torch.float16, None, everywhere(COLUMNS + 1)),
        (torch.float32, torch.bfloat16, everywhere(COLUMNS + 1)),
        (torch.bfloat16, torch.float32, parts(COLUMNS, 96, 160)),
    ],
)
def test_types(dtype, grad_dtype, ranges, device):
    """In place in the logits' own type, or into a buffer of another."""
    columns = sum(ranges[-1])
    case = awkward(columns, ranges, device, dtype=dtype)
    grad = "in place"
    if grad_dtype is not None:
        grad = torch.empty(5, columns, dtype=grad_dtype, device=device)
    check(*case, temperature=1.5, grad=grad)


def test_extreme_logits(device):
    """|logit| up to 1e4, as far as fp32 goes; small weights count like large ones."""
    student, teachers, firsts, weight = awkward(COLUMNS, everywhere(COLUMNS), device)
    student[0] += 1e4
    teachers[0][0] -= 1e4
    teachers[1][0] *= 2e3
    weight[3] *= 1e-12
    check(student, teachers, firsts, weight, tolerance=3e-3)


def test_many_teachers(device):
    check(*awkward(COLUMNS // 2, everywhere(COLUMNS // 2, 6), device))


def test_one_teacher_is_dense_kl(device):
    student, (teacher,), firsts, weight = awkward(COLUMNS, everywhere(COLUMNS, 1), device)
    divergence = run(student, [teacher], firsts, weight, 2.0)
    wanted = reference.divergence(student.double(), teacher.double(), temperature=2.0)
    rows = [0, 3, 4]
    close("divergence", divergence[rows], wanted[rows])


def test_student_rules_a_token_out(device):
    """A loss without bound, a finite gradient W (q - pbar)."""
    student, teachers, firsts, weight = awkward(COLUMNS, everywhere(COLUMNS), device)
    student[0, :5] = -math.inf
    grad = torch.empty_like(student)
    divergence = run(student, teachers, firsts, weight, grad=grad)
    assert divergence[0] == math.inf
    assert divergence[2:].isfinite().all()
    assert grad.isfinite().all()
    q = student[0].double().softmax(0)
    w = weight[0].double()
    p = sum(w[k] * teacher[0].double().softmax(0) for k, teacher in enumerate(teachers))
    close("gradient", grad[0], w.sum() * q - p)


def test_nan_is_not_hidden(device):
    student, teachers, firsts, weight = awkward(COLUMNS, everywhere(COLUMNS), device)
    student[0, 7] = math.nan
    teachers[1][4, COLUMNS - 1] = math.nan
    divergence = run(student, teachers, firsts, weight)
    assert divergence.isnan().tolist() == [True, False, False, False, True]


def test_no_rows(device):
    nothing = torch.empty(0, 40, device=device)
    divergence = run(nothing, [nothing, nothing], [0, 0], nothing[:, :2], grad=nothing)
    assert divergence.shape == (0,)


def test_elements_beyond_int32(device, tmp_path):
    """The student's and a teacher's last row lie 2^31 elements behind the first."""
    student, teacher = (far_apart(tmp_path / n, COLUMNS, device) for n in ("student", "teacher"))
    teachers = [teacher, logits(3, COLUMNS, torch.float16, device=device)]
    weight = torch.rand(3, 2, device=device)
    wanted = mixture_expected(student, teachers, [0, 0], weight)
    divergence = run(student, teachers, [0, 0], weight, grad=student)
    close("divergence", divergence, wanted[0])
    close("gradient", student, wanted[1], 3e-5 + ROUNDING[torch.float16])
