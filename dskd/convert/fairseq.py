"""RoBERTa checkpoints of fairseq, of 2019 (Knowledge Inheritance, ELLE) and since, as HuggingFace
models.

Shape letters: V vocabulary, H hidden size, F feed-forward size, L layers, P positions, I and C
width and classes of a classification head.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig

from dskd.convert.converted import Converted, config_with, heads_of, model_with
from dskd.convert.loading import FAIRSEQ, opened, tensors_of
from dskd.convert.names import NameTable, Row, layers_of, renamed, shape_of
from dskd.data.fairseq_vocabulary import (
    check_tokenizer,
    is_robertas_own,
    read_dictionary,
    read_merges,
    tokenizer_of,
    tokens_in_order,
)
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.tokenizers import vocabulary_size
from dskd.errors import ConfigError
from dskd.models.heads import ObjectiveName

_BODY = "encoder.sentence_encoder"
_LAYER, _OURS = f"{_BODY}.layers.{{n}}", "roberta.encoder.layer.{n}"
_COMMON = (
    Row(f"{_BODY}.embed_tokens.weight", "roberta.embeddings.word_embeddings.weight"),
    Row(f"{_BODY}.embed_positions.weight", "roberta.embeddings.position_embeddings.weight"),
    Row(f"{_BODY}.layernorm_embedding.{{p}}", "roberta.embeddings.LayerNorm.{p}"),
    Row(f"{_LAYER}.self_attn.q_proj.{{p}}", f"{_OURS}.attention.self.query.{{p}}"),
    Row(f"{_LAYER}.self_attn.k_proj.{{p}}", f"{_OURS}.attention.self.key.{{p}}"),
    Row(f"{_LAYER}.self_attn.v_proj.{{p}}", f"{_OURS}.attention.self.value.{{p}}"),
    Row(f"{_LAYER}.self_attn.out_proj.{{p}}", f"{_OURS}.attention.output.dense.{{p}}"),
    Row(f"{_LAYER}.self_attn_layer_norm.{{p}}", f"{_OURS}.attention.output.LayerNorm.{{p}}"),
    Row(f"{_LAYER}.fc1.{{p}}", f"{_OURS}.intermediate.dense.{{p}}"),
    Row(f"{_LAYER}.fc2.{{p}}", f"{_OURS}.output.dense.{{p}}"),
    Row(f"{_LAYER}.final_layer_norm.{{p}}", f"{_OURS}.output.LayerNorm.{{p}}"),
)
MASKED = NameTable(
    (
        *_COMMON,
        Row("encoder.lm_head.dense.{p}", "lm_head.dense.{p}"),
        Row("encoder.lm_head.layer_norm.{p}", "lm_head.layer_norm.{p}"),
        Row("encoder.lm_head.weight", "lm_head.decoder.weight"),
        Row("encoder.lm_head.bias", "lm_head.bias"),
    )
)
CLASSES = NameTable(
    (
        *_COMMON,
        Row("classification_heads.dense.{p}", "classifier.dense.{p}"),
        Row("classification_heads.out_proj.{p}", "classifier.out_proj.{p}"),
    )
)
"""Of the head that ``--head`` names, without its name."""
_TYPES = "roberta.embeddings.token_type_embeddings.weight"
"""RoBERTa has no types of tokens in fairseq; HuggingFace adds this row to every token."""

_PART = re.compile(r".*([-_](model_)?part-?\d+|-shard\d+)\.pt")
_DROPPED = re.compile(r"encoder\.sentence_encoder\.version|.*\.embed_positions\._float_tensor")
_HEAD = re.compile(r"classification_heads\.(?P<name>.+)\.(dense|out_proj)\.(weight|bias)")
_ACTIVATIONS = {
    "gelu": "gelu",  # with the error function
    "gelu_accurate": "gelu_new",  # with tanh
    "gelu_fast": "gelu_new",  # the same, by its older name
    "relu": "relu",
}


def convert(
    path: Path,
    *,
    dictionary: Path | None = None,
    bpe: Path | None = None,
    tokenizer: str | None = None,
    head: str | None = None,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Converted:
    """A fairseq RoBERTa as ``RobertaForMaskedLM``, or with one of its heads for classes.

    Args:
        path: a ``.pt`` of fairseq.
        dictionary: its ``dict.txt``.
        bpe: GPT-2's ``vocab.bpe``, from which a tokenizer is made.
        tokenizer: folder or hub id of a tokenizer in its place, which must equal the dictionary.
        head: name of the head for classes; None: the masked LM.
        heads: attention heads, if the file does not say.
        dtype: in which the weights are stored.

    Raises:
        ConfigError: the file is damaged, no whole RoBERTa, of another layout; the vocabulary is not
            the model's; a number is missing. Names tensor, line or option.
    """
    if (bpe or tokenizer) and dictionary is None:
        raise ConfigError("--dict: needed with --bpe or --tokenizer: it has the order of the ids")
    if bpe and tokenizer:
        raise ConfigError("--bpe and --tokenizer: one of them makes the tokenizer, not both")
    if _PART.fullmatch(path.name):
        raise ConfigError(f"{path} is a part of a checkpoint that is split over several files")
    content = opened(path, FAIRSEQ)
    if "fsdp_metadata" in content:
        raise ConfigError(f"{path} is a shard of a model of several (it has fsdp_metadata)")
    if "model" not in content:
        names = ", ".join(map(str, list(content)[:6]))
        raise ConfigError(f"{path} is no checkpoint of fairseq: no model among {names}")
    where = str(path)
    state = _normalised(tensors_of(content["model"], f"{path}: model"), where)
    _refuse_others(state, where)
    settings = _settings(content, where)
    state, notes = _for_head(state, head, settings, where)
    config = _config(state, settings, heads, head, where, notes)
    table = MASKED if head is None else CLASSES
    tensors = renamed(state, table, where)
    tensors[_TYPES] = torch.zeros(1, config.hidden_size)
    found, note = _tokenizer(dictionary, bpe, tokenizer, config.vocab_size, where)
    notes.append(note)
    objective: ObjectiveName = "masked" if head is None else "classification"
    model = model_with(config, objective, tensors, table, where, dtype)
    source = {
        "architecture": str(settings.get("arch", settings.get("_name", "not said"))),
        "updates": _updates(content),
        **({} if head is None else {"head": head}),
    }
    return Converted(model, found, objective, source, notes)


def _normalised(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state by today's names of fairseq, which renames older ones alike as it loads them."""
    found: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        name = re.sub(r"^decoder\.", "encoder.", theirs)  # a decoder's class until 2020
        name = name.replace(".emb_layer_norm.", ".layernorm_embedding.")
        if _DROPPED.fullmatch(name):
            continue
        parts = {name: tensor}
        if match := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name):  # until mid 2019
            if tensor.shape[0] % 3:
                raise ConfigError(f"{where}: {name} is {list(tensor.shape)}, expected [3 H, ...]")
            chunks = zip("qkv", tensor.chunk(3), strict=True)
            parts = {f"{match[1]}.{letter}_proj.{match[2]}": part for letter, part in chunks}
        for new, part in parts.items():
            if new in found:
                raise ConfigError(f"{where}: {new} is there twice, by two of its names")
            found[new] = part
    return found


