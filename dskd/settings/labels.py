"""Settings of labelled rows: which columns of a source hold what, and which classes are taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dskd.settings.base import FREE, RunPath, Section

SourcePath = Annotated[str, RunPath(), FREE]
"""Where text lies; a run compares what it holds."""


class Columns(Section):
    """The columns of a table, or keys of its rows. All but ``field`` and ``on_bad_rows`` is for
    data.objective classification, where a row is one example."""

    field: str = "text"
    """The column or key that holds the text; ``doc.text``, unless there is one of that name, is
    the key ``text`` of what lies under ``doc`` (so for the others)."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row whose text is null or, of an example, empty (also its second text):
    ``error``: it is refused by file and line; ``skip``: it is left out and counted, as documents
    of nothing but space are anyway. Any other row without a text is refused."""
    pair: str | None = None
    """That of a second text, which the tokenizer puts behind the first."""
    label: str | None = None
    """That of the class, by name; a whole number is the name of a class, too."""
    target: str | None = None
    """That of a number in the place of a class: the rows are for regression."""
    unlabelled: bool = False
    """Take rows whose label or target is missing (an empty cell, null, a class number of -1), for
    methods that need none at each row; else they are refused. Rows of a source with neither
    ``label`` nor ``target`` are such rows anyway."""

    @property
    def labelled(self) -> bool:
        """Whether a column says what the rows are."""
        return self.label is not None or self.target is not None

    @property
    def may_lack_labels(self) -> bool:
        """Whether there may be rows without a label."""
        return self.unlabelled or not self.labelled


class CsvSource(Columns):
    """Comma-separated files; cells may be quoted (RFC 4180)."""

    kind: Literal["csv"]
    path: SourcePath
    """A file, a folder (every ``*.csv`` below it, links followed, hidden ones left out) or a glob
    pattern. Files may be compressed (``*.csv.gz``, ``*.csv.zst``)."""
    columns: list[str] | None = Field(None, min_length=1)
    """The names of all columns in their order, of files without a line that names them; null: the
    first line of each file does."""
    domain: str = "csv"
    documents: int | None = Field(None, ge=1)
    """Use only the first so many rows."""


class TsvSource(Columns):
    """Tab-separated files, as :class:`CsvSource`."""

    kind: Literal["tsv"]
    path: SourcePath
    """A file, a folder (every ``*.tsv`` below it) or a glob pattern; maybe compressed."""
    columns: list[str] | None = Field(None, min_length=1)
    """As of :class:`CsvSource`."""
    quoting: bool = False
    """Whether cells may be quoted, as in CSV; else a quotation mark is text as any other."""
    domain: str = "tsv"
    documents: int | None = Field(None, ge=1)


GlueTask = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
"""Tasks of GLUE (Wang et al. 2019) by the names that the hub has for them."""


class GlueSource(Section):
    """The labelled rows of a task of GLUE, as the folder of its official download has them."""

    kind: Literal["glue"]
    task: GlueTask
    path: SourcePath
    """The task's folder, in which ``train.tsv`` lies."""
    split: Literal["train", "dev", "dev_matched", "dev_mismatched"] = "train"
    """Which file; MNLI has two of ``dev``. Those of ``test`` have no labels and are not read."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row with an empty text: it is refused, or left out and counted."""
    domain: str = "glue"
    documents: int | None = Field(None, ge=1)
    """Use only the first so many rows."""

    @property
    def label(self) -> str | None:
        """What the column of the class is called here; STS-B has none."""
        return None if self.task == "stsb" else "label"

    @property
    def target(self) -> str | None:
        """What the column of the number is called here; only STS-B has one."""
        return "score" if self.task == "stsb" else None

    @property
    def labelled(self) -> bool:
        """Every row has a label."""
        return True


class LabelPart(Section):
    """One of several parts of the classes in the order of their names' code points, each of as many
    (``of`` into their number, rounded down), the last one with the rest."""

    part: int = Field(ge=0)
    """Which of them, from 0."""
    of: int = Field(ge=1)
    """How many there are."""


def _form(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<section>"


Labels = Annotated[
    Annotated[list[str], Tag("<list>")] | Annotated[LabelPart, Tag("<section>")],
    Discriminator(_form),
]
