"""The sparse top-k kernel against float64: losses and gradients of every mode and odd shape."""

import math

import pytest
import torch

from dskd.kernels import topk
from tests.fused.expected import PLAIN, topk_expected
from tests.fused.expected import kept as kept_of
from tests.kernels.cases import GPU, ROUNDING, close, far_apart, logits, surroundings

MODES = ("tail", "renormalised", "truncated")
COLUMNS = 16384 if GPU else 500


def awkward(columns, kept, temperature, device, dtype=torch.float32, padding=0):
    """Student, teacher's arguments, labels and weights, a row for each difficulty.

    Rows: label kept; ignored, and NaN; slots unused, and no label; confident (q_rest ~ 0), label
    not kept; no slot used; masked vocabulary.
    """
    student = logits(6, columns, dtype, padding=padding, device=device)
    teacher = logits(6, columns, device=device)
    ids, logprobs, tail = kept_of(teacher, kept, temperature)
    student[1] = math.nan
    ids[1] = 1 << 30
    logprobs[2, -2:] = -math.inf
    ids[2, -2:] = -1
    student[3, ids[3, 0]] = 90.0
    ids[4], logprobs[4], tail[4] = -1, -math.inf, 0.0
    student[5, ids[5, 1]] = -20.0
    outside = torch.ones(columns, dtype=torch.bool, device=device)
    outside[ids[5]] = False
    outside = outside.nonzero()[:, 0]
    student[5, outside[: len(outside) // 2]] = -math.inf
    labels = torch.full((6,), columns - 1, device=device)
    labels[0], labels[1], labels[2] = ids[0, 1], -100, -100
    labels[3] = next(label for label in range(columns) if label not in ids[3].tolist())
    weight = torch.tensor([0.7, 0.0, 1.3, 0.4, 0.9, 1.0], device=device)
    label_weight = torch.tensor([0.6, 0.0, 0.0, 1.1, 0.5, 0.0], device=device)
    return student, (ids, logprobs, tail), labels, (weight, label_weight)


def run(student, teacher, labels, weights, mode, *, temperature=1.0, logit_map=PLAIN, grad=None):
    """Divergence and label loss; the gradient goes to `grad`, if any."""
    how = {"mode": mode, "temperature": temperature, "student_map": logit_map, "grad_NV": grad}
    return topk.topk_rows(student, *teacher, labels, *weights, **how)


def check(
    student, teacher, labels, weights, mode, *, temperature=1.0, logit_map=PLAIN, grad="other",
    tolerance=3e-5,
):  # fmt: skip
    """Run the kernel into `grad` ("other", "in place", None, a tensor) and compare everything."""
    weights = weights if labels is not None else (weights[0], None)
    ids, logprobs, tail = teacher
    teacher = ids, logprobs, tail if mode == "tail" else None
    wanted = topk_expected(student, teacher, labels, *weights, mode, temperature, logit_map)
    outside = surroundings(student)
    if grad == "in place":
        grad = student
    elif grad == "other":
        grad = torch.empty_like(student)
    heat = {"temperature": temperature, "logit_map": logit_map}
    divergence, label_loss = run(student, teacher, labels, weights, mode, **heat, grad=grad)
    close("divergence", divergence, wanted[0], tolerance, tolerance / 10)
    assert (label_loss is None) == (labels is None)
    if labels is not None:
        close("label loss", label_loss, wanted[1], tolerance, tolerance / 10)
    if grad is not None:
        close("gradient", grad, wanted[2], tolerance + ROUNDING[grad.dtype], tolerance / 30)
        assert not grad[(wanted[2] == 0).all(1)].any()
    # the rows' neighbours in memory are nobody's to write
    assert surroundings(student).equal(outside) or outside.isnan().all()
    assert surroundings(student).isnan().all()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, temperature, labelled, device):
    student, teacher, labels, weights = awkward(COLUMNS + 3, 9, temperature, device)
    check(student, teacher, labels if labelled else None, weights, mode, temperature=temperature)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("logit_map", [(0.5, 0.0), (0.8, 5.0)])
def test_maps(mode, logit_map, device):
    student, teacher, labels, weights = awkward(COLUMNS, 9, 2.0, device, padding=8)
    check(student, teacher, labels, weights, mode, temperature=2.0, logit_map=logit_map)


@pytest.mark.parametrize(
    ("columns", "padding"),
    [(1040, 8), (7, 0), (261, 6), (50257, 0) if GPU else (1537, 0)],
    ids=["even", "less than a group", "ragged, strided", "ragged"],
)
def test_places_in_memory(columns, padding, device):
    """Rows on 16 bytes, at any phase, and the gradient in the same place or another."""
    kept = min(columns - 1, 20)
    for grad in ("in place", None):
        case = awkward(columns, kept, 1.0, device, padding=padding)
        check(*case, "tail", grad=grad)
    # another phase than the student's: no 16-byte loads
    case = awkward(columns, kept, 2.0, device, padding=padding)
    elsewhere = logits(6, columns, padding=padding + 1, offset=3, device=device)
    check(*case, "tail", temperature=2.0, grad=elsewhere)
    assert surroundings(elsewhere).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "columns", "mode"),
    [
        (torch.bfloat16, None, COLUMNS + 4, "tail"),
        (torch.bfloat16, None, COLUMNS + 1, "truncated"),
        (torch.float16, None, COLUMNS + 1, "tail"),
        (torch.float32, torch.bfloat16, COLUMNS + 4, "renormalised"),
        (torch.float32, torch.bfloat16, COLUMNS + 1, "tail"),
        (torch.bfloat16, torch.float32, COLUMNS + 1, "tail"),
    ],
)
def test_types(dtype, grad_dtype, columns, mode, device):
    """In place in the logits' own type, or into a buffer of another."""
    case = awkward(columns, 9, 1.5, device, dtype=dtype)
    grad = "in place"
    if grad_dtype is not None:
        grad = torch.empty(6, columns, dtype=grad_dtype, device=device)
    check(*case, mode, temperature=1.5, grad=grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", [1, 33, 1024])
def test_numbers_of_kept_tokens(kept, mode, device):
    """Up to all of them: p_rest and q_rest are exactly 0, and the row has no rest to read."""
    student, teacher = logits(2, 1024, device=device), logits(2, 1024, device=device)
    ids, logprobs, tail = kept_of(teacher, kept, 1.0)
    ids = ids.flip(1).int()
    labels = torch.tensor([5, 1023], device=device)
    weight = torch.tensor([0.7, 1.3], device=device)
    check(student, (ids, logprobs.flip(1), tail), labels, (weight, weight + 1), mode)
    if kept == 1024:
        assert (tail == -math.inf).all()


def test_confident_student(device):
    """q_rest down to 1e-300 keeps its digits: 1 - sum q would have none."""
    student, teacher = logits(4, COLUMNS, device=device), logits(4, COLUMNS, device=device)
    ids, logprobs, tail = kept_of(teacher, 4, 1.0)
    for row, lead in enumerate((20.0, 50.0, 100.0, 690.0)):
        student[row, ids[row, 0]] += lead
    weight = torch.ones(4, device=device)
    check(student, (ids, logprobs, tail), None, (weight, None), "tail")


def test_extreme_logits(device):
    """|logit| up to 1e4, as far as fp32 goes: 1e4 has three digits behind the point."""
    student, teacher = logits(3, COLUMNS, device=device), logits(3, COLUMNS, device=device)
    ids, logprobs, tail = kept_of(teacher, 9, 1.0)
    student[0] += 1e4
    student[1] *= 2e3
    student[2] -= 1e4
    labels = torch.tensor([3, int(ids[1, 2]), 5], device=device)
    weight = torch.ones(3, device=device)
    for mode in MODES:
        case = student.clone(), (ids, logprobs, tail), labels, (weight, weight)
        check(*case, mode, tolerance=3e-3)


@pytest.mark.parametrize("mode", MODES)
def test_impossible_tokens(mode, device):
    """A token or a rest which the student rules out: a loss without bound, a finite gradient."""
    student, teacher = logits(3, COLUMNS, device=device), logits(3, COLUMNS, device=device)
    ids, logprobs, tail = kept_of(teacher, 9, 1.0)
    student[0, ids[0, 2]] = -math.inf
    kept = torch.zeros_like(student, dtype=torch.bool).scatter_(1, ids, True)
    student[1] = student[1].masked_fill(~kept[1], -math.inf)
    student[2] = student[2].masked_fill(kept[2], -math.inf)
    weight = torch.ones(3, device=device)
    grad = torch.empty_like(student)
    q = student.double().softmax(1)
    teacher = ids, logprobs, tail if mode == "tail" else None
    divergence, _ = run(student, teacher, None, (weight, None), mode, grad=grad)
    unbounded = {"tail": [0, 1, 2], "renormalised": [0, 2], "truncated": [0]}[mode]
    assert (divergence[unbounded] == math.inf).all()
    # with none of the kept tokens, there is nothing that it could be restricted to
    assert divergence.isnan().tolist() == [False, False, mode == "truncated"]
    assert grad.isfinite().all()
    # the gradient is P q - p where tokens are kept, whatever the loss
    p = logprobs[0].double().exp()
    q_kept = q[0, ids[0]]
    if mode != "tail":
        p = p / p.sum()
    if mode == "truncated":
        q_kept = q_kept / q_kept.sum()
    close("gradient", grad[0, ids[0]], q_kept - p)


@pytest.mark.parametrize("mode", ["tail", "renormalised"])
def test_nan_is_not_hidden(mode, device):
    """In a token that is not kept, and in one that is."""
    student, teacher, labels, weights = awkward(COLUMNS, 9, 1.0, device)
    student[0, next(id for id in range(COLUMNS) if id not in teacher[0][0].tolist())] = math.nan
    student[2, teacher[0][2, 1]] = math.nan
    divergence, label_loss = run(student, teacher, labels, weights, mode)
    assert divergence.isnan().tolist() == [True, False, True, False, False, False]
    assert label_loss.isnan().tolist() == [True, False, False, False, False, False]


def test_no_rows(device):
    nothing = torch.empty(0, 40, device=device)
    ids = torch.empty(0, 3, dtype=torch.int64, device=device)
    labels, weight = ids[:, 0], nothing[:, 0]
    teacher = ids, nothing[:, :3], weight
    found = run(nothing, teacher, labels, (weight, weight), "tail", grad=nothing)
    assert [loss.shape for loss in found] == [(0,), (0,)]


def test_elements_beyond_int32(device, tmp_path):
    """The last of three rows lies 2^31 elements behind the first."""
    student, teacher = far_apart(tmp_path / "rows", 600, device), logits(3, 600, device=device)
    weight = torch.ones(3, device=device)
    kept = kept_of(teacher, 5, 1.0)
    wanted = topk_expected(student, kept, None, weight, None, "tail")
    divergence, _ = run(student, kept, None, (weight, None), "tail", grad=student)
    close("divergence", divergence, wanted[0])
    close("gradient", student, wanted[2], 3e-5 + ROUNDING[torch.float16])
