"""Every loss over a vocabulary in plain differentiable torch, which the kernels are tested against.

Per-token losses [N], in nats and unweighted; no T^2 anywhere (callers fold it into their weights).
float64 logits give float64; everything narrower is computed in fp32. Nothing is done in chunks:
each function makes several [N, V] tensors, with a graph. Training goes through ``dskd/ops.py``.

A logit of ``-inf`` is a token of probability 0. A sum ``p log(p / q)`` has the term 0 where p is 0,
and ``+inf`` where q is 0 and p is not; a NaN is never hidden. Gradients go to the student alone,
and are finite wherever the loss is. An argument of a wrong shape, type or range is a ValueError
that names it, as in the fused losses; the numbers of a teacher are taken as they are.

Shape letters: N rows (tokens), V student columns, W teacher columns (W <= V), K kept logits, n
teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dskd.batch import MixtureRule
from dskd.fused.arguments import (
    FLOATING,
    MODES,
    Divergence,
    LogitMap,
    TopKMode,
    beta_of,
    columns_within,
    floating_matrix,
    map_of,
    refuse,
    refuse_kind,
    temperature_of,
)
from dskd.fused.per_token import each_token, in_range, labels_of, mixture_weights


def mapped(logits: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """``z = scale x``, or ``softcap tanh(scale x / softcap)`` where there is a softcap.

    A masked logit stays masked: ``-inf`` is mapped to ``-inf``.
    """
    refuse_kind(
        logits.dtype not in FLOATING, lambda: f"logits: must be floating-point, not {logits.dtype}"
    )
    map_of("map", LogitMap(scale, softcap))
    scaled = logits * scale
    if not softcap:
        return scaled
    return torch.where(scaled == -math.inf, scaled, softcap * torch.tanh(scaled / softcap))


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """``-log softmax(logits_n)[label_n]`` [N], labels int64; 0 where a label is negative."""
    floating_matrix("logits", logits_NV)
    labels_N = labels_of(labels_N, logits_NV)
    labelled_N = labels_N >= 0
    in_range("labels", labels_N, logits_NV.shape[1], labelled_N)
    index_N1 = torch.where(labelled_N, labels_N, 0)[:, None]
    return torch.where(labelled_N, -_log_softmax(logits_NV).gather(1, index_N1)[:, 0], 0.0)


def divergence(
    student_NV: Tensor,
    teacher_NW: Tensor,
    kind: Divergence = "forward_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence [N] of q = softmax(student / T) over V columns from p = softmax(teacher / T).

    The teacher gives the columns beyond W no probability: a padded vocabulary is pushed down.

    The kinds are those of :func:`dskd.fused.dense.dense_kd`, beta in (0, 1); total variation has
    the sub-gradient 0 where p = q. ``mixed`` is a sum and has no weights here: ValueError.
    """
    _check_student(student_NV, temperature)
    _check_teacher("teacher", teacher_NW, 0, student_NV)
    beta_of(kind, beta)
    log_q = _log_softmax(student_NV, temperature)
    log_p = _log_softmax(teacher_NW.detach(), temperature)
    log_p = F.pad(log_p, (0, student_NV.shape[1] - teacher_NW.shape[1]), value=-math.inf)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "jsd":
        log_m = _log_mean(beta, log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if kind == "skew_forward_kl":
        return _kl(log_p, _log_mean(beta, log_p, log_q))
    if kind == "skew_reverse_kl":
        return _kl(log_q, _log_mean(beta, log_q, log_p))
    if kind == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(1) / 2
    raise ValueError(f"kind: no reference for {kind!r}")


def topk_divergence(
    student_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    mode: TopKMode = "tail",
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL [N] from a teacher known by K log-probabilities a row, the student at ``temperature``.

    ``logprobs_NK`` are the teacher's AT ``temperature``, over its whole vocabulary; a slot whose id
    is negative is unused. ``tail_N`` is the logarithm of the mass of all tokens that are not kept
    (mode ``tail`` only). A row without any used slot has the divergence 0.

    The modes are those of :func:`dskd.fused.topk.topk_kd`.
    """
    _check_student(student_NV, temperature)
    _check_kept(student_NV, ids_NK, logprobs_NK, tail_N, mode)
    columns = student_NV.shape[1]
    used_NK = ids_NK >= 0
    # an unused slot points to a column beyond the last one
    column_NK = torch.where(used_NK, ids_NK, columns).long()
    log_q_NV = _log_softmax(student_NV, temperature)
    log_q = F.pad(log_q_NV, (0, 1), value=-math.inf).gather(1, column_NK)
    log_p = torch.where(used_NK, logprobs_NK.detach().to(log_q.dtype), -math.inf)
    if mode == "tail":
        kept_NV = F.pad(torch.zeros_like(log_q_NV, dtype=torch.bool), (0, 1))
        kept_NV = kept_NV.scatter_(1, column_NK, True)[:, :columns]
        rest_N1 = _logsumexp(log_q_NV.masked_fill(kept_NV, -math.inf))
        tail_N1 = tail_N.detach().to(log_p.dtype)[:, None]
        return _kl(torch.cat((log_p, tail_N1), 1), torch.cat((log_q, rest_N1), 1))
    if mode == "renormalised":
        return _kl(_normalised(log_p), log_q)
    return _kl(_normalised(log_p), _normalised(log_q))


def mixture_divergence(
    student_NV: Tensor,
    teachers: Sequence[Tensor],
    firsts: Sequence[int],
    weight_Nn: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """``KL(pbar || q)`` [N], ``pbar = sum_k w_nk softmax(teacher_k / T) / sum_k w_nk``.

    Teacher k's columns are the student's from ``firsts[k]`` on. A row whose weights are all 0 has
    the divergence 0. The gradient of this times ``sum_k w_nk`` is that of ``sum_k w_nk KL_k``.
    """
    _check_student(student_NV, temperature)
    _check_mixture(student_NV, teachers, firsts, weight_Nn)
    log_q = _log_softmax(student_NV, temperature)
    total_N1 = weight_Nn.sum(1, keepdim=True)
    share_Nn = (weight_Nn / torch.where(total_N1 == 0, 1.0, total_N1)).to(log_q.dtype)
    p = torch.zeros_like(log_q)
    for share_N, teacher_NW, first in zip(share_Nn.unbind(1), teachers, firsts, strict=True):
        one = share_N[:, None] * _log_softmax(teacher_NW.detach(), temperature).exp()
        p = p + F.pad(one, (first, p.shape[1] - first - one.shape[1]))
    return _kl(p.log(), log_q)


def confidences(teachers: Sequence[Tensor]) -> Tensor:
    """``1 - H / ln W`` [N, n], H the entropy of each teacher's softmax of its logits [N, W]."""
    several = [_log_softmax(logits_NW.detach()) for logits_NW in teachers]
    entropies = [torch.special.entr(log_p.exp()).sum(1) for log_p in several]
    bounds = [math.log(max(2, log_p.shape[1])) for log_p in several]
    return torch.stack(
        [1 - entropy_N / bound for entropy_N, bound in zip(entropies, bounds, strict=True)], 1
    )


def mixture_shares(confidence_Nn: Tensor, rule: MixtureRule) -> Tensor:
    """How much each teacher says [N, n], by the formula of
    :class:`~dskd.batch.MixtureRule`."""
    weight_n = confidence_Nn.new_tensor(rule.weights)
    if rule.sharpness == 0:
        surest_N = confidence_Nn.masked_fill(weight_n == 0, -math.inf).argmax(1)
        return F.one_hot(surest_N, len(rule.weights)).to(confidence_Nn.dtype)
    return (weight_n.log() + confidence_Nn / rule.sharpness).softmax(1)


def mixture_logits(
    teachers: Sequence[Tensor], rule: MixtureRule, *, temperature: float = 1.0
) -> Tensor:
    """Logits [N, W] whose softmax at the temperature is the teachers' mixture there."""
    share_Nn = mixture_shares(confidences(teachers), rule)
    several = [_log_softmax(logits_NW.detach(), temperature).exp() for logits_NW in teachers]
    mean_NW = sum(
        share_N[:, None] * p_NW for share_N, p_NW in zip(share_Nn.unbind(1), several, strict=True)
    )
    return temperature * mean_NW.log()


def topk_confidences(teachers: Sequence[tuple[Tensor, Tensor, Tensor]], vocabulary: int) -> Tensor:
    """``1 - H / ln V`` [N, n] of teachers known by ids, log-probabilities and tail at temperature
    1, each one's tail counted as a token."""
    entropies = []
    for ids_NK, logprobs_NK, tail_N in teachers:
        p_NK = logprobs_NK.exp() * (ids_NK >= 0)
        entropies.append(torch.special.entr(p_NK).sum(1) + torch.special.entr(tail_N.exp()))
    return 1 - torch.stack(entropies, 1) / math.log(max(2, vocabulary))


def topk_mixture_divergence(
    student_NV: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor, Tensor]],
    share_Nn: Tensor,
    mode: TopKMode = "tail",
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL [N] from the mixture of teachers known by ids, log-probabilities and tail AT the
    temperature; see :mod:`dskd.fused.mixed_topk`."""
    columns = student_NV.shape[1]
    q_NV, tail_N = torch.zeros_like(student_NV), torch.zeros_like(student_NV[:, 0])
    kept_NV = torch.zeros_like(student_NV, dtype=torch.bool)
    for (ids_NK, logprobs_NK, of_tail_N), share_N in zip(teachers, share_Nn.unbind(1), strict=True):
        used_NK = (ids_NK >= 0) & (share_N > 0)[:, None]
        at_NK = torch.where(used_NK, ids_NK, columns).long()  # a column beyond the last one
        p_NK = torch.where(used_NK, share_N[:, None] * logprobs_NK.exp(), 0.0)
        q_NV = F.pad(q_NV, (0, 1)).scatter_add(1, at_NK, p_NK)[:, :columns]
        kept_NV = F.pad(kept_NV, (0, 1)).scatter(1, at_NK, True)[:, :columns]
        tail_N = tail_N + torch.where(share_N > 0, share_N * of_tail_N.exp(), 0.0)
    ids_NV = torch.where(kept_NV, torch.arange(columns, device=student_NV.device), -1)
    tail_N = tail_N.log() if mode == "tail" else None
    how = {"temperature": temperature}
    return topk_divergence(student_NV, ids_NV, q_NV.log(), tail_N, mode, **how)


def _check_student(student_NV: Tensor, temperature: float) -> None:
    floating_matrix("student", student_NV)
    temperature_of(temperature)


def _check_teacher(name: str, logits_NW: Tensor, first: int, student_NV: Tensor) -> None:
    count, columns = student_NV.shape
    floating_matrix(name, logits_NW, rows=count, like=student_NV)
    columns_within(name, first, logits_NW.shape[1], columns)


def _check_kept(
    student_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, tail_N: Tensor | None, mode: str
) -> None:
    refuse(mode not in MODES, lambda: f"mode: {mode!r} is not one of {', '.join(MODES)}")
    count, columns = student_NV.shape
    shape = tuple(ids_NK.shape)
    refuse(
        ids_NK.dim() != 2 or len(ids_NK) != count,
        lambda: f"ids: must be [{count}, K], not {shape}",
    )
    integers = (torch.int32, torch.int64)
    refuse_kind(
        ids_NK.dtype not in integers, lambda: f"ids: must be int32 or int64, not {ids_NK.dtype}"
    )
    in_range("ids", ids_NK, columns, ids_NK >= 0)
    floating_matrix("logprobs", logprobs_NK, like=student_NV)
    refuse(
        logprobs_NK.shape != ids_NK.shape,
        lambda: f"logprobs: has shape {tuple(logprobs_NK.shape)}, ids {shape}",
    )
    refuse(tail_N is None and mode == "tail", lambda: "tail: the mode tail needs one")
    if tail_N is not None:
        each_token("tail", tail_N, student_NV)


def _check_mixture(
    student_NV: Tensor, teachers: Sequence[Tensor], firsts: Sequence[int], weight_Nn: Tensor
) -> None:
    refuse(
        len(firsts) != len(teachers), lambda: f"firsts: {len(firsts)} for {len(teachers)} teachers"
    )
    for k, (logits_NW, first) in enumerate(zip(teachers, firsts, strict=True)):
        _check_teacher(f"teachers[{k}]", logits_NW, first, student_NV)
    mixture_weights(weight_Nn, student_NV, len(teachers))


def _log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    return (logits_NV.to(wide) / temperature).log_softmax(1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``sum_j a_j log(a_j / b_j)`` [N] with 0 log 0 = 0, in the value and in the gradient."""
    a = log_a.exp()
    some = a != 0  # a NaN is something
    return (a * (torch.where(some, log_a, 0.0) - torch.where(some, log_b, 0.0))).sum(1)


def _log_mean(beta: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """``log(beta a + (1 - beta) b)``: a sum of probabilities could be 0 where neither is."""
    none = (log_a == -math.inf) & (log_b == -math.inf)
    log_a, log_b = log_a.masked_fill(none, 0.0), log_b.masked_fill(none, 0.0)
    log_mean = torch.logaddexp(log_a + math.log(beta), log_b + math.log1p(-beta))
    return log_mean.masked_fill(none, -math.inf)


def _logsumexp(logits_NK: Tensor) -> Tensor:
    """[N, 1], ``-inf`` for a row of nothing but ``-inf``, where torch's gradient is NaN."""
    none_N1 = (logits_NK == -math.inf).all(1, keepdim=True)
    total_N1 = logits_NK.masked_fill(none_N1, 0.0).logsumexp(1, keepdim=True)
    return total_N1.masked_fill(none_N1, -math.inf)


def _normalised(log_a_NK: Tensor) -> Tensor:
    """Scaled to mass 1, where there is any."""
    total_N1 = _logsumexp(log_a_NK)
    return log_a_NK - total_N1.masked_fill(total_N1 == -math.inf, 0.0)
