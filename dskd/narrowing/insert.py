"""Compactors into a HuggingFace model, and the model narrowed to the units it keeps.

Inserted compactors are identity, so the model's logits stay what they were, bit for bit in fp32.
The modules they go around are replaced in place; parameters stay the same objects, under the same
names but for the one module next to the sum of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.engine.zero import full_shape
from dskd.errors import DskdError
from dskd.models.build import construct
from dskd.models.families import lm_head, tie_head_bias
from dskd.narrowing.compactors import CompactedEmbeddings, CompactedProjection, Merging, compacted
from dskd.narrowing.layouts import (
    Group,
    groups_of,
    kept_entries,
    layout_of,
    maps_of,
    norms_of,
    projected,
    widths_of,
)
from dskd.narrowing.masked_norm import MaskedLayerNorm, MaskedRMSNorm, Statistics
from dskd.narrowing.units import Whole, spread
from dskd.narrowing.widths import Widths

Keep = Mapping[str, Tensor]
"""For each group which of its units are kept, bool [U] on the CPU; units are equal runs of
entries."""


@dataclass
class Surgery:
    """A student with compactors; ``statistics`` are those of its LayerNorms."""

    model: PreTrainedModel
    groups: dict[str, Group]
    merging: Merging
    statistics: Statistics = "biased"

    def mask(self, keep: Keep) -> None:
        """Have the norms count the kept units only. All else stays as it is ("soft")."""
        for name, group in self.groups.items():
            for path in group.norms:
                norm = self.model.get_submodule(path)
                keep_H = spread(keep[name], full_shape(norm.weight)[0])
                norm.keep = None if keep_H.all() else keep_H.to(norm.weight.device)

    def compact(self, keep: Keep) -> None:
        """Leave the removed units out of every product and activation from now on.

        The logits stay the same if the removed units' compactor entries are 0. Parameters stay
        whole, and attention keeps the scale of the teacher's heads.

        Raises:
            DskdError: the kept units are not those of a model (:func:`kept_widths`).
        """
        config = self.model.config
        layout = layout_of(config)
        widths = kept_widths(config, keep)
        for own in maps_of(config):
            layer = self.model.get_submodule(own.path)
            layer.keep_in = _indices(keep[own.reads], layer.left)
            layer.keep_out = _indices(keep[own.writes], layer.right)
        embedded = self.model.get_submodule(layout.embedded)
        embedded.keep_out = _indices(keep["R"], embedded.right)
        projection = self.model.get_submodule(lm_head(config.model_type).projection)
        projection.keep_in = _indices(keep[projected(config)], projection.left)
        for name, group in self.groups.items():
            for path in group.norms:
                norm = self.model.get_submodule(path)
                norm.keep, norm.keep_in = None, _indices(keep[name], norm.weight)
        if layout.sizes is not None:
            sizes = (widths.heads, widths.head_dim, widths.heads * widths.head_dim)
            for layer in range(config.num_hidden_layers):
                attention = self.model.get_submodule(f"{layout.layers}.{layer}.{layout.attention}")
                for attribute, size in zip(layout.sizes, sizes, strict=True):
                    assert isinstance(getattr(attention, attribute), int)
                    setattr(attention, attribute, size)
        self.merging.forget()


def insert(model: PreTrainedModel, statistics: Statistics = "biased") -> Surgery:
    """Give a model its compactors, in place, and its LayerNorms these statistics (other than
    "biased", they change its logits a little).

    Under ZeRO-3 within ``zero.sharded_construction``, so that the compactors are sharded at once.

    Raises:
        ConfigError: its family is not one that compactors are known for.
    """
    config = model.config
    layout = layout_of(config)
    merging = Merging()
    for own in maps_of(config):
        layer = model.get_submodule(own.path)
        model.set_submodule(own.path, compacted(layer, own.path, own.parts, merging))
    for path, _ in norms_of(config):
        norm = model.get_submodule(path)
        layer_norm = isinstance(norm, nn.LayerNorm)
        masked = MaskedLayerNorm(norm, statistics) if layer_norm else MaskedRMSNorm(norm)
        model.set_submodule(path, masked)
    summed = model.get_submodule(layout.summed)
    table = model.get_submodule(layout.tables[0]).weight
    embedded = CompactedEmbeddings(full_shape(table)[1], table)
    pair = (summed, embedded) if layout.summed in layout.tables else (embedded, summed)
    model.set_submodule(layout.summed, nn.Sequential(*pair))
    projection = lm_head(config.model_type).projection
    model.set_submodule(projection, CompactedProjection(model.get_submodule(projection)))
    model.train(model.training)
    return Surgery(model, groups_of(model), merging, statistics)


def replica(surgery: Surgery, whole: Whole) -> Surgery:
    """The same student, whole and in fp32 on the CPU, however the original is held.

    Neither mask nor compaction is taken over. It is in eval mode.

    Args:
        whole: values of every parameter; under ZeRO the fp32 masters.
    """
    config = surgery.model.config
    # Flash attention is not for CPUs.
    model = construct(config, "eager", None, torch.float32, "the student's config")
    tie_head_bias(model)
    twin = insert(model, surgery.statistics)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole(name))
    model.eval()
    return twin


def kept_widths(config: PreTrainedConfig, keep: Keep) -> Widths:
    """Sizes of the layers that the kept units make.

    Raises:
        DskdError: layers or heads keep different numbers, or a BERT's or GPT-2's attention another
            width than its residual stream: no model of the family is like that.
    """
    full = widths_of(config)
    rotary = layout_of(config).demands.rotary
    count = full.kv_heads if rotary else full.heads
    sets: tuple[set[int], ...] = (set(), set(), set(), set())
    hiddens, intermediates, counts, head_dims = sets
    for name, keep_U in keep.items():
        if name[0] == "A":
            in_head = spread(keep_U, count * full.head_dim).view(count, -1).sum(1)
            counts.add(int((in_head > 0).sum()))
            head_dims |= set(in_head[in_head > 0].tolist())
        elif name[0] == "F":
            intermediates.add(int(spread(keep_U, full.intermediate).sum()))
        else:
            hiddens.add(int(spread(keep_U, full.hidden).sum()))
    if any(len(found) != 1 for found in sets):
        raise _no_model(keep)
    hidden, intermediate, heads, head_dim = (found.pop() for found in sets)
    if rotary and head_dim == full.head_dim:
        return Widths(hidden, intermediate, heads * (full.heads // full.kv_heads), heads, head_dim)
    if rotary or heads * head_dim != hidden:
        raise _no_model(keep)
    return Widths(hidden, intermediate, heads, heads, head_dim)


def _no_model(keep: Keep) -> DskdError:
    counts = ", ".join(f"{name} {int(kept.sum())}/{len(kept)}" for name, kept in keep.items())
    return DskdError(
        f"the units kept of each group make no dense model (is the ramp over?): {counts}"
    )


def _indices(keep_U: Tensor, parameter: Tensor) -> Tensor | None:
    """Kept entries of a parameter's last axis; None if that is all of them."""
    if keep_U.all():
        return None
    return kept_entries(keep_U, full_shape(parameter)[-1]).to(parameter.device)
