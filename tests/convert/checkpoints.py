"""Golden files of the original systems, and checkpoints of random shapes in their layouts."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

GOLDEN = Path(__file__).parents[1] / "golden" / "bridges"
LAST = GOLDEN / "fairseq_2019/checkpoint_last.pt"
IN_PROJ = GOLDEN / "fairseq_2019/in_proj.pt"
BEST = GOLDEN / "fairseq_2021/checkpoint_best.pt"
HEAD = "sentence_classification_head"
EXPECTED = json.loads((GOLDEN / "roberta_expected.json").read_text())
IDS = torch.tensor(EXPECTED["ids"])
REAL = IDS != 1
LOGITS = torch.tensor(
    [logits for row in EXPECTED["logits"] for logits in row if logits], dtype=torch.float64
)
"""Of the original model at the tokens that are no padding."""


def off(model: nn.Module, dtype: torch.dtype = torch.float64) -> float:
    """How far a model's logits are from the original ones, at most."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        logits = model(IDS, attention_mask=REAL.long()).logits[REAL]
    return float((logits.double() - LOGITS).abs().max())


def save(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def golden() -> dict[str, Any]:
    """The content of the 2021 file, to be changed."""
    return torch.load(BEST, weights_only=True)


def random_roberta(sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Tensors of a fairseq RoBERTa of any sizes (L, H, F, V, P), by today's names."""
    generator = torch.Generator().manual_seed(seed)
    layers, h, f, v, p = (sizes[name] for name in "LHFVP")
    body = "encoder.sentence_encoder"
    shapes = {f"{body}.embed_tokens.weight": (v, h), f"{body}.embed_positions.weight": (p + 2, h)}
    norms = [f"{body}.layernorm_embedding", "encoder.lm_head.layer_norm"]
    maps = {"encoder.lm_head.dense": (h, h)}
    for n in range(layers):
        at = f"{body}.layers.{n}"
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        maps |= {f"{at}.self_attn.{part}": (h, h) for part in parts}
        maps |= {f"{at}.fc1": (f, h), f"{at}.fc2": (h, f)}
        norms += [f"{at}.self_attn_layer_norm", f"{at}.final_layer_norm"]
    for name in norms:
        shapes |= {f"{name}.weight": (h,), f"{name}.bias": (h,)}
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"encoder.lm_head.weight": (v, h), "encoder.lm_head.bias": (v,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain_logits(state: dict[str, Tensor], ids_T: Tensor, heads: int) -> Tensor:
    """Logits [T, V] of such tensors for one row, in float64, written down from fairseq's model."""
    state = {name: tensor.double() for name, tensor in state.items()}
    body = "encoder.sentence_encoder"

    def mapped(x: Tensor, name: str) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    words = state[f"{body}.embed_tokens.weight"]
    x = words[ids_T] + state[f"{body}.embed_positions.weight"][2 : 2 + len(ids_T)]
    x = normed(x, f"{body}.layernorm_embedding")
    layers = sum(name.endswith(".fc1.bias") for name in state)
    for n in range(layers):
        at = f"{body}.layers.{n}"
        q, k, v = (
            mapped(x, f"{at}.self_attn.{letter}_proj").unflatten(1, (heads, -1)).transpose(0, 1)
            for letter in "qkv"
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        x = normed(x + mapped(mixed, f"{at}.self_attn.out_proj"), f"{at}.self_attn_layer_norm")
        inner = gelu(mapped(x, f"{at}.fc1"))
        x = normed(x + mapped(inner, f"{at}.fc2"), f"{at}.final_layer_norm")
    x = normed(gelu(mapped(x, "encoder.lm_head.dense")), "encoder.lm_head.layer_norm")
    return linear(x, state["encoder.lm_head.weight"], state["encoder.lm_head.bias"])


def arguments(**changes: Any) -> argparse.Namespace:
    """The settings that a file has beside its tensors."""
    own = {"arch": "roberta_base", "activation_fn": "gelu", "encoder_attention_heads": 3}
    return argparse.Namespace(**own | changes)
