"""BERT checkpoints of UER-py (and of Weight-Inherited Distillation's code, a fork of it) as
HuggingFace models.

Shape letters: V vocabulary, H hidden size, F feed-forward size, P positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertConfig, BertTokenizer

from dskd.convert.converted import Converted, config_with, heads_of, model_with
from dskd.convert.loading import opened, tensors_of
from dskd.convert.names import NameTable, Row, layers_of, renamed, shape_of
from dskd.data.foreign import raised_as
from dskd.errors import ConfigError

TrainedIn = Literal["uer", "elsewhere"]

_LAYER, _OURS = "encoder.transformer.{n}", "bert.encoder.layer.{n}"
_TRANSFORM = "cls.predictions.transform"


def _types(rows: Tensor) -> Tensor:
    """Row 0 of UER's three is that of padding, where no token is."""
    return rows[1:]


def _unbiased(gamma: Tensor) -> Tensor:
    """UER divides by the standard deviation with divisor H - 1, HuggingFace by that with H."""
    width = len(gamma)
    return gamma * math.sqrt((width - 1) / width)


def _table(
    word: str, position: str, segment: str, lm: str, norm: str, trained_in: str
) -> NameTable:
    """The names of one generation; gammas are changed for weights that were trained in UER."""
    gamma = _unbiased if trained_in == "uer" else None
    norms = {
        "embedding.layer_norm": "bert.embeddings.LayerNorm",
        f"{_LAYER}.layer_norm_1": f"{_OURS}.attention.output.LayerNorm",
        f"{_LAYER}.layer_norm_2": f"{_OURS}.output.LayerNorm",
        norm: f"{_TRANSFORM}.LayerNorm",
    }
    maps = {
        f"{_LAYER}.self_attn.linear_layers.0": f"{_OURS}.attention.self.query",
        f"{_LAYER}.self_attn.linear_layers.1": f"{_OURS}.attention.self.key",
        f"{_LAYER}.self_attn.linear_layers.2": f"{_OURS}.attention.self.value",
        f"{_LAYER}.self_attn.final_linear": f"{_OURS}.attention.output.dense",
        f"{_LAYER}.feed_forward.linear_1": f"{_OURS}.intermediate.dense",
        f"{_LAYER}.feed_forward.linear_2": f"{_OURS}.output.dense",
        f"{lm}linear_1": f"{_TRANSFORM}.dense",
        f"{lm}linear_2": "cls.predictions.decoder",
    }
    rows = [
        Row(f"{word}.weight", "bert.embeddings.word_embeddings.weight"),
        Row(f"{position}.weight", "bert.embeddings.position_embeddings.weight"),
        Row(f"{segment}.weight", "bert.embeddings.token_type_embeddings.weight", _types),
        *(Row(f"{theirs}.{{p}}", f"{ours}.{{p}}") for theirs, ours in maps.items()),
    ]
    for theirs, ours in norms.items():
        rows += [Row(f"{theirs}.gamma", f"{ours}.weight", gamma)]
        rows += [Row(f"{theirs}.beta", f"{ours}.bias")]
    return NameTable(rows)


def table_of(generation: Literal["until 2023", "since 2023"], trained_in: TrainedIn) -> NameTable:
    """The table of one of the two ways in which UER names a BERT's tensors."""
    if generation == "until 2023":
        names = (f"embedding.{part}_embedding" for part in ("word", "position", "segment"))
        return _table(*names, "target.mlm_", "target.layer_norm", trained_in)
    names = (f"embedding.{part}.embedding" for part in ("word", "pos", "seg"))
    return _table(*names, "target.mlm.", "target.mlm.layer_norm", trained_in)


_NEXT_SENTENCE = ("target.sp.linear_", "target.sp_linear_", "target.nsp_linear_")
_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_OTHERS = {
    "compactor": "a WID student that is not merged yet: export it with the code that made it",
    "linear_gate": "a gated feed-forward part, which HuggingFace's BERT does not have",
    "encoder.layer_norm.": "layers that normalise before (layernorm_positioning: pre)",
    "relative_pos": "relative positions, which HuggingFace's BERT does not have",
    "encoder.linear.": "factorised embeddings or shared layers, which are another model",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "layernorm_positioning": ("post",),
    "layernorm": ("normal",),
    "encoder": ("transformer",),
    "mask": ("fully_visible",),
    "feed_forward": ("dense",),
    "embedding": ("word_pos_seg", ["word", "pos", "seg"]),
    "factorized_embedding_parameterization": (False,),
    "parameter_sharing": (False,),
    "relative_position_embedding": (False,),
    "remove_embedding_layernorm": (False,),
    "remove_transformer_bias": (False,),
    "remove_attention_scale": (False,),
}
"""What UER's config may say, where it says anything."""


