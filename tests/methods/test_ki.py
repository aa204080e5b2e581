"""Knowledge Inheritance against the original criterion: losses, gradients, edges, normalisation."""

import math

import pytest
import torch

from dskd.batch import IGNORE, DenseTeacher, Positions
from dskd.errors import ConfigError
from dskd.fused import reference
from dskd.methods.base import build_method
from dskd.ops import KINDS
from dskd.settings.run import Run
from tests import batches
from tests.equivalence.small import LIVE, LIVE_OTHER, Runs, cached, routed, same
from tests.fused.plain_losses import MODES, top_k
from tests.goldens import golden
from tests.launching import losses

GOLDEN = golden("ki")
SCHEDULES = {"linear": "linear", "then": "switch"}
LOGGED = 1e-6  # the original logs in fp32
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


def method_of(inputs):
    """The settings that stand for the original's options."""
    section = {"kind": "ki", "schedule": SCHEDULES[inputs.get("mode", "linear")]}
    section |= {"steps": inputs["max_update_distil"], "temperature": inputs["temperature"]}
    return build_method(section)


def batch_of(inputs, pad):
    labels_BT = torch.tensor(inputs["labels"])
    labels_BT[labels_BT == pad] = IGNORE
    return batches.batch_of(labels_BT)


def forward(method, inputs, step, *, pad=1, dtype=torch.float64, k=None):
    """Terms, the whole student logits (a leaf) and the batch, as the objective would make them."""
    batch = batch_of(inputs, pad)
    student_BTV = torch.tensor(inputs["student_logits"], dtype=dtype).requires_grad_()
    teacher_NV = torch.tensor(inputs["teacher_logits"], dtype=dtype)[batch.supervised_BT]
    rows = Positions(student_BTV[batch.supervised_BT], Identity(student_BTV), batch.labels_N)
    signal = None
    if method.needs_teacher(step):
        signal = DenseTeacher(teacher_NV) if k is None else top_k(teacher_NV, k, method.temperature)
    return method.loss(rows, signal, batch, step), student_BTV, batch


