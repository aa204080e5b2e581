"""The six products that merging compactors is made of, in plain torch: any device, any dtype.

A compactor is stored as its difference D from identity, so every product is a residual one: what it
is applied to, plus a matrix product that is 0 while D is. D_jj = -1 in an empty row or column
removes unit j exactly, in every dtype: x - x is 0.

Every function takes lists, one entry a layer, and returns a list of new tensors; the same functions
for many layers in one launch are in ``kernels/compactor.py``. Entries are batches of matrices:
P parts of one layer, N outputs, K inputs, n and k those that are kept. A ``keep`` is the int64
indices of the kept ones or None for all; a tensor's axis is then n or k long in the place of N or
K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Keeps = Sequence[Tensor | None]
Both = tuple[list[Tensor], list[Tensor] | None]
"""Matrices, and vectors if some were given."""


def right(xs_PNK: Tensors, xs_PN: Tensors | None, factors_PNN: Tensors, keeps: Keeps) -> Both:
    """``(I + D) x``, of its kept rows, of a matrix and (if there are any) of a vector.

    [P, n, K] and [P, n].
    """
    return _each(_right, xs_PNK, xs_PN, factors_PNN, keeps)


def _right(x: Tensor, factor: Tensor, keep: Tensor | None) -> Tensor:
    return torch.baddbmm(_rows(x, keep), _rows(factor, keep), x)


def left(xs_PNK: Tensors, factors_PKK: Tensors, keeps: Keeps) -> list[Tensor]:
    """``x (I + D)``, of its kept columns: [P, N, k]."""
    return [
        torch.baddbmm(_columns(x, keep), x, _columns(d, keep))
        for x, d, keep in zip(xs_PNK, factors_PKK, keeps, strict=True)
    ]


def right_input(
    grads_PnK: Tensors, grads_Pn: Tensors | None, factors_PNN: Tensors, keeps: Keeps
) -> Both:
    """The gradient of :func:`right` for what D is applied to: ``(I + D)^T grad``.

    [P, N, K] and [P, N].
    """
    return _each(_right_input, grads_PnK, grads_Pn, factors_PNN, keeps)


def _right_input(grad: Tensor, factor: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.baddbmm(grad, factor.mT, grad)
    return (factor[:, keep].mT @ grad).index_add_(1, keep, grad)


def _each(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    matrices: Tensors,
    vectors: Tensors | None,
    factors: Tensors,
    keeps: Keeps,
) -> Both:
    """A product of matrices, and of vectors as matrices of one column."""
    made = [product(*given) for given in zip(matrices, factors, keeps, strict=True)]
    if vectors is None:
        return made, None
    columns = [v.unsqueeze(2) for v in vectors]
    of_vectors = [product(*given) for given in zip(columns, factors, keeps, strict=True)]
    return made, [v.squeeze(2) for v in of_vectors]


def left_input(grads_PNk: Tensors, factors_PKK: Tensors, keeps: Keeps) -> list[Tensor]:
    """The gradient of :func:`left` for x: ``grad (I + D)^T``, [P, N, K]."""
    return [
        torch.baddbmm(grad, grad, d.mT)
        if keep is None
        else (grad @ d[..., keep].mT).index_add_(2, keep, grad)
        for grad, d, keep in zip(grads_PNk, factors_PKK, keeps, strict=True)
    ]


def right_factor(
    grads_PnK: Tensors,
    xs_PNK: Tensors,
    grads_Pn: Tensors | None,
    xs_PN: Tensors | None,
    keeps: Keeps,
) -> list[Tensor]:
    """The gradient of :func:`right` for D, [P, N, N]: 0 in the rows that are not kept.

    ``grad x^T`` of the matrices, plus that of the vectors.
    """
    made = [grad @ x.mT for grad, x in zip(grads_PnK, xs_PNK, strict=True)]
    if xs_PN is not None:
        for square, g, v in zip(made, grads_Pn, xs_PN, strict=True):
            square.baddbmm_(g[:, :, None], v[:, None, :])
    rows = zip(made, keeps, strict=True)
    return [kept if keep is None else _spread(kept, keep, 1) for kept, keep in rows]


def left_factor(xs_PNK: Tensors, grads_PNk: Tensors, keeps: Keeps) -> list[Tensor]:
    """The gradient of :func:`left` for D: ``x^T grad`` in the kept columns, 0 elsewhere."""
    return [
        x.mT @ grad if keep is None else _spread(x.mT @ grad, keep, 2)
        for x, grad, keep in zip(xs_PNK, grads_PNk, keeps, strict=True)
    ]


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x[:, keep]


def _columns(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x[..., keep]


def _spread(kept: Tensor, keep: Tensor, axis: int) -> Tensor:
    """A square matrix with these rows or columns, and zeros in the others."""
    size = kept.shape[3 - axis]
    return kept.new_zeros(len(kept), size, size).index_copy_(axis, keep, kept)