def convert(
    path: Path,
    vocabulary: Path,
    *,
    config: Path | None = None,
    heads: int | None = None,
    trained_in: TrainedIn = "uer",
    cased: bool = False,
) -> Converted:
    """A BERT of UER-py as ``BertForMaskedLM``, with its WordPiece tokenizer.

    UER's LayerNorm divides by another standard deviation than HuggingFace's. ``trained_in`` says
    which one the weights belong to, as the file does not: ``elsewhere`` are those that were
    converted to UER and not trained there.

    Raises:
        ConfigError: the file is damaged, no whole BERT, of another layout; the vocabulary is not
            the model's; the number of heads is not said. Names tensor, line or option.
    """
    where = str(path)
    state = tensors_of(opened(path), where)
    for name in state:
        for mark, what in _OTHERS.items():
            if mark in name:
                raise ConfigError(f"{where}: {name} is of {what}")
    state = {n: t for n, t in state.items() if not n.startswith(_NEXT_SENTENCE)}
    new = "embedding.word.embedding.weight" in state
    table = table_of("since 2023" if new else "until 2023", trained_in)
    settings = {} if config is None else _settings(config)
    made = _config(state, table, settings, heads, where)
    vocab = _vocabulary(vocabulary, made.vocab_size, where)
    made.pad_token_id = vocab["[PAD]"]
    model = model_with(made, "masked", renamed(state, table, where), table, where)
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=not cased)
    source = {"trained_in": trained_in, "updates": "not said"}
    notes = [
        f"vocabulary: {len(vocab)} tokens, as many as embeddings",
        "LayerNorm: weights times sqrt((H-1)/H), as trained in UER"
        if trained_in == "uer"
        else "LayerNorm: weights as they are, never trained in UER",
    ]
    return Converted(model, tokenizer, "masked", source, notes)


def _config(
    state: Mapping[str, Tensor],
    table: NameTable,
    settings: Mapping[str, Any],
    heads: int | None,
    where: str,
) -> BertConfig:
    """The config as the tensors have it, which UER's own must agree with."""

    def shape(ours: str) -> list[int]:
        name = table.of_ours(ours)
        assert name is not None
        return shape_of(state, name, 2, where)

    words = "bert.embeddings.word_embeddings.weight"
    vocabulary, hidden = shape(words)
    positions, _ = shape("bert.embeddings.position_embeddings.weight")
    segments = shape("bert.embeddings.token_type_embeddings.weight")
    if segments[0] != 3:
        name = table.of_ours("bert.embeddings.token_type_embeddings.weight")
        raise ConfigError(f"{where}: {name} is {segments}, expected [3, {hidden}]")
    width = shape("bert.encoder.layer.0.attention.self.query.weight")[1]
    if width != hidden:
        raise ConfigError(
            f"{where}: embeddings are {hidden} wide, layers {width}: factorised embeddings are "
            "another model"
        )
    forward, _ = shape("bert.encoder.layer.0.intermediate.dense.weight")
    last = "cls.predictions.decoder.weight"
    shape(last)
    layers = layers_of(state, _LAYER, where)
    sizes = {
        "emb_size": hidden,
        "hidden_size": hidden,
        "feedforward_size": forward,
        "layers_num": layers,
        "max_seq_length": positions,
    }
    for name, size in sizes.items():
        if settings.get(name, size) != size:
            raise ConfigError(f"--config: {name} is {settings[name]}, {where} has {size}")
    tied = torch.equal(state[str(table.of_ours(words))], state[str(table.of_ours(last))])
    return config_with(
        BertConfig,
        where,
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads_of(
            heads, settings.get("heads_num"), hidden, where, "heads_num of --config"
        ),
        intermediate_size=forward,
        hidden_act="gelu",
        hidden_dropout_prob=settings.get("dropout", 0.1),
        attention_probs_dropout_prob=settings.get("dropout", 0.1),
        max_position_embeddings=positions,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        tie_word_embeddings=tied,
    )


def _settings(path: Path) -> dict[str, Any]:
    """UER's config, which describes a BERT as HuggingFace has it."""
    with raised_as(ConfigError, f"--config: cannot read {path}"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ConfigError(f"--config: {path} holds no object")
    for name, allowed in _FIXED.items():
        if name in found and found[name] not in allowed:
            raise ConfigError(
                f"--config: {name} is {found[name]!r}; HuggingFace's BERT has {allowed[0]!r}"
            )
    return found


def _vocabulary(path: Path, rows: int, where: str) -> dict[str, int]:
    """The tokens of a ``vocab.txt``, one a line, with their ids."""
    with raised_as(ConfigError, f"--vocab: cannot read {path}"):
        text = path.read_bytes().decode("utf-8")
    lines = text.removesuffix("\n").replace("\r\n", "\n").split("\n")
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.strip()
        if not token or token in vocab:
            what = f"{token!r} is line {vocab[token] + 1} already" if token else "it is empty"
            raise ConfigError(f"--vocab: {path}, line {number + 1}: {what}")
        vocab[token] = number
    if len(vocab) != rows:
        raise ConfigError(
            f"--vocab: {path} has {len(vocab)} lines, {where} embeddings of {rows} tokens: not its "
            "vocabulary"
        )
    lacking = [token for token in _NEEDED if token not in vocab]
    if lacking:
        raise ConfigError(f"--vocab: {path} has no {', '.join(lacking)}: not a BERT's vocabulary")
    return vocab
