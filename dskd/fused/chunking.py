"""The matrix products around a fused loss: chunks of tokens, buffers, precisions.

Shape letters: N tokens, C of them in a chunk, V columns, D hidden size.

On a GPU the operands keep their type, the products with an fp32 result keep cuBLAS's fp32
accumulator, and the gradient of the logits is rounded to the operands' type for the last two
products. Elsewhere the operands are widened to fp32 first: CPUs have no mixed product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dskd.fused.arguments import wide

GPU_BYTES = 3 << 30
"""What the logits of a chunk may take on a GPU. dW is read and written once per chunk: of 131,072
columns and hidden size 4096 that moves 4.3 GB, which 5 chunks of 8192 tokens do instead of 8 with
2 GiB (at 14 bytes a logit: the student's in fp32, the teacher's of two chunks, their gradient)."""
GPU_LEAST = 1024
"""Fewest tokens of a chunk there, for the same reason."""
CPU_BYTES = 1 << 26
"""What the logits of a chunk may take on a CPU."""
CPU_LEAST = 64


def chunk_of(tokens: int, columns: int, bytes_per_logit: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as the budget allows, evenly spread over the chunks."""
    on_gpu = device.type == "cuda"
    budget, least = (GPU_BYTES, GPU_LEAST) if on_gpu else (CPU_BYTES, CPU_LEAST)
    most = max(least, budget // (bytes_per_logit * columns))
    if tokens <= most:
        return max(1, tokens)
    each = math.ceil(tokens / math.ceil(tokens / most))
    return min(most, math.ceil(each / 128) * 128) if on_gpu else each


def operand(value: Tensor) -> Tensor:
    """What the products take: the tensor itself on a GPU, widened elsewhere."""
    return value if value.device.type == "cuda" else value.to(wide(value.dtype))


class Buffer:
    """[C, V] scratch; rows begin at multiples of 64 elements, so that any V loads in 16 bytes."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        padded = -(-columns // 64) * 64
        self._whole = torch.empty(rows, padded, dtype=dtype, device=device)
        self._columns = columns

    def first(self, rows: int) -> Tensor:
        """The first rows, [rows, V]."""
        return self._whole[:rows, : self._columns]


def project(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> None:
    """``out = hidden weight^T + bias`` in the type of ``out``."""
    if out_CV.dtype == hidden_CD.dtype:
        if bias_V is None:
            torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
        else:
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=out_CV)
        return
    if out_CV.device.type == "cuda":
        torch.mm(hidden_CD, weight_VD.t(), out_dtype=out_CV.dtype, out=out_CV)
    else:
        out_CV.copy_(hidden_CD @ weight_VD.t())
    if bias_V is not None:
        out_CV.add_(bias_V)


class HeadGradients:
    """Gradients of hidden states, weight and bias, gathered chunk by chunk.

    All in fp32 (float64 for float64), whatever their types: sums over chunks in bf16 would lose
    what the fp32 logits gained, and a 16-bit gradient of hidden states would be rounded again once
    it is multiplied by the upstream one, or in fp16 be nothing before the loss scale is.
    """

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]
    ) -> None:
        need_hidden, need_weight, need_bias = needs
        self._weight_VD = weight_VD
        # contiguous, however the hidden states lie: the operator's fake and `scaled` count on it
        shape = hidden_ND.shape if need_hidden else (0, 0)
        self.hidden_ND = hidden_ND.new_empty(shape, dtype=wide(hidden_ND.dtype))
        total = {"dtype": wide(weight_VD.dtype), "device": weight_VD.device}
        # written by the first chunk, if there is one
        make = torch.empty if len(hidden_ND) else torch.zeros
        self.weight_VD = make(weight_VD.shape if need_weight else (0, 0), **total)
        rows = len(weight_VD) if need_bias and bias_V is not None else 0
        self.bias_V = torch.zeros(rows, **total)
        self._needs = needs
        self._begun = False

    def add(self, rows: slice, hidden_CD: Tensor, grad_CV: Tensor) -> None:
        """Take in the gradient of a chunk's logits."""
        need_hidden, need_weight, need_bias = self._needs
        if need_hidden:
            project(grad_CV, self._weight_VD.t(), None, self.hidden_ND[rows])
        if need_weight:
            self._add_weight(grad_CV.t(), hidden_CD)
        if need_bias:
            self.bias_V += grad_CV.sum(0, dtype=self.bias_V.dtype)

    def _add_weight(self, grad_VC: Tensor, hidden_CD: Tensor) -> None:
        into, old = self.weight_VD, 1.0 if self._begun else 0.0
        self._begun = True
        if grad_VC.dtype == into.dtype:
            torch.addmm(into, grad_VC, hidden_CD, beta=old, out=into)
        else:
            torch.addmm(into, grad_VC, hidden_CD, into.dtype, beta=old, out=into)


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of the tokens, ``size`` each but for the last."""
    for begin in range(0, tokens, size):
        yield slice(begin, min(tokens, begin + size))
