"""Settings of the data: sources, tokenizer, packing and masking. Those of labelled rows are in
``labels.py``, of questions in ``examples.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from dskd.settings.base import CHOSEN_LATER, FREE, Freedom, RunPath, Section
from dskd.settings.examples import Questions, QuestionSource, ReplayedSource, SquadSource
from dskd.settings.labels import (
    Columns,
    CsvSource,
    GlueSource,
    Labels,
    SourcePath,
    TsvSource,
)
from dskd.settings.model import Model


class BuiltinSource(Section):
    """The English text every CPython ships: language reference topics and library docstrings."""

    kind: Literal["builtin"] = "builtin"
    domain: str = "builtin"
    """Name of the domain its rows belong to (routes domain teachers)."""
    label: Literal["module"] | None = None
    """``module``, of data.objective classification: the rows are paragraphs of the docstrings of 16
    modules and packages of the library, each with the one that it is of as its class; their names
    are taken out of the texts."""
    documents: int | None = Field(None, ge=1)
    """Use only the first so many documents, or rows."""

    @property
    def labelled(self) -> bool:
        """Whether it has rows with classes in the place of documents."""
        return self.label is not None


class TextSource(Section):
    """Text files; sentences are separated by line ends."""

    kind: Literal["text"]
    path: SourcePath
    """A file, a folder (every ``*.txt`` below it, links followed, hidden ones left out) or a glob
    pattern. Files may be compressed (``*.txt.gz``, ``*.txt.zst``)."""
    per: Literal["paragraph", "line", "file"] = "paragraph"
    """What one document is: the lines between blank ones, a line, or all of a file."""
    domain: str = "text"
    documents: int | None = Field(None, ge=1)


class JsonlSource(Columns):
    """JSON files; one document or example a line, or an element of the file's one array."""

    kind: Literal["jsonl"]
    path: SourcePath
    """A file, a folder (every ``*.jsonl`` below it, links followed, hidden ones left out) or a glob
    pattern. Files may be compressed (``*.jsonl.gz``, ``*.jsonl.zst``)."""
    domain: str = "jsonl"
    documents: int | None = Field(None, ge=1)


class HubSource(Columns):
    """Anything ``datasets.load_dataset`` or ``load_from_disk`` reads."""

    kind: Literal["datasets"]
    path: SourcePath
    """Hub id, a builder's name (``parquet``, ``csv`` ...), or a folder of ``save_to_disk``."""
    config: str | None = None
    split: str = "train"
    """A split, a slice of one (``train[:10%]``) or a sum of them, in the words of ``datasets``."""
    revision: str | None = None
    data_files: list[str] | None = None
    streaming: bool = False
    domain: str = "datasets"
    documents: int | None = Field(None, ge=1)


class FairseqSource(Section):
    """A corpus that ``fairseq-preprocess`` made: tokens, and no text. A document is what stands
    between blank lines. Rows are fairseq's blocks; a line that is longer than a row is cut, where
    fairseq drops it."""

    kind: Literal["fairseq"]
    path: SourcePath
    """The files without their endings (``data-bin/train`` is ``train.bin`` and ``train.idx``, with
    ``train1``, ``train2`` ... behind them if they are there), or a folder, whose ``train`` is
    taken. ``dict.txt`` lies beside them; ``data.tokenizer`` must be a pretrained one that has its
    tokens at its ids."""
    domain: str = "fairseq"
    documents: int | None = Field(None, ge=1)


Source = Annotated[
    BuiltinSource
    | TextSource
    | JsonlSource
    | HubSource
    | FairseqSource
    | CsvSource
    | TsvSource
    | GlueSource
    | QuestionSource
    | SquadSource
    | ReplayedSource,
    Field(discriminator="kind"),
]


LabelledSource = Columns | BuiltinSource | GlueSource
"""Sources whose rows may be examples."""


class TrainedTokenizer(Section):
    """A byte-level BPE trained on the run's own sources."""

    kind: Literal["trained"] = "trained"
    vocab_size: int = Field(2048, ge=300)
    """Size of the vocabulary, special tokens included."""


