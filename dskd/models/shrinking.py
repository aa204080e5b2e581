"""A config's small copy: of the same kind in all that is not a size, quick to make on a CPU."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 96
"""Most tokens of a small copy."""
_LAYERS, _HEADS, _EXPERTS = 2, (2, 4, 8), 4
_WINDOW = 4
_POSITIONS = 32
_WINDOWS = re.compile(r".*(window|chunk_size).*|local_attention")
_INNER = re.compile(r".*(intermediate|inner|ffn).*(size|dim|hidden)s?|n_inner|d_ff|hidden_dim")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "moe_k", "moe_top_k")


def small_copies(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, bool]]:
    """Copies with few layers, heads and tokens, and short windows of attention, ever larger ones;
    whether each has the width of the config itself."""
    heads, width = _field(config, "num_attention_heads"), _field(config, "hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        for few in _HEADS:
            if few < heads:
                yield _narrow(few_layers(config), heads, width, few), False
    yield few_layers(config), True


def _narrow(small: PreTrainedConfig, heads: int, width: int, few: int) -> PreTrainedConfig:
    """A copy made narrow in place. The width of a head is kept: what turns it, in rotary positions,
    has sizes of its own."""
    narrow = width // heads * few
    if width % heads or _field(small, "head_dim"):  # then a head has a width of its own
        narrow = -(-width * few // heads // 64) * 64
    for name, value in _numbers(small):
        if name == _named(small, "num_attention_heads"):
            setattr(small, name, few)
        elif name in ("num_key_value_heads", "num_kv_heads", "n_head_kv") and value > 1:
            setattr(small, name, few if value == heads else few // 2)
        elif name == _named(small, "hidden_size"):
            setattr(small, name, narrow)
        elif name in ("embedding_size", "word_embed_proj_dim"):
            setattr(small, name, narrow if value == width else min(value, max(1, narrow // 2)))
        elif _INNER.fullmatch(name) and value > 2 * narrow:
            setattr(small, name, 2 * narrow)
    return small


def few_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with few layers, experts and tokens, of the same width."""
    small = copy.deepcopy(config)
    small._attn_implementation_internal = None  # as of the class, on a CPU
    small.vocab_size = min(config.vocab_size or VOCABULARY, VOCABULARY)
    for name, value in _numbers(small):
        if name.endswith("token_id") and value >= small.vocab_size:
            setattr(small, name, small.vocab_size - 1)
        elif _WINDOWS.fullmatch(name) and value > _WINDOW:
            setattr(small, name, _WINDOW)
        elif name == _named(small, "max_position_embeddings") and value < _POSITIONS:
            setattr(small, name, _POSITIONS)  # room for the batch by which it is proved
        elif name in _EXPERT_COUNTS and value > _EXPERTS:
            setattr(small, name, _EXPERTS)
        elif name in _CHOSEN_COUNTS and value > 2:
            setattr(small, name, 2)
        elif name in ("n_group", "topk_group") and value > 1:
            setattr(small, name, 1)
        elif name.startswith("vocab_size") and value > small.vocab_size:
            setattr(small, name, small.vocab_size)
    layers = _field(config, "num_hidden_layers")
    if isinstance(layers, int):
        _cut_layers(small, layers)
    return small


def _cut_layers(small: PreTrainedConfig, layers: int) -> None:
    """Keep one layer of each kind, two at least."""
    kinds = _field(small, "layer_types")
    kept = [*range(min(layers, _LAYERS))]
    if isinstance(kinds, list) and len(kinds) == layers:
        kept = sorted({*kept, *(kinds.index(kind) for kind in kinds)})
    for name, value in vars(small).items():
        if isinstance(value, list) and len(value) == layers and layers > len(kept):
            setattr(small, name, [value[layer] for layer in kept])
    small.num_hidden_layers = len(kept)


def _named(config: PreTrainedConfig, name: str) -> str:
    """The name under which a config keeps a field that all of them have."""
    return type(config).attribute_map.get(name, name)


def _field(config: PreTrainedConfig, name: str) -> Any:
    """A field's own value, None where the config does not have it."""
    return vars(config).get(_named(config, name))


def _numbers(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    """The whole numbers of a config by name."""
    found = vars(config).items()
    return [(name, n) for name, n in found if isinstance(n, int) and not isinstance(n, bool)]
