"""The losses as they are defined, term by term, with plain differentiable operations."""

import math

import torch
import torch.nn.functional as F

from dskd.batch import TopK

MODES = {"tail": "tail", "renormalised": "renorm", "truncated": "renorm_both"}
"""Our names of the top-k losses, and those of the golden values."""


def plain_ce(logits_NV, labels_N):
    return F.nll_loss(logits_NV.log_softmax(1), labels_N, reduction="sum")


def plain_kl(student_NV, teacher_NW, t):
    width = teacher_NW.shape[1]
    logp = (student_NV / t).log_softmax(1)[:, :width]
    return t**2 * _divergence((teacher_NW / t).log_softmax(1), logp)


def plain_topk(student_NV, teacher_NV, k, t, mode):
    """From the full distributions of both, one row at a time."""
    total = 0.0
    for s_V, z_V in zip(student_NV / t, teacher_NV / t, strict=True):
        kept = torch.zeros(len(z_V), dtype=torch.bool)
        kept[z_V.topk(k).indices] = True
        logq, logp = z_V.log_softmax(0), s_V.log_softmax(0)
        if mode == "tail":
            logq, logp = (
                torch.cat((x[kept], x.masked_fill(kept, -math.inf).logsumexp(0, True)))
                for x in (logq, logp)
            )
        elif mode == "renormalised":
            logq, logp = z_V[kept].log_softmax(0), logp[kept]
        else:
            logq, logp = z_V[kept].log_softmax(0), s_V[kept].log_softmax(0)
        total = total + _divergence(logq, logp)
    return t**2 * total


def top_k(teacher_NV, k, *temperatures):
    """What a cache would hold of these logits, in their dtype."""
    logprobs_NV = teacher_NV.log_softmax(1)
    kept_NK, ids_NK = logprobs_NV.topk(k, 1)
    rest_NV = logprobs_NV.scatter(1, ids_NK, -math.inf)
    return TopK(ids_NK, kept_NK, {t: (rest_NV / t).logsumexp(1) for t in temperatures})


def _divergence(logq, logp):
    return torch.where(logq > -math.inf, logq.exp() * (logq - logp), 0.0).sum()
