"""LayerNorm and RMSNorm whose statistics come from the kept units only.

While a mask is set all units are still normalised and emitted ("soft"): the removed ones are on
their way to 0 and no consumer reads them in the end. After compaction only the kept ones arrive.

Shape letters: H units of the norm, h kept ones.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from dskd.fused.arguments import wide

Statistics = Literal["biased", "unbiased"]
UER_EPS = 1e-6
"""Of the unbiased norm, which adds it to the deviation; HuggingFace's adds one to the variance."""


class MaskedNorm(nn.Module):
    """Base of norms whose statistics come from the kept units only.

    Attributes:
        keep: bool [H], the units that statistics are computed over, or None for all; on the device
            of the weights.
        keep_in: int64 [h], the units that arrive once the model is compacted, or None for all.
            Then ``keep`` is None.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.keep: Tensor | None = None
        self.keep_in: Tensor | None = None

    def kept(self, parameter: Tensor) -> Tensor:
        """Those entries of a parameter [H] whose units arrive."""
        return parameter if self.keep_in is None else parameter[self.keep_in]

    def mean(self, x: Tensor) -> Tensor:
        """Over the kept units of the last axis, which stays."""
        if self.keep is None:
            return x.mean(-1, keepdim=True)
        # not x * keep: a removed unit may be infinite
        return x.where(self.keep, 0.0).sum(-1, keepdim=True) / self.keep.sum()


class MaskedLayerNorm(MaskedNorm):
    """Takes over the weight and bias of an ``nn.LayerNorm`` over the last axis.

    Attributes:
        statistics: "biased" is ``(x - mean) / sqrt(variance + eps)`` (HuggingFace), with the eps of
            the ``nn.LayerNorm``; "unbiased" ``(x - mean) / (deviation + eps)`` with n - 1 in the
            deviation's denominator and ``UER_EPS`` (UER, which WID was written in).
    """

    def __init__(self, norm: nn.LayerNorm, statistics: Statistics = "biased") -> None:
        super().__init__(norm.weight, norm.eps)
        self.bias = norm.bias
        self.statistics = statistics
        self._plain_eps = norm.eps
        if statistics == "unbiased":
            self.eps = UER_EPS

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] (or h) normalised; without a mask exactly as ``nn.LayerNorm`` does."""
        weight, bias = self.kept(self.weight), self.kept(self.bias)
        if self.keep is None and self.statistics == "biased":
            return layer_norm(x, weight.shape, weight, bias, self.eps)
        wide_x = x.to(wide(x.dtype))
        centred = wide_x - self.mean(wide_x)
        variance = self.mean(centred.square())
        if self.statistics == "biased":
            normal = centred * torch.rsqrt(variance + self.eps)
        else:
            # in floating point of x's width: the quotient of two integer tensors is fp32
            count = x.shape[-1] if self.keep is None else self.keep.sum(dtype=wide_x.dtype)
            normal = centred / ((variance * (count / (count - 1))).sqrt() + self.eps)
        return (normal * weight + bias).to(x.dtype)

    @torch.no_grad()
    def become_biased(self, count: int) -> None:
        """From now on be HuggingFace's norm of ``count`` units, of the same values but for eps."""
        self.weight.mul_(biased_scale(count))
        self.statistics, self.eps = "biased", self._plain_eps


def biased_scale(count: int) -> float:
    """What the weight of an unbiased norm of ``count`` units is multiplied by in a biased one."""
    return math.sqrt((count - 1) / count)


class MaskedRMSNorm(MaskedNorm):
    """Takes over the weight and eps of a HuggingFace RMSNorm over the last axis."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm.weight, norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] (or h) normalised, rounded as HuggingFace's Llama does."""
        wide_x = x.to(wide(x.dtype))
        normal = wide_x * torch.rsqrt(self.mean(wide_x.square()) + self.eps)
        return self.kept(self.weight) * normal.to(x.dtype)
