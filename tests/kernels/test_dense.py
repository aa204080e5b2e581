"""The dense kernel against float64 autograd of dskd/fused/reference.py."""

import math
from typing import NamedTuple

import pytest
import torch

from dskd.kernels.common import EVEN, LOOSE, RAGGED, alignment, launch, map_kind
from dskd.kernels.dense import dense_rows
from dskd.kernels.divergence import KINDS
from tests.fused.expected import PLAIN, dense_expected

from .cases import ROUNDING, close, logits, needs_gpu, surroundings

TILED = 601
"""Columns that are two full tiles of fp32 and a rest, and start a row anywhere."""

# numpy computes for the interpreter, and tells of every inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


class Weights(NamedTuple):
    """Per token; `labels` and `label` are None together."""

    labels: torch.Tensor | None
    divergence: torch.Tensor
    reverse: torch.Tensor | None
    label: torch.Tensor | None

    def counted(self):
        """Rows with a weight."""
        vectors = [v for v in (self.divergence, self.reverse, self.label) if v is not None]
        return sum(vector != 0 for vector in vectors) > 0


def weights(rows, columns, device, *, kind="forward_kl", labelled=True):
    """Row 1 counts for nothing, row 2 without its label, row 3 (if labelled) with it alone."""
    divergence = torch.rand(rows, device=device) + 0.1
    reverse = torch.rand(rows, device=device) if kind == "mixed" else None
    label = torch.rand(rows, device=device) + 0.1 if labelled else None
    labels = torch.randint(0, columns, (rows,), device=device) if labelled else None
    for vector in (divergence, reverse, label):
        if vector is not None:
            vector[1:2] = 0
    if labelled:
        label[2:3] = divergence[3:4] = 0
        labels[1:3] = -100
        labels[2:3] = 2**40
    return Weights(labels, divergence, reverse, label)


def run(student, teacher, w, kind, beta=0.3, temperature=1.0, maps=(PLAIN, PLAIN), grad=None):
    """Divergence and label loss; the gradient goes to `grad`, if any."""
    heat = {"kind": kind, "beta": beta, "temperature": temperature}
    both = {"student_map": maps[0], "teacher_map": maps[1]}
    return dense_rows(student, teacher, *w, **heat, **both, grad_NV=grad)


def check(  # the arguments of `run` and tolerances
    student, teacher, w, kind, temperature=1.0, maps=(PLAIN, PLAIN), grad=None,
    relative=3e-5, absolute=3e-7,
):  # fmt: skip
    """Losses and gradient are the reference's; returns the losses."""
    wanted = dense_expected(student, teacher, *w, kind, 0.3, temperature, maps)
    grad = torch.empty_like(student) if grad is None else grad
    divergence, label_loss = run(student, teacher, w, kind, 0.3, temperature, maps, grad)
    assert divergence.dtype == torch.float32
    close("divergence", divergence, wanted[0], relative, 3e-6)
    if w.labels is None:
        assert label_loss is None
    else:
        close("label loss", label_loss, wanted[1], relative, 1e-5)
    close("gradient", grad, wanted[2], relative + ROUNDING[grad.dtype], absolute)
    assert not grad[~w.counted()].any()
    return divergence, label_loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("temperature", "labelled"), [(1.0, False), (1.0, True), (2.0, True), (1.5, True)]
)
def test_kinds_and_labels(device, kind, temperature, labelled):
    """A row that does not count may be NaN; labels without weight may be anything."""
    student, teacher = (logits(4, TILED, device=device) for _ in range(2))
    w = weights(4, TILED, device, kind=kind, labelled=labelled)
    student[1] = teacher[1] = math.nan
    check(student, teacher, w, kind, temperature)


