"""Rows of earlier tasks for the next one, made before its data is (LAMOL: Sun et al. 2020).

The model that a run starts as has learnt the earlier tasks, texts and all, and writes rows of them
behind their tokens: pseudo samples. Sample j of a task is fixed by the run's seed, the task and j,
whatever the number of ranks, the batch and the ZeRO stage (in 16 bits as far as their rounding
leaves the order of the logits), and a task gets its first well-formed ones in the order of j, as
many as asked; a stop changes nothing. In the original what is not well-formed is left out and not
made up for.

With ``real`` they are rows of ``data.memory`` instead. A row may come again only once all have; the
original draws with replacement.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.continual.memories import drawn_rows
from dskd.continual.writing_model import decoding_of, writer_of, writing_model
from dskd.data.layouts import layout_of, task_ids
from dskd.data.preparing import training_questions
from dskd.data.questions import Question, questions
from dskd.data.sources import content_hash
from dskd.data.tokenizers import load_tokenizer
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError, DataError, StoreError
from dskd.models.generate import continuations
from dskd.settings.base import Section
from dskd.settings.examples import ReplayedSource
from dskd.settings.folders import RunFolder, replay_file
from dskd.settings.run import Run
from dskd.system import dist
from dskd.system.files import read_manifest, write_manifest
from dskd.system.log import bar, say
from dskd.system.markup import html_table
from dskd.system.rows_file import RowsFile

SUMMARY = "summary.json"
_WHAT = "the replayed rows"


class Replay(Section):
    """How many rows of earlier tasks are replayed, and who writes them."""

    share: float = Field(0.2, gt=0)
    """Of the number of new rows, rounded up: as many replayed ones in all, of each earlier task
    equally many, rounded down."""
    real: bool = False
    """Take rows of ``data.memory``; else the model that the student starts as writes them."""
    top_k: int | None = Field(20, ge=1)
    """Each token is drawn from the so many most likely ones; null: from all."""
    temperature: float = Field(1.0, gt=0)
    """Of the draws."""
    rounds: int = Field(5, ge=1)
    """At most so many times as many samples are written as rows are asked for, since not all are
    well-formed."""


def replay_stage(settings: Replay) -> Stage:
    """The stage that writes the rows of replayed sources without a path; ``replay/summary.json``
    comes last."""
    return Stage(
        "replay",
        partial(write_replayed, settings),
        before="data",
        leaves=("replay",),
        whole=f"replay/{SUMMARY}",
        wanted=lambda run: bool(written_domains(run)),
        chosen=False,
        report=replay_section,
    )


def written_domains(run: Run) -> list[str]:
    """The earlier tasks of which this run has rows written."""
    found = [s for s in run.data.sources if isinstance(s, ReplayedSource) and s.path is None]
    return [source.domain for source in found]


def check_replay(settings: Replay | None, run: Run, *, remembered: bool) -> None:
    """Refuse settings by which no rows can be written, or those that are would not be read.

    Args:
        remembered: whether something else reads all of ``data.memory``.

    Raises:
        ConfigError: names the setting.
    """
    domains = written_domains(run)
    for number, source in enumerate(run.data.memory or ()):
        if settings is not None and not remembered and source.domain not in domains:
            text = f"no rows of {source.domain!r} are written from it (method.replay); leave it out"
            raise ConfigError(f"data.memory.{number}.domain: {text}")
    if settings is None or not run.data.replayed_domains:  # or the first task
        return
    if not domains:
        text = "every replayed source has a path, so that none is written; set it to null"
        raise ConfigError(f"method.replay: {text}")
    if settings.real:
        known = {source.domain: n for n, source in enumerate(run.data.memory or ())}
        for domain in domains:
            if domain not in known:
                raise ConfigError(f"data.memory: no questions of {domain!r} (method.replay.real)")
        return
    if run.model.path is None:
        text = "missing; by method.replay the model there writes rows of earlier tasks"
        raise ConfigError(f"model.path: {text}")
    if run.model.slice is not None:
        text = "by method.replay the model that the student starts as writes; it is not cut yet"
        raise ConfigError(f"model.slice: {text}")


def rows_of_each(new: int, share: float, tasks: int) -> int:
    """Rows of each earlier task.

    Args:
        new: number of new rows.
        share: of them, that are replayed.
        tasks: number of the earlier tasks.
    """
    return math.ceil(new * share) // tasks


def write_replayed(settings: Replay, context: StageContext) -> None:
    """Write what is missing of the rows, and then the summary; what is there must be what would
    be written now, until the run's inputs are noted, which tell of the rows (collective).

    Raises:
        ConfigError: there are too few new rows for a replayed one; a model or tokenizer that cannot
            be used.
        DataError: the sources cannot be read; no sample of a task is well-formed.
        StoreError: what is there was made otherwise.
        NonFiniteError: the model's logits are not finite.
    """
    run, folder = context.given, context.folder.replay
    domains = written_domains(run)
    done = (folder / SUMMARY).exists() and context.folder.inputs.exists()
    if not domains or dist.broadcast_object(done):
        return
    new = dist.on_rank0(lambda: sum(1 for _ in training_questions(run.data)))
    tasks = len(run.data.replayed_domains)
    asked = rows_of_each(new, settings.share, tasks)
    if not asked:
        raise ConfigError(
            f"method.replay.share: {settings.share:g} of {new} new rows are less than one for each "
            f"of {tasks} earlier tasks"
        )
    if settings.real:
        found = {domain: _write_real(run, domain, asked) for domain in domains}
    else:
        found = _PseudoSamples.of(settings, context, asked).write(domains)
    with dist.agreed():
        if dist.rank() == 0 and not (folder / SUMMARY).exists():
            write_manifest(folder / SUMMARY, {"tasks": found}, _WHAT)


def _write_real(run: Run, domain: str, asked: int) -> dict[str, Any]:
    sources = [source for source in run.data.memory or () if source.domain == domain]
    task = run.data.domains.index(domain)

    def made_of() -> dict[str, Any]:
        content = [[content_hash(source), source.documents] for source in sources]
        return {"data.memory": content, "rows": asked, "seed": run.seed, "task": task}

    def drawn() -> list[dict[str, str]]:
        every = [question for source in sources for question in questions(source)]
        return [line_of(q, q.answers[0]) for q in drawn_questions(every, asked, run.seed, task)]

    path = replay_file(run, domain)
    with RowsFile(path, _WHAT, dist.on_rank0(made_of), asked) as out:
        if not out.complete:
            first = out.keep(1)
            out.append(dist.on_rank0(drawn)[first:])
            out.finish()
            say(f"replay: {asked} rows of {domain} from data.memory")
    return {"asked": asked, "written": asked, "samples": None, "well_formed": None}


def drawn_questions(every: Sequence[Question], count: int, seed: int, task: int) -> list[Question]:
    """So many of the questions, in their order; each before any of them comes again."""
    times, rest = divmod(count, len(every))
    return [*every] * times + [every[n] for n in drawn_rows(len(every), rest, seed, task)]


def line_of(question: Question, answer: str) -> dict[str, str]:
    """A line of JSON that is read as this question with this answer."""
    return {"context": question.context, "question": question.text, "answer": answer}


@dataclass
class _PseudoSamples:
    """What the model that a run starts as writes of earlier tasks; it is loaded when it first
    writes, which may be never: after a kill."""

    settings: Replay
    context: StageContext
    asked: int
    tokenizer: PreTrainedTokenizerBase
    made_of: dict[str, Any]
    model: PreTrainedModel | None = None

    @staticmethod
    def of(settings: Replay, context: StageContext, asked: int) -> _PseudoSamples:
        run = context.given
        with dist.agreed():
            tokenizer = load_tokenizer(run.data, ())
        made_of = writer_of(run, run.model, tokenizer, "model")
        made_of |= {"method.replay": settings.model_dump(), "rows": asked}
        return _PseudoSamples(settings, context, asked, tokenizer, made_of)

    def write(self, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The files of these tasks; what is to be told of each."""
        return {domain: self._task(domain) for domain in domains}

    def _task(self, domain: str) -> dict[str, Any]:
        data = self.context.given.data
        task = data.domains.index(domain)
        prompt = task_ids(data, self.tokenizer)[task]
        path, most = replay_file(self.context.given, domain), self.settings.rounds * self.asked
        made_of = {**self.made_of, "task": task, "prompt": prompt}
        with RowsFile(path, _WHAT, made_of, self.asked) as out:
            there = out.complete
            if not there:
                self._write(out, task, prompt, domain, most)
            numbers = dist.on_rank0(lambda: _numbers(out, path, most))
        rows = len(numbers)
        samples = most if rows < self.asked else numbers[-1] + 1
        share = rows / samples
        told = {"asked": self.asked, "written": rows, "samples": samples, "well_formed": share}
        if there:
            return told
        if rows < self.asked:
            say(
                f"warning: method.replay.rounds: {self.settings.rounds}: of {most} samples of the "
                f"task {domain!r} {rows} are well-formed, {self.asked} were asked for"
            )
        say(f"replay: {rows} rows of {domain}, {share:.1%} of {samples} samples well-formed")
        return told

    def _write(self, out: RowsFile, task: int, prompt: int, domain: str, most: int) -> None:
        """Samples from the one behind the last that is kept, until there are enough."""
        run = self.context.given
        layout = layout_of(run.data, self.tokenizer)
        window = run.evaluation.micro_batch * dist.world()
        out.keep(1)
        numbers = dist.on_rank0(lambda: _numbers(out, replay_file(run, domain), most))
        # Windows begin where they would without a stop, so that in 16 bits batches are the same.
        first = numbers[-1] // window * window if numbers else 0
        rows = bisect_left(numbers, first)
        out.drop(rows)
        decoding = decoding_of(
            run,
            self.tokenizer,
            positions=run.data.block_size,  # the prompt's in the place of an end token
            top_k=self.settings.top_k,
            temperature=self.settings.temperature,
        )
        with bar(f"replaying {domain}") as report:
            while rows < self.asked and first < most:
                some = range(first, min(first + window, most))
                new = continuations(
                    self._loaded(),
                    [[prompt]] * len(some),
                    decoding,
                    numbers=[(task << 32) + number for number in some],
                    batch=run.evaluation.micro_batch,
                )
                parsed = [
                    {"ids": row, "sample": number}
                    for number, ids in zip(some, new, strict=True)
                    if (row := layout.parsed(ids)) is not None
                ][: self.asked - rows]
                out.append(parsed)
                rows, first = rows + len(parsed), some.stop
                report(rows, self.asked)
        if not rows:
            raise DataError(
                f"method.replay: of {most} samples of the task {domain!r} none is well-formed (has "
                f"exactly one {run.data.questions.answer_token}); has the model at model.path "
                "learnt to write rows of it (data.questions.modelling)?"
            )
        out.finish()

    def _loaded(self) -> PreTrainedModel:
        if self.model is None:
            run = self.context.given
            self.model = writing_model(run, run.model, self.tokenizer, self.context.device, "model")
        return self.model


def _numbers(out: RowsFile, path: Path, most: int) -> list[int]:
    """The samples that the rows of a file are."""
    found = [row.get("sample") if isinstance(row, dict) else None for row in out.rows()]
    whole = all(type(number) is int and 0 <= number < most for number in found)
    if not whole or found != sorted(set(found)):
        raise StoreError(f"{path}: damaged, its rows are no samples in their order; remove it")
    return found


def replay_section(runs: Mapping[str, RunFolder]) -> str:
    """What was replayed, one row a run and earlier task, for ``report.html``."""
    rows = []
    for name, folder in runs.items():
        path = folder.replay / SUMMARY
        if not path.exists():
            continue
        for domain, told in read_manifest(path, StoreError)["tasks"].items():
            samples, share = told["samples"], told["well_formed"]
            share = "-" if samples is None else f"{share:.1%} of {samples}"
            rows.append([name, domain, str(told["asked"]), str(told["written"]), share])
    if not rows:
        return ""
    header = ["run", "earlier task", "rows asked for", "replayed", "well-formed samples"]
    return "<h2>Replayed rows</h2>\n" + html_table(header, rows)
