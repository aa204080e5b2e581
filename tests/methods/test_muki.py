"""MUKI's target, weights, margin and loss against the original's numbers and its closed forms."""

import pytest
import torch

from dskd.batch import Panel
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.methods.integration import confidences, divergence, uhc_term, vkd_term
from dskd.methods.muki import integrated, margin, muki_term, teacher_weights
from tests.methods.panels import PRECISIONS, blocks, cases, close, named, panel_of, tensor

OF_CASE = {"tau": "sharpness", "kd_temperature": "temperature", "lam": "weight"}
"""The case's names of settings, and ours."""


def options_of(inputs):
    own = {ours: inputs[theirs] for theirs, ours in OF_CASE.items() if theirs in inputs}
    return own | {"hard": inputs["mode"] == "hard", "by_margin": inputs["reweight"]}


def random_panel(sizes=(2, 3, 4), rows=7, present_Nn=None):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(rows, m, generator=generator, dtype=torch.float64) for m in sizes]
    confidence_Nn = torch.rand(rows, len(sizes), generator=generator, dtype=torch.float64)
    return Panel(logits, blocks(logits), confidence_Nn, present_Nn)


def student(rows=7, classes=9):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("muki_loss"), ids=named)
def test_loss_gradient_and_parts(case, dtype, extra):
    inputs, expected = case["inputs"], case["expect"]
    known = {"student_logits", "teacher_logits", "teacher_weight", "mode", "reweight"}
    assert inputs.keys() <= known | OF_CASE.keys()
    options, panel = options_of(inputs), panel_of(inputs, dtype)
    temperature, sharpness = options.get("temperature", 1.0), options.get("sharpness", 0.2)
    student_NC = tensor(inputs["student_logits"], dtype).requires_grad_()
    rows, classes = student_NC.shape

    confidence_Nn = confidences(panel, temperature)
    close(confidence_Nn, expected["teacher_weight"], case, extra)
    alpha_Nn = teacher_weights(confidence_Nn, None, hard=options["hard"], sharpness=sharpness)
    close(alpha_Nn, expected["coeff"], case, extra)
    target_NC = integrated(panel, alpha_Nn, classes, temperature)
    close(target_NC, expected["target"], case, extra)
    close(divergence(target_NC, student_NC, temperature), expected["kl"], case, 10 * extra)
    if "margin" in expected:
        close(margin(confidence_Nn, None), expected["margin"], case, extra)

    term = muki_term(student_NC, panel, **options)
    (term.total / rows).backward()
    assert term.total.dtype == dtype
    close(term.total / rows, expected["loss"], case, extra)
    close(student_NC.grad, expected["grad_student_logits"], case, extra)


@pytest.mark.parametrize("case", cases("ext_integrate_indexed"), ids=named)
def test_overlapping_classes_and_missing_teachers(case):
    inputs, expected = case["inputs"], case["expect"]
    panel = panel_of(inputs)
    alpha_Nn = teacher_weights(
        panel.confidence_Nn, panel.present_Nn, hard=inputs["mode"] == "hard",
        sharpness=inputs["tau"],
    )  # fmt: skip
    close(alpha_Nn, expected["coeff"], case)
    close(integrated(panel, alpha_Nn, inputs["total"], 1.0), expected["target"], case)


TRAJECTORY = {
    "muki_hard_plain": {"hard": True, "by_margin": False},
    "muki_hard_margin": {"hard": True, "by_margin": True},
    "muki_soft_plain": {"hard": False, "by_margin": False},
    "muki_soft_margin": {"hard": False, "by_margin": True},
}


