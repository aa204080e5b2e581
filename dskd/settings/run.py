"""Every setting of a run, typed (a model's are in ``model_settings.py``). ``config.py`` reads them
from YAML and the command line.

The YAML decides *what* is trained (data, models, batch, steps, rates); the DeepSpeed JSON named by
``deepspeed`` decides *how* (ZeRO stage, offload, buckets). The defaults are the 20-step toy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dskd.settings.model import Model, Section

Precision = Literal["auto", "fp32", "bf16", "fp16"]


# ---- data ----------------------------------------------------------------------------------------


class BuiltinSource(Section):
    """The English text every CPython ships: language reference topics and library docstrings."""

    kind: Literal["builtin"] = "builtin"
    domain: str = "builtin"
    """Name of the domain its rows belong to (routes domain teachers)."""
    documents: int | None = Field(None, ge=1)
    """Use only the first so many documents."""


class TextSource(Section):
    """Text files; documents are separated by blank lines, sentences by line ends."""

    kind: Literal["text"]
    path: str
    """A file, a folder (every ``*.txt`` below it) or a glob pattern."""
    domain: str = "text"
    documents: int | None = Field(None, ge=1)


class JsonlSource(Section):
    """JSON-lines files; one document a line."""

    kind: Literal["jsonl"]
    path: str
    """A file, a folder (every ``*.jsonl`` below it) or a glob pattern."""
    field: str = "text"
    """The key that holds the text."""
    domain: str = "jsonl"
    documents: int | None = Field(None, ge=1)


class HubSource(Section):
    """Anything ``datasets.load_dataset`` or ``load_from_disk`` reads."""

    kind: Literal["datasets"]
    path: str
    """Hub id, a builder's name (``parquet``, ``csv`` ...), or a folder of ``save_to_disk``."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: list[str] | None = None
    field: str = "text"
    """The column that holds the text."""
    streaming: bool = False
    domain: str = "datasets"
    documents: int | None = Field(None, ge=1)


Source = Annotated[
    BuiltinSource | TextSource | JsonlSource | HubSource, Field(discriminator="kind")
]


class TrainedTokenizer(Section):
    """A byte-level BPE trained on the run's own sources."""

    kind: Literal["trained"] = "trained"
    vocab_size: int = Field(2048, ge=300)
    """Size of the vocabulary, special tokens included."""


class PretrainedTokenizer(Section):
    """Any HuggingFace tokenizer."""

    kind: Literal["pretrained"]
    path: str
    """Folder or hub id; ``run:NAME`` is the export of another run of the recipe."""
    revision: str | None = None


