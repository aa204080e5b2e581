"""Losses over a vocabulary: cross entropy and KL from a dense or a top-k teacher.

All return SUMS over the N supervised positions, in nats: an fp32 scalar (float64 for float64
logits), exactly 0 and connected to the graph when N is 0. The student's logits may be of any
floating type and may hold ``-inf``; the teacher gets no gradient. The work goes by chunks of rows
and the backward pass writes one buffer, the gradient of the logits; it honours any upstream
gradient and cannot be differentiated again (it raises).

Shape letters: N positions, C of them in a chunk, V student vocabulary, W teacher vocabulary
(W <= V), K kept logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from dskd.batch import Signal, TopK
from dskd.errors import ConfigError

TopKMode = Literal["tail", "renormalised", "truncated"]


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """``sum_n -log softmax(logits_n)[label_n]`` (KI, L_MLM), labels int64."""
    _, label_N1, rest_N1 = _Split.apply(logits_NV, _nothing(logits_NV), labels_N[:, None], (1.0,))
    return (rest_N1 - label_N1).sum()


def kl(student_NV: Tensor, teacher_NW: Tensor, temperature: float) -> Tensor:
    """``T^2 sum_n KL(softmax(teacher_n / T) || softmax(student_n / T))`` (KI, L_KD).

    The student's softmax covers all V columns, the teacher's mass lies on the first W: the padding
    columns of a padded vocabulary are pushed down.
    """
    return _with_dense(student_NV, _nothing(student_NV), teacher_NW, temperature)[1]


def topk_kl(
    student_NV: Tensor, teacher: TopK, temperature: float, mode: TopKMode = "tail"
) -> Tensor:
    """``T^2 sum_n KL`` from a teacher known by its K largest log-probabilities.

    ``tail``: K + 1 buckets, the last one being all dropped tokens together; it never exceeds the
    dense KL, grows with K and equals it at K = V. ``renormalised``: the teacher's kept tokens are
    scaled up to mass 1, the student keeps its full softmax. ``truncated``: both are restricted to
    the kept tokens. (``renorm`` and ``renorm_both`` of the original's golden values.)
    """
    return _with_topk(student_NV, _nothing(student_NV), teacher, temperature, mode)[1]


def cross_entropy_and_kl(
    student_NV: Tensor,
    labels_N: Tensor,
    teacher: Signal,
    temperature: float,
    mode: TopKMode = "tail",
) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy`, and :func:`kl` or :func:`topk_kl`, sharing their work."""
    labels_N1 = labels_N[:, None]
    if isinstance(teacher, TopK):
        return _with_topk(student_NV, labels_N1, teacher, temperature, mode)
    return _with_dense(student_NV, labels_N1, teacher.logits_NV, temperature)


def _with_dense(
    student_NV: Tensor, labels_NL: Tensor, teacher_NW: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the labels (L = 1, or 0 for none) and dense KL."""
    ce_NL, kl_N1 = _Dense.apply(student_NV, labels_NL, teacher_NW.detach(), temperature)
    return ce_NL.sum(), kl_N1.sum() * temperature**2


def _with_topk(
    student_NV: Tensor, labels_NL: Tensor, teacher: TopK, temperature: float, mode: TopKMode
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the labels (L = 1, or 0 for none) and top-k KL."""
    one = labels_NL.shape[1] == 0 or temperature == 1.0
    kept_NK, label_NL, *rests = _Split.apply(
        student_NV, teacher.ids_NK, labels_NL, (temperature,) if one else (1.0, temperature)
    )
    ce = (torch.cat((kept_NK, rests[0]), 1).logsumexp(1, keepdim=True) - label_NL).sum()
    student = torch.cat((kept_NK / temperature, rests[-1]), 1)
    kept_q_NK = teacher.logprobs_NK.detach().to(kept_NK.dtype) / temperature
    if mode == "tail":
        tail_N1 = _tail(teacher, temperature).detach().to(kept_NK.dtype)[:, None]
        logq, logp = torch.cat((kept_q_NK, tail_N1), 1).log_softmax(1), student.log_softmax(1)
    elif mode == "renormalised":
        logq, logp = kept_q_NK.log_softmax(1), student.log_softmax(1)[:, :-1]
    else:
        logq, logp = kept_q_NK.log_softmax(1), student[:, :-1].log_softmax(1)
    q = logq.exp()
    per_bucket = torch.where(q == 0, 0.0, q * (logq - logp))
    return ce, per_bucket.sum() * temperature**2


def _tail(teacher: TopK, temperature: float) -> Tensor:
    if temperature not in teacher.tail_N:
        stored = ", ".join(map(str, teacher.tail_N))
        raise ConfigError(
            f"the top-k teacher has no tail mass at temperature {temperature}: {stored}"
        )
    return teacher.tail_N[temperature]


class _Split(torch.autograd.Function):
    """What a loss needs to know of a row: kept logits, label's logit, logsumexp over all others.

    ``apply(logits_NV, ids_NK, labels_NL, temperatures)``, the temperatures being ``(1.0,)``,
    ``(T,)`` or ``(1.0, T)``, returns ``kept_NK``, ``label_NL`` and for each temperature
    ``rest_N1 = logsumexp(logits / T)`` over the tokens not in ``ids_NK``, summed directly, never as
    a difference. Logits are relative to their row's largest (a large common offset costs no
    digits), which counts as a constant: a softmax does not depend on it. An unused slot (id -1,
    never the first) is ``-inf``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        ids_NK: Tensor,
        labels_NL: Tensor,
        temperatures: tuple[float, ...],
    ) -> tuple[Tensor, ...]:
        unused_NK = ids_NK < 0
        ids_NK = torch.where(unused_NK, ids_NK[:, :1], ids_NK)
        peak_N1, *sums = _columns(logits_NV, 1 + len(temperatures))
        t = temperatures[-1]
        for logits_CV, ids_CK, peak_C1, *sums_C1, exp_CV in _chunks(
            logits_NV, ids_NK, peak_N1, *sums, buffers=1
        ):
            _peak(logits_CV, ids_CK, exp_CV, out=peak_C1)
            # exp is slow on -inf, so the kept tokens are struck out after it
            _exp(logits_CV, peak_C1, t, out=exp_CV).scatter_(1, ids_CK, 0.0)
            torch.sum(exp_CV, 1, keepdim=True, out=sums_C1[-1])
            if len(sums_C1) == 2:
                _cool(exp_CV, logits_CV, peak_C1, t).scatter_(1, ids_CK, 0.0)
                torch.sum(exp_CV, 1, keepdim=True, out=sums_C1[0])
        kept_NK = logits_NV.gather(1, ids_NK).to(peak_N1).masked_fill_(unused_NK, -torch.inf)
        top_N1 = torch.cat((kept_NK, peak_N1), 1).amax(1, keepdim=True)
        rests = [(peak_N1 - top_N1) / t + s.log() for s, t in zip(sums, temperatures, strict=True)]
        ctx.save_for_backward(logits_NV, ids_NK, unused_NK, labels_NL, peak_N1, *sums)
        ctx.temperatures = temperatures
        label_NL = logits_NV.gather(1, labels_NL).to(peak_N1) - top_N1
        return kept_NK - top_N1, label_NL, *rests

    @staticmethod
    def backward(
        ctx: Any, grad_kept_NK: Tensor, grad_label_NL: Tensor, *grad_rests: Tensor
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        logits_NV, ids_NK, unused_NK, labels_NL, peak_N1, *sums = ctx.saved_tensors
        # an unused slot repeats the first one's id, and is written where that one is
        grad_kept_NK = torch.where(unused_NK, grad_kept_NK[:, :1], grad_kept_NK)
        scales = [
            torch.where(s > 0, g / (t * s), 0.0)  # an empty rest has no gradient
            for g, s, t in zip(grad_rests, sums, ctx.temperatures, strict=True)
        ]
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        for grad_CV, _, ids_CK, grad_kept_CK, labels_CL, grad_label_CL in _weighted_exps(
            logits_NV,
            peak_N1,
            ctx.temperatures,
            scales,
            into=grad_NV,
            also=(ids_NK, grad_kept_NK, labels_NL, grad_label_NL),
        ):
            grad_CV.scatter_(1, ids_CK, grad_kept_CK)
            grad_CV.scatter_add_(1, labels_CL, grad_label_CL)
        return grad_NV, None, None, None


class _Dense(torch.autograd.Function):
    """``apply(student_NV, labels_NL, teacher_NW, T)``: cross entropy [N, L] and KL [N, 1].

    Both rows are shifted by their largest logit, so equal logits give a KL of exactly 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        labels_NL: Tensor,
        teacher_NW: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        t, width = temperature, teacher_NW.shape[1]
        peak_N1, sum_N1, hot_sum_N1, q_peak_N1, q_sum_N1, cross_N1 = _columns(student_NV, 6)
        columns = (peak_N1, sum_N1, hot_sum_N1, q_peak_N1, q_sum_N1, cross_N1)
        for s_CV, z_CW, *columns_C1, p_CV, q_CV, exp_CV in _chunks(
            student_NV, teacher_NW, *columns, buffers=3
        ):
            peak, total, hot_total, q_peak, q_total, cross = columns_C1
            # log-probabilities up to a constant of the row
            logp_CV = _shift(s_CV, peak.copy_(s_CV.amax(1, True)), t, out=p_CV)
            logq_CW = _shift(z_CW, q_peak.copy_(z_CW.amax(1, True)), t, out=q_CV[:, :width])
            exp_CW = torch.exp(logq_CW, out=exp_CV[:, :width])
            torch.sum(exp_CW, 1, keepdim=True, out=q_total)
            # 0 * inf is 0 here; a real NaN is in the sums as well and stays
            logq_CW.sub_(logp_CV[:, :width]).mul_(exp_CW).nan_to_num_(0.0, torch.inf, -torch.inf)
            torch.sum(logq_CW, 1, keepdim=True, out=cross)
            torch.sum(torch.exp(logp_CV, out=exp_CV), 1, keepdim=True, out=hot_total)
            if labels_NL.shape[1]:
                torch.sum(_cool(exp_CV, s_CV, peak, t), 1, keepdim=True, out=total)
        ctx.save_for_backward(
            student_NV, labels_NL, teacher_NW, peak_N1, sum_N1, hot_sum_N1, q_peak_N1, q_sum_N1
        )
        ctx.temperature = t
        ce_NL = sum_N1.log() + (peak_N1 - student_NV.gather(1, labels_NL).to(peak_N1))
        return ce_NL, cross_N1 / q_sum_N1 + (hot_sum_N1.log() - q_sum_N1.log())

    @staticmethod
    def backward(ctx: Any, grad_ce_NL: Tensor, grad_kl_N1: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        student_NV, labels_NL, teacher_NW, *rows = ctx.saved_tensors
        peak_N1, sum_N1, hot_sum_N1, q_peak_N1, q_sum_N1 = rows
        t, width = ctx.temperature, teacher_NW.shape[1]
        temperatures, scales = (t,), [grad_kl_N1 / (t * hot_sum_N1)]
        if labels_NL.shape[1] and t == 1.0:
            scales = [scales[0] + grad_ce_NL / sum_N1]
        elif labels_NL.shape[1]:
            temperatures, scales = (1.0, t), [grad_ce_NL / sum_N1, *scales]
        grad_NV = torch.empty_like(student_NV, memory_format=torch.contiguous_format)
        for grad_CV, work_CV, labels_CL, grad_label_CL, z_CW, q_peak, q_scale in _weighted_exps(
            student_NV,
            peak_N1,
            temperatures,
            scales,
            into=grad_NV,
            also=(labels_NL, -grad_ce_NL, teacher_NW, q_peak_N1, grad_kl_N1 / (t * q_sum_N1)),
        ):
            q_CW = _exp(z_CW, q_peak, t, out=work_CV[:, :width])
            grad_CV[:, :width].sub_(q_CW.mul_(q_scale))
            grad_CV.scatter_add_(1, labels_CL, grad_label_CL)
        return grad_NV, None, None, None


_LOWEST = -1e30
"""Stands for the largest of no logits at all: ``-inf - -inf`` would be NaN."""


def _refuse_second_order() -> None:
    """Raise under ``create_graph=True``.

    ``once_differentiable`` raises only if the upstream gradient is itself differentiable, and drops
    the second derivative otherwise.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a loss of dskd.losses cannot be differentiated with create_graph=True")


def _nothing(logits_NV: Tensor) -> Tensor:
    """No ids or labels, [N, 0]."""
    return logits_NV.new_empty(len(logits_NV), 0, dtype=torch.int64)


def _wide(logits_NV: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is summed in fp32."""
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _columns(logits_NV: Tensor, count: int) -> tuple[Tensor, ...]:
    """One number per row, [N, 1] each."""
    return logits_NV.new_empty(count, len(logits_NV), 1, dtype=_wide(logits_NV)).unbind()


def _chunks(logits_NV: Tensor, *others: Tensor, buffers: int) -> Iterator[list[Tensor]]:
    """Views of chunks of rows, then scratch [C, V]; on a CPU a buffer fits a core's cache."""
    count, columns = logits_NV.shape
    on_cpu = logits_NV.device.type == "cpu"
    budget = torch.get_num_threads() << 17 if on_cpu else 1 << 24
    step = max(1, min(count, budget // columns))
    scratch = logits_NV.new_empty(buffers, step, columns, dtype=_wide(logits_NV)).unbind()
    for views in zip(*(tensor.split(step) for tensor in (logits_NV, *others)), strict=True):
        size = len(views[0])
        yield [*views, *(scratch if size == step else (buffer[:size] for buffer in scratch))]


def _peak(logits_CV: Tensor, ids_CK: Tensor, scratch_CV: Tensor, out: Tensor) -> None:
    """Each row's largest logit outside ``ids_CK``."""
    if ids_CK.shape[1] or logits_CV.dtype != out.dtype:
        logits_CV = scratch_CV.copy_(logits_CV).scatter_(1, ids_CK, -torch.inf)
    torch.amax(logits_CV, 1, keepdim=True, out=out).clamp_(min=_LOWEST)


def _shift(logits_CV: Tensor, peak_C1: Tensor, temperature: float, out: Tensor) -> Tensor:
    """``(logits - peak) / T`` in one pass, each product rounded once."""
    over = 1.0 / temperature
    return torch.add(peak_C1 * -over, logits_CV, alpha=over, out=out)


def _exp(logits_CV: Tensor, peak_C1: Tensor, temperature: float, out: Tensor) -> Tensor:
    """``exp((logits - peak) / T)``."""
    return _shift(logits_CV, peak_C1, temperature, out).exp_()


def _cool(exp_CV: Tensor, logits_CV: Tensor, peak_C1: Tensor, temperature: float) -> Tensor:
    """Turn ``exp((logits - peak) / T)`` into ``exp(logits - peak)``, in place."""
    if temperature == 1.0:
        return exp_CV
    if temperature == 2.0:  # exp(x) = exp(x / 2)^2: one exponential for both
        return exp_CV.mul_(exp_CV)
    return _exp(logits_CV, peak_C1, 1.0, out=exp_CV)


def _weighted_exps(
    logits_NV: Tensor,
    peak_N1: Tensor,
    temperatures: tuple[float, ...],
    scales: list[Tensor],
    *,
    into: Tensor,
    also: tuple[Tensor, ...],
) -> Iterator[list[Tensor]]:
    """``into = sum_i scale_i * exp((logits - peak) / T_i)`` by chunks, each open to correction.

    The temperatures are (T,) or (1, T). Yields a chunk of the sum, to be corrected in place before
    the next is asked for, scratch of its shape, and the same rows of the tensors of ``also``.
    """
    narrow = into.dtype != peak_N1.dtype
    t, count = temperatures[-1], len(scales)
    for logits_CV, into_CV, peak_C1, *views in _chunks(
        logits_NV, into, peak_N1, *scales, *also, buffers=1 + narrow
    ):
        scales_C1, also_C = views[:count], views[count : count + len(also)]
        work_CV, sum_CV = views[-1], views[-2] if narrow else into_CV
        _exp(logits_CV, peak_C1, t, out=sum_CV)
        if count == 1:
            sum_CV.mul_(scales_C1[0])
        elif t == 2.0:  # as in _cool
            sum_CV.mul_(torch.mul(sum_CV, scales_C1[0], out=work_CV).add_(scales_C1[1]))
        else:
            _exp(logits_CV, peak_C1, 1.0, out=work_CV).mul_(scales_C1[0])
            sum_CV.mul_(scales_C1[1]).add_(work_CV)
        yield [sum_CV, work_CV, *also_C]
        if narrow:
            into_CV.copy_(sum_CV)
