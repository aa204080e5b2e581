"""Tiny tokenizers, models and batches of every family."""

import deepspeed
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

from dskd.batch import IGNORE, Batch
from dskd.engine.zero import full_shape
from dskd.models.build import build
from dskd.models.families import lm_head, positions_of
from dskd.settings.model import Model
from tests.batches import batch_of

BLOCK = 16
SIX = ["bert", "roberta", "gpt2", "llama", "qwen2", "qwen3"]
ALL = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]
ALL += ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
AUTO = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}
_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

_POSITIONS = {"max_position_embeddings": 32}
_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16}
_EXPERTS["num_experts_per_tok"] = 2
_FIELDS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, **_POSITIONS},
    "electra": {"embedding_size": 24},
    "modernbert": {"local_attention": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": _EXPERTS,
}
_COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **_POSITIONS}
_COMMON["num_attention_heads"] = 4


def tokenizer(size: int = 43, swap: tuple[int, int] | None = None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer without merges; ``swap`` exchanges the tokens of two ids."""
    tokens = _SPECIALS + [f"t{i}" for i in range(size - len(_SPECIALS))]
    if swap is not None:
        a, b = swap
        tokens[a], tokens[b] = tokens[b], tokens[a]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    own = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    ends = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own, **ends)


def settings(model_type: str, **fields) -> Model:
    """Settings of a random two-layer model."""
    if model_type in ("gpt2", "distilbert"):
        own = _FIELDS[model_type]
    else:
        own = _COMMON | _FIELDS.get(model_type, {})
    if model_type in ("llama", "mistral", "qwen2", "qwen3"):
        own = own | {"num_key_value_heads": 2}
    return Model(config={"model_type": model_type, **own, **fields})


def make(
    what: Model | str, *, tok=None, ds=None, seed=7, dtype=torch.float32, block=BLOCK, device=None,
    classes=None, new_head=False, **kw,
):  # fmt: skip
    """Build from settings, or a tiny random model of a ``model_type``; one for ``classes``, if they
    are given."""
    chosen = settings(what, **kw) if isinstance(what, str) else what
    model_type = chosen.config.get("model_type") or kw["model_type"]
    how = {"block_size": block, "seed": seed, "ds": ds, "dtype": dtype, "device": device}
    how |= {"where": "model", "classes": classes, "new_head": new_head}
    objective = "classification" if classes is not None else lm_head(model_type).objective
    return build(chosen, tok or tokenizer(), objective=objective, **how)


def stored(folder, model_type: str, *, tok=None, drift=False, shard="5GB", **fields) -> Model:
    """A random model in a folder, written by transformers itself, ``drift``: every parameter
    random; settings that name it."""
    tok = tok or tokenizer()
    torch.manual_seed(5)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": len(tok)}
    config = AutoConfig.for_model(**(settings(model_type).config | special | fields))
    model = auto_of(model_type).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters() if drift else ():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    tok.save_pretrained(folder)
    return Model(path=str(folder))


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


def geometry(world: int, micro: int = 1, rows: int | None = None) -> dict:
    """DeepSpeed's sizes of steps of ``micro`` micro-batches of ``rows``, by default one a rank."""
    rows = rows or world
    steps = {"gradient_accumulation_steps": micro, "steps_per_print": 10**9}
    sizes = {"train_batch_size": micro * rows, "train_micro_batch_size_per_gpu": rows // world}
    return steps | sizes


def zero3(world: int, **more) -> dict:
    """A DeepSpeed ZeRO-3 config without ``auto``."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    return {**geometry(world), **zero, **more}


def adamw(zero: dict, offload: bool, bf16: bool, **params) -> dict:
    """A DeepSpeed config of torch's AdamW at a ZeRO stage, on the CPU or offloaded to it."""
    optimizer = {"betas": [0.9, 0.99], "weight_decay": 0.0, "torch_adam": True, **params}
    place = {"offload_optimizer": {"device": "cpu" if offload else "none"}}
    return {
        "zero_optimization": zero | place,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": bf16},
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