def _refuse_others(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse what looks like RoBERTa and is not."""
    for name in state:
        if name.startswith(("encoder.regression_head", "encoder._ema")):
            raise ConfigError(f"{where}: {name} is of data2vec, which is another model")
    if not any(name.startswith(f"{_BODY}.") for name in state):
        names = ", ".join(list(state)[:6])
        raise ConfigError(f"{where}: no RoBERTa: nothing of {_BODY} among {names} ...")
    before = f"{_BODY}.layer_norm.weight"
    embedded = f"{_BODY}.layernorm_embedding.weight"
    # By the tensors: the flag encoder_normalize_before means something else in fairseq 0.9.
    if before in state or embedded not in state:
        which = f"it has {before}" if before in state else f"it has no {embedded}"
        raise ConfigError(
            f"{where}: {which}: its layers normalise before, not behind (roberta_prenorm, XLM-R "
            "XL), which is another model"
        )


def _settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The model's settings as its trainer wrote them."""
    args, cfg = content.get("args"), content.get("cfg")
    found = args
    if args is None:
        found = cfg.get("model", {}) if isinstance(cfg, dict) else {}
    if isinstance(found, argparse.Namespace):
        return vars(found)
    if isinstance(found, dict):
        return found
    raise ConfigError(f"{where}: its settings are a {type(found).__name__}")


def _for_head(
    state: Mapping[str, Tensor], head: str | None, settings: Mapping[str, Any], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the body and of one head, and what the user is told of the others."""
    names = sorted({match["name"] for name in state if (match := _HEAD.fullmatch(name))})
    mine = {n: t for n, t in state.items() if not _HEAD.fullmatch(n)}
    if head is None:
        left = [f"heads for classes are left out: {', '.join(names)} (--head NAME)"]
        return mine, left if names else []
    if head not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"--head: {where} has no head {head!r}; {there}")
    function = settings.get("pooler_activation_fn", "tanh")
    if function != "tanh":
        raise ConfigError(f"--head: its pooler_activation_fn is {function!r}, not tanh")
    # HuggingFace's model for classes has no LM head.
    body = {n: t for n, t in mine.items() if not n.startswith("encoder.lm_head.")}
    chosen = f"classification_heads.{head}."
    own = {f"classification_heads.{n[len(chosen) :]}": state[n] for n in state if n in _own(head)}
    others = [name for name in names if name != head]
    left = ["the masked LM head", *(f"the head {name}" for name in others)]
    return body | own, [f"left out: {', '.join(left)}"]


def _own(head: str) -> set[str]:
    parts = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    return {f"classification_heads.{head}.{part}" for part in parts}


def _config(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    heads: int | None,
    head: str | None,
    where: str,
    notes: list[str],
) -> RobertaConfig:
    """The config as the tensors have it, and what no tensor has from the settings."""
    vocabulary, hidden = shape_of(state, f"{_BODY}.embed_tokens.weight", 2, where)
    positions, _ = shape_of(state, f"{_BODY}.embed_positions.weight", 2, where)
    layers = layers_of(state, f"{_BODY}.layers.{{n}}", where)
    forward, _ = shape_of(state, f"{_BODY}.layers.0.fc1.weight", 2, where)
    taken = {
        "encoder_layers": layers,  # fewer after encoder_layers_to_keep, too
        "encoder_embed_dim": hidden,
        "encoder_ffn_embed_dim": forward,
    }
    for name, size in taken.items():
        if settings.get(name, size) != size:
            notes.append(f"its settings say {name} {settings[name]}, its tensors {size}: taken")
    function = settings.get("activation_fn", "gelu")
    if function not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"{where}: its activation_fn is {function!r}, not one of {known}")
    config = config_with(
        RobertaConfig,
        where,
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads_of(
            heads, settings.get("encoder_attention_heads"), hidden, where, "encoder_attention_heads"
        ),
        intermediate_size=forward,
        hidden_act=_ACTIVATIONS[function],
        hidden_dropout_prob=settings.get("dropout", 0.1),
        attention_probs_dropout_prob=settings.get("attention_dropout", 0.1),
        max_position_embeddings=positions,  # the first two rows are no positions in both
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    if head is None:
        name = "encoder.lm_head.weight"
        shape_of(state, name, 2, where)
        tied = torch.equal(state[name], state[f"{_BODY}.embed_tokens.weight"])
        config.tie_word_embeddings = tied
    else:
        inner, _ = shape_of(state, "classification_heads.dense.weight", 2, where)
        if inner != hidden:
            raise ConfigError(
                f"--head: {head} is {inner} wide, the model {hidden}: HuggingFace's RoBERTa has no "
                "such head"
            )
        classes, _ = shape_of(state, "classification_heads.out_proj.weight", 2, where)
        config.num_labels = classes
        config.classifier_dropout = settings.get("pooler_dropout", 0.0)
    return config


def _tokenizer(
    dictionary: Path | None, bpe: Path | None, tokenizer: str | None, rows: int, where: str
) -> tuple[Any, str]:
    """The tokenizer, or None, and what the user is told of it.

    Raises:
        ConfigError: the vocabulary is not that of a model with so many rows, or cannot be made.
    """
    if dictionary is None:
        return None, "no --dict: the vocabulary is not checked, no tokenizer is written"
    symbols = read_dictionary(dictionary)
    found, extra, tokens = None, 0, None
    if tokenizer is not None:
        found = stored_tokenizer(tokenizer, "--tokenizer")
        tokens = check_tokenizer(found, symbols, f"--tokenizer {tokenizer}", str(dictionary))
        extra = vocabulary_size(found) - len(tokens)
    size = 4 + len(symbols) + 1 + extra
    if rows != size:
        behind = f" and {extra} of --tokenizer behind them" if extra else ""
        raise ConfigError(
            f"{where} has embeddings of {rows} tokens; {dictionary} makes {size} (4 special, "
            f"{len(symbols)} lines, <mask>{behind}): not its dictionary"
        )
    if bpe is not None:
        merges = read_merges(bpe)
        found = tokenizer_of(symbols, merges, str(dictionary))
        tokens = tokens_in_order(symbols, merges, str(dictionary))
    if tokens is None:
        return None, "neither --bpe nor --tokenizer: no tokenizer is written"
    own = ", the order of the public RoBERTa" if is_robertas_own(tokens) else ""
    return found, f"vocabulary: {size} tokens, as many as embeddings{own}"


def _updates(content: Mapping[str, Any]) -> Any:
    """Optimizer steps the file was saved after."""
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    return updates if isinstance(updates, int) else "not said"
