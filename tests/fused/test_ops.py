"""The door: autograd, compilation, checkpointing, autocast, precisions, chunks and refusals."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from dskd import losses, ops
from dskd.ops import DenseTeacher, LinearTeacher, LogitMap, TopKTeacher

N, V, W, D, E, K = 5, 11, 9, 4, 3, 4
KINDS = [kind for kind in ops.KINDS if kind != "mixed"]
WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], dtype=torch.float64)
REVERSE = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0], dtype=torch.float64)
LABELS = torch.tensor([3, 0, 10, -100, 7])


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def kept(teacher_NV, temperature, dtype=torch.float64):
    """A top-k teacher with an unused slot in row 1."""
    logprobs_NV = (teacher_NV / temperature).log_softmax(1)
    logprobs_NK, ids_NK = logprobs_NV.topk(K, 1)
    ids_NK[1, -1], logprobs_NK[1, -1] = -1, -torch.inf
    known_NV = torch.zeros(N, V + 1, dtype=torch.bool).scatter_(
        1, ids_NK.where(ids_NK >= 0, V), True
    )
    tail_N = logprobs_NV.masked_fill(known_NV[:, :V], -torch.inf).logsumexp(1)
    return TopKTeacher(ids_NK, logprobs_NK.to(dtype), tail_N.to(dtype))


def plain(logits_NV, teacher, *, kind="forward_kl", temperature=1.0, mode="tail", reverse=None):
    """``sum weight * divergence + label_weight * label`` by the references; row 3 is ignored."""
    heat = {"temperature": temperature}
    if isinstance(teacher, TopKTeacher):
        tail_N = teacher.tail_N if mode == "tail" else None
        found = losses.topk_divergence(
            logits_NV, teacher.ids_NK, teacher.logprobs_NK, tail_N, mode, **heat
        )
    elif kind == "mixed":
        found = losses.divergence(logits_NV, teacher, "forward_kl", **heat)
    else:
        found = losses.divergence(logits_NV, teacher, kind, beta=0.3, **heat)
    labelled = LABELS >= 0
    total = (WEIGHT * found)[labelled].sum()
    if reverse is not None:
        total = (
            total
            + (reverse * losses.divergence(logits_NV, teacher, "reverse_kl", **heat))[
                labelled
            ].sum()
        )
    return total + 0.7 * losses.cross_entropy(logits_NV, LABELS)[labelled].sum()


def gradients(total, *leaves):
    return torch.autograd.grad(total, leaves)


COMMON = {"labels_N": LABELS, "weight": WEIGHT, "label_weight": 0.7}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_dense_kd_is_the_reference_and_passes_gradcheck(kind, temperature):
    narrow = kind not in ("reverse_kl", "mixed")
    student_NV, teacher_NW = normal(N, V).requires_grad_(), normal(N, W if narrow else V, seed=1)
    reverse = REVERSE if kind == "mixed" else None

    def total(student_NV):
        return ops.dense_kd(
            student_NV,
            teacher_NW,
            kind=kind,
            beta=0.3,
            temperature=temperature,
            reverse_weight=reverse,
            **COMMON,
        ).total

    expected = plain(student_NV, teacher_NW, kind=kind, temperature=temperature, reverse=reverse)
    torch.testing.assert_close(total(student_NV), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(3 * total(student_NV), student_NV),
        gradients(3 * expected, student_NV),
        rtol=1e-9,
        atol=1e-11,
    )
    if kind != "total_variation":  # it has kinks
        assert gradcheck(total, student_NV)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mode", ops.MODES)
def test_topk_kd_is_the_reference_and_passes_gradcheck(mode, temperature):
    student_NV, teacher = normal(N, V).requires_grad_(), kept(normal(N, V, seed=1), temperature)
    tail_N = teacher.tail_N if mode == "tail" else None
    parts = (teacher.ids_NK, teacher.logprobs_NK, tail_N)

    def total(student_NV):
        options = {"mode": mode, "temperature": temperature}
        return ops.topk_kd(student_NV, *parts, **options, **COMMON).total

    expected = plain(student_NV, teacher, mode=mode, temperature=temperature)
    torch.testing.assert_close(total(student_NV), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(total(student_NV), student_NV),
        gradients(expected, student_NV),
        rtol=1e-9,
        atol=1e-11,
    )
    assert gradcheck(total, student_NV)


def test_mixture_kd_passes_gradcheck():
    student_NV = normal(N, V).requires_grad_()
    teachers, firsts = [normal(N, 5, seed=1), normal(N, 6, seed=2), normal(N, V, seed=3)], [0, 5, 0]
    weights_Nn = normal(N, 3, seed=4).abs()
    weights_Nn[2], weights_Nn[3, 1] = 0.0, 0.0

    def total(student_NV):
        return ops.mixture_kd(
            student_NV, teachers, weights_Nn, firsts=firsts, temperature=1.5
        ).total

    found = losses.mixture_divergence(student_NV, teachers, firsts, weights_Nn, temperature=1.5)
    expected = (weights_Nn.sum(1) * found).sum()
    torch.testing.assert_close(total(student_NV), expected, rtol=1e-10, atol=1e-12)
    assert gradcheck(total, student_NV)


def head(dtype=torch.float64, bias=True):
    hidden_ND, weight_VD = normal(N, D, seed=5, dtype=dtype), normal(V, D, seed=6, dtype=dtype)
    bias_V = normal(V, seed=7, dtype=dtype) if bias else None
    return [x if x is None else x.requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]


def linear_teacher(dtype=torch.float64, rows=W):
    parts = (normal(N, E, seed=8), normal(rows, E, seed=9), normal(rows, seed=10))
    return LinearTeacher(*(part.to(dtype) for part in parts))


def logits_of(teacher):
    return teacher.hidden_NE @ teacher.weight_WE.t() + teacher.bias_W


FORMS = {
    "linear": lambda: (linear_teacher(), logits_of(linear_teacher())),
    "dense": lambda: (DenseTeacher(normal(N, W, seed=1)), normal(N, W, seed=1)),
    "topk": lambda: (kept(normal(N, V, seed=1), 2.0), kept(normal(N, V, seed=1), 2.0)),
}


@pytest.mark.parametrize("chunk", [1, 2, 5, 99, None])
@pytest.mark.parametrize("form", FORMS)
def test_linear_kd_is_the_reference_for_any_chunk(form, chunk):
    """Values, and the gradients of hidden states, weight and bias."""
    inputs, (teacher, known) = head(), FORMS[form]()
    total = ops.linear_kd(*inputs, teacher=teacher, temperature=2.0, chunk=chunk, **COMMON).total
    hidden_ND, weight_VD, bias_V = inputs
    expected = plain(hidden_ND @ weight_VD.t() + bias_V, known, temperature=2.0)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    found, wanted = gradients(total, *inputs), gradients(expected, *inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_linear_kd_passes_gradcheck():
    def total(*inputs):
        return ops.linear_kd(
            *inputs, teacher=linear_teacher(), kind="jsd", temperature=1.3, chunk=2, **COMMON
        ).total

    assert gradcheck(total, head())


def test_labels_alone():
    inputs = head()
    hidden_ND, weight_VD, bias_V = inputs
    found = ops.linear_kd(*inputs, teacher=None, labels_N=LABELS, label_weight=1.0, chunk=2)
    logits_NV = hidden_ND @ weight_VD.t() + bias_V
    expected = losses.cross_entropy(logits_NV, LABELS)
    torch.testing.assert_close(found.total, expected.sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.label_N, expected, rtol=1e-10, atol=1e-12)
    assert not found.divergence_N.any()
    torch.testing.assert_close(
        gradients(found.total, *inputs), gradients(expected.sum(), *inputs), rtol=1e-9, atol=1e-11
    )
    direct = ops.label_ce(logits_NV.detach().requires_grad_(), LABELS)
    torch.testing.assert_close(direct.total, expected.sum(), rtol=1e-10, atol=1e-12)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    _, weight_VD, _ = head()
    first = torch.arange(N)
    total = ops.linear_kd(weight_VD[first], weight_VD, teacher=linear_teacher(), **COMMON).total
    expected = plain(weight_VD[first] @ weight_VD.t(), logits_of(linear_teacher()))
    torch.testing.assert_close(
        gradients(total, weight_VD), gradients(expected, weight_VD), rtol=1e-9, atol=1e-11
    )


def test_only_what_is_asked_for_gets_a_gradient():
    hidden_ND, weight_VD, bias_V = head()
    frozen = weight_VD.detach()
    total = ops.linear_kd(hidden_ND, frozen, bias_V.detach(), teacher=linear_teacher()).total
    (grad_ND,) = gradients(total, hidden_ND)
    whole = ops.linear_kd(hidden_ND, weight_VD, bias_V, teacher=linear_teacher()).total
    torch.testing.assert_close(grad_ND, gradients(whole, hidden_ND)[0], rtol=0, atol=0)
    with torch.no_grad():
        found = ops.linear_kd(hidden_ND, weight_VD, bias_V, teacher=linear_teacher())
    assert not found.total.requires_grad
    assert found.total == whole


def test_the_upstream_gradient_counts_and_backward_may_run_again():
    inputs = head()
    total = ops.linear_kd(*inputs, teacher=linear_teacher(), **COMMON).total
    once = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total * 2.5, inputs)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(second, 2.5 * first, rtol=1e-14, atol=0)
    student_NV = normal(N, V).requires_grad_()
    total = ops.dense_kd(student_NV, normal(N, V, seed=1)).total
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(total, student_NV, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_rounded_once(dtype):
    """1/3 is no 16-bit number: multiplying by it in 16 bits would round it as well."""
    student_NV = normal(N, V, dtype=dtype).requires_grad_()
    teacher_NV, third = normal(N, V, seed=1, dtype=dtype), torch.tensor(1 / 3)
    saved_NV = torch.empty(N, V, dtype=torch.float32 if dtype == torch.float16 else dtype)
    ops.dense_kd(student_NV.detach(), teacher_NV, out=saved_NV)
    (found,) = gradients(ops.dense_kd(student_NV, teacher_NV).total * third, student_NV)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (saved_NV.float() * third).to(dtype), rtol=0, atol=0)


def test_the_loss_scale_saves_an_fp16_gradient():
    """1e-9 and less of 1000 columns: nothing is left of it if rounded before the scale of 65536."""
    student_NV = normal(4, 1000, dtype=torch.float16).requires_grad_()
    teacher_NV = student_NV.detach().float() + 1e-3 * normal(4, 1000, seed=1).float()
    exact_NV = student_NV.detach().double().requires_grad_()
    reference = losses.divergence(exact_NV, teacher_NV.double(), temperature=4.0).sum()
    (expected,) = gradients(reference * 65536.0, exact_NV)
    for loss in (
        lambda: ops.dense_kd(student_NV, teacher_NV, temperature=4.0),
        lambda: ops.topk_kd(student_NV, *_all_kept(teacher_NV / 4.0), temperature=4.0),
    ):
        (found,) = gradients(loss().total * 65536.0, student_NV)
        assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def _all_kept(teacher_NV):
    logprobs_NV = teacher_NV.log_softmax(1)
    ids_NV = torch.arange(logprobs_NV.shape[1]).expand_as(logprobs_NV)
    return ids_NV, logprobs_NV, torch.full((len(logprobs_NV),), -torch.inf)


def test_fp32_logits_keep_the_gradient_of_a_student_close_to_its_teacher():
    """The reason for the default: rounded to bf16, the logits hide what is left to learn."""
    weight_VD, hidden_ND = normal(500, 64, seed=1), normal(16, 64, seed=2) / 2
    student_ND = (hidden_ND + 0.02 * normal(16, 64, seed=3)).bfloat16().requires_grad_()
    weight_VD = weight_VD.bfloat16()
    teacher = LinearTeacher(hidden_ND.bfloat16(), weight_VD)
    exact_ND, wide_VD = student_ND.detach().double().requires_grad_(), weight_VD.double()
    reference = losses.divergence(exact_ND @ wide_VD.t(), teacher.hidden_NE.double() @ wide_VD.t())
    (expected,) = gradients(reference.sum(), exact_ND)
    error = {}
    for dtype in (torch.float32, torch.bfloat16):
        total = ops.linear_kd(student_ND, weight_VD, teacher=teacher, logits_dtype=dtype).total
        (found,) = gradients(total, student_ND)
        error[dtype] = ((found.double() - expected).norm() / expected.norm()).item()
    assert error[torch.float32] < 0.01
    assert error[torch.bfloat16] > 5 * error[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_the_whole_function(form):
    inputs, (teacher, _) = head(), FORMS[form]()

    def total(*inputs):
        hidden_ND, *rest = inputs
        return (
            2
            * ops.linear_kd(
                hidden_ND * 1.5, *rest, teacher=teacher, temperature=2.0, **COMMON
            ).total
        )

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected, found = total(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(found, *inputs), gradients(expected, *inputs), rtol=1e-12, atol=1e-14
    )


def test_operators_are_registered_as_pytorch_wants_them():
    """Schema, autograd registration and fake results, by torch's own check."""
    student_NV, teacher_NV = normal(N, V).requires_grad_(), normal(N, V, seed=1)
    weight_N, maps = WEIGHT.clone(), [1.0, 0.0, 1.0, 0.0]
    labels_N, label_N = LABELS.clamp_min(0), torch.ones(N, dtype=torch.float64)
    dense = (student_NV, weight_N, label_N, teacher_NV, None, labels_N, "jsd", 0.5, 2.0, maps)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for gradient in (True, False):
        torch.library.opcheck(torch.ops.dskd.dense_kd, (*dense, gradient), test_utils=tests)
    inputs, teacher = head(), linear_teacher()
    parts = [teacher.hidden_NE, teacher.weight_WE, teacher.bias_W]
    rest = (weight_N, None, labels_N, label_N, "linear", "forward_kl", 0.5, 2.0, maps)
    linear = (*inputs, parts, *rest, torch.float64, 2, [True] * 3)
    torch.library.opcheck(torch.ops.dskd.linear_kd, linear, test_utils=tests)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    inputs = head()

    def total(*inputs):
        return ops.linear_kd(*inputs, teacher=linear_teacher(), **COMMON).total

    found = (
        gradients(checkpoint(total, *inputs, use_reentrant=reentrant), *inputs)
        if (not reentrant)
        else _accumulated(checkpoint(total, *inputs, use_reentrant=True), inputs)
    )
    torch.testing.assert_close(found, gradients(total(*inputs), *inputs), rtol=0, atol=0)


