"""The terms about several teachers that methods share, VKD and UHC, against the original's numbers;
and what the original has not: overlapping classes, in any order, and teachers who say nothing."""

import pytest
import torch
from torch.nn.functional import kl_div

from dskd.batch import Panel
from dskd.errors import ConfigError
from dskd.methods.integration import (
    confidences,
    entropy,
    label_map,
    merged_logits,
    teacher_probabilities,
    uhc_term,
    vkd_term,
)
from dskd.stores.uncertainty import confidence
from tests.methods.panels import CASES, PRECISIONS, blocks, cases, close, named, panel_of, tensor

TESTED = {
    "entropy_upper_bound", "confidence", "single_confidence", "vkd_loss", "uhc_loss",
    "eval_single_teacher", "eval_concat", "ext_uhc_indexed",  # here
    "muki_loss", "trajectory", "ext_integrate_indexed",  # test_muki
    "dfa_loss", "dfa_layer_indices", "mmd_rbf", "cfl_loss",  # test_alignment
    "mc_scores",  # tests/teachers/test_dropout_scores
}  # fmt: skip
TERMS = {"vkd": vkd_term, "uhc": uhc_term}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_panel(present_Nn=None, rows=5):
    """Two teachers of 3 and 2 of 4 classes, the third class being of both."""
    maps = [torch.tensor([2, 0, 1]), torch.tensor([3, 2])]
    return Panel([random(rows, 3), random(rows, 2, seed=1)], maps, None, present_Nn)


def test_every_golden_function_has_a_test():
    """Label sets are of the data's part."""
    assert {case["fn"] for case in CASES} - TESTED == {"split_labels"}


@pytest.mark.parametrize("case", cases("entropy_upper_bound"), ids=named)
def test_the_entropy_of_knowing_nothing(case):
    classes = case["inputs"]["C"]
    uniform_1C = torch.full((1, classes), 1.0 / classes, dtype=torch.float64)
    close(entropy(uniform_1C)[0], case["expect"]["value"], case)
    close(confidence(entropy(uniform_1C), classes), [0.0], case)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("confidence") + cases("single_confidence"), ids=named)
def test_confidence(case, dtype, extra):
    inputs = case["inputs"]
    if case["fn"] == "confidence":
        probabilities_NM = tensor(inputs["probs"], dtype)
        found_N = confidence(entropy(probabilities_NM), probabilities_NM.shape[1])
    else:
        logits_NM = tensor(inputs["logits"], dtype)
        panel = Panel([logits_NM], blocks([logits_NM]))
        found_N = confidences(panel, inputs["kd_temperature"])[:, 0]
    close(found_N, case["expect"]["value"], case, extra)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("vkd_loss") + cases("uhc_loss"), ids=named)
def test_loss_and_gradient(case, dtype, extra):
    inputs, expected = case["inputs"], case["expect"]
    student_NC = tensor(inputs["student_logits"], dtype).requires_grad_()
    panel = panel_of(inputs, dtype)
    term = TERMS[case["fn"].removesuffix("_loss")](
        student_NC, panel, temperature=inputs["temperature"]
    )
    (term.total / len(student_NC)).backward()
    assert term.total.dtype == dtype
    assert torch.equal(term.parts["kl"], term.total.detach())
    close(term.total / len(student_NC), expected["loss"], case, extra)
    close(student_NC.grad, expected["grad_student_logits"], case, extra)
    if "target" in expected:
        merged_NC = merged_logits(panel, student_NC.shape[1], "logsumexp")
        close((merged_NC / inputs["temperature"]).softmax(1), expected["target"], case, extra)


@pytest.mark.parametrize("case", cases("eval_single_teacher") + cases("eval_concat"), ids=named)
def test_answers_without_a_student(case):
    inputs, expected = case["inputs"], case["expect"]
    panel = panel_of(inputs)
    classes = sum(each.shape[1] for each in panel.logits)
    if case["fn"] == "eval_concat":
        found_NC = merged_logits(panel, classes, "logsumexp")
    else:
        found_NC = teacher_probabilities(panel, inputs["k"], inputs["total"], 1.0)
    close(found_NC, expected["logits"], case)
    assert found_NC.argmax(1).tolist() == expected["pred"]


@pytest.mark.parametrize("case", cases("ext_uhc_indexed"), ids=named)
def test_uhc_of_overlapping_classes(case):
    inputs = case["inputs"]
    student_NC = tensor(inputs["student_logits"])
    term = uhc_term(student_NC, panel_of(inputs), temperature=inputs["temperature"])
    close(term.total / len(student_NC), case["expect"]["loss"], case)


@pytest.mark.parametrize("name", TERMS)
def test_temperature_and_weight(name):
    """T^2 is a switch, the weight of the term is not in what is logged."""
    student_NC = random(5, 4, seed=2)
    plain = TERMS[name](student_NC, a_panel(), temperature=3.0, squared=False)
    warm = TERMS[name](student_NC, a_panel(), temperature=3.0, weight=0.5)
    torch.testing.assert_close(warm.total, plain.total * 4.5)
    torch.testing.assert_close(warm.parts["kl"], plain.total * 9.0)


@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_classes_does_not_matter(name):
    student_NC, panel, order = random(5, 4, seed=2), a_panel(), torch.tensor([2, 0, 3, 1])
    moved = Panel(panel.logits, [torch.argsort(order)[each] for each in panel.maps])
    wanted = TERMS[name](student_NC, panel, temperature=2.0).total
    found = TERMS[name](student_NC[:, order], moved, temperature=2.0).total
    torch.testing.assert_close(found, wanted)


