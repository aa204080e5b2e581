"""Merging linear layers with their compactors, and the way back for the gradients.

The compactors are those of Weight-Inherited Distillation (Wu et al. 2024): a square matrix before a
layer and one after it, stored as their differences DL and DR from identity.

    P = (I + DR) W,   W' = P (I + DL),   b' = (I + DR) b

and back, from dW' and db',

    dP = dW' (I + DL)^T,   dDL = P^T dW',   dDR = dP W^T + db' b^T,
    dW = (I + DR)^T dP,    db = (I + DR)^T db'

Done once for many tokens this is far cheaper than three products a token, and its gradients are the
same. With units kept on either side only, W' is [n, k], and the side that leaves less to do comes
first: ``Q = W (I + DL)``, ``W' = (I + DR) Q`` is the other order.

Shape letters: P parts, N outputs, K inputs, n and k the kept ones (see ``products.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import FLOATING, refuse
from dskd.fused.backend import row_functions
from dskd.fused.cpu import products

GROUPED_UP_TO = 1024 * 1024
"""Elements N K of the largest weight whose layers share a launch of the kernels on a GPU; larger
ones are a GEMM each (cuBLAS). Not measured: a guess at where one product alone fills the GPU."""


class Factors(NamedTuple):
    """What one layer is merged from.

    Attributes:
        weight_PNK: P layers of one input side by side (GPT-2's c_attn: 3), else P = 1.
        bias_PN: or None.
        left_PKK, right_PNN: the compactors' differences from identity.
        keep_in, keep_out: int64 indices of the kept inputs and outputs of every part, each once;
            None keeps all.
    """

    weight_PNK: Tensor
    bias_PN: Tensor | None
    left_PKK: Tensor
    right_PNN: Tensor
    keep_in: Tensor | None = None
    keep_out: Tensor | None = None


class Merged(NamedTuple):
    """W', b', and the product of W with the first side, which the way back needs again."""

    weight_Pnk: Tensor
    bias_Pn: Tensor | None
    middle: Tensor


class FactorGradients(NamedTuple):
    """The gradients of the factors; None for a bias that is not there."""

    weight_PNK: Tensor
    bias_PN: Tensor | None
    left_PKK: Tensor
    right_PNN: Tensor


def merge_layers(layers: Sequence[Factors]) -> list[Merged]:
    """Merged weight and bias of layers that all have the same sizes, dtype and device.

    While both differences are 0, W' and b' equal W and b bit for bit. No graph is built.

    Raises:
        ValueError: a factor of a wrong shape, type or device, named.
    """
    weights, lefts, rights, biases = _checked(layers)
    ins, outs = [f.keep_in for f in layers], [f.keep_out for f in layers]
    use = _products(layers[0])
    if right_first(layers[0]):
        middles, kept = use.right(weights, biases, rights, outs)
        merged = use.left(middles, lefts, ins)
    else:
        middles = use.left(weights, lefts, ins)
        merged, kept = use.right(middles, biases, rights, outs)
    kept = kept or [None] * len(layers)
    return [Merged(*made) for made in zip(merged, kept, middles, strict=True)]


def unmerge_layers(
    layers: Sequence[Factors],
    middles: Sequence[Tensor],
    grads_Pnk: Sequence[Tensor],
    grads_Pn: Sequence[Tensor] | None,
) -> list[FactorGradients]:
    """The gradients of every factor, from those of the merged weights and biases.

    A compactor's gradient is whole: 0 in the rows (right) or columns (left) that are not kept.

    Args:
        middles: what :func:`merge_layers` gave for the same layers.
        grads_Pnk, grads_Pn: of W' and b', in the dtype of the factors; no ``grads_Pn`` for layers
            without bias.
    """
    weights, lefts, rights, biases = _checked(layers)
    ins, outs = [f.keep_in for f in layers], [f.keep_out for f in layers]
    use = _products(layers[0])
    if right_first(layers[0]):
        of_middles = use.left_input(grads_Pnk, lefts, ins)
        of_lefts = use.left_factor(middles, grads_Pnk, ins)
        of_rights = use.right_factor(of_middles, weights, grads_Pn, biases, outs)
        of_weights, of_biases = use.right_input(of_middles, grads_Pn, rights, outs)
    else:
        of_middles, of_biases = use.right_input(grads_Pnk, grads_Pn, rights, outs)
        of_rights = use.right_factor(grads_Pnk, middles, grads_Pn, biases, outs)
        of_lefts = use.left_factor(weights, of_middles, ins)
        of_weights = use.left_input(of_middles, lefts, ins)
    of_biases = of_biases or [None] * len(layers)
    return [
        FactorGradients(*g) for g in zip(of_weights, of_biases, of_lefts, of_rights, strict=True)
    ]


def right_first(factors: Factors) -> bool:
    """Whether the right compactor is applied first: both ways and back take 3 times these products.

    ``n N K + n K k`` multiplications one way, ``N K k + n N k`` the other.
    """
    _, outputs, inputs = factors.weight_PNK.shape
    kept_out = outputs if factors.keep_out is None else len(factors.keep_out)
    kept_in = inputs if factors.keep_in is None else len(factors.keep_in)
    by_right = kept_out * inputs * (outputs + kept_in)
    return by_right <= outputs * kept_in * (inputs + kept_out)


def _products(factors: Factors) -> ModuleType:
    """What computes these layers' products."""
    _, outputs, inputs = factors.weight_PNK.shape
    large = outputs * inputs > GROUPED_UP_TO
    if large or factors.weight_PNK.dtype == torch.float64:
        return products
    return row_functions("compactor", factors.weight_PNK)


def _checked(
    layers: Sequence[Factors],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """Weights, lefts, rights and biases, none of them with a graph."""
    refuse(not layers, lambda: "layers: there are none")
    differ = len({_look(factors) for factors in layers}) > 1
    refuse(differ, lambda: "layers: they differ in shapes, strides, dtype, device or kept units")
    weight, bias, left, right, *keeps = layers[0]
    refuse(
        weight.dim() != 3, lambda: f"weight: must have three axes, not shape {tuple(weight.shape)}"
    )
    refuse(
        weight.dtype not in FLOATING, lambda: f"weight: must be floating-point, not {weight.dtype}"
    )
    parts, outputs, inputs = weight.shape
    _alike("left", left, (parts, inputs, inputs), weight)
    _alike("right", right, (parts, outputs, outputs), weight)
    if bias is not None:
        _alike("bias", bias, (parts, outputs), weight)
    for name, keep in zip(("keep_in", "keep_out"), keeps, strict=True):
        indices = keep is None or (keep.dtype == torch.int64 and keep.dim() == 1)
        refuse(not indices, lambda name=name: f"{name}: must be int64 indices")
    biases = None if bias is None else [f.bias_PN.detach() for f in layers]
    return (
        [f.weight_PNK.detach() for f in layers],
        [f.left_PKK.detach() for f in layers],
        [f.right_PNN.detach() for f in layers],
        biases,
    )


def _alike(name: str, given: Tensor, shape: tuple[int, ...], weight: Tensor) -> None:
    """Check a factor's shape, and that its type and device are the weight's."""
    refuse(given.shape != shape, lambda: f"{name}: must be {shape}, not {tuple(given.shape)}")
    refuse(
        given.dtype != weight.dtype or given.device != weight.device,
        lambda: (
            f"{name}: is {given.dtype} on {given.device}, the weight {weight.dtype} on"
            f" {weight.device}"
        ),
    )


def _look(factors: Factors) -> tuple[object, ...]:
    """What the layers of one call have in common."""
    *tensors, keep_in, keep_out = factors
    looks = [
        None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors
    ]
    return *looks, *(None if keep is None else len(keep) for keep in (keep_in, keep_out))
