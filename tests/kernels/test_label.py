"""The kernel of the label's cross entropy against float64 autograd of dskd/fused/reference.py."""

import math

import pytest
import torch

from dskd.fused import reference
from dskd.kernels.label import label_rows
from tests.fused.expected import PLAIN, gradient_of

from .cases import ROUNDING, close, logits, needs_gpu, surroundings

# numpy computes for the interpreter, and tells of every inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def labels_and_weights(rows, columns, device):
    """Row 1 does not count, its label is anything."""
    labels = torch.randint(0, columns, (rows,), device=device)
    weight = torch.rand(rows, device=device) + 0.1
    labels[1:2], weight[1:2] = -100, 0
    labels[3:4] = columns - 1
    return labels, weight


def check(student, labels, weight, grad, student_map=PLAIN, *, relative=3e-5, absolute=3e-7):
    """Loss and gradient are the reference's."""
    counted = weight != 0
    weights, rows = weight[counted], student[counted]

    def loss_of(leaf):
        return reference.cross_entropy(reference.mapped(leaf, *student_map), labels[counted])

    wanted = loss_of(rows.double())
    wanted_grad = gradient_of(lambda leaf: (weights * loss_of(leaf)).sum(), rows)
    loss = label_rows(student, labels, weight, student_map=student_map, grad_NV=grad)
    assert loss.dtype == torch.float32
    close("loss", loss[counted], wanted, relative, 1e-5)
    close("gradient", grad[counted], wanted_grad, relative + ROUNDING[grad.dtype], absolute)
    assert not loss[~counted].any()
    assert not grad[~counted].any()
    return loss


LAYOUTS = {
    # columns, row padding of logits and gradient, offset
    "even": (600, (0, 8), 0),
    "four warps": (2304, (0, 0), 0),
    "odd columns in even rows": (301, (3, 3), 0),
    "odd rows": (515, (0, 8), 0),
    "odd start": (259, (5, 5), 3),
    "few columns": (9, (0, 0), 0),
    "one column": (1, (0, 0), 0),
    "phases that differ": (601, (0, 5), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    """Around the rows everything is NaN and stays what it is; a row that does not count is NaN."""
    columns, paddings, offset = LAYOUTS[layout]
    student, grad = (
        logits(5, columns, padding=padding, offset=offset, device=device) for padding in paddings
    )
    student[1] = math.nan
    check(student, *labels_and_weights(5, columns, device), grad)
    assert surroundings(grad).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_types(device, dtype, grad_dtype):
    """In place, or to a 16-bit gradient."""
    student = logits(4, 601, dtype, device=device)
    grad = student if dtype == grad_dtype else torch.empty_like(student, dtype=grad_dtype)
    check(student, *labels_and_weights(4, 601, device), grad)


@pytest.mark.parametrize("student_map", [(0.25, 0.0), (1.0, 30.0), (0.5, 5.0)])
def test_maps_and_masked_logits(device, student_map):
    """-inf stays -inf under a softcap."""
    student = logits(4, 601, scale=20.0, device=device)
    labels, weight = labels_and_weights(4, 601, device)
    student[0, :500] = -math.inf
    labels[0] = 600
    check(student, labels, weight, torch.empty_like(student), student_map, absolute=2e-6)


def test_large_logits(device):
    """1e-3 is what fp32 knows of the logarithm of a probability at logits of 1e4."""
    student = logits(4, 601, device=device)
    student[0] += 1e4
    student[2] *= 3000
    check(student, *labels_and_weights(4, 601, device), torch.empty_like(student), relative=1e-3)


def test_without_gradient(device):
    """The same loss to the last bit, and nothing is written."""
    student = logits(4, 601, device=device)
    labels, weight = labels_and_weights(4, 601, device)
    wanted = check(student, labels, weight, torch.empty_like(student))
    before = student.clone()
    loss = label_rows(student, labels, weight, student_map=PLAIN, grad_NV=None)
    assert torch.equal(loss, wanted)
    assert torch.equal(student, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_shows(device, bad):
    """In its own row only."""
    student = logits(2, 300, device=device)
    student[0, 77] = bad
    labels, weight = torch.tensor((3, 4), device=device), torch.ones(2, device=device)
    grad = torch.empty_like(student)
    loss = label_rows(student, labels, weight, student_map=PLAIN, grad_NV=grad)
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().any()
    assert grad[1].isfinite().all()


def test_no_rows(device):
    nothing = torch.empty(0, 12, device=device)
    labels, weight = nothing[:, 0].long(), nothing[:, 0]
    loss = label_rows(nothing, labels, weight, student_map=PLAIN, grad_NV=nothing)
    assert loss.shape == (0,)


@needs_gpu
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(64, 50257, torch.bfloat16), (8, 151936, torch.bfloat16), (64, 32000, torch.float32)],
)
def test_real_shapes(rows, columns, dtype):
    student = logits(rows, columns, dtype, device="cuda")
    grad = torch.empty_like(student, dtype=torch.bfloat16)
    check(student, *labels_and_weights(rows, columns, "cuda"), grad)
