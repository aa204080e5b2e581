"""What tests of the losses share: a cache's view of logits, and the golden names of the modes."""

import math

import torch

from dskd.batch import TopKTeacher

MODES = {"tail": "tail", "renormalised": "renorm", "truncated": "renorm_both"}
"""Our names of the top-k losses, and those of the golden values."""


def top_k(teacher_NV, k, *temperatures):
    """What a cache would hold of these logits, in their dtype."""
    logprobs_NV = teacher_NV.log_softmax(1)
    kept_NK, ids_NK = logprobs_NV.topk(k, 1)
    rest_NV = logprobs_NV.scatter(1, ids_NK, -math.inf)
    return TopKTeacher(ids_NK, kept_NK, {t: (rest_NV / t).logsumexp(1) for t in temperatures})


def at_temperature(signal, t):
    """A cached signal's log-probabilities [N, K] and the logarithm of its tail's mass [N], at T."""
    kept_NK, tail_N = signal.logprobs_NK / t, signal.tail_N[t]
    lse_N = torch.logaddexp(kept_NK.logsumexp(1), tail_N)
    return kept_NK - lse_N[:, None], tail_N - lse_N
