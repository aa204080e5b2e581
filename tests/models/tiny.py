"""Tiny tokenizers, models and batches of every family."""

import deepspeed
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from dskd.batch import IGNORE, Batch
from dskd.engine.zero import full_shape
from dskd.models.build import build
from dskd.models.families import MODEL_TYPES, lm_head, positions_of
from dskd.settings.model import Model
from tests.batches import batch_of

BLOCK = 16
SIX = ["bert", "roberta", "gpt2", "llama", "qwen2", "qwen3"]
ALL = list(MODEL_TYPES)
AUTO = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}
_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

_FIELDS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
    },
    "electra": {"embedding_size": 24},
    "modernbert": {"local_attention": 8},
}
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def tokenizer(size: int = 43, swap: tuple[int, int] | None = None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer without merges; ``swap`` exchanges the tokens of two ids."""
    tokens = _SPECIALS + [f"t{i}" for i in range(size - len(_SPECIALS))]
    if swap is not None:
        a, b = swap
        tokens[a], tokens[b] = tokens[b], tokens[a]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def settings(model_type: str, **fields) -> Model:
    """Settings of a random two-layer model."""
    if model_type in ("gpt2", "distilbert"):
        own = _FIELDS[model_type]
    else:
        own = _COMMON | _FIELDS.get(model_type, {})
    if model_type in ("llama", "mistral", "qwen2", "qwen3"):
        own = own | {"num_key_value_heads": 2}
    return Model(config={"model_type": model_type, **own, **fields})


def make(what: Model | str, *, tok=None, ds=None, seed=7, dtype=torch.float32, block=BLOCK, **kw):
    """Build from settings, or a tiny random model of a ``model_type``."""
    chosen = settings(what, **kw) if isinstance(what, str) else what
    model_type = chosen.config.get("model_type") or kw["model_type"]
    return build(
        chosen,
        tok or tokenizer(),
        objective=lm_head(model_type).objective,
        block_size=block,
        seed=seed,
        ds=ds,
        dtype=dtype,
        where="model",
    )


def batch(rows: int = 3, vocab: int = 43, supervised: bool = True, seed: int = 0) -> Batch:
    """Rows of different lengths; every third real position is supervised (or none is)."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(5, vocab, (rows, BLOCK), generator=generator)
    lengths_B = torch.tensor([BLOCK - 3 * row for row in range(rows)])
    mask_BT = (torch.arange(BLOCK) < lengths_B[:, None]).long()
    labels_BT = torch.randint(5, vocab, (rows, BLOCK), generator=generator)
    chosen_BT = (mask_BT == 1) & (torch.arange(BLOCK) % 3 == 1) & supervised
    ids_BT, labels_BT = ids_BT.where(mask_BT == 1, 1), labels_BT.where(chosen_BT, IGNORE)
    return batch_of(labels_BT, ids_BT=ids_BT, mask_BT=mask_BT)


def zero3(world: int, **more) -> dict:
    """A DeepSpeed ZeRO-3 config without ``auto``."""
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }


def loss_of(model, data: Batch) -> torch.Tensor:
    """Summed cross entropy of the supervised positions."""
    rows = positions_of(model, data)
    return nn.functional.cross_entropy(rows.logits_NV, rows.labels_N, reduction="sum")


class LossOf(nn.Module):
    """An objective for a DeepSpeed engine: :func:`loss_of` of a student."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, data):
        return loss_of(self.student, data)


def auto_of(model_type: str) -> type:
    """The class of transformers that loads a model type."""
    return AUTO[lm_head(model_type).objective]


def count_gathered() -> list[int]:
    """A list that grows by the number of elements that ZeRO-3 makes whole at one time; for a
    process of its own."""
    seen = []

    class Gathered(deepspeed.zero.GatheredParameters):
        def __enter__(self):
            super().__enter__()
            assert all(p.numel() == full_shape(p).numel() for p in self.params)
            seen.append(sum(p.numel() for p in self.params))

    deepspeed.zero.GatheredParameters = Gathered
    return seen


def without_dropout(model):
    """The model in train mode, dropping nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