@pytest.mark.parametrize("case", cases("trajectory"), ids=named)
def test_trajectory_of_a_linear_student(case):
    inputs, expected = case["inputs"], case["expect"]
    panel, temperature = panel_of(inputs), {"temperature": inputs["temperature"]}
    rows_ND = tensor(inputs["X"])
    weight_CD, bias_C = (tensor(inputs[name]).requires_grad_() for name in ("W0", "b0"))
    losses = []
    for _ in range(inputs["steps"]):
        student_NC = rows_ND @ weight_CD.T + bias_C
        if inputs["method"] in TRAJECTORY:
            options = TRAJECTORY[inputs["method"]] | {"sharpness": inputs["tau"]}
            term = muki_term(student_NC, panel, **options, **temperature)
        else:
            kind = {"uhc": uhc_term, "vkd": vkd_term}[inputs["method"]]
            term = kind(student_NC, panel, **temperature)
        loss = term.total / len(rows_ND)
        losses.append(loss)
        gradients = torch.autograd.grad(loss, [weight_CD, bias_C])
        with torch.no_grad():
            for parameter, gradient in zip((weight_CD, bias_C), gradients, strict=True):
                parameter.sub_(inputs["lr"] * gradient)
    close(torch.stack(losses), expected["losses"], case)
    close(weight_CD, expected["W"], case)
    close(bias_C, expected["b"], case)


@pytest.mark.parametrize("hard", [True, False])
def test_gradient_is_the_closed_form(hard):
    """weight m (p - q) / T, and with T^2 that times T."""
    panel, student_NC = random_panel(), student().requires_grad_()
    alpha_Nn = teacher_weights(panel.confidence_Nn, None, hard=hard, sharpness=0.2)
    target_NC = integrated(panel, alpha_Nn, 9, 2.0)
    torch.testing.assert_close(target_NC.sum(1), torch.ones(7, dtype=torch.float64))
    margin_N = margin(panel.confidence_Nn, None)
    wanted_NC = 0.7 * margin_N[:, None] * ((student_NC / 2.0).softmax(1) - target_NC) / 2.0
    for squared, factor in ((False, 1.0), (True, 4.0)):
        options = {"temperature": 2.0, "squared": squared, "weight": 0.7}
        term = muki_term(student_NC, panel, hard=hard, by_margin=True, **options)
        (found_NC,) = torch.autograd.grad(term.total, student_NC)
        torch.testing.assert_close(found_NC, wanted_NC * factor)
        torch.testing.assert_close(term.parts["margin"], margin_N.sum())
        plain = muki_term(student_NC, panel, hard=hard, by_margin=False, **options)
        torch.testing.assert_close(plain.total / 0.7, term.parts["kl"])


def test_soft_weights_become_hard_as_they_sharpen():
    confidence_Nn = random_panel().confidence_Nn
    hard_Nn = teacher_weights(confidence_Nn, None, hard=True, sharpness=0.2)
    soft_Nn = teacher_weights(confidence_Nn, None, hard=False, sharpness=1e-4)
    torch.testing.assert_close(soft_Nn, hard_Nn)
    even_Nn = teacher_weights(confidence_Nn, None, hard=False, sharpness=1e6)
    torch.testing.assert_close(even_Nn, torch.full((7, 3), 1 / 3).double(), atol=1e-5, rtol=0)


def test_permuting_teachers_permutes_their_weights_alone():
    panel, student_NC = random_panel(), student()
    order = [2, 0, 1]
    moved = Panel(
        [panel.logits[i] for i in order], [panel.maps[i] for i in order],
        panel.confidence_Nn[:, order],
    )  # fmt: skip
    for hard in (True, False):
        alpha_Nn = teacher_weights(panel.confidence_Nn, None, hard=hard, sharpness=0.2)
        other_Nn = teacher_weights(moved.confidence_Nn, None, hard=hard, sharpness=0.2)
        torch.testing.assert_close(other_Nn, alpha_Nn[:, order])
        options = {"hard": hard, "by_margin": True}
        found = muki_term(student_NC, moved, **options).total
        torch.testing.assert_close(found, muki_term(student_NC, panel, **options).total)


