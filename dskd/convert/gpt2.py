"""GPT-2 task folders of pytorch_transformers (Lifelong Language Knowledge Distillation, LAMOL) as
HuggingFace models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import GPT2Config, GPT2Tokenizer

from dskd.convert.converted import Converted, config_with, heads_of, model_with
from dskd.convert.loading import opened, tensors_of
from dskd.convert.names import NameTable, Row, layers_of, renamed, shape_of
from dskd.data.fairseq_vocabulary import read_merges
from dskd.data.foreign import raised_as
from dskd.data.tokenizers import vocabulary_size
from dskd.errors import ConfigError

WEIGHTS = "model-finish"

_SAME = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    *(f"transformer.h.{{n}}.{part}.{{p}}" for part in ("ln_1", "ln_2")),
    *(f"transformer.h.{{n}}.attn.{part}.{{p}}" for part in ("c_attn", "c_proj")),
    *(f"transformer.h.{{n}}.mlp.{part}.{{p}}" for part in ("c_fc", "c_proj")),
    "transformer.ln_f.{p}",
    "lm_head.weight",
)
TABLE = NameTable(Row(name, name) for name in _SAME)
"""The names are today's; the table says which of them a whole model has."""

_BUFFERS = (".attn.bias", ".attn.masked_bias")
_PREFIX = "module."
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_FILES = ("vocab.json", "merges.txt")


def convert(folder: Path) -> Converted:
    """The finished model of a task's folder as ``GPT2LMHeadModel``.

    Raises:
        ConfigError: a file is missing or damaged, is no whole GPT-2, or contradicts another. Names
            tensor, file or field.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of a task (with config.json and {WEIGHTS})")
    path = folder / WEIGHTS
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("model-*"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise ConfigError(f"{folder}: no {WEIGHTS}, which is written as a task ends{there}")
    where = str(path)
    state = _normalised(tensors_of(opened(path), where))
    settings = _object(folder / "config.json")
    config = _config(state, settings, where)
    tokenizer = _tokenizer(folder)
    rows = config.vocab_size
    if tokenizer is None:
        notes = [f"no {' and '.join(_FILES)} there: no tokenizer is written"]
    else:
        beyond = rows - vocabulary_size(tokenizer)
        if beyond < 0:
            raise ConfigError(
                f"{where} has embeddings of {rows} tokens, its tokenizer {rows - beyond}"
            )
        extra = f"; {beyond} further embeddings are of no token" if beyond else ""
        notes = [f"vocabulary: {rows - beyond} tokens{extra}"]
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
    if settings.get("vocab_size", rows) != rows:
        notes.append(f"config.json says vocab_size {settings['vocab_size']}, the tensor {rows}")
    model = model_with(config, "causal", renamed(state, TABLE, where), TABLE, where)
    source = {"folder": folder.resolve().name, "updates": "not said"}
    return Converted(model, tokenizer, "causal", source, notes)


def _normalised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the masks of attention, which are no weights, and a wrapper's prefix."""
    wrapped = all(name.startswith(_PREFIX) for name in state)
    names = {name: name.removeprefix(_PREFIX) if wrapped else name for name in state}
    return {new: state[old] for old, new in names.items() if not new.endswith(_BUFFERS)}


def _config(state: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> GPT2Config:
    """The config as the tensors have it; its own file has the heads and what no tensor tells."""
    words = "transformer.wte.weight"
    rows, hidden = shape_of(state, words, 2, where)
    positions, _ = shape_of(state, "transformer.wpe.weight", 2, where)
    layers = layers_of(state, "transformer.h.{n}", where)
    _, forward = shape_of(state, "transformer.h.0.mlp.c_fc.weight", 2, where)
    for name, size in {"n_embd": hidden, "n_layer": layers, "n_positions": positions}.items():
        if settings.get(name, size) != size:
            raise ConfigError(f"config.json: {name} is {settings[name]}, {where} has {size}")
    if settings.get("pruned_heads"):
        raise ConfigError("config.json: pruned_heads: a model with heads removed is not converted")
    if settings.get("n_head") is None:
        raise ConfigError("config.json: no n_head; no tensor tells the number of attention heads")
    shape_of(state, "lm_head.weight", 2, where)
    return config_with(
        GPT2Config,
        where,
        vocab_size=rows,  # tokens were added after config.json was written
        n_embd=hidden,
        n_layer=layers,
        n_head=heads_of(None, settings["n_head"], hidden, where, "n_head in config.json"),
        n_positions=positions,
        n_inner=None if forward == 4 * hidden else forward,
        activation_function="gelu_new",
        layer_norm_epsilon=settings.get("layer_norm_epsilon", 1e-5),
        resid_pdrop=settings.get("resid_pdrop", 0.1),
        embd_pdrop=settings.get("embd_pdrop", 0.1),
        attn_pdrop=settings.get("attn_pdrop", 0.1),
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=torch.equal(state[words], state["lm_head.weight"]),
    )


def _tokenizer(folder: Path) -> GPT2Tokenizer | None:
    """The tokenizer of the folder's files; None: it has none.

    Raises:
        ConfigError: one of two files is missing, or an added token's id is not the next one.
    """
    there = [name for name in _FILES if (folder / name).is_file()]
    if not there:
        return None
    if len(there) == 1:
        raise ConfigError(f"{folder} has {there[0]} of a tokenizer's {' and '.join(_FILES)} only")
    vocab, merges = _object(folder / _FILES[0]), read_merges(folder / _FILES[1])
    special, added = folder / "special_tokens_map.json", folder / "added_tokens.json"
    roles = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in (_object(special) if special.is_file() else {}).items()
        if name != "additional_special_tokens"  # they are among the added ones
    }
    for name, token in roles.items():
        if name not in _ROLES or not isinstance(token, str):
            raise ConfigError(f"{special}: {name}: {token!r} is not one of {', '.join(_ROLES)}")
    new = _object(added) if added.is_file() else {}
    tokens = sorted(new, key=new.__getitem__)
    for index, token in enumerate(tokens, len(vocab)):
        if new[token] != index or token in vocab:
            raise ConfigError(f"{added}: {token!r} has the id {new[token]}, expected {index}")
    for name, token in roles.items():
        if token not in vocab and token not in new:
            raise ConfigError(f"{special}: {name}: {token!r} is not in the vocabulary")
    with raised_as(ConfigError, f"{folder}: its tokenizer cannot be made"):
        # The added ones first: a role (`pad_token`) may be one of them, and must keep its id.
        tokenizer = GPT2Tokenizer(vocab={**vocab, **new}, merges=merges, **roles)
        marked = [AddedToken(token, normalized=False, special=True) for token in tokens]
        tokenizer.add_tokens(marked, special_tokens=True)
    ids = tokenizer.get_vocab()
    for token, index in new.items():
        if ids[token] != index:
            raise ConfigError(f"{added}: {token!r} gets the id {ids[token]}, not {index}")
    return tokenizer


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with raised_as(ConfigError, f"{path} is damaged"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no object")
    return found