def _accumulated(total, leaves):
    """Reentrant checkpointing works with backward() only."""
    total.backward()
    return tuple(leaf.grad for leaf in leaves)


def test_autocast_casts_as_a_linear_layer_does():
    inputs = head(torch.float32)
    teacher = linear_teacher(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_kd(*inputs, teacher=teacher)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = ops.linear_kd(*halves, teacher=linear_teacher(torch.bfloat16))
    assert found.total.dtype == torch.float32
    assert found.total == expected.total
    for leaf, grad, half in zip(
        inputs, gradients(found.total, *inputs), gradients(expected.total, *halves), strict=True
    ):
        assert grad.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(grad, half.float(), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    inputs, (teacher, _) = head(), FORMS[form]()
    none = type(teacher)(
        *(x if name in ("weight_WE", "bias_W") else x[:0] for name, x in vars(teacher).items())
    )
    hidden_ND = inputs[0].detach()[:0].requires_grad_()
    found = ops.linear_kd(
        hidden_ND, *inputs[1:], teacher=none, labels_N=LABELS[:0], label_weight=1.0
    )
    assert found.total == 0
    assert len(found.divergence_N) == len(found.label_N) == 0
    for leaf, grad in zip(inputs[1:], gradients(found.total, *inputs[1:]), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_in_place_and_into_another_type():
    student_NV, teacher_NV = normal(N, V, dtype=torch.float32), normal(N, V, seed=1).float()
    leaf = student_NV.clone().requires_grad_()
    (expected,) = gradients(ops.dense_kd(leaf, teacher_NV).total, leaf)
    into_NV = torch.full((N, V + 3), torch.nan, dtype=torch.bfloat16)[:, :V]
    ops.dense_kd(student_NV, teacher_NV, out=into_NV)
    torch.testing.assert_close(into_NV, expected.bfloat16(), rtol=0, atol=0)
    found = ops.dense_kd(student_NV, teacher_NV, out=student_NV)
    torch.testing.assert_close(student_NV, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.total, found.divergence_N.sum())


def test_transposed_and_strided_logits():
    student_NV, teacher_NV = normal(V, N).t().requires_grad_(), normal(N, 2 * V, seed=1)[:, ::2]
    plain_NV = student_NV.detach().contiguous().requires_grad_()
    found = ops.dense_kd(student_NV, teacher_NV).total
    expected = ops.dense_kd(plain_NV, teacher_NV.contiguous()).total
    assert found == expected
    assert torch.equal(*gradients(found, student_NV), *gradients(expected, plain_NV))


def test_the_logit_map_is_the_models():
    student_NV, teacher_NV = normal(N, V).requires_grad_(), normal(N, V, seed=1)
    own, other = LogitMap(1.3, 2.0), LogitMap(softcap=1.5)
    found = ops.dense_kd(student_NV, teacher_NV, student_map=own, teacher_map=other).total
    expected = losses.divergence(
        losses.mapped(student_NV, *own), losses.mapped(teacher_NV, *other)
    ).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(found, student_NV), gradients(expected, student_NV))


S, T = normal(N, V), normal(N, V, seed=1)
IDS, LOGPROBS, TAIL = vars(kept(T, 1.0)).values()
H, B_VD = normal(N, D), normal(V, D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dense_kd(S[0], T), r"student: must have two axes, not shape \(11,\)"),
        (lambda: ops.dense_kd(S.long(), T), r"student: must be floating-point, not torch\.int64"),
        (lambda: ops.dense_kd(S, T[:3]), r"teacher: has 3 rows where there are 5 tokens"),
        (
            lambda: ops.dense_kd(S[:, :W], T),
            r"teacher: has 11 columns, the student 9; .*vocabulary=",
        ),
        (lambda: ops.dense_kd(S, T, vocabulary=12), r"vocabulary: 12 is not within the 11 columns"),
        (lambda: ops.dense_kd(S, T, kind="kl"), r"kind: 'kl' is not one of forward_kl, "),
        (
            lambda: ops.dense_kd(S, T[:, :W], kind="reverse_kl"),
            r"kind: reverse_kl is infinite where",
        ),
        (
            lambda: ops.dense_kd(S, T, kind="jsd", beta=1.0),
            r"beta: must lie between 0 and 1 for jsd",
        ),
        (lambda: ops.dense_kd(S, T, kind="mixed"), r"reverse_weight: the mixed divergence has one"),
        (lambda: ops.dense_kd(S, T, reverse_weight=1.0), r"reverse_weight: .*kind is 'forward_kl'"),
        (lambda: ops.dense_kd(S, T, temperature=0.0), r"temperature: must be positive and finite"),
        (
            lambda: ops.dense_kd(S, T, weight=T),
            r"weight: has shape \(5, 11\) where there are 5 tokens",
        ),
        (lambda: ops.dense_kd(S, T, weight=float("nan")), r"weight: must be finite, not nan"),
        (
            lambda: ops.dense_kd(S, T, label_weight=1.0),
            r"label_weight: is not 0, and there are no lab",
        ),
        (lambda: ops.dense_kd(S, T, LABELS.int()), r"labels: must be int64, not torch\.int32"),
        (
            lambda: ops.dense_kd(S, T, LABELS[:2]),
            r"labels: has shape \(2,\) where there are 5 tokens",
        ),
        (
            lambda: ops.dense_kd(S, T, LABELS + 1),
            r"labels: 11 at \[2\] is not one of the 11 columns",
        ),
        (
            lambda: ops.dense_kd(S, T, student_map=LogitMap(0.0)),
            r"student_map\.scale: must be positive",
        ),
        (
            lambda: ops.dense_kd(S, T, teacher_map=LogitMap(1.0, -1.0)),
            r"teacher_map\.softcap: must be",
        ),
        (
            lambda: ops.dense_kd(S, T, out=T[:, :W]),
            r"out: has shape \(5, 9\), the student's logits",
        ),
        (lambda: ops.dense_kd(S.clone().requires_grad_(), T, out=T.clone()), r"out: .*detach them"),
        (
            lambda: ops.topk_kd(S, IDS, LOGPROBS, TAIL, mode="top"),
            r"mode: 'top' is not one of tail",
        ),
        (
            lambda: ops.topk_kd(S, IDS, LOGPROBS),
            r"tail: the mode tail needs the mass of what is not",
        ),
        (
            lambda: ops.topk_kd(S, IDS, LOGPROBS, TAIL, mode="truncated"),
            r"tail: .*mode is 'truncated'",
        ),
        (
            lambda: ops.topk_kd(S[:, :3], IDS, LOGPROBS, TAIL),
            r"ids: must be \[5, K\] with K from 1 to 3, not \(5, 4\)",
        ),
        (lambda: ops.topk_kd(S, IDS.float(), LOGPROBS, TAIL), r"ids: must be int32 or int64"),
        (
            lambda: ops.topk_kd(S, IDS + 9, LOGPROBS, TAIL),
            r"ids: \d+ at \[\d, \d\] is not one of the",
        ),
        (lambda: ops.topk_kd(S, IDS, LOGPROBS[:, 1:], TAIL), r"logprobs: has shape \(5, 3\), ids"),
        (
            lambda: ops.topk_kd(S, IDS, LOGPROBS, TAIL[1:]),
            r"tail: has shape \(4,\) where there are 5",
        ),
        (lambda: ops.mixture_kd(S, [], T), r"teachers: there are none"),
        (
            lambda: ops.mixture_kd(S, [T], torch.ones(N, 1), firsts=[1]),
            r"teachers\[0\]: columns 1 to 12 are not within the student's 11",
        ),
        (
            lambda: ops.mixture_kd(S, [T], torch.ones(N, 2)),
            r"weights: must be floating-point \[5, 1\], not \(5, 2\)",
        ),
        (lambda: ops.linear_kd(H, B_VD, teacher=None), r"teacher: neither a teacher nor labels"),
        (lambda: ops.linear_kd(H, S, teacher=None), r"weight: has 11 columns, the hidden states 4"),
        (
            lambda: ops.linear_kd(H, B_VD.float(), teacher=None),
            r"weight: is torch\.float32, the hidden states are torch\.float64",
        ),
        (
            lambda: ops.linear_kd(H, B_VD, normal(N), teacher=None),
            r"bias: must be torch\.float64 \[11\], not torch\.float64 \[5\]",
        ),
        (
            lambda: ops.linear_kd(H, B_VD, teacher=LinearTeacher(H[1:], B_VD)),
            r"teacher's hidden: has 4 rows where there are 5 tokens",
        ),
        (
            lambda: ops.linear_kd(H, B_VD, teacher=LinearTeacher(H, T)),
            r"teacher's weight: has 11 columns, the hidden states 4",
        ),
        (
            lambda: ops.linear_kd(H, B_VD, teacher=DenseTeacher(T), logits_dtype=torch.float16),
            r"logits_dtype: must be torch\.float64",
        ),
        (
            lambda: ops.linear_kd(H, B_VD, teacher=DenseTeacher(T), chunk=0),
            r"chunk: must be at least",
        ),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
