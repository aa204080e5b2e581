"""What the exported model answers to the questions of named sets, and how that is scored; its
answers to each set are in ``<out>/answers/<set>.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dskd.data.json_files import checked_text, json_rows, row_value
from dskd.data.tokenizers import tokenizer_fingerprint, vocabulary_size
from dskd.engine.stage import StageContext
from dskd.errors import StoreError
from dskd.models.build import model_fingerprint
from dskd.models.continuation_files import own_tokens, write_continuations
from dskd.models.families import longest_row
from dskd.models.generate import Decoding
from dskd.runs.named_sets import AskedSet, answer_sets, asked_questions
from dskd.settings.model import Model
from dskd.system import dist
from dskd.system.log import say
from dskd.system.rows_file import RowsFile
from dskd.tasks.answers import ANSWER_METRICS, Answers
from dskd.training.evaluation import Scores


def answer_scores(context: StageContext, model: PreTrainedModel) -> Scores:
    """The scores of each set that has a metric of answers, by its name (collective). What is there
    of a file is gone on with.

    Args:
        model: the exported one, whole on each rank's device, or sharded by ZeRO-3.

    Raises:
        StoreError, DataError: a file of answers is of another model or other questions, or damaged.
        DiskError: it cannot be written.
        NonFiniteError: the model's logits are not finite.
    """
    found: Scores = {}
    sets = answer_sets(context.run)
    # Once for all sets: the weights are hashed for it.
    writer = dist.on_rank0(lambda: _writer(context)) if sets else {}
    for name, own in sets.items():
        asked = dist.on_rank0(lambda own=own: asked_questions(context, own))
        made_of = writer | {"questions": asked.fingerprint, "longest": asked.longest}
        path = context.folder.answers / f"{name}.jsonl"
        with RowsFile(path, f"the answers to set {name}", made_of, len(asked.questions)) as out:
            if not out.complete:
                say(f"{name}: {len(asked.questions)} questions, to be answered in {path}")
                _answer(context, model, asked, out, name)
        compute = ANSWER_METRICS[own.metric].compute
        found[name] = dist.on_rank0(
            lambda asked=asked, path=path, compute=compute: compute(_written(path, asked))
        )
    return found


def _writer(context: StageContext) -> dict[str, Any]:
    """All that the answers to any questions depend on."""
    export = Model(path=str(context.folder.export))
    return {
        "export": model_fingerprint(export, seed=0, where="export"),
        "tokenizer": tokenizer_fingerprint(context.prepared.tokenizer),
    }


def _answer(
    context: StageContext, model: PreTrainedModel, asked: AskedSet, out: RowsFile, name: str
) -> None:
    """Write the answers that are missing."""
    tokenizer = context.prepared.tokenizer
    decoding = Decoding(
        longest=asked.longest,
        positions=longest_row(model.config),
        vocabulary=vocabulary_size(tokenizer),
        ends=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
    )

    def line(number: int, ids: list[int]) -> dict[str, Any]:
        question, own = asked.questions[number], own_tokens(ids, decoding)
        return {
            **({"context": question.context} if question.context else {}),
            "question": question.text,
            "answer": tokenizer.decode(own, clean_up_tokenization_spaces=False),
            "references": list(question.answers),
        }

    how = {"batch": context.run.evaluation.micro_batch, "doing": f"answering {name}"}
    write_continuations(out, lambda: model, asked.prompts, decoding, line, **how)


def _written(path: Path, asked: AskedSet) -> Answers:
    """What a whole file holds."""
    predicted_R = [
        checked_text(row_value(row, "answer", place), place, "under the key 'answer'")
        for place, row in json_rows(path, int)
    ]
    if len(predicted_R) != len(asked.questions):
        text = f"{len(predicted_R)} answers to {len(asked.questions)} questions"
        raise StoreError(f"{path}: damaged, {text}")
    references_R = [question.answers for question in asked.questions]
    return Answers(predicted_R, references_R, [question.detail for question in asked.questions])