TokenizerSource = Annotated[TrainedTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


class MaskShares(Section):
    """What every kind of masking shares: how many tokens are masked, and what replaces them."""

    probability: float = Field(0.15, gt=0, le=1)
    """Share of the tokens that are selected and predicted."""
    keep: float = Field(0.1, ge=0, le=1)
    """Share of the selected tokens that stay as they are."""
    random: float = Field(0.1, ge=0, le=1)
    """Share of the selected tokens replaced by a random one; the rest become the mask token."""
    draws: int | None = Field(None, ge=1)
    """Number of different masks a row gets: epoch e uses mask ``e % draws``; null: one per epoch.
    A logit cache holds ``draws`` masks and needs a number here."""


class Masking(MaskShares):
    """BERT masking of masked LMs: tokens at random (unused for causal LMs)."""

    kind: Literal["random"] = "random"
    whole_word: bool = False
    """Select whole words instead of tokens."""
    sampler: Literal["counter", "fairseq"] = "counter"
    """``counter``: drawn from (seed, epoch, row) only, vectorised, specials excluded; ``fairseq``:
    bit for bit the sampling of the original Knowledge Inheritance code."""


class HardTokens(MaskShares):
    """Masking of the tokens that a model finds hard (Self-Evolution).

    The model is asked once, before training; a store keeps its answers for every token, so all
    that chooses among them can be changed without asking again. Validation rows are masked at
    random. For causal LMs the hard tokens are labels that the method weighs; without such a method
    they are refused, as are settings that only masks need (``least``, ``replacement`` ...).
    """

    kind: Literal["hard_tokens"]
    store: Path | None = None
    """Folder of the first store, filled by this run as far as it is not; ``run:NAME`` is that of
    another run of the recipe; null: ``<out>/questions``. Later ones are the run's own."""
    model: Model | None = None
    """The model that is asked; null: the run's own before training, as in the paper."""
    shown: Literal["token", "mask"] = "token"
    """What the model sees where it is asked: ``token``: the token itself (the paper; one pass over
    the rows); ``mask``: the mask token (1 / ``probability`` passes, each asking another share of
    the tokens)."""
    metric: Literal["confidence", "correctness", "quantile"] = "confidence"
    """Which tokens are hard: ``confidence``: those whose negative log-likelihood is above
    ``threshold``; ``correctness``: those that are not the model's first guess; ``quantile``: the
    hardest share ``quantile`` of the training rows' tokens."""
    threshold: float = Field(0.1, ge=0)
    """Nats; used by ``metric: confidence``. A weak model finds most tokens hard at 0.1."""
    quantile: float = Field(0.2, gt=0, lt=1)
    """Used by ``metric: quantile``."""
    least: float | None = Field(None, ge=0, le=1)
    """Share of a row's tokens up to which random ones fill up; null: ``probability``."""
    most: float | None = Field(None, gt=0, le=1)
    """Largest share of a row's tokens, the hardest first; null: ``probability`` (causal LMs: 1)."""
    replacement: Literal["bert", "all_mask"] = "bert"
    """``bert``: as ``keep`` and ``random`` say; ``all_mask``: always the mask token."""
    sampler: Literal["counter", "original"] = "counter"
    """``counter``: as above; ``original``: those of the original Self-Evolution code, bit for bit
    up to the store's float16; ``least``, ``most`` and ``replacement`` play no part."""
    refresh: int | None = Field(None, ge=1)
    """Ask again, and then the current student, every so many epochs; null: never."""
    micro_batch: int = Field(16, ge=1)
    """Rows that are asked about at a time, per rank."""
    rows_per_shard: int = Field(1024, ge=1)


AnyMasking = Annotated[Masking | HardTokens, Field(discriminator="kind")]


class Data(Section):
    """Where the text comes from and how it becomes rows."""

    objective: Literal["masked", "causal"] = "masked"
    sources: list[Source] = Field(
        default_factory=lambda: [BuiltinSource(documents=400)], min_length=1
    )
    validation: list[Source] | None = None
    """Sources of the validation rows; null: ``validation_fraction`` of the documents."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out, chosen by a hash of each text."""
    tokenizer: TokenizerSource = TrainedTokenizer()
    block_size: int = Field(64, ge=8)
    """Most tokens of a row, special tokens included."""
    packing: Literal["complete", "complete_doc", "contiguous"] = "complete"
    """``complete``: whole sentences, greedily; ``complete_doc``: also cut at documents;
    ``contiguous``: one stream cut every ``block_size`` tokens."""
    masking: AnyMasking = Masking()
    folder: Path = Path("runs/data")
    """Prepared rows live here, in a folder named by their fingerprint, and are reused."""


# ---- teachers ------------------------------------------------------------------------------------


TINY = {
    "model_type": "roberta",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


class LiveTeacher(Section):
    """A frozen model run on every batch."""

    kind: Literal["live"] = "live"
    model: Model = Model(config=TINY)
    deepspeed: str | None = None
    """DeepSpeed JSON (ZeRO-3, with or without offload) that shards the teacher; null: a replica
    on every rank."""
    precision: Precision = "auto"


class CachedTeacher(Section):
    """Top-k logits captured beforehand; captured by this run when ``path`` does not exist yet."""

    kind: Literal["cached"]
    path: Path | None = None
    """The cache's folder; null: ``<out>/cache``."""
    model: Model | None = None
    """The model to capture from; null: the cache must exist."""
    deepspeed: str | None = None
    """As for a live teacher, used by the capture."""
    precision: Precision = "auto"
    k: int = Field(32, ge=1)
    """Logits kept per position when capturing."""
    use_k: int | None = Field(None, ge=1)
    """Logits used per position in training; null: all that are kept."""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [2.0], min_length=1
    )
    """Temperatures whose tail mass is stored."""
    values: Literal["fp16", "fp32"] = "fp16"
    """Storage type of the log-probabilities."""
    rows_per_shard: int = Field(1024, ge=1)
    micro_batch: int = Field(16, ge=1)
    """Rows of a capture batch per rank."""


class RoutedTeacher(Section):
    """One teacher per domain; each row is taught by its own domain's teacher."""

    kind: Literal["routed"]
    domains: dict[str, Annotated[LiveTeacher | CachedTeacher, Field(discriminator="kind")]] = Field(
        min_length=1
    )


class SelfTeacher(Section):
    """The student itself, shown the rows without masks (method ``self_evolution``). As any teacher,
    it is not made where the method wants none."""

    kind: Literal["self"]
    weights: Literal["current", "frozen", "average"] = "current"
    """``current``: as they are at that step, as in the original code (masked LMs only); ``frozen``:
    as the run began; ``average``: their exponential moving average."""
    decay: float = Field(0.999, ge=0, lt=1)
    """Factor of the average."""
    deepspeed: str | None = None
    """As for a live teacher; of the frozen copy."""
    precision: Precision = "auto"
    """Of the frozen copy."""


Teacher = Annotated[
    LiveTeacher | CachedTeacher | RoutedTeacher | SelfTeacher, Field(discriminator="kind")
]


# ---- training ------------------------------------------------------------------------------------


Decay = Annotated[float, Field(ge=0, lt=1)]
"""Factor of a running average."""


class Train(Section):
    """The optimisation; batch sizes count rows."""

    steps: int = Field(20, ge=1)
    """Optimiser steps."""
    batch: int = Field(16, ge=1)
    """Rows of one optimiser step, over all ranks and accumulation steps."""
    micro_batch: int = Field(8, ge=1)
    """Rows of one forward pass on one rank."""
    lr: float = Field(1e-3, ge=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "polynomial"] = "linear"
    """Decay after the warm-up."""
    warmup: int = Field(2, ge=0)
    """Steps of linear warm-up from 0."""
    end_lr: float = Field(0.0, ge=0)
    power: float = Field(1.0, gt=0)
    """Exponent of the polynomial decay."""
    weight_decay: float = Field(0.01, ge=0)
    decay_all: bool = False
    """Also decay biases and norms, as the original Knowledge Inheritance code does."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    precision: Precision = "auto"
    """``auto``: bf16 on a GPU that has it, else fp32."""
    activation_checkpointing: bool = False
    compile: bool = False
    """Run the student's layers through ``torch.compile``."""


class Evaluation(Section):
    """The plain LM loss on the validation rows; it selects the best checkpoint, but not where hard
    tokens are masked or by method ``self_evolution``."""

    every: int = Field(10, ge=1)
    """Steps between evaluations (the last step is always evaluated)."""
    rows: int | None = Field(None, ge=1)
    """Use only so many validation rows; null: all."""
    micro_batch: int = Field(16, ge=1)


class Checkpoint(Section):
    """When to save and how many to keep."""

    every: int = Field(10, ge=1)
    """Steps between checkpoints (the last step is always saved)."""
    keep: int = Field(2, ge=1)
    """Most recent checkpoints kept; the best one, if the evaluation selects, besides."""


class Run(Section):
    """One run: a student trained by a method."""

    out: Path = Path("runs/toy")
    """Folder of everything the run writes."""
    seed: int = Field(1, ge=0, lt=2**63)
    until: Literal["data", "slice", "question", "cache", "train", "export", "evaluate"] = "evaluate"
    """Last stage to run."""
    deepspeed: str = "zero0"
    """A shipped preset (``zero2`` is ``ds_configs/zero2.json``) or a path to a DeepSpeed JSON."""
    method: dict[str, Any] = Field(
        default_factory=lambda: {"kind": "ki", "schedule": "linear", "steps": 10}
    )
    """The method's own settings; ``kind`` names it."""
    data: Data = Data()
    model: Model = Model(config=TINY)
    teacher: Teacher | None = LiveTeacher()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log_every: int = Field(1, ge=1)
    """Steps between progress lines and metrics."""
