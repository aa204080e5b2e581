"""Layers with compactors: a trainable matrix before and after, that start as identity.

    y = ((x CL^T) W^T + b) CR^T = x W'^T + b',   W' = CR W CL,   b' = CR b

Parameters are the differences from identity: ``left`` = CL - I, ``right`` = CR - I, 0 at the start.
A removed unit j is column j of CL = 0 or row j of CR = 0. Once removed units are exactly 0, setting
``keep_in`` and ``keep_out`` leaves them out of the products ("compaction"): x and y are then of the
kept units only, parameters stay whole, and the removed entries' gradients are 0.

Linear layers are merged (:class:`Merging`); the embedding's and the vocabulary projection's
compactors are applied to the tokens instead, whose number is below V.

Shape letters: N outputs, K inputs, n and k kept ones, P parts; B rows, T tokens, M = any axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dskd.batch import Use
from dskd.engine.zero import full_shape, is_sharded
from dskd.fused.arguments import wide
from dskd.models.families import LinearProjection
from dskd.ops import Factors, Merged, merge_layers, unmerge_layers


class Compacted(nn.Module):
    """What has compactors.

    Attributes:
        left: [K, K] (P of them, if the layer has parts), or None.
        right: [N, N] likewise, or None.
        keep_in, keep_out: int64 indices of the kept inputs and outputs once compacted; None: all.
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    keep_in: Tensor | None = None
    keep_out: Tensor | None = None


class Merging:
    """When the merged layers of one student are merged, and when their gradients are taken apart.

    A merged weight is computed once and serves until :meth:`forget`, which whoever changes a weight
    calls (an optimizer step, loading, a change of device or dtype, compaction). The gradients of
    merged weights are added up over the micro-batches of a step, and the last one's backward pass
    takes the sum apart; until then the parameters get no gradient (None, not 0).

    Parameters that ZeRO-3 has sharded are merged in every forward pass, again in the backward pass,
    and every micro-batch is taken apart: whole merged weights that stay would undo the sharding.

    Attributes:
        last: whether the micro-batch under way is the last of its optimizer step.
        layers: those that are merged together.
    """

    def __init__(self) -> None:
        self.last = True
        self.layers: list[MergedLayer] = []
        self._merged: dict[MergedLayer, Merged] = {}

    def forget(self) -> None:
        """Merge anew at the next use."""
        assert not any(layer.waiting for layer in self.layers), (
            "weights change while gradients of an unfinished optimizer step wait for its end"
        )
        self._merged.clear()

    def of(self, layer: MergedLayer) -> Merged:
        """The layer's merged weight; all layers are merged as soon as one is needed."""
        if not self._merged:
            alike: dict[object, list[MergedLayer]] = {}
            for other in self.layers:
                alike.setdefault(other.look(), []).append(other)
            for layers in alike.values():
                merged = merge_layers([other.factors() for other in layers])
                self._merged.update(zip(layers, merged, strict=True))
        return self._merged[layer]


class MergedLayer(Compacted):
    """A linear map with both compactors, applied as one matrix.

    The ``weight`` and ``bias`` (or None) of the layer it replaces become its own.

    Attributes:
        parts: how many layers of one input lie side by side in the weight; None for one.
    """

    left: nn.Parameter
    right: nn.Parameter

    def __init__(
        self, layer: nn.Module, merging: Merging, inputs: int, outputs: int, parts: int | None
    ) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.left = _identity(inputs, self.weight, parts)
        self.right = _identity(outputs, self.weight, parts)
        self.parts = parts
        self.merging = merging
        self.waiting: tuple[Tensor, Tensor | None] | None = None
        merging.layers.append(self)

    def factors(self) -> Factors:
        """Views of the parameters, of which autograd knows."""
        raise NotImplementedError

    def look(self) -> object:
        """Equal for layers that can be merged in one call."""
        parameters = (self.weight, self.bias, self.left, self.right)
        keeps = (self.keep_in, self.keep_out)
        return (
            type(self),
            *(None if p is None else (p.shape, p.dtype, p.device) for p in parameters),
            *(None if keep is None else len(keep) for keep in keeps),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] (or k) -> [..., N] (or n), the parts one after the other."""
        if not (is_sharded(self.weight) and torch.is_grad_enabled()):
            return self._apply_merged(x)
        # keeps x for the backward pass, but nothing of a whole weight's size
        return checkpoint(self._apply_merged, x, use_reentrant=False, preserve_rng_state=False)

    def _apply_merged(self, x: Tensor) -> Tensor:
        factors = self.factors()
        if torch.is_grad_enabled():
            # Out of the graph if they get no gradient: ZeRO-2 has a hook on each that wants one.
            if not (self.merging.last or is_sharded(self.weight)):
                factors = Factors(*(f if f is None else f.detach() for f in factors))
            anchor = torch.ones((), requires_grad=True)  # for a backward pass without parameters
            weight_Pnk, bias_Pn = _Merge.apply(self, anchor, *factors)
        else:
            weight_Pnk, bias_Pn, _ = self.merged(factors)
        return linear(x, weight_Pnk.flatten(0, 1), None if bias_Pn is None else bias_Pn.flatten())

    def merged(self, factors: Factors) -> Merged:
        """Made now if the parameters are sharded, else once until the merging forgets."""
        if is_sharded(self.weight):
            return merge_layers([factors])[0]
        return self.merging.of(self)

    def due(
        self, weight_Pnk: Tensor, bias_Pn: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The gradients of W' and b' to take apart now; None if they wait for the last ones."""
        grads = weight_Pnk, bias_Pn
        if is_sharded(self.weight):
            return grads
        if self.waiting is not None:
            for waiting, grad in zip(self.waiting, grads, strict=True):
                if grad is not None:
                    waiting.add_(grad)
            grads = self.waiting
        elif not self.merging.last:
            # a sum of 16-bit numbers is kept in fp32
            grads = tuple(g if g is None else g.to(wide(g.dtype), copy=True) for g in grads)
        self.waiting = None if self.merging.last else grads
        return grads if self.merging.last else None


