"""L2KD's loss: the original's numbers, plain torch in float64, counts of each term, and what is
refused by name."""

import math

import numpy as np
import pytest
import torch

from dskd.batch import IGNORE, DenseTeacher, Positions
from dskd.data.views import Shown
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.methods.l2kd import GroupPositions
from dskd.settings.run import Run
from tests.batches import batch_of
from tests.data.row_batches import row_batch
from tests.goldens import golden
from tests.methods.test_ki import Identity

CASES = {case["id"]: case for case in golden("l2kd_loss")["cases"]}
ANSWER = 6
"""The token that has a weight of 5 in the golden cases."""
PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-5)]


def l2kd(**settings):
    return build_method({"kind": "l2kd", **settings})


def shown_batch(questions, texts, domains, *, replayed=(1,), weight=5.0):
    """A batch whose rows have these labels as questions and, one longer, as texts (None: they are
    not shown so), -1 where nothing is learnt."""
    parts = [questions] if texts is None else [questions, texts]
    width = max(len(row) for part in parts for row in part)
    padded = [row + [-1] * (width - len(row)) for part in parts for row in part]
    labels_BT = np.array(padded)
    labels_BT[labels_BT == -1] = IGNORE
    domains_B = np.array(domains * len(parts))
    rows = row_batch(list(range(len(padded))), 0, labels_BT * 0, [width] * len(padded))
    rows = rows._replace(domains_B=domains_B)
    columns = GroupPositions(replayed, ANSWER, weight, texts=texts is not None)(
        rows, Shown(labels_BT, labels_BT)
    )
    tensors = {name: torch.from_numpy(np.asarray(each)) for name, each in columns.items()}
    labels = torch.from_numpy(labels_BT)
    return batch_of(labels, domains_B=torch.from_numpy(domains_B), columns=tensors)


def flat(*parts, batch, dtype):
    """Logits at the supervised positions, of rows as questions and then as texts."""
    width = batch.labels_BT.shape[1]
    rows = [row + [row[0]] * (width - len(row)) for part in parts for row in part]
    return torch.tensor(rows, dtype=dtype)[batch.supervised_BT]


def terms_of(method, student_NV, batch, teacher_NV=None):
    positions = Positions(student_NV, Identity(student_NV), batch.labels_N)
    signal = None if teacher_NV is None else DenseTeacher(teacher_NV)
    terms = method.loss(positions, signal, batch, 0)
    counts = method.counts(batch)
    assert terms.keys() == counts.keys() <= set(method.terms)
    return {name: term.total / (counts[name] or 1.0) for name, term in terms.items()}, terms, counts


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_the_originals_numbers(name, dtype, extra):
    """LAMOL's loss of all rows, and L2KD's of replayed ones, which no teacher teaches: the same."""
    case = CASES[name]
    inputs, replayed = case["inputs"], name == "word_kd_all_replay"
    logits = [inputs[f"{of}_{'student' if replayed else 'logits'}"] for of in ("qa", "lm")]
    batch = shown_batch(inputs["Y"], inputs["gen_Y"], [1, 1, 1], replayed=[1] * replayed)
    student_NV = flat(*logits, batch=batch, dtype=dtype)
    method = l2kd(word_kd=replayed, text_weight=inputs["lm_lambda"])
    found, terms, counts = terms_of(method, student_NV, batch, student_NV if replayed else None)
    assert found["question"].item() == pytest.approx(case["expected"]["qa"], abs=extra)
    assert found["text"].item() == pytest.approx(case["expected"]["lm"], abs=extra)
    if replayed:
        assert counts["question_kl"] == counts["text_kl"] == 0
        assert terms["question_kl"].total == terms["text_kl"].total == 0


