"""Self-Evolution against the original criterion: losses, gradients, edges, normalisation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dskd.batch import IGNORE, Batch, DenseTeacher, Positions, ProjectedTeacher, Term
from dskd.errors import ConfigError
from dskd.hardness.masks import HARD_LABELS
from dskd.methods.base import Method, build_method
from dskd.settings.recipe import read
from dskd.training.passes import count
from tests import batches
from tests.goldens import golden
from tests.methods.test_ki import Identity

GOLDEN = golden("self_evolution")
TLS = GOLDEN["stage2_loss"][0]["inputs"]
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-6)]
LOGGED = 1e-6  # the original logs in fp32


def method_of(**settings: Any) -> Method:
    return build_method({"kind": "self_evolution", **settings})


def batch_of(inputs: dict[str, Any]) -> Batch:
    """The golden batch, of ``ntokens`` real tokens, supervised where the labels are not padding."""
    labels_BT = torch.tensor(inputs["labels"])
    labels_BT[labels_BT == inputs["pad"]] = IGNORE
    mask_BT = torch.ones_like(labels_BT)
    mask_BT.view(-1)[inputs["ntokens"] :] = 0
    return batches.batch_of(labels_BT, mask_BT=mask_BT)


def forward(
    method: Method, inputs: dict[str, Any], *, dtype: torch.dtype = torch.float64,
    projected: bool = False, reference: Tensor | None = None, **columns: Tensor,
) -> tuple[Term, Tensor, Batch]:  # fmt: skip
    """The term, the whole student logits (a leaf) and the batch, as the objective makes them."""
    batch = replace(batch_of(inputs), columns=columns)
    student_BTV = torch.tensor(inputs["logits"], dtype=dtype).requires_grad_()
    head = Identity(student_BTV)
    rows = Positions(student_BTV[batch.supervised_BT], head, batch.labels_N)
    signal = None
    if method.needs_teacher(0):
        logits_NV = reference_logits(inputs, dtype) if reference is None else reference
        size = logits_NV.shape[1]
        signal = ProjectedTeacher(logits_NV, head, size) if projected else DenseTeacher(logits_NV)
    return method.loss(rows, signal, batch, 0)["tokens"], student_BTV, batch


def reference_logits(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """[N, V]: those of the unmasked input; even ones for the branch that smooths evenly."""
    logits_BTV = torch.tensor(inputs["ref_logits"], dtype=dtype)
    if inputs["kind"] == "uniform":
        logits_BTV = torch.zeros_like(logits_BTV)
    return logits_BTV[batch_of(inputs).supervised_BT]


def entropy(inputs: dict[str, Any]) -> float:
    """The summed entropy of the reference, which the paper's loss has lambda times beside ours."""
    logprobs_NV = reference_logits(inputs).log_softmax(1)
    return -(logprobs_NV.exp() * logprobs_NV).sum().item()


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize("projected", [False, True], ids=["dense", "projected"])
@pytest.mark.parametrize("case", GOLDEN["stage2_loss"], ids=lambda c: c["name"])
def test_loss_and_gradient(case, projected, dtype, rtol):
    """The paper's loss is ours and lambda H(r); the gradient is the same."""
    inputs, expected = case["inputs"], case["expected"]
    method, close = method_of(smoothing=inputs["lam"]), {"rel": rtol, "abs": rtol}
    (loss, parts), student_BTV, batch = forward(method, inputs, dtype=dtype, projected=projected)
    whole = loss.item() + inputs["lam"] * entropy(inputs)
    assert whole == pytest.approx(expected["loss_sum"], **close)
    assert parts["ce"].item() == pytest.approx(expected["nll_sum"], **close)
    assert method.counts(batch) == {"tokens": expected["n_masked"]}
    loss.backward()
    gradient = torch.tensor(expected["grad_logits_of_sum"], dtype=dtype)
    torch.testing.assert_close(student_BTV.grad, gradient, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("case", GOLDEN["stage2_loss"], ids=lambda c: c["name"])
def test_normalised_by_all_tokens_as_the_original(case):
    """Its mean, and what it logs, in bits."""
    inputs, expected = case["inputs"], case["expected"]
    counts = {}
    for normalise in ("masked", "tokens"):
        method = method_of(smoothing=inputs["lam"], normalise=normalise)
        (loss, parts), _, batch = forward(method, inputs)
        whole = loss + inputs["lam"] * entropy(inputs)
        count = counts[normalise] = method.counts(batch)["tokens"]
        assert isinstance(count, float)
        name = {"masked": "loss_per_masked_token", "tokens": "loss_per_ntoken"}[normalise]
        assert (whole / count).item() == pytest.approx(expected[name], rel=1e-9)
    assert counts["tokens"] == expected["sample_size_original"]
    for value, name in ((whole, "log_loss_bits"), (parts["ce"], "log_loss_nll_bits")):
        bits = value.item() / expected["sample_size_original"] / math.log(2)
        assert bits == pytest.approx(expected[name], rel=LOGGED)


@pytest.mark.parametrize("smoothing", [float(name) for name in GOLDEN["lambda_sweep"]["values"]])
def test_lambda_sweep(smoothing):
    golden = GOLDEN["lambda_sweep"]
    expected = golden["values"][str(smoothing)]
    (loss, parts), _, batch = forward(method_of(smoothing=smoothing), TLS)
    whole = loss.item() + smoothing * golden["ref_entropy_sum"]
    assert whole == pytest.approx(expected["loss_sum"], rel=1e-9)
    assert batch.supervised == expected["n"]
    found = {name: part.item() for name, part in parts.items()}
    wanted = {"ce": expected["nll_sum"]} if smoothing < 1.0 else {}
    if smoothing > 0.0:
        wanted["kl"] = golden["kl_ref_student_sum"]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_without_smoothing_it_is_language_modelling():
    """The same bits, and no teacher is asked."""
    method, plain = method_of(smoothing=0.0), build_method({"kind": "lm"})
    assert not method.wants_teacher() and method_of().wants_teacher()
    (loss, parts), logits_BTV, _ = forward(method, TLS, dtype=torch.float32)
    (expected, _), others_BTV, _ = forward(plain, TLS, dtype=torch.float32)
    assert loss.item() == parts["ce"].item() == expected.item()
    loss.backward()
    expected.backward()
    assert torch.equal(logits_BTV.grad, others_BTV.grad)


def test_a_reference_that_is_sure_of_the_label_is_language_modelling():
    batch = batch_of(TLS)
    onehot_NV = torch.full((5, 9), -1e4, dtype=torch.float64)
    onehot_NV.scatter_(1, batch.labels_N[:, None], 0.0)
    for smoothing in (0.1, 0.7):
        method = method_of(smoothing=smoothing)
        (loss, _), logits_BTV, _ = forward(method, TLS, reference=onehot_NV)
        (expected, _), others_BTV, _ = forward(method_of(smoothing=0.0), TLS)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(logits_BTV.grad, others_BTV.grad, rtol=1e-12, atol=1e-12)


def test_a_reference_that_is_the_student_only_shrinks_the_gradient():
    """KL(p || p) is 0, and so is its gradient."""
    logits_NV = torch.tensor(TLS["logits"], dtype=torch.float64)[batch_of(TLS).supervised_BT]
    (loss, parts), logits_BTV, _ = forward(method_of(), TLS, reference=logits_NV)
    (plain, _), others_BTV, _ = forward(method_of(smoothing=0.0), TLS)
    assert parts["kl"].item() == pytest.approx(0.0, abs=1e-12)
    loss.backward()
    plain.backward()
    torch.testing.assert_close(logits_BTV.grad, 0.9 * others_BTV.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_tokens_weigh_more(smoothing):
    """By hand: every position's loss times its weight, over the sum of the weights."""
    hard_N = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    method = method_of(smoothing=smoothing, hard_weight=3.0)
    (loss, parts), logits_BTV, batch = forward(method, TLS, hard_N=hard_N)
    weight_N = torch.tensor([3.0, 1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    assert method.counts(batch) == {"tokens": 11.0}
    logprobs_NV = logits_BTV[batch.supervised_BT].log_softmax(1)
    ce_N = -logprobs_NV.gather(1, batch.labels_N[:, None])[:, 0]
    reference_NV = reference_logits(TLS).log_softmax(1)
    kl_N = (reference_NV.exp() * (reference_NV - logprobs_NV)).sum(1)
    expected = (weight_N * ((1 - smoothing) * ce_N + smoothing * kl_N)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)  # the weights are fp32
    assert parts["ce"].item() == pytest.approx((weight_N * ce_N).sum().item(), rel=1e-9)
    (found,) = torch.autograd.grad(loss, logits_BTV)
    (wanted,) = torch.autograd.grad(expected, logits_BTV)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hard_weight", [1e-3, 0.5])
def test_light_tokens_are_averaged_like_others(hard_weight):
    """Where all weigh alike their weight plays no part, though its sum is below 1."""
    method, plain = method_of(hard_weight=hard_weight), method_of()
    (loss, _), logits_BTV, batch = forward(method, TLS, hard_N=torch.ones(5))
    (expected, _), others_BTV, _ = forward(plain, TLS)
    halves = [replace(batch, columns={HARD_LABELS: torch.ones(5)}), _without_labels(batch)]
    whole = count(method.counts, halves).by_term["tokens"]
    assert whole == pytest.approx(5 * hard_weight, rel=1e-4)  # the weights are fp32
    loss, expected = loss / whole, expected / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits_BTV.grad, others_BTV.grad, rtol=1e-6, atol=1e-9)


def test_a_batch_without_labels_is_divided_by_1():
    method = method_of(hard_weight=0.5)
    counts = count(method.counts, [_without_labels(batch_of(TLS))], stop=True)
    assert counts.by_term == {"tokens": 1.0} and counts.stop


def _without_labels(batch: Batch) -> Batch:
    nothing_BT = torch.full_like(batch.labels_BT, IGNORE)
    return batches.changed(batch, labels_BT=nothing_BT, columns={HARD_LABELS: torch.ones(0)})


def check(*words: str, **settings: Any) -> None:
    method = method_of(**settings)
    run = read(None, ["method={kind: self_evolution}", *words]).runs["run"]
    method.check(run, None)


def test_only_the_student_teaches():
    check("teacher={kind: self}")
    check("teacher=null", smoothing=0.0)
    with pytest.raises(ConfigError, match=r"^teacher\.kind: live, but .* set it to self"):
        check()
    with pytest.raises(ConfigError, match=r"^teacher\.kind: none"):
        check("teacher=null")


def test_only_hard_tokens_of_causal_models_weigh_more():
    words, hard = ["teacher={kind: self}"], "data.masking={kind: hard_tokens}"
    with pytest.raises(ConfigError, match=r"^method\.hard_weight: 2\.0 is for causal LMs"):
        check(*words, hard, hard_weight=2.0)
    words.append("data.objective=causal")
    with pytest.raises(ConfigError, match=r"^data\.masking\.kind: random, .* needs hard_tokens"):
        check(*words, hard_weight=2.0)
    check(*words, hard, hard_weight=2.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("smoothing", 1.1), ("smoothing", -0.1), ("hard_weight", 0.0), ("hard_weight", math.inf)],
)
def test_values_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=rf"method\.{setting}"):
        method_of(**{setting: value})


def test_the_temperature_is_no_setting():
    with pytest.raises(ConfigError, match=r"method\.temperature: no such setting"):
        method_of(temperature=2.0)
    assert method_of().temperature == 1.0
