"""Tiny students of every family with compactors that are not identity, and units to remove."""

import torch
from torch import Tensor, nn

from dskd.engine.zero import gathered, sharded_construction
from dskd.narrowing.insert import Surgery, insert
from dskd.narrowing.layouts import layout_of, widths_of
from dskd.narrowing.widths import Widths
from tests.models.tiny import batch, make

SHAPES = [
    *(("bert", shape) for shape in ((16, 24, 4, 4), (16, 24, 2, 8))),
    *(("roberta", shape) for shape in ((16, 24, 4, 4), (16, 24, 2, 8))),
    ("xlm-roberta", (16, 24, 4, 4)),
    *(("gpt2", shape) for shape in ((16, 64, 4, 4), (16, 64, 2, 8))),
    *((family, (16, 24, 1, 8)) for family in ("llama", "mistral", "qwen2", "qwen3")),
    ("qwen2", (24, 24, 1, 8)),  # heads times their size is not the hidden size
    ("qwen3", (24, 24, 2, 16)),
]
"""Families and (hidden, intermediate, heads or kv-groups, head_dim) to be kept, ``dim`` and
``head``; the teachers are (32, 48, 4, 8) or, rotary, (32, 48, 2, 8 or 16), with 128 for GPT-2."""


def small_student(
    model_type: str, shape: tuple[int, int, int, int], ds: dict | None = None
) -> tuple[Surgery, dict[str, Tensor]]:
    """A student whose every parameter is off its start, and the units of each group to keep.

    Sharded if the DeepSpeed config ``ds`` says so.
    """
    hidden, intermediate, heads, head_dim = shape
    fields = {"head_dim": head_dim} if model_type == "qwen3" else {}
    model = make(model_type, ds=ds, **fields).eval()
    with sharded_construction(ds):
        surgery = insert(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in surgery.model.parameters():
        with gathered([parameter], write=True), torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    full = widths_of(surgery.model.config)
    keep = {}
    for name in surgery.groups:
        if name[0] == "A":
            layout = layout_of(surgery.model.config)
            keep[name] = _attention(full, layout, heads, head_dim, generator)
        elif name[0] == "F":
            keep[name] = _some(full.intermediate, intermediate, generator)
        else:
            keep[name] = _some(full.hidden, hidden, generator)
    return surgery, keep


def _attention(
    full: Widths, layout, heads: int, head_dim: int, generator: torch.Generator
) -> Tensor:
    """Units are kv-groups of rotary models, heads if heads go, else entries."""
    if layout.demands.rotary:
        return _some(full.kv_heads, heads, generator)
    if heads < full.heads:
        return _some(full.heads, heads, generator)
    return torch.cat([_some(full.head_dim, head_dim, generator) for _ in range(heads)])


def _some(size: int, kept: int, generator: torch.Generator) -> Tensor:
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.randperm(size, generator=generator)[:kept]] = True
    return keep


def logits_of(model: nn.Module) -> Tensor:
    """Of the real tokens, in eval mode."""
    data = batch()
    with torch.no_grad():
        out = model.eval()(input_ids=data.ids_BT, attention_mask=data.mask_BT)
    return out.logits[data.mask_BT.bool()]
