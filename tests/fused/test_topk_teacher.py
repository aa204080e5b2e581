"""From logits to a top-k teacher; and what is none is found out before it teaches anything."""

import math

import pytest
import torch

from dskd import ops
from dskd.fused import per_token, reference, topk_teacher
from dskd.ops import DenseTeacher, TopKTeacher
from tests.fused.cases import N, V, error_of, head, normal, same
from tests.heads import small_chunks

INF, NAN = math.inf, math.nan
LOGITS = normal(N, V, seed=1)


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_keeps_the_largest_and_the_rest_is_the_tail(k, dtype):
    logits_NV = LOGITS.to(dtype).requires_grad_()
    found = ops.topk_teacher(logits_NV, k, [0.5, 1, 2.0])
    logprobs_NV = logits_NV.detach().double().log_softmax(1)
    kept_NK, ids_NK = logprobs_NV.sort(1, descending=True)
    assert found.ids_NK.equal(ids_NK[:, :k]) and found.ids_NK.dtype == torch.int64
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.logprobs_NK.dtype == wide and not found.logprobs_NK.requires_grad
    torch.testing.assert_close(found.logprobs_NK.double(), kept_NK[:, :k], rtol=exact, atol=exact)
    assert [*found.tail_N] == [0.5, 1.0, 2.0]
    for heat, tail_N in found.tail_N.items():
        wanted_N = (kept_NK[:, k:] / heat).logsumexp(1) if k < V else torch.full((N,), -INF)
        torch.testing.assert_close(tail_N, wanted_N.to(wide), rtol=exact, atol=exact)


@pytest.mark.parametrize("temperature", [0.7, 1, 2.0])
def test_a_teacher_of_all_logits_is_the_dense_one(temperature):
    inputs, teacher = head(), ops.topk_teacher(LOGITS, V, temperature)
    of_all, of_logits = (
        ops.linear_kd(*inputs, teacher=each, temperature=temperature).total
        for each in (teacher, DenseTeacher(LOGITS))
    )
    same(of_all, of_logits, *inputs)


def test_many_logits_are_sorted_in_parts(monkeypatch):
    whole = ops.topk_teacher(LOGITS, 3, 2.0)
    small_chunks(monkeypatch, 2)
    parts = ops.topk_teacher(LOGITS, 3, 2.0)
    assert parts.ids_NK.equal(whole.ids_NK) and parts.logprobs_NK.equal(whole.logprobs_NK)
    assert parts.tail_N[2.0].equal(whole.tail_N[2.0])
    assert ops.topk_teacher(LOGITS[:0], 3, 2.0).ids_NK.shape == (0, 3)


def _row_of(value):
    return LOGITS.index_fill(0, torch.tensor([2]), value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.topk_teacher(LOGITS.long(), 3, 1.0), "logits: must be floating-point"),
        (lambda: ops.topk_teacher(LOGITS[0], 3, 1.0), "logits: must have two axes"),
        (lambda: ops.topk_teacher(LOGITS, 0, 1.0), "k: must be a whole number from 1 to the 11"),
        (lambda: ops.topk_teacher(LOGITS, V + 1, 1.0), "k: .* not 12"),
        (lambda: ops.topk_teacher(LOGITS, 2.0, 1.0), r"k: .* not 2\.0"),
        (lambda: ops.topk_teacher(LOGITS, 3, 0.0), "temperatures: must be positive and finite"),
        (lambda: ops.topk_teacher(LOGITS, 3, [1.0, NAN]), "temperatures: .* not nan"),
        (lambda: ops.topk_teacher(LOGITS, 3, []), "temperatures: there are none"),
        (lambda: ops.topk_teacher(_row_of(NAN), 3, 1.0), "logits: row 2 is NaN, infinite, or"),
        (lambda: ops.topk_teacher(_row_of(-INF), 3, 1.0), "logits: row 2 is .* -inf throughout"),
    ],
)
def test_what_cannot_be_kept_is_refused(call, message):
    with pytest.raises(error_of(message), match=message):
        call()


# ---- what is no teacher --------------------------------------------------------------------------


def changed(place, value, k=4):
    """Ids, log-probabilities and tail of a teacher, with one number changed."""
    kept = ops.topk_teacher(LOGITS, k, 1.0)
    parts = [kept.ids_NK, kept.logprobs_NK, kept.tail_N[1.0]]
    name, *index = place
    parts[["ids", "logprobs", "tail"].index(name)][tuple(index)] = value
    return parts


def raw_logits():
    logits_NK, ids_NK = (LOGITS - 4.0).topk(4, 1)  # all of them below 0
    return [ids_NK, logits_NK, torch.full((N,), -1.0)]


def masses():
    """The tail as a probability, and no logarithm of one."""
    ids_NK, logprobs_NK, tail_N = changed(("ids", 0, 0), int(LOGITS[0].argmax()))
    return [ids_NK, logprobs_NK, tail_N.exp()]


