"""Top-k teachers that are mixed over the tokens that any of them keeps."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradcheck

from dskd import ops
from dskd.batch import Positions
from dskd.errors import ConfigError
from dskd.fused import reference, topk_teacher
from dskd.fused.mixed_topk import Kept, mixed_topk, topk_confidence
from dskd.models.families import LinearProjection
from dskd.ops import DenseTeacher, MixedTopK, MixtureRule, TopKTeacher
from tests.fused.cases import COMMON, LABELS, RULES, WEIGHT, D, N, V, gradients, head, normal, same

INF, NAN = math.inf, math.nan
LOGITS = [normal(N, V, seed=seed) * scale for seed, scale in ((1, 1.0), (2, 2.0), (3, 1.5))]
HEAT = 2.0


def teachers(ks=(4, 3, 5), dtype=torch.float64):
    """Three that keep some tokens together; the first has an unused slot at token 1."""
    parts = [
        ops.topk_teacher(logits_NV.to(dtype), k, (1.0, HEAT))
        for logits_NV, k in zip(LOGITS, ks, strict=True)
    ]
    first = parts[0]
    for heat, tail_N in first.tail_N.items():
        tail_N[1] = tail_N[1].logaddexp(first.logprobs_NK[1, -1] / heat)
    first.ids_NK[1, -1], first.logprobs_NK[1, -1] = -1, -INF
    return parts


def at(part, heat):
    """Ids, log-probabilities and tail at a temperature, of mass 1."""
    buckets_NB = torch.cat((part.logprobs_NK / heat, part.tail_N[heat][:, None]), 1).log_softmax(1)
    return Kept(part.ids_NK, buckets_NB[:, :-1], buckets_NB[:, -1])


def shares(parts, rule):
    confidence_Nn = reference.topk_confidences([at(part, 1.0) for part in parts], V)
    return reference.mixture_shares(confidence_Nn, rule)


# ---- what it is ----------------------------------------------------------------------------------


def test_a_mixture_by_hand():
    """Of 5 tokens, one teacher keeps 0 and 1, the other 1 and 3; the tails are added."""
    first = Kept(
        torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]).log(), torch.tensor([0.2]).log()
    )
    other = Kept(
        torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.1]]).log(), torch.tensor([0.3]).log()
    )
    found = mixed_topk([first, other], None, MixtureRule((1.0, 3.0)), 5)
    assert found.ids_NK.tolist() == [[3, 1, 0, -1]]
    wanted = [0.75 * 0.6, 0.25 * 0.3 + 0.75 * 0.1, 0.25 * 0.5, 0.0]
    assert found.logprobs_NK.exp().tolist() == [pytest.approx(wanted)]
    assert found.tail_N.exp().tolist() == pytest.approx([0.25 * 0.2 + 0.75 * 0.3])
    sure = topk_confidence(first, 5)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert sure.tolist() == pytest.approx([1 - entropy / math.log(5)])


def test_a_token_that_all_keep_has_the_sum():
    ids_NK = torch.tensor([[4, 2, 7]])
    one = Kept(ids_NK, torch.tensor([[0.5, 0.25, 0.125]]).log(), torch.tensor([0.125]).log())
    found = mixed_topk([one] * 4, None, MixtureRule((1.0,) * 4), 9)
    assert found.ids_NK.tolist() == [[7, 4, 2] + [-1] * 6]
    assert found.logprobs_NK[0, :3].exp().tolist() == pytest.approx([0.125, 0.5, 0.25])
    assert found.logprobs_NK[0, 3:].isneginf().all() and found.tail_N.exp().item() == 0.125


def test_it_is_a_distribution_without_a_token_twice():
    parts = teachers()
    for rule in RULES.values():
        sure_Nn = torch.stack([topk_confidence(at(part, 1.0), V) for part in parts], 1)
        found = mixed_topk([at(part, HEAT) for part in parts], sure_Nn, rule, V)
        topk_teacher.check_ids(found.ids_NK, V)
        assert found.ids_NK.shape == (N, min(12, V)) or rule is RULES["fixed"]
        mass_N = found.logprobs_NK.exp().sum(1) + found.tail_N.exp()
        torch.testing.assert_close(mass_N, torch.ones(N).double())
        assert (found.logprobs_NK == -INF).equal(found.ids_NK < 0)


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, HEAT])
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_reference(rule, mode, temperature):
    """Value and gradients; in chunks, too."""
    parts, inputs = teachers(), head()
    logits_NV = torch.nn.functional.linear(*inputs)
    wanted_N = reference.topk_mixture_divergence(
        logits_NV,
        [at(part, temperature) for part in parts],
        shares(parts, RULES[rule]),
        mode,
        temperature=temperature,
    )
    label_N = reference.cross_entropy(logits_NV, LABELS)
    wanted = (WEIGHT * (LABELS >= 0) * wanted_N).sum() + 0.7 * label_N.sum()
    signal = MixedTopK(parts, RULES[rule], V)
    how = {"teacher": signal, "mode": mode, "temperature": temperature, **COMMON}
    expected = gradients(wanted, *inputs)
    for chunk in (2, None):
        total = ops.linear_kd(*inputs, chunk=chunk, **how).total
        torch.testing.assert_close(total, wanted, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients(total, *inputs), expected, rtol=1e-9, atol=1e-11)
    assert gradcheck(lambda *x: ops.linear_kd(*x, **how).total, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_where_all_is_kept_it_is_the_mixture_of_all_logits(rule):
    parts = [ops.topk_teacher(logits_NV, V, (1.0, HEAT)) for logits_NV in LOGITS]
    inputs, how = head(), {"temperature": HEAT, **COMMON}
    found = ops.linear_kd(*inputs, teacher=MixedTopK(parts, RULES[rule], V), **how)
    whole = DenseTeacher(reference.mixture_logits(LOGITS, RULES[rule], temperature=HEAT))
    wanted = ops.linear_kd(*inputs, teacher=whole, **how)
    same(found.total, wanted.total, *inputs)
    torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("rule", ["confidence_hard", "fixed"])
def test_what_is_one_teachers_alone_is_that_teacher(rule, mode):
    """By its weight, or where it is the surest: what the others keep is not kept for it."""
    parts, inputs = teachers(), head()
    how = {"mode": mode, "temperature": HEAT, **COMMON}
    alone = [ops.linear_kd(*inputs, teacher=part, **how).divergence_N for part in parts]
    by_rule = RULES[rule] if rule == "confidence_hard" else MixtureRule((0.0, 2.0, 0.0))
    found_N = ops.linear_kd(*inputs, teacher=MixedTopK(parts, by_rule, V), **how).divergence_N
    chosen_N = shares(parts, by_rule).argmax(1)
    assert chosen_N.unique().numel() > 1 or rule == "fixed"
    wanted_N = torch.stack(alone).gather(0, chosen_N[None])[0]
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-10, atol=1e-12)


def test_twice_the_same_teacher_is_that_teacher():
    part, inputs = teachers()[0], head()
    how = {"temperature": HEAT, **COMMON}
    for rule in RULES.values():
        wanted = ops.linear_kd(*inputs, teacher=part, **how).total
        found = ops.linear_kd(*inputs, teacher=MixedTopK([part] * 3, rule, V), **how).total
        same(found, wanted, *inputs)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("mode", ops.MODES)
def test_in_fp32_and_by_the_kernels(mode, triton):
    inputs, how = head(torch.float32), {"mode": mode, "temperature": HEAT, **COMMON}
    exact = ops.linear_kd(
        *(x.double() for x in inputs),
        teacher=MixedTopK(teachers(), RULES["confidence_soft"], V),
        **how,
    )
    parts = teachers(dtype=torch.float32)
    with ops.triton_everywhere() if triton else nullcontext():
        found = ops.linear_kd(*inputs, teacher=MixedTopK(parts, RULES["confidence_soft"], V), **how)
    torch.testing.assert_close(found.total.double(), exact.total, rtol=1e-5, atol=0)
    for mine, other in zip(
        gradients(found.total, *inputs), gradients(exact.total, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    parts = [
        TopKTeacher(p.ids_NK[:0], p.logprobs_NK[:0], {t: x[:0] for t, x in p.tail_N.items()})
        for p in teachers()
    ]
    for rule in RULES.values():
        hidden_ND, *rest = head()
        signal = MixedTopK(parts, rule, V)
        found = ops.linear_kd(hidden_ND[:0], *rest, teacher=signal, temperature=HEAT)
        assert found.total == 0 and found.divergence_N.shape == (0,)


def test_where_only_the_label_counts_the_teachers_may_be_anything():
    parts = teachers()
    for part in parts:
        part.logprobs_NK[2] = part.tail_N[1.0][2] = part.tail_N[HEAT][2] = NAN
    inputs = head()
    for rule in RULES.values():
        how = {"teacher": MixedTopK(parts, rule, V), "temperature": HEAT, **COMMON}
        found = ops.linear_kd(*inputs, **how)  # WEIGHT is 0 at token 2
        assert all(g.isfinite().all() for g in gradients(found.total, *inputs))


def test_through_the_head_of_a_student_with_padding_columns():
    """Its columns beyond the vocabulary are in its tail."""
    torch.manual_seed(0)
    positions = Positions(torch.randn(N, D), LinearProjection(D, V + 3), LABELS.clamp_min(0))
    parts = teachers(dtype=torch.float32)
    found_N = ops.positions_kd(
        positions, MixedTopK(parts, RULES["uniform"], V), temperature=HEAT
    ).divergence_N
    wanted_N = reference.topk_mixture_divergence(
        positions.logits_NV.detach(),
        [at(part, HEAT) for part in parts],
        torch.full((N, 3), 1 / 3),
        temperature=HEAT,
    )
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="cached teacher knows its largest logits only"):
        signal = MixedTopK(parts, RULES["uniform"], V)
        ops.positions_kd(positions, signal, temperature=HEAT, kind="jsd")


def test_torch_compile_takes_the_whole_function():
    inputs, signal = head(), MixedTopK(teachers(), RULES["confidence_soft"], V)

    def total(*inputs):
        return ops.linear_kd(*inputs, teacher=signal, temperature=HEAT, **COMMON).total

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    same(compiled(*inputs), total(*inputs), *inputs)


# ---- what is wrong -------------------------------------------------------------------------------


def changed(place, value, part=1):
    """One number of one teacher is another; ``place``: what it is of, or its temperature; index."""
    parts = teachers()
    name, *index = place
    tensors = {"ids": parts[part].ids_NK, "logprobs": parts[part].logprobs_NK}
    tensors.update(parts[part].tail_N)
    tensors[name][tuple(index)] = value
    return parts


def without_tail(heat):
    parts = teachers()
    parts[2] = TopKTeacher(
        parts[2].ids_NK,
        parts[2].logprobs_NK,
        {t: x for t, x in parts[2].tail_N.items() if t != heat},
    )
    return parts


SOFT = RULES["confidence_soft"]


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (MixedTopK(teachers(), MixtureRule((1.0, 1.0)), V), r"weights: 2 for 3 teachers"),
        (MixedTopK(teachers(), MixtureRule((0.0,) * 3), V), r"weights: .*not all 0"),
        (MixedTopK(teachers(), SOFT, V + 1), r"vocabulary: 12 is not within the student's 11"),
        (MixedTopK(changed(("ids", 2, 1), V), SOFT, V), r"teachers\[1\]: ids: 11 at \[2, 1\]"),
        (MixedTopK(changed(("logprobs", 3, 0), 0.2), SOFT, V),
         r"teachers\[1\]: logprobs: 0\.2 at \[3, 0\] is above 0"),
        (MixedTopK(changed((1.0, 0), 0.0, part=0), SOFT, V), r"teachers\[0\]: tail: 0 at \[0\]"),
        (MixedTopK(changed((HEAT, 4), -INF), SOFT, V), r"teachers\[1\]: tail: -inf at \[4\]"),
        (MixedTopK(without_tail(HEAT), SOFT, V),
         r"teachers\[2\]: has no tail mass at temperature 2\.0, but at 1\.0"),
        (MixedTopK(without_tail(1.0), SOFT, V),
         r"teachers\[2\]: has no tail mass at temperature 1\.0, but at 2\.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(signal, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_kd(*head(), teacher=signal, temperature=HEAT)


def test_without_confidences_no_tail_at_1_is_needed():
    signal = MixedTopK(without_tail(1.0), RULES["uniform"], V)
    assert ops.linear_kd(*head(), teacher=signal, temperature=HEAT).total.isfinite()


def test_more_tokens_than_the_kernels_hold_are_refused(monkeypatch):
    monkeypatch.setattr(topk_teacher, "MOST_KEPT", 9)
    with ops.triton_everywhere(), pytest.raises(ValueError, match="at most 9 kept tokens, not 11"):
        signal = MixedTopK(teachers(dtype=torch.float32), SOFT, V)
        ops.linear_kd(*head(torch.float32), teacher=signal, temperature=HEAT)
