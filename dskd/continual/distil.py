"""Answers of a run's model to the questions that it was trained on: what another model may learn in
the place of the given ones (sequence-level knowledge distillation: Kim and Rush 2016; for a stream
of tasks: Chuang et al. 2020, section 3.2)."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from dskd.continual.replay import line_of
from dskd.continual.writing_model import decoding_of, writer_of, writing_model
from dskd.data.layouts import QuestionEncoder
from dskd.data.preparing import training_questions
from dskd.data.questions import Question
from dskd.engine.stage import Stage, StageContext
from dskd.models.continuation_files import own_tokens, write_continuations
from dskd.settings.base import Section
from dskd.settings.folders import data_settings
from dskd.settings.model import Model
from dskd.system import dist
from dskd.system.files import fingerprint
from dskd.system.log import say
from dskd.system.rows_file import RowsFile


class Distil(Section):
    """How the exported model answers; without a setting it takes the most likely tokens. (The
    original's published answers are drawn: ``top_k: 20``.)"""

    top_k: int | None = Field(None, ge=1)
    """Each token is drawn from the so many most likely ones; null: from all, if any is drawn."""
    temperature: float | None = Field(None, gt=0)
    """Of the draws; null: 1."""


def distil_stage(settings: Distil) -> Stage:
    """The stage that writes ``distilled.jsonl`` once the model is exported."""
    return Stage(
        "distil",
        partial(write_answers, settings),
        before="evaluate",
        leaves=("distilled.jsonl*",),
        whole="distilled.jsonl",
    )


def write_answers(settings: Distil, context: StageContext) -> None:
    """Answer what is not answered yet, question by question in their order; answers that are there
    must be those of this model, until it has scores (collective).

    The answer to a question is fixed by the run's seed and the question's place; in 16 bits as far
    as rounding leaves the order of the logits.

    Raises:
        DataError: the sources cannot be read.
        StoreError: what is there was made otherwise.
        NonFiniteError: the model's logits are not finite.
    """
    path, run = context.folder.distilled, context.run
    if dist.broadcast_object(path.exists() and context.folder.scores.exists()):
        return
    tokenizer = context.prepared.tokenizer
    with dist.agreed():
        asked = [question for _, question in training_questions(data_settings(run))]
    exported = Model(path=str(context.folder.export), attention=run.model.attention)
    made_of = writer_of(run, exported, tokenizer, "export")
    made_of |= {"method.distil": settings.model_dump(), "questions": _print(asked)}
    made_of |= {"data.questions.room": run.data.questions.room}
    decoding = decoding_of(
        run,
        tokenizer,
        positions=run.data.block_size,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )

    def line(number: int, ids: list[int]) -> dict[str, str]:
        own = own_tokens(ids, decoding)
        answer = tokenizer.decode(own, clean_up_tokenization_spaces=False)
        return line_of(asked[number], answer)

    with RowsFile(path, "the answers", made_of, len(asked)) as out:
        if out.complete:
            return
        with dist.agreed():
            prompts = QuestionEncoder(run.data, tokenizer).prompts(asked)
        write_continuations(
            out,
            lambda: writing_model(run, exported, tokenizer, context.device, "export"),
            prompts,
            decoding,
            line,
            batch=run.evaluation.micro_batch,
            doing="distil",
        )
    say(f"distil: answers to {len(asked)} questions: {path}")


def _print(asked: list[Question]) -> str:
    return fingerprint([[question.context, question.text] for question in asked])