def test_new_rows_are_taught_and_replayed_ones_learn_their_labels():
    """Each term over its own count, gradients included, against plain torch."""
    inputs = CASES["lamol_loss"]["inputs"]
    domains = [1, 0, 1]
    batch = shown_batch(inputs["Y"], inputs["gen_Y"], domains, replayed=[0])
    torch.manual_seed(0)
    student_NV = flat(inputs["qa_logits"], inputs["lm_logits"], batch=batch, dtype=torch.float64)
    student_NV.requires_grad_()
    teacher_NV = torch.randn_like(student_NV)
    heat, weight = 2.0, 0.25
    found, terms, counts = terms_of(l2kd(word_kd=True), student_NV, batch, teacher_NV)

    row_N = torch.repeat_interleave(torch.arange(6), batch.counts_B)
    new_N = torch.tensor([domain == 1 for domain in domains * 2])[row_N]
    text_N, labels_N = row_N >= 3, batch.labels_N
    label_weight_N = torch.where(labels_N == ANSWER, 5.0, 1.0).double()
    ce_N = torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="none")
    target_NV = (teacher_NV / heat).softmax(1)
    log_NV = (student_NV / heat).log_softmax(1)
    kl_N = heat**2 * (target_NV * (target_NV.log() - log_NV)).sum(1)
    wanted = {}
    for name, here_N, scale in (("question", ~text_N, 1.0), ("text", text_N, weight)):
        taught_N, told_N = here_N & new_N, here_N & ~new_N
        wanted[f"{name}_kl"] = scale * kl_N[taught_N].mean()
        wanted[name] = scale * (ce_N * label_weight_N)[told_N].sum() / label_weight_N[told_N].sum()
        assert counts[f"{name}_kl"] == taught_N.sum()
        assert counts[name] == label_weight_N[told_N].sum()
        parts = terms[name].parts[f"{name}_ce"]
        assert parts.item() == pytest.approx((ce_N * label_weight_N)[told_N].sum().item())
    assert {n: v.item() for n, v in found.items()} == pytest.approx(
        {n: v.item() for n, v in wanted.items()}, rel=1e-10
    )
    gradients = [
        torch.autograd.grad(sum(each.values()), student_NV, retain_graph=True)[0]
        for each in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-9)


def test_positions_count_alike_over_the_count_of_both():
    inputs = CASES["lamol_loss"]["inputs"]
    batch = shown_batch(inputs["Y"], inputs["gen_Y"], [1, 0, 1], replayed=[0])
    torch.manual_seed(0)
    student_NV = flat(inputs["qa_logits"], inputs["lm_logits"], batch=batch, dtype=torch.float64)
    teacher_NV = torch.randn_like(student_NV)
    _, by_terms, each = terms_of(l2kd(word_kd=True), student_NV, batch, teacher_NV)
    both = l2kd(word_kd=True, weighting="counts")
    found, terms, counts = terms_of(both, student_NV, batch, teacher_NV)
    for name in ("question", "text"):
        together = each[name] + each[f"{name}_kl"]
        assert counts[name] == counts[f"{name}_kl"] == together and each[name] > 0
        for term in (name, f"{name}_kl"):
            assert terms[term].total == by_terms[term].total
            assert found[term].item() == pytest.approx(by_terms[term].total.item() / together)
    assert both.selection() is None


def test_questions_alone():
    """Without texts there is one term, or two."""
    batch = shown_batch([[-1, 2, 3], [1, 0, -1]], None, [0, 1])
    student_NV = torch.zeros(4, 8, dtype=torch.float64)
    found, _, counts = terms_of(l2kd(text_weight=0), student_NV, batch)
    assert counts == {"question": 4.0} and found["question"].item() == pytest.approx(math.log(8))
    counts = l2kd(text_weight=0, word_kd=True).counts(batch)
    assert counts == {"question_kl": 2.0, "question": 2.0}


QUESTIONS = {
    "objective": "causal",
    "sources": [{"kind": "questions", "path": "x.jsonl", "domain": "woz"}],
    "questions": {"modelling": True},
}


@pytest.mark.parametrize(
    ("data", "method", "teacher", "told"),
    [
        ({"questions": None, "sources": [{"kind": "text", "path": "x"}]}, {}, None,
         r"data\.questions: missing; method l2kd learns questions"),
        ({"questions": {}}, {}, None, r"modelling: false, but method\.text_weight is 0\.25"),
        ({}, {"text_weight": 0}, None, r"modelling: true, but method\.text_weight is 0"),
        ({}, {"weighting": "counts"}, None, r"weighting: counts is of what method\.word_kd"),
        ({}, {"word_kd": True}, None, r"teacher\.kind: method\.word_kd needs a live one, not none"),
        ({}, {"word_kd": True}, {"kind": "cached", "path": "x"}, "a live one, not cached"),
    ],
    ids=["rows", "texts", "no-texts", "counts", "none", "cached"],
)  # fmt: skip
def test_what_does_not_go_together(data, method, teacher, told):
    run = Run.model_validate({"data": QUESTIONS | data, "teacher": teacher})
    with pytest.raises(ConfigError, match=told):
        l2kd(**method).check(run, None)