def test_logits_of_a_class_that_two_teachers_have():
    panel = a_panel()
    left_N, right_N = panel.logits[0][:, 0], panel.logits[1][:, 1]
    for overlap, wanted_N in {
        "logsumexp": torch.logaddexp(left_N, right_N),
        "mean": (left_N + right_N) / 2,
    }.items():
        merged_NC = merged_logits(panel, 5, overlap)
        torch.testing.assert_close(merged_NC[:, 2], wanted_N)
        assert torch.equal(merged_NC[:, [0, 1]], panel.logits[0][:, [1, 2]])
        assert torch.equal(merged_NC[:, 3], panel.logits[1][:, 0])
        assert (merged_NC[:, 4] == -torch.inf).all()  # nobody has it


@pytest.mark.parametrize("overlap", ["logsumexp", "mean"])
def test_teachers_who_are_not_heard(overlap):
    """What their logits are does not count: the loss is that of the rows that each one has."""
    present_Nn = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 1]], dtype=torch.bool)
    panel = a_panel(present_Nn)
    for index, logits_NM in enumerate(panel.logits):
        logits_NM[~present_Nn[:, index]] = torch.nan
    student_NC = random(5, 4, seed=2).requires_grad_()
    vkd = vkd_term(student_NC, panel, overlap=overlap).total
    uhc = uhc_term(student_NC, panel).total
    wanted_vkd = wanted_uhc = 0.0
    for row in range(5):
        row_1 = slice(row, row + 1)
        heard = [i for i in (0, 1) if present_Nn[row, i]]
        alone = Panel([panel.logits[i][row_1] for i in heard], [panel.maps[i] for i in heard])
        wanted_vkd = wanted_vkd + vkd_term(student_NC[row_1], alone, overlap=overlap).total
        wanted_uhc = wanted_uhc + uhc_term(student_NC[row_1], alone).total
    torch.testing.assert_close(vkd, wanted_vkd)
    torch.testing.assert_close(uhc, wanted_uhc)
    (vkd + uhc).backward()
    assert student_NC.grad.isfinite().all()


def test_uhc_does_not_tie_the_teachers_classes():
    student_NC, logits = random(5, 5, seed=2), [random(5, 3), random(5, 2, seed=1)]
    panel = Panel(logits, blocks(logits))
    wanted = uhc_term(student_NC, panel).total
    shifted_NC = student_NC + torch.tensor([3.0, 3.0, 3.0, -7.0, -7.0])
    torch.testing.assert_close(uhc_term(shifted_NC, panel).total, wanted)
    assert not torch.allclose(vkd_term(shifted_NC, panel).total, vkd_term(student_NC, panel).total)


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_sums_in_fp32_and_train_no_teacher(name):
    logits = [random(5, 3).bfloat16().requires_grad_(), random(5, 2).requires_grad_()]
    student_NC = random(5, 5, seed=2).bfloat16().requires_grad_()
    first = Panel([logits[0]], [torch.tensor([0, 1, 2])])
    term = TERMS[name](student_NC, first)
    assert term.total.dtype == torch.float32
    term = TERMS[name](student_NC, Panel(logits, blocks(logits)))
    halves = [
        TERMS[name](student_NC[part], Panel([each[part] for each in logits], blocks(logits))).total
        for part in (slice(0, 1), slice(1, 5))
    ]
    torch.testing.assert_close(sum(halves), term.total)
    term.total.backward()
    assert student_NC.grad.any()
    assert all(each.grad is None for each in logits)


def test_saturated_logits_give_numbers():
    """The KL by log of softmax, and the entropy by p log p, would be no numbers."""
    logits = [torch.tensor([[300.0, 0.0]]), torch.tensor([[-300.0, 0.0, 300.0]])]
    panel = Panel(logits, blocks(logits))
    student_NC = torch.tensor([[0.0, 0.0, 500.0, 0.0, 0.0]], requires_grad=True)
    assert torch.equal(confidences(panel, 1.0), torch.ones(1, 2))
    # q is (1/2, 0, 0, 0, 1/2), then (1, 0) and (0, 0, 1)
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(vkd_term(student_NC, panel).total, 500.0 - ln2)
    torch.testing.assert_close(uhc_term(student_NC, panel).total, ln2 + 500.0)
    (vkd_term(student_NC, panel).total + uhc_term(student_NC, panel).total).backward()
    assert student_NC.grad.isfinite().all()


def test_vkd_is_the_kl_of_the_joint_softmax():
    logits = [random(6, 3), random(6, 2, seed=1)]
    student_NC = random(6, 5, seed=2)
    wanted = kl_div(
        student_NC.log_softmax(1), torch.cat(logits, 1).log_softmax(1), log_target=True,
        reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(vkd_term(student_NC, Panel(logits, blocks(logits))).total, wanted)


def test_label_maps_go_by_name():
    union = ["art", "law", "sport", "war"]
    assert label_map(["sport", "art"], union, "teacher").tolist() == [2, 0]
    assert label_map(union, union, "teacher").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["art"], "teacher.labels: 1 class, but a teacher has to tell at least 2 apart"),
        ([], "teacher.labels: 0 class"),
        (["art", "law", "art"], "teacher.labels: the label 'art' is there twice"),
        (["art", "ART"], "no class 'ART'; its classes are art, law"),
    ],
)
def test_labels_that_cannot_be_mapped_are_refused(own, told):
    with pytest.raises(ConfigError, match=told):
        label_map(own, ["art", "law"], "teacher.labels")