LAYOUTS = {
    # columns of student and teacher, row padding of student, teacher and gradient, offset
    "even": (EVEN, 600, 600, (0, 8, 16), 0),
    "four warps": (EVEN, 2304, 2304, (0, 0, 0), 0),
    "one tile, narrow teacher": (EVEN, 256, 200, (0, 16, 0), 0),
    "odd columns in even rows": (RAGGED, 301, 300, (3, 4, 3), 0),
    "odd rows": (RAGGED, 515, 515, (0, 0, 8), 0),
    "odd rows, narrow teacher": (RAGGED, 601, 301, (0, 300, 0), 0),
    "odd rows, wide rest": (RAGGED, 601, 9, (0, 592, 0), 0),
    "odd start": (RAGGED, 259, 259, (5, 5, 5), 3),
    "few columns": (RAGGED, 9, 7, (0, 2, 0), 0),
    "one column": (RAGGED, 1, 1, (0, 0, 0), 7),
    "phases that differ": (LOOSE, 601, 500, (0, 2, 5), 0),
    "narrow, phases that differ": (LOOSE, 19, 12, (0, 0, 0), 1),
}


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, kind, layout):
    """Around the rows everything is NaN and stays what it is."""
    align, columns, width, paddings, offset = LAYOUTS[layout]
    shapes = zip((columns, width, columns), paddings, strict=True)
    student, teacher, grad = (
        logits(5, c, padding=p, offset=offset, device=device) for c, p in shapes
    )
    assert alignment(student, teacher, grad, widths=(columns, width))[0] == align.value
    w = weights(5, columns, device)
    w.labels[4] = columns - 1
    check(student, teacher, w, kind, 2.0, grad=grad)
    assert surroundings(grad).isnan().all()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("kind", ["forward_kl", "mixed", "skew_reverse_kl"])
