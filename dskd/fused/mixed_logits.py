"""The logits of a mixture of teachers, made of one teacher's after the other's in the same room.

Everything is per row, so a chunk needs nothing of another one. The mixture is kept in logarithms:
sums of probabilities would be 0 where every teacher's is below what fp32 holds, and KL(q || p)
would be infinite there.

Shape letters: C tokens of a chunk, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dskd.fused.chunking import Buffer

MIXTURE_BUFFERS = 2
"""Matrices of a chunk that mixing takes beside the result."""


class Mixture:
    """Mixes by a :class:`~dskd.batch.MixtureRule`, at a temperature.

    Args:
        sharpness: of the rule, as are ``weights``.
        temperature: at which the mixture is taken; confidences are at temperature 1.
    """

    def __init__(self, sharpness: float, *weights: float, temperature: float) -> None:
        self._sharpness = sharpness
        self._weights = weights
        self._temperature = temperature

    def make(
        self,
        out_CW: Tensor,
        teachers: Sequence[Callable[[Tensor], None]],
        spare: Sequence[Buffer],
    ) -> None:
        """Write logits whose softmax at the temperature is the mixture.

        Args:
            out_CW: fp32 or float64.
            teachers: each writes its logits into a matrix of this shape.
            spare: ``MIXTURE_BUFFERS`` of the type of ``out_CW``.
        """
        logits_CW, spare_CW = (buffer.first(len(out_CW)) for buffer in spare)
        # a teacher of weight 0 is left out, not added with the share 0: it may be NaN
        heard = [pair for pair in zip(self._weights, teachers, strict=True) if pair[0] > 0]
        so_far_C1: Tensor | None = None
        for weight, write in heard:
            write(logits_CW)
            if self._sharpness == 0:
                so_far_C1 = _keep_surest(out_CW, logits_CW, spare_CW, so_far_C1)
                continue
            share_C1 = torch.full_like(logits_CW[:, :1], math.log(weight))
            if self._sharpness != math.inf:
                share_C1 += _confidence(logits_CW, spare_CW) / self._sharpness
            logits_CW.div_(self._temperature)
            so_far_C1 = _add(out_CW, logits_CW, spare_CW, share_C1, so_far_C1)
        if self._sharpness != 0:
            out_CW.mul_(self._temperature)


def _add(
    out_CW: Tensor, logits_CW: Tensor, spare_CW: Tensor, share_C1: Tensor, so_far_C1: Tensor | None
) -> Tensor:
    """Add a teacher's softmax to the mixture so far, both as logarithms; returns the logarithm of
    all shares so far. Shares come as logarithms, too, and need not sum to 1."""
    if so_far_C1 is None:
        torch.log_softmax(logits_CW, 1, out=out_CW)
        return share_C1
    torch.log_softmax(logits_CW, 1, out=spare_CW)
    # scaled to 1 each time: shares of exp(confidence / 0.001) are far beyond any probability
    total_C1 = torch.logaddexp(so_far_C1, share_C1)
    out_CW.add_(so_far_C1 - total_C1)
    spare_CW.add_(share_C1 - total_C1)
    torch.logaddexp(out_CW, spare_CW, out=out_CW)
    return total_C1


def _keep_surest(
    out_CW: Tensor, logits_CW: Tensor, spare_CW: Tensor, best_C1: Tensor | None
) -> Tensor:
    """Take a teacher's logits where it is surer than those before; returns the confidence of the
    surest so far."""
    confidence_C1 = _confidence(logits_CW, spare_CW)
    if best_C1 is None:
        out_CW.copy_(logits_CW)
        return confidence_C1
    # a confidence that is NaN is the surest: nothing that is said may hide it
    surer_C1 = (confidence_C1 > best_C1) | confidence_C1.isnan()
    torch.where(surer_C1, logits_CW, out_CW, out=out_CW)
    return torch.where(surer_C1, confidence_C1, best_C1)


def _confidence(logits_CW: Tensor, spare_CW: Tensor) -> Tensor:
    """``1 - H / ln W`` [C, 1]; a vocabulary of one token is certain."""
    columns = logits_CW.shape[1]
    torch.softmax(logits_CW, 1, out=spare_CW)
    entropy_C1 = torch.special.entr(spare_CW, out=spare_CW).sum(1, keepdim=True)
    return 1.0 - entropy_C1 / math.log(max(2, columns))