class PretrainedTokenizer(Section):
    """Any HuggingFace tokenizer."""

    kind: Literal["pretrained"]
    path: Annotated[str, RunPath("export")]
    """Folder or hub id; ``run:NAME`` is the export of another run of the recipe."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run the Python code that lies in the folder or hub repository of ``path``; without it such
    code is never run, nor asked about. Rows and exports keep a tokenizer that needs none."""


QuestionsOnly = Annotated[QuestionSource | SquadSource, Field(discriminator="kind")]


TokenizerSource = Annotated[TrainedTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


class MaskShares(Section):
    """What every kind of masking shares: how many tokens are masked, and what replaces them."""

    probability: Annotated[float, CHOSEN_LATER] = Field(0.15, gt=0, le=1)
    """Share of the tokens that are selected and predicted."""
    keep: Annotated[float, CHOSEN_LATER] = Field(0.1, ge=0, le=1)
    """Share of the selected tokens that stay as they are."""
    random: Annotated[float, CHOSEN_LATER] = Field(0.1, ge=0, le=1)
    """Share of the selected tokens replaced by a random one; the rest become the mask token."""
    draws: Annotated[int | None, CHOSEN_LATER] = Field(None, ge=1)
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

    def freedom(self, name: str) -> Freedom | None:
        """None: random masks are chosen from no scores, so the first call settles them."""
        del name
        return None


class HardTokens(MaskShares):
    """Masking of the tokens that a model finds hard (Self-Evolution).

    The model scores every token once, before training; a store keeps the scores, so all that
    chooses among them can be changed without scoring again. Validation rows are masked at
    random. For causal LMs the hard tokens are labels that the method weighs; without such a method
    they are refused, as are settings that only masks need (``least``, ``replacement`` ...).
    """

    kind: Literal["hard_tokens"]
    store: Annotated[Path | None, RunPath("store"), FREE] = None
    """Folder of the first store, filled by this run as far as it is not; ``run:NAME`` is that of
    another run of the recipe; null: ``<out>/questions``. Later ones are the run's own."""
    model: Model | None = None
    """The model that scores; null: the run's own before training, as in the paper."""
    shown: Literal["token", "mask"] = "token"
    """What the model sees where it scores: ``token``: the token itself (the paper; one pass over
    the rows); ``mask``: the mask token (1 / ``probability`` passes, each scoring another share of
    the tokens)."""
    metric: Annotated[Literal["confidence", "correctness", "quantile"], CHOSEN_LATER] = "confidence"
    """Which tokens are hard: ``confidence``: those whose negative log-likelihood is above
    ``threshold``; ``correctness``: those that are not the model's first guess; ``quantile``: the
    hardest share ``quantile`` of the training rows' tokens."""
    threshold: Annotated[float, CHOSEN_LATER] = Field(0.1, ge=0)
    """Nats; used by ``metric: confidence``. A weak model finds most tokens hard at 0.1."""
    quantile: Annotated[float, CHOSEN_LATER] = Field(0.2, gt=0, lt=1)
    """Used by ``metric: quantile``."""
    least: Annotated[float | None, CHOSEN_LATER] = Field(None, ge=0, le=1)
    """Share of a row's tokens up to which random ones fill up; null: ``probability``."""
    most: Annotated[float | None, CHOSEN_LATER] = Field(None, gt=0, le=1)
    """Largest share of a row's tokens, the hardest first; null: ``probability`` (causal LMs: 1)."""
    replacement: Annotated[Literal["bert", "all_mask"], CHOSEN_LATER] = "bert"
    """``bert``: as ``keep`` and ``random`` say; ``all_mask``: always the mask token."""
    sampler: Annotated[Literal["counter", "original"], CHOSEN_LATER] = "counter"
    """``counter``: as above; ``original``: those of the original Self-Evolution code, bit for bit
    up to the store's float16; ``least``, ``most`` and ``replacement`` play no part."""
    refresh: Annotated[int | None, CHOSEN_LATER] = Field(None, ge=1)
    """Score again, and then by the current student, every so many epochs; null: never."""
    micro_batch: Annotated[int, FREE] = Field(16, ge=1)
    """Rows that are scored at a time, per rank."""
    rows_per_shard: Annotated[int, FREE] = Field(1024, ge=1)

    def freedom(self, name: str) -> Freedom | None:
        """Until when a field may change: as marked, but with ``shown: mask`` the store depends on
        ``probability``, too, which then says how many passes there are."""
        return None if (name, self.shown) == ("probability", "mask") else super().freedom(name)


AnyMasking = Annotated[Masking | HardTokens, Field(discriminator="kind")]


class Data(Section):
    """Where the text comes from and how it becomes rows."""

    objective: Literal["masked", "causal", "classification"] = "masked"
    """``classification``: each row is an example of a class, or has a number (regression)."""
    sources: list[Source] = Field(
        default_factory=lambda: [BuiltinSource(documents=400)], min_length=1
    )
    validation: list[Source] | None = None
    """Sources of the validation rows; null: ``validation_fraction`` of the documents."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out, chosen by a hash of each text."""
    labels: Labels | None = None
    """The classes that are taken, by name or as a part of all; rows of others are left out, those
    without a label stay. null: all that ``sources`` have. Of sources without labels: what classes
    there are."""
    questions: Questions | None = None
    """Each row is a question with its answer, for a causal LM; of sources of kind ``questions``,
    ``squad`` and ``replayed``, which have nothing else. null: of other sources."""
    memory: list[QuestionsOnly] | None = Field(None, min_length=1)
    """Questions of earlier tasks, of which the method takes some; none of them is a row of training
    by itself."""
    tokenizer: TokenizerSource = TrainedTokenizer()
    block_size: int = Field(64, ge=8)
    """Most tokens of a row, special tokens included."""
    packing: Literal["complete", "complete_doc", "contiguous"] = Field(None, validate_default=True)
    """``complete``: whole sentences, greedily; ``complete_doc``: also cut at documents;
    ``contiguous``: one stream cut every ``block_size`` tokens. null: ``contiguous`` for causal LMs,
    whose sentences may begin anywhere in a row, else ``complete``. Of rows that are not packed,
    examples and questions, it says nothing."""
    masking: AnyMasking = Masking()
    folder: Annotated[Path, RunPath(), FREE] = Path("runs/data")
    """Prepared rows live here, in a folder named by their fingerprint, and are reused."""

    @field_validator("packing", mode="before")
    @classmethod
    def _of_objective(cls, value: object, info: ValidationInfo) -> object:
        """A packing that is not given is that of the objective; what is dumped names it."""
        if value is not None:
            return value
        packed = info.data.get("objective") == "causal" and info.data.get("questions") is None
        return "contiguous" if packed else "complete"

    @property
    def packed(self) -> bool:
        """Whether rows are cut from documents, and none is one example or question."""
        return self.objective != "classification" and self.questions is None

    @property
    def labelled_sources(self) -> list[LabelledSource]:
        """Those of ``sources`` that say what their rows are."""
        return [s for s in self.sources if isinstance(s, LabelledSource) and s.labelled]

    @property
    def replayed_domains(self) -> list[str]:
        """Those of ``sources`` of kind ``replayed``, whose other rows are new."""
        return [s.domain for s in self.sources if isinstance(s, ReplayedSource)]

    @property
    def domains(self) -> list[str]:
        """Names of the domains of the rows, in the order of their indices; of questions, those of
        all tasks that have tokens, whichever the sources are of."""
        if self.questions is not None and self.questions.task_tokens:
            return list(self.questions.task_tokens)
        others = (*(self.validation or ()), *(self.memory or ()))
        return list(dict.fromkeys(source.domain for source in (*self.sources, *others)))

    @property
    def question_tokens(self) -> list[str]:
        """The special tokens that rows of questions need; none of other rows."""
        return [] if self.questions is None else self.questions.tokens

    @property
    def regression(self) -> bool:
        """Whether the rows of this objective have numbers in the place of classes."""
        return any(getattr(s, "target", None) is not None for s in self.sources)

    @property
    def may_lack_labels(self) -> bool:
        """Whether rows, also of validation, may have no label."""
        every = [*self.sources, *(self.validation or ())]
        return any(isinstance(s, Columns) and s.may_lack_labels for s in every)