WRONG = {
    "raw logits": (raw_logits, r"tail: -1 at \[0\] must be from -0\.15"),
    "a mass": (masses, r"tail: 0\.\d+ at \[0\] must be from -"),
    "no tail": (lambda: changed(("tail", 3), -INF), r"tail: -inf at \[3\] must be from -"),
    "a tail of 1": (lambda: changed(("tail", 3), 0.0), r"tail: 0 at \[3\] must be from -"),
    "a tail, with all kept": (
        lambda: changed(("tail", 3), -3.0, V), r"tail: -3 at \[3\] must be from -inf to -inf",
    ),
    "a tail that is infinite": (lambda: changed(("tail", 1), INF), r"tail: inf at \[1\] must be"),
    "a tail that is no number": (lambda: changed(("tail", 2), NAN), r"tail: nan at \[2\] must be"),
    "above 0": (
        lambda: changed(("logprobs", 2, 1), 0.5), r"logprobs: 0\.5 at \[2, 1\] is above 0",
    ),
    "no number": (lambda: changed(("logprobs", 2, 1), NAN), r"logprobs: nan at \[2, 1\] is no num"),
    "more than 1": (
        lambda: changed(("logprobs", 2, 1), -1e-4), r"logprobs: at \[2\] have the mass 1\.\d+, mor",
    ),
    "a slot that is not empty": (
        lambda: changed(("ids", 1, 3), -1), r"logprobs: -\S+ at \[1, 3\] must be -inf, its slot",
    ),
    "a token twice": (
        lambda: changed(("ids", 1, 3), int(LOGITS[1].argmax())), "ids: row 1 has .* twice",
    ),
    "no token": (lambda: changed(("ids", 1, 3), V), r"ids: 11 at \[1, 3\] is not one of the 11"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_teacher_is_refused(name):
    make, message = WRONG[name]
    ids_NK, logprobs_NK, tail_N = make()
    with pytest.raises(ValueError, match=message):
        ops.topk_kd(normal(N, V), ids_NK, logprobs_NK, tail_N)
    with pytest.raises(ValueError, match=message):
        ops.linear_kd(*head(), teacher=TopKTeacher(ids_NK, logprobs_NK, {1.0: tail_N}))


@pytest.mark.parametrize("mode", ["renormalised", "truncated"])
def test_without_a_tail_kept_tokens_have_at_most_the_mass_1(mode):
    ids_NK, logprobs_NK, _ = WRONG["more than 1"][0]()
    with pytest.raises(ValueError, match=r"logprobs: at \[2\] have the mass"):
        ops.topk_kd(normal(N, V), ids_NK, logprobs_NK, mode=mode)


@pytest.mark.parametrize(("temperature", "tail"), [(2.0, 3.0), (2.0, -9.0), (0.5, 0.0), (0.5, -99)])
def test_a_tail_of_another_temperature_is_held_to_what_the_rest_can_be(temperature, tail):
    kept = ops.topk_teacher(LOGITS, 4, temperature)
    kept.tail_N[temperature][2] = tail
    with pytest.raises(ValueError, match=rf"tail: {tail:.0f} at \[2\] must be from .* of the mass"):
        ops.linear_kd(*head(), teacher=kept, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 1.3, 2.0, 10.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_rounded_values_are_a_teachers_still(dtype, temperature, spread):
    """As a cache keeps them, and joins those that are not used to the tail."""
    logits_NV = normal(200, 300) * spread
    for k in (1, 2, 7, 32, 299, 300):
        kept = ops.topk_teacher(logits_NV, k, temperature)
        logprobs_NK, tail_N = kept.logprobs_NK.to(dtype), kept.tail_N[temperature].float()
        used = (k + 1) // 2
        dropped_N = (logprobs_NK.float()[:, used:] / temperature).logsumexp(1)
        for ids_NK, part_NK, part_N in (
            (kept.ids_NK, logprobs_NK, tail_N),
            (kept.ids_NK[:, :used], logprobs_NK[:, :used], tail_N.logaddexp(dropped_N)),
        ):
            topk_teacher.check_masses(
                ids_NK, part_NK, part_N, torch.ones(200), temperature=temperature, columns=300
            )


def test_a_gpu_is_not_waited_for_but_in_debug_mode(monkeypatch):
    there = torch.empty(1, device="meta")
    assert not per_token.looks(there)
    monkeypatch.setattr(per_token, "DEBUG", True)
    assert per_token.looks(there)


def test_on_a_gpu_it_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(topk_teacher, "looks", lambda values: False)
    for name in ("raw logits", "above 0", "no tail"):
        ops.topk_kd(normal(N, V), *WRONG[name][0]())


def test_a_row_without_weight_or_token_may_hold_anything():
    student_NV, (ids_NK, logprobs_NK, tail_N) = normal(N, V), changed(("tail", 2), NAN)
    weight_N = torch.ones(N).index_fill(0, torch.tensor([2]), 0.0)
    ids_NK[0], logprobs_NK[0], tail_N[0] = -1, -INF, -INF
    found_N = ops.topk_kd(student_NV, ids_NK, logprobs_NK, tail_N, weight=weight_N).divergence_N
    wanted_N = reference.topk_divergence(student_NV, ids_NK, logprobs_NK, tail_N)
    torch.testing.assert_close(found_N[[1, 3, 4]], wanted_N[[1, 3, 4]])
    assert found_N[0] == found_N[2] == 0