@pytest.mark.parametrize(
    "dtypes",
    [(BF16,) * 3, (FP16,) * 3, (FP32,) * 3, (FP32, FP32, BF16), (FP32, BF16, FP16)],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_types(device, kind, dtypes):
    """In place, or from fp32 logits to a 16-bit gradient whose rows have another length."""
    in_place = len(set(dtypes)) == 1
    student, teacher = (logits(4, 301, dtype, device=device) for dtype in dtypes[:2])
    grad = student if in_place else logits(4, 301, dtypes[2], padding=8, device=device)
    before = student.clone()
    w = weights(4, 301, device, kind=kind)
    wanted = dense_expected(before, teacher, *w, kind, temperature=2.0)
    check(student, teacher, w, kind, 2.0, grad=grad)
    # the label's column, which is written twice
    at = (torch.tensor((0, 3), device=device), w.labels[[0, 3]])
    close("label's gradient", grad[at], wanted[2][at], 3e-5 + ROUNDING[dtypes[2]])
    assert in_place or torch.equal(student, before)


@pytest.mark.parametrize("kind", ["forward_kl", "mixed", "jsd"])
@pytest.mark.parametrize(
    "maps",
    [
        ((0.25, 0.0), PLAIN),
        ((1.0, 30.0), (1.0, 30.0)),
        ((0.5, 5.0), (2.0, 0.0)),
        (PLAIN, (2.0, 9.0)),
    ],
    ids=["scale", "softcap", "both", "teacher"],
)
def test_maps(device, kind, maps):
    """Masked logits stay masked under a softcap; large ones saturate it."""
    student, teacher = (logits(4, 301, scale=20.0, device=device) for _ in range(2))
    student[0, 5:280] = teacher[0, 5:280] = -math.inf
    if kind == "jsd":
        student[0, 290] = teacher[2, 8] = -math.inf
    w = weights(4, 301, device, kind=kind)
    w.labels[0] = 300
    check(student, teacher, w, kind, 1.5, maps, absolute=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient(device, kind):
    """The same losses to the last bit, and nothing is written."""
    student, teacher = (logits(4, 301, device=device) for _ in range(2))
    w = weights(4, 301, device, kind=kind)
    wanted = run(student, teacher, w, kind, grad=torch.empty_like(student))
    before = student.clone()
    found = run(student, teacher, w, kind)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(student, before)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_logits(device, kind):
    """Whole tiles masked on either side or both, a near one-hot row, equal rows."""
    student, teacher = (logits(5, TILED, device=device) for _ in range(2))
    student[0, :400] = teacher[0, :400] = -math.inf
    if kind not in ("forward_kl", "mixed"):  # p > 0 where q = 0 has a test of its own
        student[1, 10:280] = -math.inf
    if kind not in ("reverse_kl", "mixed"):
        teacher[2, 300:] = -math.inf
    student[3, 200] = teacher[3, 200] = 60.0
    student[4] = teacher[4]
    w = weights(5, TILED, device, kind=kind, labelled=False)
    w.divergence[1] = 0.5
    divergence, _ = check(student, teacher, w, kind)
    assert abs(divergence[4]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits(device, kind):
    """At 1e4 fp32 knows the logarithm of a probability to 1e-3, and h - E_q[h] less well."""
    student, teacher = (logits(3, 300, device=device) for _ in range(2))
    student[0], teacher[0] = student[0] + 1e4, teacher[0] + 1e4
    if kind not in ("reverse_kl", "mixed"):  # else q > 0 where p = 0
        student[2], teacher[2] = student[2] * 2000, teacher[2] * 2000
    w = weights(3, 300, device, kind=kind, labelled=False)
    check(student, teacher, w, kind, relative=1e-3 if kind == "forward_kl" else 3e-2)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mixed"])
def test_infinite_divergence(device, kind):
    """p > 0 where q = 0, or the other way round: a huge loss and a finite gradient."""
    student, teacher = (logits(2, 300, device=device) for _ in range(2))
    student[0, 10:200] = -math.inf
    teacher[1, 100:290] = -math.inf
    w = weights(2, 300, device, kind=kind, labelled=False)
    w.divergence[1] = 1.0
    grad = torch.empty_like(student)
    divergence, _ = run(student, teacher, w, kind, grad=grad)
    assert divergence[int(kind == "reverse_kl")] == math.inf
    assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "bad"), [(0, math.nan), (1, math.inf)])
def test_what_is_not_a_number_shows(device, kind, side, bad):
    """In its own row only."""
    pair = [logits(3, 300, device=device) for _ in range(2)]
    pair[side][0, 77] = bad
    w = weights(3, 300, device, kind=kind, labelled=False)
    grad = torch.empty_like(pair[0])
    divergence, _ = run(*pair, w, kind, grad=grad)
    assert divergence.isnan().tolist() == [True, False, False]
    assert grad[0].isnan().any()
    assert grad[1:].isfinite().all()


def test_no_rows(device):
    nothing, w = torch.empty(0, 12, device=device), weights(0, 12, device)
    found = run(nothing, nothing, w, "jsd", grad=nothing)
    assert [tensor.shape for tensor in found] == [(0,), (0,)]


def test_launches():
    """All of 1024 threads for a row that two could not keep in the caches, down to one warp."""
    assert launch(131072, BF16) == (8192, 8, 32)
    assert launch(32768, BF16) == (4096, 8, 16)
    assert launch(32768, FP32) == (8192, 4, 32)
    assert launch(16000, FP16) == (2048, 8, 8)
    assert launch(2304, FP32) == (1024, 4, 4)
    assert launch(TILED, FP32) == (256, 4, 1)
    assert [map_kind(m) for m in (PLAIN, (0.5, 0.0), (1.0, 30.0), (0.5, 30.0))] == [0, 1, 2, 2]


GPU_SHAPES = {
    # rows, columns, types of logits and gradient
    "gpt2": (64, 50257, BF16, BF16),
    "qwen": (8, 151936, BF16, BF16),
    "fp32": (64, 32000, FP32, BF16),
    "many": (5000, 1024, FP16, FP16),
}


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_real_shapes(kind, shape):
    rows, columns, dtype, grad_dtype = GPU_SHAPES[shape]
    student, teacher = (logits(rows, columns, dtype, device="cuda") for _ in range(2))
    grad = student if dtype == grad_dtype else student.to(grad_dtype)
    w = weights(rows, columns, "cuda", kind=kind)
    check(student, teacher, w, kind, 2.0, grad=grad)


@needs_gpu
def test_more_than_two_to_the_31_elements():
    """The last rows of 4.3 GB, in place."""
    rows, columns = 16400, 131072
    student, teacher = (torch.zeros(rows, columns, dtype=BF16, device="cuda") for _ in range(2))
    for tensor in (student, teacher):
        tensor[-4:] = logits(4, columns, BF16, device="cuda")
    w = weights(rows, columns, "cuda", labelled=False)
    w.divergence[:-4] = 0
    last = Weights(None, w.divergence[-4:], None, None)
    wanted = dense_expected(student[-4:], teacher[-4:], *last, "forward_kl")
    divergence, _ = run(student, teacher, w, "forward_kl", grad=student)
    close("divergence", divergence[-4:], wanted[0], 3e-5, 3e-6)
    close("gradient", student[-4:], wanted[2], ROUNDING[BF16] + 3e-5, 3e-7)
    assert not student[:-4].any()
