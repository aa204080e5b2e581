"""The models of ``tests/golden/wid.json``, which the original code's numbers are of, as ours.

Golden names: ``emb``, ``L<layer>.{q,k,v,o,f1,f2}``, ``mlm1``, ``mlm2`` with ``W``, ``b``, ``CL``,
``CR``, and norms with ``g``, ``b``.
"""

import math

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from dskd.models.families import tie_head_bias
from dskd.narrowing.insert import Surgery, insert
from tests import goldens

GOLDEN = goldens.golden("wid")

_OUTSIDE = {
    "emb.word": "bert.embeddings.word_embeddings.weight",
    "emb.pos": "bert.embeddings.position_embeddings.weight",
    "emb.seg": "bert.embeddings.token_type_embeddings.weight",
    "emb.CR": "bert.embeddings.LayerNorm.0.right",
    "emb.ln": "bert.embeddings.LayerNorm.1",
    "mlm1": "cls.predictions.transform.dense",
    "mlm.ln": "cls.predictions.transform.LayerNorm",
    "mlm2": "cls.predictions.decoder",
}
_IN_LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "f1": "intermediate.dense", "f2": "output.dense",
    "ln1": "attention.output.LayerNorm", "ln2": "output.LayerNorm",
}  # fmt: skip
_FIELDS = {
    "V": "vocab_size", "H": "hidden_size", "FF": "intermediate_size", "L": "num_hidden_layers",
    "heads": "num_attention_heads", "P": "max_position_embeddings",
}  # fmt: skip
_LAST = {"W": "weight", "g": "weight", "b": "bias", "CL": "left", "CR": "right"}


def parameter_name(golden: str) -> str:
    """Our name of a golden tensor, once compactors are in."""
    if golden in _OUTSIDE:
        return _OUTSIDE[golden]
    path, _, last = golden.rpartition(".")
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.{_LAST[last]}"
    layer, _, own = path.partition(".")
    return f"bert.encoder.layer.{layer[1:]}.{_IN_LAYER[own]}.{_LAST[last]}"


def group_name(golden: str) -> str:
    """``A0`` -> ``A.0``."""
    return golden if golden in "RT" else f"{golden[0]}.{golden[1:]}"


def uniform(index: int, shape: list[int]) -> Tensor:
    """The golden hash of the flat positions, in [0, 1), float64."""
    x = torch.arange(math.prod(shape), dtype=torch.int64) + 0x9E3779B9 * (index + 1)
    x = x % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x = x ^ (x >> 16)
    return (x.double() / 2**32).reshape(shape)


def real(index: int, shape: list[int], scale: float, shift: float = 0.0) -> Tensor:
    """Hashed numbers within ``scale`` of ``shift``."""
    return shift + scale * (2 * uniform(index, shape) - 1)


def integer(index: int, shape: list[int], low: int, high: int) -> Tensor:
    """Hashed whole numbers from ``low`` to below ``high``."""
    return (uniform(index, shape) * (high - low)).long() + low


def student(config: dict[str, int], *, identity: bool, statistics: str) -> Surgery:
    """The golden model with its compactors, float64, without dropout, in train mode.

    Args:
        config: ``H``, ``FF``, ``V``, ``P`` and so on.
        identity: compactors are identity, as at the start of the trajectory; else hashed.
        statistics: ``uer`` or ``hf`` norms.
    """
    sizes = {field: config[name] for name, field in _FIELDS.items()}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hf = BertConfig(**sizes, **still, type_vocab_size=3, tie_word_embeddings=False)
    model = BertForMaskedLM(hf).double().train()
    tie_head_bias(model)
    surgery = insert(model, {"uer": "unbiased", "hf": "biased"}[statistics])
    filled = set()
    for golden, _, index, scale, shift in GOLDEN["model"]["params"]:
        parameter = model.get_parameter(parameter_name(golden))
        filled.add(id(parameter))
        with torch.no_grad():
            if shift != "I + hash":
                by_inputs = math.sqrt(3 / parameter.shape[-1])
                wide = by_inputs if golden.endswith(".W") else scale
                parameter.copy_(real(index, parameter.shape, wide, shift))
            elif not identity:
                parameter.copy_(real(index, parameter.shape, scale))
    assert filled == {id(p) for p in model.parameters()}
    return surgery


def assert_matches(found: Tensor, golden: dict, tolerance: float) -> None:
    """Shape, sum, norm, first and last entries of a golden record."""
    assert list(found.shape) == golden["shape"]
    flat = found.detach().double().flatten()
    numbers = [flat.sum(), flat.norm(), *flat[:4], *flat[-2:]]
    expected = [golden["sum"], golden["l2"], *golden["first"], *golden["last"]]
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(numbers), wanted, rtol=tolerance, atol=tolerance)
