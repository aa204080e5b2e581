"""What is wrong with an argument is named."""

from functools import partial

import pytest
import torch

from dskd import ops
from dskd.fused import per_token
from dskd.ops import DenseTeacher, LinearTeacher, LogitMap
from tests.fused.cases import LABELS, D, N, V, W, error_of, kept, normal, topk_teacher

S, T = normal(N, V), normal(N, V, seed=1)
IDS, LOGPROBS, TAIL = kept(T, 1.0)
TOPK, TWICE = topk_teacher(T, 1.0), IDS.clone()
TWICE[2, 1], TWICE[2, 3] = 5, 5
H, B_VD = normal(N, D), normal(V, D)
NAN, INF = float("nan"), float("inf")
dense, mixture = partial(ops.dense_kd, S, T), partial(ops.mixture_kd, S)
topk, linear = partial(ops.topk_kd, S), partial(ops.linear_kd, H, B_VD)


def one_is(weight):
    return torch.ones(N).index_fill(0, torch.tensor([3]), weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dense_kd(S[0], T), r"student: must have two axes or more, not shape \(11,\)"),
        (lambda: ops.dense_kd(S.long(), T), r"student: must be floating-point, not torch\.int64"),
        (lambda: ops.dense_kd(S, T[:3]), r"teacher: has 3 rows where there are 5 tokens"),
        (lambda: ops.dense_kd(S[:, :W], T),
         r"teacher: has 11 columns, the student 9; .*vocabulary="),
        (lambda: dense(vocabulary=12), r"vocabulary: 12 is not within the 11 columns"),
        (lambda: dense(kind="kl"), r"kind: 'kl' is not one of forward_kl, "),
        (lambda: ops.dense_kd(S, T[:, :W], kind="reverse_kl"),
         r"kind: reverse_kl is infinite where"),
        (lambda: dense(kind="jsd", beta=1.0), r"beta: must lie between 0 and 1 for jsd"),
        (lambda: dense(kind="mixed"), r"reverse_weight: the mixed divergence has one"),
        (lambda: dense(reverse_weight=1.0), r"reverse_weight: .*kind is 'forward_kl'"),
        (lambda: dense(temperature=0.0), r"temperature: must be positive and finite"),
        (lambda: dense(weight=T), r"weight: has shape \(5, 11\) where there are 5 tokens"),
        (lambda: dense(weight=float("nan")), r"weight: must be finite, not nan"),
        (lambda: dense(label_weight=1.0), r"label_weight: is not 0, and there are no lab"),
        (lambda: dense(LABELS.double()), r"labels: must be int64 or int32, not torch\.float64"),
        (lambda: dense(LABELS), r"label_weight: missing; how much do the labels count beside"),
        (lambda: topk(IDS, LOGPROBS, TAIL, LABELS), r"label_weight: missing"),
        (lambda: linear(teacher=DenseTeacher(T), labels_N=LABELS), r"label_weight: missing"),
        (lambda: dense(LABELS[:2]), r"labels: has shape \(2,\) where there are 5 tokens"),
        (lambda: dense(LABELS + 1), r"labels: 11 at \[2\] is not one of the 11 columns"),
        (lambda: dense(student_map=LogitMap(0.0)), r"student_map\.scale: must be positive"),
        (lambda: dense(teacher_map=LogitMap(1.0, -1.0)), r"teacher_map\.softcap: must be"),
        (lambda: dense(out=T[:, :W]), r"out: has shape \(5, 9\), the student's logits"),
        (lambda: ops.dense_kd(S.clone().requires_grad_(), T, out=T.clone()), r"out: .*detach them"),
        (lambda: topk(IDS, LOGPROBS, TAIL, mode="top"), r"mode: 'top' is not one of tail"),
        (lambda: topk(IDS, LOGPROBS), r"tail: the mode tail needs the mass of what is not"),
        (lambda: topk(IDS, LOGPROBS, TAIL, mode="truncated"), r"tail: .*mode is 'truncated'"),
        (lambda: ops.topk_kd(S[:, :3], IDS, LOGPROBS, TAIL),
         r"ids: must be \[5, K\] with K from 1 to 3, not \(5, 4\)"),
        (lambda: topk(IDS.float(), LOGPROBS, TAIL), r"ids: must be int32 or int64"),
        (lambda: topk(IDS + 9, LOGPROBS, TAIL), r"ids: \d+ at \[\d, \d\] is not one of the"),
        (lambda: topk(IDS, LOGPROBS[:, 1:], TAIL), r"logprobs: has shape \(5, 3\), ids"),
        (lambda: topk(IDS, LOGPROBS, TAIL[1:]), r"tail: has shape \(4,\) where there are 5"),
        (lambda: mixture([], T), r"teachers: there are none"),
        (lambda: mixture([T], torch.ones(N, 1), firsts=[1]),
         r"teachers\[0\]: columns 1 to 12 are not within the student's 11"),
        (lambda: mixture([T], torch.ones(N, 2)),
         r"weights: must be \[5, 1\], not \(5, 2\)"),
        (lambda: linear(teacher=None), r"teacher: neither a teacher nor labels"),
        (lambda: ops.linear_kd(H, S, teacher=None), r"weight: has 11 columns, the hidden states 4"),
        (lambda: ops.linear_kd(H, B_VD.float(), teacher=None),
         r"weight: is torch\.float32, the hidden states are torch\.float64"),
        (lambda: linear(normal(N), teacher=None),
         r"bias: must be torch\.float64 \[11\], not torch\.float64 \[5\]"),
        (lambda: linear(teacher=LinearTeacher(H[1:], B_VD)),
         r"teacher's hidden: has 4 rows where there are 5 tokens"),
        (lambda: linear(teacher=LinearTeacher(H, T)),
         r"teacher's weight: has 11 columns, the hidden states 4"),
        (lambda: linear(teacher=DenseTeacher(T), logits_dtype=torch.float16),
         r"logits_dtype: must be torch\.float64"),
        (lambda: linear(teacher=DenseTeacher(T), chunk=0), r"chunk: must be at least"),
        (lambda: linear(teacher=T), r"teacher: must be a DenseTeacher, .*not Tensor"),
        (lambda: linear(teacher=TOPK, kind="jsd"), r"kind: jsd cannot be computed"),
        (lambda: linear(teacher=TOPK, kind="kl"), r"kind: 'kl' is not one of"),
        (lambda: linear(teacher=TOPK, vocabulary=3), r"vocabulary: nothing to cut"),
        (lambda: linear(teacher=TOPK, teacher_map=LogitMap(2.0)), r"teacher_map: nothing to map"),
        (lambda: linear(teacher=TOPK, reverse_weight=1.0),
         r"reverse_weight: .*kind is 'forward_kl'"),
        (lambda: linear(teacher=TOPK, temperature=2.0),
         r"teacher: has no tail mass at temperature 2\.0, but at 1\.0"),
        (lambda: linear(teacher=DenseTeacher(T), mode="truncated"),
         r"mode: 'truncated' is of a top-k teacher"),
        (lambda: ops.linear_kd(H.float(), B_VD.float(), teacher=None, logits_dtype=torch.half),
         r"logits_dtype: must be torch\.float32, not torch\.float16"),
        (lambda: topk(TWICE, LOGPROBS, TAIL), r"ids: row 2 has 5 twice"),
        (lambda: dense(student_map=(1.0, 0.0)), r"student_map: must be a LogitMap"),
        (lambda: dense(out=T[:1].expand(N, V)), r"out: its rows share memory"),
        (lambda: ops.label_ce(S, None), r"labels: there are none"),
        (lambda: mixture(torch.stack([T, T]), T), r"teachers: must be a list"),
        (lambda: mixture([T, T], T[:, :2] - 9), r"weights: a mixture has none below 0"),
        (lambda: mixture([T], one_is(NAN)[:, None]), r"weights: nan at \[3, 0\] must be finite"),
        (lambda: dense(weight=one_is(NAN)), r"weight: nan at \[3\] must be finite"),
        (lambda: dense(kind="mixed", reverse_weight=one_is(-INF)),
         r"reverse_weight: -inf at \[3\] must be finite"),
        (lambda: dense(LABELS.clamp_min(0), label_weight=one_is(INF)),
         r"label_weight: inf at \[3\] must be finite"),
        (lambda: linear(teacher=TOPK, weight=one_is(NAN)), r"weight: nan at \[3\] must be finite"),
        (lambda: topk(IDS, LOGPROBS, TAIL, weight=one_is(NAN)), r"weight: nan at \[3\] must be"),
        (lambda: mixture([T], torch.ones(N, 1, device="meta")),
         r"weights: is on meta, not the logits'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(error_of(message), match=message):
        call()


def test_the_weights_of_an_ignored_token_may_be_anything():
    """LABELS ignores token 3."""
    bad_N, good_N = one_is(NAN), torch.ones(N)
    found, wanted = (
        dense(LABELS, kind="mixed", weight=x, reverse_weight=x, label_weight=x).total
        for x in (bad_N, good_N)
    )
    assert found == wanted


def test_on_a_gpu_weights_wait_until_somebody_asks(monkeypatch):
    """Their caller, once the loss is known not to be finite; the first wrong one is named."""
    monkeypatch.setattr(per_token, "looks", lambda values: False)
    assert dense(weight=one_is(NAN)).total.isnan()
    with per_token.weights_kept() as kept:
        dense(weight=one_is(1.0), label_weight=0.0)
        assert per_token.first_non_finite(kept) is None
        dense(LABELS.clamp_min(0), weight=0.5, label_weight=one_is(INF))
        mixture([T], one_is(NAN)[:, None])
    assert per_token.first_non_finite(kept) == "label_weight: inf at [3]"
    dense(weight=one_is(NAN))
    assert len(kept) == 3  # no number, and nothing from outside


def test_more_kept_tokens_than_a_program_has_registers():
    student_NV = torch.zeros(1, 5000)
    kept = ops.topk_teacher(torch.zeros(1, 5000), 4097, 1.0)
    arguments = (student_NV, kept.ids_NK, kept.logprobs_NK, kept.tail_N[1.0])
    assert ops.topk_kd(*arguments).total.isfinite()
    with ops.triton_everywhere(), pytest.raises(ValueError, match="ids: the kernels take at most"):
        ops.topk_kd(*arguments)
