"""Settings of rows that are questions with their answers: where they come from, what they look
like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dskd.settings.base import FREE, RunPath, Section
from dskd.settings.labels import SourcePath


class QuestionSource(Section):
    """JSON-lines files of questions. Each line has a ``question``, an ``answer`` (a text) or
    ``answers`` (texts: all are right, the first one is trained on) and, if there is something to
    read for it, a ``context``."""

    kind: Literal["questions"]
    path: Annotated[str, RunPath("distilled"), FREE]
    """A file, a folder (every ``*.jsonl`` below it, links followed) or a glob pattern; files may be
    compressed (``*.jsonl.gz``, ``*.jsonl.zst``). ``run:NAME``: the training questions of an earlier
    run with the answers of its model, as its method had them written (sequence-level
    distillation)."""
    domain: str = "questions"
    documents: int | None = Field(None, ge=1)
    """Use only the first so many questions."""


class SquadSource(Section):
    """JSON files in the layout of SQuAD, as LAMOL and L2KD have all their tasks
    (``woz.en_to_squad-train-v2.0.json``)."""

    kind: Literal["squad"]
    path: SourcePath
    """A file, a folder (every ``*.json`` below it) or a glob pattern."""
    answers: Annotated[str | None, RunPath(), FREE] = None
    """The answer file of ``path``, for the metrics ``lfem`` and ``joint_goal_em``:
    ``wikisql_answers.json`` or ``woz.en_answers.json``, one entry for each question in the order of
    their ids."""
    domain: str = "squad"
    documents: int | None = Field(None, ge=1)


class ReplayedSource(Section):
    """JSON-lines files of rows of an earlier task, as a model wrote them (LAMOL: Sun et al. 2020).

    Each line has ``ids``, the tokens behind the task's token; or ``text``, the same as text, of any
    engine (``which is it ?__ans__this one``; what stands behind an end token counts neither here
    nor there); or is a question with its answer, as those of kind ``questions``. Such rows are
    never held out for validation.
    """

    kind: Literal["replayed"]
    path: Annotated[str | None, RunPath(), FREE] = None
    """A file, a folder (every ``*.jsonl`` below it) or a glob pattern. null: what the run's method
    has written for it, ``<out>/replay/<domain>.jsonl``."""
    domain: str
    """The earlier task; none of the other sources is of it."""
    documents: int | None = Field(None, ge=1)
    """Use only the first so many rows."""


class Questions(Section):
    """What a row of a question is: context, question, answer token, answer and the end token of the
    tokenizer, each made into tokens by itself (LAMOL: Sun et al. 2020, section 3.1). Only answer
    and end are learnt.

    The tokens named here become special tokens of the data's tokenizer: at the end of a pretrained
    one that lacks them, among the first of a trained one.
    """

    answer_token: str = "__ans__"
    """Stands between question and answer."""
    task_tokens: dict[str, str] = Field(default_factory=dict)
    """By domain, the token behind which a model writes rows of it; of all the domains that a model
    ever learns, in one order. None: ``__gen__`` for any."""
    room: int = Field(16, ge=1)
    """Tokens of a row that are left for an answer at least, its end included. A context is cut at
    its end for them, in the rows as in the prompts that answers are written for."""
    modelling: bool = False
    """Show each row twice: as a question, of which the answer is learnt, and behind the token of
    its task, where all of it is learnt (language modelling)."""

    def task_token(self, domain: str) -> str:
        """The token behind which rows of a domain are written."""
        return self.task_tokens[domain] if self.task_tokens else GENERATION

    @property
    def tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        tasks = list(self.task_tokens.values()) or [GENERATION]
        return list(dict.fromkeys([self.answer_token, *tasks]))


GENERATION = "__gen__"
"""The token of all tasks together."""
