"""A dense HuggingFace model of fewer units, filled from a larger one.

What it is filled with is up to a :class:`UnitSource`: the larger model's own weights at the kept
units (``heaviest.py``), or their products with compactors (``merge.py``).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dskd.models.build import construct
from dskd.models.families import lm_head, tie_head_bias
from dskd.narrowing.insert import Keep, kept_widths
from dskd.narrowing.layouts import Map, kept_entries, layout_of, maps_of, norms_of, projected
from dskd.narrowing.widths import Widths


class UnitSource(Protocol):
    """A model with the units kept. Paths and names are those of the HuggingFace model.

    Shape letters: N outputs, K inputs, n and k kept ones, P parts, V vocabulary, H hidden.
    """

    model: PreTrainedModel

    def table(self, path: str, keep_R: Tensor) -> Tensor:
        """An embedding's rows [V, n]."""

    def map(self, own: Map, keep_in: Tensor, keep_out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight [P, n, k] and bias [P, n] of a linear map, given its kept units."""

    def projection(self, path: str, keep_in: Tensor) -> Tensor:
        """The vocabulary projection's weight [V, k]."""

    def whole(self, name: str) -> Tensor:
        """A parameter as it is."""


def narrow(source: UnitSource, keep: Keep) -> PreTrainedModel:
    """The model of the kept units, in the dtype of the source's values, in train mode.

    It has the input embedding and the vocabulary projection apart: they are of different spaces.
    Queries are scaled by what their heads' new size changes in the attention's own scale.

    Raises:
        DskdError: the kept units are not those of a model (:func:`kept_widths`).
    """
    model, config = source.model, source.model.config
    keep = {name: keep_U.cpu() for name, keep_U in keep.items()}
    layout = layout_of(config)
    projection = lm_head(config.model_type).projection
    values: dict[str, Tensor] = {}
    for path in layout.tables:
        values[f"{path}.weight"] = source.table(path, keep["R"])
    dtype = values[f"{layout.tables[0]}.weight"].dtype
    config_n = narrowed_config(config, kept_widths(config, keep))
    small = construct(config_n, config._attn_implementation, None, dtype, "the student's config")
    tie_head_bias(small)
    for own in maps_of(config):
        weight_Pnk, bias_Pn = source.map(own, keep[own.reads], keep[own.writes])
        if own.path.endswith(layout.maps[0].path):
            _rescale(weight_Pnk, bias_Pn, _scale_ratio(model, small, own.path))
        flat = weight_Pnk.flatten(0, 1)
        transposed = isinstance(small.get_submodule(own.path), Conv1D)
        values[f"{own.path}.weight"] = flat.mT if transposed else flat
        if bias_Pn is not None:
            values[f"{own.path}.bias"] = bias_Pn.flatten()
    for path, group in norms_of(config):
        for name, _ in small.get_submodule(path).named_parameters():
            whole_H = source.whole(f"{path}.{name}")
            values[f"{path}.{name}"] = whole_H[kept_entries(keep[group], len(whole_H))]
    values[f"{projection}.weight"] = source.projection(projection, keep[projected(config)])
    _fill(small, values, source)
    if model.can_generate():
        small.generation_config = model.generation_config
    return small


def narrowed_config(config: PreTrainedConfig, widths: Widths) -> PreTrainedConfig:
    """The same model's config with other widths and untied embeddings."""
    fields = {
        "hidden_size": widths.hidden,
        "num_attention_heads": widths.heads,
        "n_inner" if config.model_type == "gpt2" else "intermediate_size": widths.intermediate,
        "tie_word_embeddings": False,
    }
    if layout_of(config).demands.rotary:
        # Qwen2's config has no head_dim of its own; its model reads one where there is one.
        fields |= {"num_key_value_heads": widths.kv_heads, "head_dim": widths.head_dim}
    own = {config.attribute_map.get(name, name): value for name, value in fields.items()}
    return type(config).from_dict({**config.to_dict(), **own})


def _scale_ratio(model: PreTrainedModel, small: PreTrainedModel, queries: str) -> float:
    """How many times larger the scale of a layer's scores was in the larger model."""
    layout = layout_of(model.config)
    attention = queries.removesuffix(layout.maps[0].path) + layout.attention
    return model.get_submodule(attention).scaling / small.get_submodule(attention).scaling


def _rescale(weight_Pnk: Tensor, bias_Pn: Tensor | None, ratio: float) -> None:
    """Multiply what makes the queries, the first part, in place."""
    if ratio != 1.0:
        weight_Pnk[0] *= ratio
        if bias_Pn is not None:
            bias_Pn[0] *= ratio


def _fill(small: PreTrainedModel, values: dict[str, Tensor], source: UnitSource) -> None:
    """Set every parameter; those without units (an output bias, norms within heads) stay whole."""
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            value = values.pop(name) if name in values else source.whole(name)
            assert parameter.shape == value.shape, f"{name}: {parameter.shape}, {value.shape}"
            parameter.copy_(value)
    assert not values, f"the narrow model has no {sorted(values)}"


def part_by_part(layer: nn.Module, weight: Tensor, parts: int) -> Tensor:
    """A linear layer's weight as [P, N, K], whichever way the layer holds it."""
    rows = weight.mT if isinstance(layer, Conv1D) else weight
    return rows.unflatten(0, (parts, -1))