class Identity:
    """A head that changes nothing: hidden states are logits."""

    def __init__(self, like):
        self.weight = torch.eye(like.shape[-1], dtype=like.dtype)

    def __call__(self, hidden_NV, use=None):
        return hidden_NV if use is None else use(hidden_NV, self.weight, None)


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize("k", [None, 9], ids=["live", "cached"])
@pytest.mark.parametrize("case", GOLDEN["loss_cases"], ids=lambda c: c["name"])
def test_loss_and_gradient(case, k, dtype, rtol):
    inputs, expected = case["inputs"], case["expected"]
    step, close = inputs["step"], {"rel": rtol, "abs": rtol}
    method = method_of(inputs)
    terms, student_BTV, batch = forward(method, inputs, step, pad=inputs["pad"], dtype=dtype, k=k)
    assert method.alpha(step) == expected["alpha"]
    assert method.rates(step) == {"alpha": expected["alpha"]}
    weights = {"ce": 1 - expected["alpha"], "kl": expected["alpha"]}
    ((loss, parts),) = terms.values()
    assert set(parts) == {name for name, weight in weights.items() if weight}
    if "ce" in parts:
        assert parts["ce"].item() == pytest.approx(expected["loss_mlm_sum"], **close)
    if "kl" in parts:
        assert parts["kl"].item() == pytest.approx(expected["loss_kd_sum"], **close)
    assert loss.item() == pytest.approx(expected["loss_sum"], **close)
    (count,) = set(method.counts(batch).values())
    assert count == expected["sample_size"]
    assert (loss / count).item() == pytest.approx(expected["loss_per_token"], **close)
    bits = loss.item() / expected["sample_size"] / math.log(2)
    assert bits == pytest.approx(expected["log_loss_bits"], rel=max(rtol, LOGGED), abs=LOGGED)
    loss.backward()
    gradient = torch.tensor(expected["grad_student_logits_of_sum"], dtype=dtype)
    torch.testing.assert_close(student_BTV.grad, gradient, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize("case", GOLDEN["loss_cases"], ids=lambda c: c["name"])
def test_both_losses_and_their_logged_values(case, dtype, rtol):
    """The original logs both terms whatever alpha is; so does a constant rate."""
    inputs, expected = case["inputs"], case["expected"]
    half = {"schedule": "constant", "rate": 0.5, "temperature": inputs["temperature"]}
    method = build_method({"kind": "ki", **half})
    terms, _, batch = forward(method, inputs, 0, pad=inputs["pad"], dtype=dtype)
    ce, divergence = (terms["tokens"].parts[name].item() for name in ("ce", "kl"))
    close = {"rel": rtol, "abs": rtol}
    assert ce == pytest.approx(expected["loss_mlm_sum"], **close)
    assert divergence == pytest.approx(expected["loss_kd_sum"], **close)
    bits = 1 / batch.supervised / math.log(2)
    logged = {"rel": max(rtol, LOGGED), "abs": max(rtol, LOGGED)}
    assert ce * bits == pytest.approx(expected["log_loss_mlm_bits"], **logged)
    assert divergence * bits == pytest.approx(expected["log_loss_distil_bits"], **logged)
    assert 2 ** (ce * bits) == pytest.approx(expected["ppl"], rel=max(10 * rtol, LOGGED))


def test_no_masked_position_is_exactly_zero():
    (edge,) = [e for e in GOLDEN["edge_cases"] if e["name"] == "no_masked_position"]
    inputs = dict(GOLDEN["loss_cases"][0]["inputs"])
    inputs["labels"] = [[inputs["pad"]] * 6] * 2
    for k in (None, 3):
        terms, student_BTV, batch = forward(method_of(inputs), inputs, 27500, k=k)
        loss, parts = terms["tokens"]
        assert {name: part.item() for name, part in parts.items()} == {"ce": 0.0, "kl": 0.0}
        assert loss.item() == edge["wanted"]["loss"] == 0.0
        assert batch.supervised == edge["wanted"]["sample_size"] == 0
        loss.backward()
        assert (student_BTV.grad == 0).all()


def test_a_decay_without_length_is_refused():
    for schedule in ("linear", "cosine", "switch"):
        told = rf"method\.steps: the {schedule} schedule.*at least 1"
        with pytest.raises(ConfigError, match=told):
            build_method({"kind": "ki", "schedule": schedule, "steps": 0})
    with pytest.raises(ConfigError, match=r"method\.steps"):
        build_method({"kind": "ki"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0.0), ("temperature", math.inf), ("rate", 1.5), ("rate", -0.1),
        ("steps", -1), ("divergence", "kl"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(setting, value):
    section = {"kind": "ki", "schedule": "constant", setting: value}
    with pytest.raises(ConfigError, match=rf"method\.{setting}"):
        build_method(section)


WITH_BETA = {"mixed", "jsd", "skew_forward_kl", "skew_reverse_kl"}


@pytest.mark.parametrize("divergence", KINDS)
def test_beta_is_of_some_divergences(divergence):
    """Where there is none its default alone is taken, as a printed recipe names it."""
    section = {"kind": "ki", "schedule": "constant", "divergence": divergence}
    assert build_method(section | {"beta": 0.5}) == build_method(section)
    if divergence in WITH_BETA:
        assert build_method(section | {"beta": 0.1}).beta == 0.1
        for end in (0.0, 1.0):
            with pytest.raises(ConfigError, match=rf"^method\.beta: {end} should be "):
                build_method(section | {"beta": end})
    else:
        with pytest.raises(ConfigError, match=rf"^method\.beta: 0\.1, .*{divergence} has no beta"):
            build_method(section | {"beta": 0.1})


@pytest.mark.parametrize("teacher", [cached(LIVE), routed(LIVE, cached(LIVE_OTHER))])
@pytest.mark.parametrize("divergence", KINDS)
def test_a_cached_teacher_gives_the_forward_kl_only(divergence, teacher):
    """Refused before a run, unless no step has a teacher."""
    section = {"schedule": "constant", "divergence": divergence}
    wid = {"kind": "wid", "hidden_size": 4}
    cases = [({"kind": "ki"} | section, "method"), (wid | {"inherit": section}, r"method\.inherit")]
    run = Run(model={"path": "teacher"}, teacher=teacher, train={"steps": 20000, "clip": 0.0})
    for method, place in cases:
        if divergence == "forward_kl":
            build_method(method).check(run, None)
            continue
        with pytest.raises(ConfigError, match=rf"^{place}\.divergence: {divergence} needs all"):
            build_method(method).check(run, None)
    build_method({"kind": "ki", "rate": 0.0} | section).check(run, None)
    live = run.model_copy(update={"teacher": Run(teacher=routed(LIVE, LIVE)).teacher})
    build_method({"kind": "ki"} | section).check(live, None)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_each_divergence_is_the_references(divergence, temperature):
    """Value and gradient in float64, with the labels' part, and the logged sum without alpha."""
    inputs, alpha, beta = GOLDEN["loss_cases"][0]["inputs"], 0.6, 0.3
    section = {"kind": "ki", "schedule": "constant", "rate": alpha, "temperature": temperature}
    section |= {"divergence": divergence} | ({"beta": beta} if divergence in WITH_BETA else {})
    terms, student_BTV, batch = forward(build_method(section), inputs, 0)
    total, parts = terms["tokens"]
    student_NV = student_BTV[batch.supervised_BT]
    teacher_BTV = torch.tensor(inputs["teacher_logits"], dtype=torch.float64)
    teacher_NV = teacher_BTV[batch.supervised_BT]

    def plain(kind):
        pair = (student_NV, teacher_NV)
        return reference.divergence(*pair, kind, beta=beta, temperature=temperature).sum()

    if divergence == "mixed":
        part = beta * plain("forward_kl") + (1 - beta) * plain("reverse_kl")
    else:
        part = plain(divergence)
    # the gradient of the one that is linear in the gap falls as 1/T, of the others as 1/T^2
    part = part * (temperature if divergence == "total_variation" else temperature**2)
    labels = reference.cross_entropy(student_NV, batch.labels_N).sum()
    expected = (1 - alpha) * labels + alpha * part
    name = "kl" if divergence == "forward_kl" else divergence
    assert set(parts) == {"ce", name}
    assert parts[name].item() == pytest.approx(part.item(), rel=1e-9)
    assert parts["ce"].item() == pytest.approx(labels.item(), rel=1e-9)
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    found, wanted = (torch.autograd.grad(loss, student_BTV) for loss in (total, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", KINDS)
def test_the_factor_keeps_the_gradient_at_high_temperatures(divergence):
    """Twice the temperature leaves it nearly as it is: without the factor it would fall."""
    inputs = GOLDEN["loss_cases"][0]["inputs"]
    sizes = []
    for temperature in (200.0, 400.0):
        section = {"kind": "ki", "schedule": "constant", "temperature": temperature}
        method = build_method(section | {"divergence": divergence})
        terms, student_BTV, _ = forward(method, inputs, 0)
        (gradient_BTV,) = torch.autograd.grad(terms["tokens"].total, student_BTV)
        sizes.append(gradient_BTV.norm().item())
    assert sizes[0] > 0
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize(
    "method", [{"divergence": "skew_reverse_kl", "beta": 0.2}, {"divergence": "mixed"}]
)
def test_one_trajectory_at_every_stage_and_world_size(tmp_path, method):
    """Live, routed, and from the student itself, which are what gives all logits."""
    runs = Runs(tmp_path)
    single = runs.run("single", 1, method=method)
    assert len(set(losses(single))) > 1
    both = runs.run("both", 2, "deepspeed=zero3", method=method, teacher=routed(LIVE, LIVE))
    for other in (runs.run("zero3", 1, "deepspeed=zero3", method=method), both):
        same(other, single)
    itself = {"teacher": {"kind": "self", "weights": "frozen"}, "method": method}
    frozen = runs.run("itself", 1, **itself)
    again = runs.run("itself-2", 2, "deepspeed=zero3", **itself)
    assert losses(again) == pytest.approx(losses(frozen), abs=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
def test_normalisation_is_the_mean_over_all_tokens_of_the_step(dtype, rtol):
    golden = GOLDEN["normalisation"]
    method = method_of(golden)
    sums, counts = [], []
    for inputs, loss_sum in zip(golden["micro_batches"], golden["loss_sums"], strict=True):
        terms, _, batch = forward(method, inputs, golden["step"], pad=golden["pad"], dtype=dtype)
        assert terms["tokens"].total.item() == pytest.approx(loss_sum, rel=rtol)
        sums.append(terms["tokens"].total)
        counts.append(method.counts(batch)["tokens"])
    assert [int(count) for count in counts] == golden["n"]
    mean = sum(sums) / sum(counts)
    assert mean.item() == pytest.approx(golden["global_token_mean"], rel=rtol)
    assert 1 / sum(counts) == golden["grad_scale"]
    assert abs(mean.item() - golden["wrong_mean_of_means"]) > 0.1


def test_the_teacher_is_asked_only_while_alpha_lasts():
    linear = build_method({"kind": "ki", "steps": 4})
    assert linear.wants_teacher()
    assert [linear.needs_teacher(step) for step in range(6)] == [True] * 4 + [False] * 2
    never = build_method({"kind": "ki", "schedule": "constant", "rate": 0.0})
    assert not never.wants_teacher()
    constant = build_method({"kind": "ki", "schedule": "constant", "rate": 0.2})
    assert constant.needs_teacher(10**9)


@pytest.mark.parametrize("topk", MODES)
def test_topk_modes_reach_the_loss(topk):
    """Golden top-k cases through the method, at alpha 1 and (with the labels' term) at 1/2."""
    golden = GOLDEN["topk"]
    inputs = {
        "student_logits": [golden["student_logits"]],
        "teacher_logits": [golden["teacher_logits"]],
        "labels": [[0, 2, 3, 4, 5]],
    }
    for case in golden["cases"]:
        section = {"kind": "ki", "steps": 2, "temperature": case["T"], "topk": topk}
        for step in (0, 1):
            terms, _, _ = forward(build_method(section), inputs, step, k=case["K"])
            assert ("ce" in terms["tokens"].parts) == (step == 1)
            wanted = pytest.approx(case[MODES[topk]], rel=1e-9, abs=1e-9)
            assert terms["tokens"].parts["kl"].item() == wanted
