"""One top-k teacher of several: their distributions mixed over the tokens that any of them keeps.

Of a token that teacher i keeps and teacher j does not, j's probability is somewhere in j's tail,
and there it stays: ``q_v = sum of share_i p_i(v)`` over those who keep v, and the mixture's tail is
``sum of share_i tail_i`` over all. So q_v falls short of the true mixture by at most
``share_j min(tail_j, least kept p_j)``, for which the tail is too large; nothing is lost where all
keep the same tokens, and at K = V. The confidences of teachers that keep few tokens are too high by
what their tails hide, all of which counts as one token.

Shape letters: N tokens, K kept of one teacher, U kept of all, n teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.batch import MixtureRule


class Kept(NamedTuple):
    """What a top-k teacher says at one temperature, all of it with the mass 1.

    Attributes:
        ids_NK: negative on unused slots, none twice.
        logprobs_NK: -inf there.
        tail_N: logarithm of the mass of all others.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor


def topk_confidence(kept: Kept, vocabulary: int) -> Tensor:
    """``1 - H / ln V`` [N] of a teacher at temperature 1, its tail counted as one token."""
    buckets_NB = torch.cat((kept.logprobs_NK, kept.tail_N[:, None]), 1)
    return 1.0 - torch.special.entr(buckets_NB.exp()).sum(1) / math.log(max(2, vocabulary))


def mixed_topk(
    teachers: Sequence[Kept], confidence_Nn: Tensor | None, rule: MixtureRule, vocabulary: int
) -> Kept:
    """The mixture, of the tokens kept by any teacher that has a share of the position.

    Args:
        teachers: at the temperature of the mixture.
        confidence_Nn: of each of them; None: as the rule does not ask.
        rule: how much each says.
        vocabulary: number of real tokens, which U is not larger than.
    """
    heard = [index for index, weight in enumerate(rule.weights) if weight > 0]
    teachers = [teachers[index] for index in heard]
    weights = [math.log(rule.weights[index]) for index in heard]
    shares = _log_shares(weights, confidence_Nn, heard, rule.sharpness, teachers[0].tail_N)
    ids, logprobs, tails = [], [], []
    for kept, share_N in zip(teachers, shares, strict=True):
        unused_NK = (kept.ids_NK < 0) | (share_N == -math.inf)[:, None]
        ids.append(kept.ids_NK.masked_fill(unused_NK, -1))
        logprobs.append((kept.logprobs_NK + share_N[:, None]).masked_fill(unused_NK, -math.inf))
        tails.append((kept.tail_N + share_N).masked_fill(share_N == -math.inf, -math.inf))
    ids_NU, logprobs_NU = _merged(torch.cat(ids, 1), torch.cat(logprobs, 1), len(heard))
    # no more tokens than there are: those who are kept come first
    used = slice(min(ids_NU.shape[1], vocabulary))
    tail_N = torch.stack(tails).logsumexp(0)
    return Kept(ids_NU[:, used].contiguous(), logprobs_NU[:, used].contiguous(), tail_N)


def _log_shares(
    weights: Sequence[float],
    confidence_Nn: Tensor | None,
    heard: Sequence[int],
    sharpness: float,
    like_N: Tensor,
) -> Sequence[Tensor]:
    """The logarithm of each heard teacher's share [N]; they sum to 1."""
    share_Nn = torch.stack([torch.full_like(like_N, weight) for weight in weights], 1)
    if confidence_Nn is not None and sharpness != math.inf:
        confidence_Nn = torch.stack([confidence_Nn[:, index] for index in heard], 1)
        if sharpness == 0:
            surest_N1 = confidence_Nn.argmax(1, keepdim=True)  # which is NaN, if one is
            return torch.full_like(share_Nn, -math.inf).scatter_(1, surest_N1, 0.0).unbind(1)
        share_Nn = share_Nn + confidence_Nn / sharpness
    return share_Nn.log_softmax(1).unbind(1)


def _merged(ids_NU: Tensor, logprobs_NU: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each token once, with the sum of what it has; unused slots last. ``most``: times that a token
    can be there."""
    ids_NU, order_NU = ids_NU.sort(1, descending=True)
    logprobs_NU = logprobs_NU.gather(1, order_NU)
    total_NU, again_NU = logprobs_NU.clone(), torch.zeros_like(ids_NU, dtype=torch.bool)
    again_NU[:, 1:] = ids_NU[:, 1:] == ids_NU[:, :-1]
    for apart in range(1, most):
        same_NU = ids_NU[:, apart:] == ids_NU[:, :-apart]
        other_NU = logprobs_NU[:, apart:].masked_fill(~same_NU, -math.inf)
        total_NU[:, :-apart] = torch.logaddexp(total_NU[:, :-apart], other_NU)
    ids_NU, order_NU = ids_NU.masked_fill(again_NU, -1).sort(1, descending=True)
    return ids_NU, total_NU.masked_fill_(again_NU, -math.inf).gather(1, order_NU)