class CompactedLinear(MergedLayer):
    """In the place of an ``nn.Linear``: weight [N, K], left [K, K], right [N, N]."""

    def __init__(self, layer: nn.Linear, merging: Merging) -> None:
        outputs, inputs = full_shape(layer.weight)
        super().__init__(layer, merging, inputs, outputs, None)

    def factors(self) -> Factors:
        """One part."""
        bias = None if self.bias is None else self.bias[None]
        matrices = (self.left[None], self.right[None])
        return Factors(self.weight[None], bias, *matrices, self.keep_in, self.keep_out)


class CompactedConv1D(MergedLayer):
    """In the place of GPT-2's linear layer of a transposed weight [K, N].

    With ``parts`` (c_attn: 3) the weight is [K, P N], and every part has compactors of its own:
    left [P, K, K], right [P, N, N]. ``keep_out`` is within a part, the same for all.
    """

    def __init__(self, layer: Conv1D, merging: Merging, parts: int | None = None) -> None:
        inputs, outputs = full_shape(layer.weight)
        super().__init__(layer, merging, inputs, outputs // (parts or 1), parts)

    def factors(self) -> Factors:
        """The weight seen as that of ``nn.Linear``, part by part."""
        parts = self.parts or 1
        weight_PNK = self.weight.unflatten(1, (parts, -1)).permute(1, 2, 0)
        matrices = (m.view(parts, *m.shape[-2:]) for m in (self.left, self.right))
        bias_PN = self.bias.unflatten(0, (parts, -1))
        return Factors(weight_PNK, bias_PN, *matrices, self.keep_in, self.keep_out)


def compacted(layer: nn.Module, path: str, parts: int, merging: Merging) -> MergedLayer:
    """What stands in the place of a model's linear layer."""
    if isinstance(layer, Conv1D):
        return CompactedConv1D(layer, merging, None if parts == 1 else parts)
    assert type(layer) is nn.Linear, f"{path} is a {type(layer).__name__}"
    return CompactedLinear(layer, merging)


class CompactedEmbeddings(Compacted):
    """The right compactor of the summed embedding, as a module of its own behind the sum."""

    right: nn.Parameter

    def __init__(self, width: int, like: nn.Parameter) -> None:
        """Of dtype and device ``like`` another parameter's."""
        super().__init__()
        self.left = None
        self.right = _identity(width, like)

    def forward(self, x: Tensor) -> Tensor:
        """x CR^T: [..., N] -> [..., N] (or n)."""
        right, kept = self.right, x
        if self.keep_out is not None:
            right, kept = right[self.keep_out], x[..., self.keep_out]
        flat = torch.addmm(kept.flatten(0, -2), x.flatten(0, -2), right.mT)
        return flat.unflatten(0, x.shape[:-1])


class CompactedProjection(Compacted, LinearProjection):
    """A model's last linear map with a left compactor; its N = V outputs are all kept."""

    left: nn.Parameter

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.out_features, self.in_features = full_shape(layer.weight)
        self.weight = layer.weight
        self.bias = layer.bias
        self.left = _identity(self.in_features, self.weight)
        self.right = None

    def forward(self, hidden_ND: Tensor, use: Use | None = None) -> Any:
        """Logits of x [..., K] (or k), or what ``use`` makes of (x CL^T [..., K], weight, bias)."""
        kept = hidden_ND.flatten(0, -2)
        left, rows = self.left, kept
        if self.keep_in is not None:
            left = left[:, self.keep_in]
            rows = kept.new_zeros(len(kept), self.in_features).index_copy(1, self.keep_in, kept)
        compacted_ND = torch.addmm(rows, kept, left.mT).unflatten(0, hidden_ND.shape[:-1])
        return super().forward(compacted_ND, use)


def _identity(size: int, like: nn.Parameter, parts: int | None = None) -> nn.Parameter:
    shape = (size, size) if parts is None else (parts, size, size)
    return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))


class _Merge(torch.autograd.Function):
    """(W', b') of a layer's factors, which gradients reach when they are due."""

    @staticmethod
    def forward(
        ctx: Any, layer: MergedLayer, anchor: Tensor, *factors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weight_Pnk, bias_Pn, ctx.middle = layer.merged(Factors(*factors))
        ctx.layer = layer
        ctx.save_for_backward(*factors)
        # what stays for the next micro-batch must not be what gets this one's graph
        return weight_Pnk.detach(), None if bias_Pn is None else bias_Pn.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Pnk: Tensor, grad_Pn: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, factors = ctx.layer, Factors(*ctx.saved_tensors)
        due = layer.due(grad_Pnk, None if factors.bias_PN is None else grad_Pn)
        if due is None:
            return (None,) * 8
        weight, bias = (g if g is None else g.to(factors.weight_PNK.dtype) for g in due)
        (found,) = unmerge_layers(
            [factors], [ctx.middle], [weight], None if bias is None else [bias]
        )
        return None, None, *found, None, None
