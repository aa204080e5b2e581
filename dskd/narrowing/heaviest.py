"""Slice-init: a small model of those units of a teacher whose weights are largest.

The control that Weight-Inherited Distillation is to be measured against: no compactors, nothing is
trained. Units are ranked by the squared weights of everything in their group: the rows that write
them and the columns that read them, embeddings and vocabulary projection included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dskd.models.families import lm_head
from dskd.narrowing.insert import Keep
from dskd.narrowing.layouts import Map, kept_entries, layout_of, maps_of, projected, widths_of
from dskd.narrowing.narrow import narrow, part_by_part
from dskd.narrowing.units import fold, lowest
from dskd.narrowing.widths import Strategy, Widths, cuts


def slice_model(teacher: PreTrainedModel, student: Widths, strategy: Strategy) -> PreTrainedModel:
    """A dense model of the heaviest units of a teacher, which is left as it is.

    Args:
        teacher: whole, without compactors.
        student: its sizes, of ``widths.student_widths``.
        strategy: which attention units go, ``dim`` or ``head``.

    Raises:
        ConfigError: a family whose units are not known.
    """
    return narrow(_Sliced(teacher), heaviest(teacher, student, strategy))


def heaviest(teacher: PreTrainedModel, student: Widths, strategy: Strategy) -> Keep:
    """Which units of each group stay, bool [U]. Ties go by index, the first first."""
    config = teacher.config
    cut_of = cuts(widths_of(config), student, strategy, "annealed", layout_of(config).demands)
    keep = {}
    for name, weights_K in unit_weights(teacher, cut_of["A"].size).items():
        cut = cut_of[name[0]]
        keep[name] = ~lowest(fold(weights_K, cut.size), cut.remove, cut.chunks)
    return keep


@torch.no_grad()
def unit_weights(teacher: PreTrainedModel, attention_units: int) -> dict[str, Tensor]:
    """Sum of squares of each unit's weights over its group, by group: float64.

    [H] of ``R`` and ``T``, [F] of ``F.*``; of ``A.*`` [attention_units], since queries may have
    more entries than keys.
    """
    config = teacher.config
    totals: dict[str, Tensor] = {}

    def add(group: str, squares_K: Tensor) -> None:
        if group[0] == "A":
            squares_K = fold(squares_K, attention_units)
        totals[group] = totals[group] + squares_K if group in totals else squares_K

    for path in layout_of(config).tables:
        add("R", _squares(teacher.get_submodule(path).weight, 0))
    for own in maps_of(config):
        layer = teacher.get_submodule(own.path)
        weight_PNK = part_by_part(layer, layer.weight, own.parts)
        add(own.reads, _squares(weight_PNK, (0, 1)))
        add(own.writes, _squares(weight_PNK, (0, 2)))
    projection = lm_head(config.model_type).projection
    add(projected(config), _squares(teacher.get_submodule(projection).weight, 0))
    return totals


def _squares(weight: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    return weight.double().square().sum(axes)


class _Sliced:
    """A model's own weights at the kept units."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def table(self, path: str, keep_R: Tensor) -> Tensor:
        weight_VH = self.model.get_submodule(path).weight.detach()
        return weight_VH[:, kept_entries(keep_R, weight_VH.shape[1])]

    def map(self, own: Map, keep_in: Tensor, keep_out: Tensor) -> tuple[Tensor, Tensor | None]:
        layer = self.model.get_submodule(own.path)
        weight_PNK = part_by_part(layer, layer.weight.detach(), own.parts)
        rows = kept_entries(keep_out, weight_PNK.shape[1])
        columns = kept_entries(keep_in, weight_PNK.shape[2])
        bias_Pn = None
        if layer.bias is not None:
            bias_Pn = layer.bias.detach().unflatten(0, (own.parts, -1))[:, rows]
        return weight_PNK[:, rows][:, :, columns], bias_Pn

    def projection(self, path: str, keep_in: Tensor) -> Tensor:
        return self.table(path, keep_in)

    def whole(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()
