"""Which units of a model go together: its groups, and what of every layer belongs to them.

* ``R``: the residual stream, of one mask for the whole model: the summed embedding writes it, and
  so does the last map of every attention and feed-forward part; all other maps and the norms read
  it.
* ``T``: the output of the head transform of masked LMs, which the vocabulary projection reads.
* ``A.<layer>``: a layer's attention. Queries, keys and values write it, the output map reads it.
* ``F.<layer>``: a layer's feed-forward units.

What writes a group has a *right* compactor of it, what reads it a *left* one. Why removal is exact,
post-norm and pre-norm alike: rows of 0 in all writers leave a removed unit of the stream 0
from the embedding to the end, norms count the kept entries only, and columns of 0 in all readers
(the vocabulary projection included) make what a norm's own weight and bias put there unread. A
removed query unit meets a removed key unit in a product that adds 0 to its head's scores; a removed
head's context is unread. The activation of a removed feed-forward unit need not be 0: it is unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.errors import ConfigError
from dskd.models.families import lm_head
from dskd.narrowing.units import Member, Vector, spread
from dskd.narrowing.widths import Family, Widths


@dataclass(frozen=True)
class Map:
    """A linear map: its module path, the units it reads, those it writes, and how many parts of
    that kind lie side by side in what it writes (GPT-2's queries, keys and values: 3)."""

    path: str
    reads: str
    writes: str
    parts: int = 1


_NOT_ROTARY = Family()


@dataclass(frozen=True)
class UnitLayout:
    """Where a family keeps what has units. Paths of a layer's modules are relative to the layer.

    Attributes:
        tables: the embeddings that are summed, of words first.
        summed: the module the sum passes through first, or the table that makes it (Llama).
        layers: the list of layers.
        maps: linear maps of a layer, that of the queries first.
        norms: of a layer, all of the residual stream.
        outside: norms of the residual stream outside of the layers.
        transform: the head's map and its norm, which are of ``T``.
        values: the map, and which of its parts, that the original code ranks the stream by.
        attention: of a layer, the module that splits heads.
        sizes: attributes of it that change: how many heads, entries of a head, entries of all.
        demands: what the family demands of a student's widths.
    """

    tables: tuple[str, ...]
    summed: str
    layers: str
    maps: tuple[Map, ...]
    norms: tuple[str, ...]
    outside: tuple[str, ...]
    values: tuple[str, int]
    attention: str
    sizes: tuple[str, str, str] | None = None
    transform: tuple[str, str] | None = None
    demands: Family = _NOT_ROTARY

    @property
    def embedded(self) -> str:
        """Path of the summed embedding's compactor, once it and ``summed`` are in a row."""
        return f"{self.summed}.{1 if self.summed in self.tables else 0}"

    def moved(self, path: str) -> str:
        """Where a module of the HuggingFace model is once the embedding has its compactor."""
        if path != self.summed:
            return path
        return f"{path}.{0 if path in self.tables else 1}"


def _bert(body: str, transform: tuple[str, str]) -> UnitLayout:
    embeddings = f"{body}.embeddings"
    return UnitLayout(
        tables=tuple(f"{embeddings}.{of}_embeddings" for of in ("word", "position", "token_type")),
        summed=f"{embeddings}.LayerNorm",
        layers=f"{body}.encoder.layer",
        maps=(
            *(Map(f"attention.self.{what}", "R", "A") for what in ("query", "key", "value")),
            Map("attention.output.dense", "A", "R"),
            Map("intermediate.dense", "R", "F"),
            Map("output.dense", "F", "R"),
        ),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        outside=(f"{embeddings}.LayerNorm",),
        values=("attention.self.value", 0),
        attention="attention.self",
        sizes=("num_attention_heads", "attention_head_size", "all_head_size"),
        transform=transform,
    )


def _rotary(*, divides: bool = False) -> UnitLayout:
    return UnitLayout(
        tables=("model.embed_tokens",),
        summed="model.embed_tokens",
        layers="model.layers",
        maps=(
            *(Map(f"self_attn.{what}_proj", "R", "A") for what in "qkv"),
            Map("self_attn.o_proj", "A", "R"),
            *(Map(f"mlp.{what}_proj", "R", "F") for what in ("gate", "up")),
            Map("mlp.down_proj", "F", "R"),
        ),
        # The norms of Qwen3's queries and keys are over a head's entries, which all stay.
        norms=("input_layernorm", "post_attention_layernorm"),
        outside=("model.norm",),
        values=("self_attn.v_proj", 0),
        attention="self_attn",  # nothing in it depends on how many kv-groups there are
        demands=Family(rotary=True, divides=divides),
    )


_ROBERTA = _bert("roberta", ("lm_head.dense", "lm_head.layer_norm"))

LAYOUTS: dict[str, UnitLayout] = {
    "bert": _bert(
        "bert", ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "gpt2": UnitLayout(
        tables=("transformer.wte", "transformer.wpe"),
        summed="transformer.drop",
        layers="transformer.h",
        maps=(
            Map("attn.c_attn", "R", "A", parts=3),
            Map("attn.c_proj", "A", "R"),
            Map("mlp.c_fc", "R", "F"),
            Map("mlp.c_proj", "F", "R"),
        ),
        norms=("ln_1", "ln_2"),
        outside=("transformer.ln_f",),
        values=("attn.c_attn", 2),
        attention="attn",
        sizes=("num_heads", "head_dim", "split_size"),
    ),
    "llama": _rotary(divides=True),
    "mistral": _rotary(),
    "qwen2": _rotary(),
    "qwen3": _rotary(),
}


@dataclass(frozen=True)
class Group:
    """Units that share a mask. Names are those of the student's parameters and modules.

    Attributes:
        members: every compactor of the group.
        ranking: the left one among them that alone ranks the units in the original.
        part: which of its stacked parts, 0 if it has none.
        norms: paths of the norms over these units.
        vectors: weights and biases of those norms, and biases of the maps that write the group.
    """

    members: tuple[Member, ...]
    ranking: str
    part: int
    norms: tuple[str, ...]
    vectors: tuple[Vector, ...]


def layout_of(config: PreTrainedConfig) -> UnitLayout:
    """Where a model keeps its units.

    Raises:
        ConfigError: its family is not one that compactors are known for, or it has more than
            self-attention.
    """
    if config.model_type not in LAYOUTS:
        raise ConfigError(
            f"method.kind: wid cannot put compactors into a {config.model_type}, only into "
            f"{', '.join(LAYOUTS)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise ConfigError("model.config.add_cross_attention: method wid knows no cross attention")
    return LAYOUTS[config.model_type]


def widths_of(config: PreTrainedConfig) -> Widths:
    """Sizes of a model's layers."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.model_type == "gpt2":
        intermediate = 4 * hidden if config.n_inner is None else config.n_inner
    else:
        intermediate = config.intermediate_size
    # Families without grouped queries, and Qwen2, have no such fields.
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return Widths(hidden, intermediate, heads, kv_heads, head_dim)


def maps_of(config: PreTrainedConfig) -> Iterator[Map]:
    """Every linear map but the vocabulary projection, with whole paths and groups' names."""
    layout = layout_of(config)
    for layer in range(config.num_hidden_layers):
        for own in layout.maps:
            reads, writes = (f"{k}.{layer}" if k in "AF" else k for k in (own.reads, own.writes))
            yield Map(f"{layout.layers}.{layer}.{own.path}", reads, writes, own.parts)
    if layout.transform is not None:
        yield Map(layout.transform[0], "R", "T")


def norms_of(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Path in the HuggingFace model, and group, of every norm over a group's units."""
    layout = layout_of(config)
    for layer in range(config.num_hidden_layers):
        for path in layout.norms:
            yield f"{layout.layers}.{layer}.{path}", "R"
    for path in layout.outside:
        yield path, "R"
    if layout.transform is not None:
        yield layout.transform[1], "T"


def projected(config: PreTrainedConfig) -> str:
    """The group that the vocabulary projection reads."""
    return "R" if layout_of(config).transform is None else "T"


def groups_of(model: PreTrainedModel) -> dict[str, Group]:
    """The groups of a model with compactors, by name."""
    config = model.config
    layout = layout_of(config)
    members = {"R": [Member(f"{layout.embedded}.right", "right")]}
    norms: dict[str, list[str]] = {}
    vectors: dict[str, list[Vector]] = {}
    for own in maps_of(config):
        members.setdefault(own.reads, []).append(Member(f"{own.path}.left", "left"))
        members.setdefault(own.writes, []).append(Member(f"{own.path}.right", "right"))
        vectors.setdefault(own.writes, []).extend(_vectors(model, own.path, ["bias"], own.parts))
    projection = lm_head(config.model_type).projection
    members[projected(config)].append(Member(f"{projection}.left", "left"))
    for plain, group in norms_of(config):
        path = layout.moved(plain)
        norms.setdefault(group, []).append(path)
        vectors[group].extend(_vectors(model, path, ["weight", "bias"]))
    return {
        name: Group(
            tuple(found),
            *_ranking(layout, name, found),
            tuple(norms.get(name, ())),
            tuple(vectors[name]),
        )
        for name, found in members.items()
    }


def kept_entries(keep_U: Tensor, entries: int) -> Tensor:
    """Which of ``entries``, an equal run of them for each unit, are kept: indices, int64."""
    return spread(keep_U, entries).nonzero().flatten()


def _ranking(layout: UnitLayout, name: str, members: list[Member]) -> tuple[str, int]:
    """What ranks a group, as in the original code: the first layer's values rank the stream, its
    only reader any other group."""
    if name == "R":
        path, part = layout.values
        return f"{layout.layers}.0.{path}.left", part
    (reader,) = (member.name for member in members if member.side == "left")
    return reader, 0


def _vectors(model: nn.Module, path: str, names: list[str], parts: int = 1) -> Iterator[Vector]:
    """Those of a module's parameters that it has (RMSNorms have no bias, nor have all maps)."""
    module = model.get_submodule(path)
    for name in names:
        if getattr(module, name, None) is not None:
            yield Vector(f"{path}.{name}", parts)