def test_the_first_of_equally_sure_teachers_is_heard():
    confidence_Nn = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.9, 0.9]])
    alpha_Nn = teacher_weights(confidence_Nn, None, hard=True, sharpness=0.2)
    assert alpha_Nn.tolist() == [[1, 0, 0], [0, 1, 0]]
    absent = torch.tensor([[False, True, True], [True, False, True]])
    alpha_Nn = teacher_weights(confidence_Nn, absent, hard=True, sharpness=0.2)
    assert alpha_Nn.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_margins():
    confidence_Nn = torch.tensor([[0.9, 0.2, 0.5], [1.0, 0.0, 0.0], [0.4, 0.4, 0.1]])
    wanted_N = torch.tensor([0.4, 1.0, 0.0]) + 1e-6
    torch.testing.assert_close(margin(confidence_Nn, None), wanted_N)
    present_Nn = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    # of the last row one teacher is left: its runner-up counts as 0
    wanted_N = torch.tensor([0.3, 1.0, 0.1]) + 1e-6
    torch.testing.assert_close(margin(confidence_Nn, present_Nn), wanted_N)
    torch.testing.assert_close(margin(confidence_Nn[:, :1], None), confidence_Nn[:, 0] + 1e-6)


@pytest.mark.parametrize("hard", [True, False])
def test_a_teacher_who_is_not_heard_may_be_anything(hard):
    """The rows with and without it, one by one, are those of the whole."""
    present_Nn = torch.rand(7, 3, generator=torch.Generator().manual_seed(4)) < 0.6
    present_Nn[:, 1] |= ~present_Nn.any(1)
    panel, student_NC = random_panel(present_Nn=present_Nn), student().requires_grad_()
    panel.confidence_Nn[~present_Nn] = torch.nan
    for index, logits_NM in enumerate(panel.logits):
        logits_NM[~present_Nn[:, index]] = torch.nan
    found = muki_term(student_NC, panel, hard=hard, by_margin=True, temperature=1.5).total
    wanted = 0.0
    for row in range(7):
        row_1, heard = slice(row, row + 1), present_Nn[row].nonzero().flatten().tolist()
        alone = Panel(
            [panel.logits[i][row_1] for i in heard], [panel.maps[i] for i in heard],
            panel.confidence_Nn[row_1, heard],
        )  # fmt: skip
        options = {"hard": hard, "by_margin": True, "temperature": 1.5}
        wanted = wanted + muki_term(student_NC[row_1], alone, **options).total
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert student_NC.grad.isfinite().all()


def test_margins_divided_by_their_global_sum():
    """Two micro-batches of unequal margins: the sums of both by one division, not a mean of two."""
    panel, student_NC = random_panel(), student()
    options = {"hard": True, "by_margin": True}
    alpha_Nn = teacher_weights(panel.confidence_Nn, None, hard=True, sharpness=0.2)
    kl_N = divergence(integrated(panel, alpha_Nn, 9, 1.0), student_NC, 1.0)
    margin_N = margin(panel.confidence_Nn, None)
    total = count = 0.0
    for part in (slice(0, 2), slice(2, 7)):
        own = Panel([each[part] for each in panel.logits], panel.maps, panel.confidence_Nn[part])
        total = total + muki_term(student_NC[part], own, **options).total
        count = count + margin(own.confidence_Nn, None).sum()
    wanted = (margin_N / margin_N.mean() * kl_N).mean()
    torch.testing.assert_close(total / count, wanted)


@pytest.mark.parametrize("method", ["muki", "vkd"])
def test_a_teacher_that_gives_no_numbers_is_seen(method):
    """Where it is heard, however little it says; of one that is not heard they do not count."""
    logits = [torch.zeros(2, 2), torch.tensor([[0.0, torch.nan], [0.0, 1.0]])]
    student_NC = torch.zeros(2, 4, requires_grad=True)
    for present_Nn, seen in ((None, True), (torch.tensor([[True, False], [True, True]]), False)):
        panel = Panel(logits, blocks(logits), None, present_Nn)
        if method == "vkd":
            terms = [vkd_term(student_NC, panel, overlap=o) for o in ("mean", "logsumexp")]
        else:
            how = [(False, False), (False, True), (True, False)]
            terms = [muki_term(student_NC, panel, hard=h, by_margin=m) for h, m in how]
        assert all(term.total.isnan().item() is seen for term in terms)


def test_a_hard_choice_has_no_sharpness():
    assert build_method({"kind": "muki", "choice": "soft", "sharpness": 0.5}).sharpness == 0.5
    with pytest.raises(ConfigError, match=r"method\.sharpness: 0\.5, but a hard choice has no"):
        build_method({"kind": "muki", "sharpness": 0.5})
