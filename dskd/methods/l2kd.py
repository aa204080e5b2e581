"""L2KD: learn a stream of language tasks, each taught by a model that has learnt it alone.

Chuang et al. 2020 (EMNLP), "Lifelong Language Knowledge Distillation", on LAMOL (Sun et al. 2020,
ICLR, "LAMOL: LAnguage MOdeling for Lifelong Language Learning"). A row is a question, whose answer
is learnt, and a text of its task, all of which is learnt, so that a model can write rows of the
tasks that it knows: they are replayed while the next one is learnt. Rows of the new task are taught
by its teacher's distributions (Word-KD), replayed ones by what stands in them.

Shape letters: B rows of a batch (those shown as questions, then the same as texts), N supervised
positions, M those of one term, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import (
    HOST,
    IGNORE,
    Batch,
    DenseTeacher,
    Positions,
    ProjectedTeacher,
    Signal,
    Term,
)
from dskd.continual.distil import Distil, distil_stage
from dskd.continual.earlier_tasks import IMPORTANCE, RowLoss, hooks_of, importance_stage
from dskd.continual.replay import Replay, check_replay, replay_stage
from dskd.continual.settings import Memories, Penalty
from dskd.data.prepared import RowBatch
from dskd.data.views import Reader, Shown, view_for
from dskd.engine.checkpoints import Selection
from dskd.engine.ds_edits import check_adam, check_edits
from dskd.engine.hooks import StepHooks
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.ops import positions_ce, positions_kd
from dskd.settings.run import Run
from dskd.settings.teachers import LiveTeacher

GROUPS = ("question_new", "question_replayed", "text_new", "text_replayed")
"""Of positions: each is in one of them, by how its row is shown and where that comes from."""
GROUPED_POSITIONS = "l2kd_positions"
"""Column of a batch, int64 [N]: its positions, group by group."""
LABEL_WEIGHTS = "l2kd_label_weights"
"""Column of a batch, float32 [N]: weights of the positions' cross entropies, group by group."""
ROW_GROUPS = f"{HOST}l2kd_groups"
"""Column of a batch, int64 [B] on the CPU: the group of each row, as its index."""
ROW_WEIGHTS = f"{HOST}l2kd_row_weights"
"""Column of a batch, float64 [B] on the CPU: the sum of the label weights of each row."""


class GroupPositions:
    """The :class:`~dskd.data.views.Reader` that sorts positions into the terms of the loss.

    Args:
        replayed: indices of the domains whose rows are replayed; those of others are new.
        answer: id of the answer token.
        weight: its weight among the labels.
        texts: whether the rows are shown as texts of their tasks, too.
    """

    def __init__(self, replayed: Sequence[int], answer: int, weight: float, *, texts: bool) -> None:
        self._replayed = np.array(replayed, np.int64)
        self._answer = answer
        self._weight = weight
        self._texts = texts

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """The four columns named above."""
        supervised_BT = shown.labels_BT != IGNORE
        count = len(rows.ids_B)
        replayed_B = np.isin(rows.domains_B, self._replayed)
        text_B = np.arange(count) >= (count // 2 if self._texts else count)
        group_B = 2 * text_B.astype(np.int64) + replayed_B
        weights_BT = np.where(shown.labels_BT == self._answer, self._weight, 1.0) * supervised_BT
        places_N = np.argsort(np.repeat(group_B, supervised_BT.sum(1)), kind="stable")
        return {
            GROUPED_POSITIONS: places_N,
            LABEL_WEIGHTS: weights_BT[supervised_BT][places_N].astype(np.float32),
            ROW_GROUPS: group_B,
            ROW_WEIGHTS: weights_BT.sum(1),
        }


class LifelongDistillation(Method):
    """Cross entropy of answers and of whole rows, of new rows in the place of which the divergence
    from a teacher of the task may stand."""

    terms: ClassVar[tuple[str, ...]] = ("question", "text", "question_kl", "text_kl")
    objectives: ClassVar[frozenset[str]] = frozenset({"causal"})

    kind: Literal["l2kd"] = "l2kd"
    word_kd: bool = False
    """Whether new rows are taught by the teacher's distributions, at answers and texts, in the
    place of their labels (Word-KD); the answers of Seq-KD are a matter of ``data.sources``."""
    text_weight: float = Field(0.25, ge=0)
    """Of the rows as texts of their tasks (lambda of LAMOL); 0: they are no texts."""
    temperature: float = Field(2.0, gt=0)
    """Of both distributions of the divergence."""
    answer_weight: float = Field(5.0, gt=0)
    """Of the answer token among the labels of a text, whose weighted mean the cross entropy is."""
    replay: Replay | None = None
    """The rows of replayed sources without a path, and how they are written; null: there are none.
    """
    distil: Distil | None = None
    """How the exported model answers the questions of the training rows, for other runs that name
    ``run:NAME`` as the path of questions (Seq-KD); null: it is not asked."""
    weighting: Literal["terms", "counts"] = "terms"
    """Of new rows against replayed ones, where the new are taught: ``terms``: divergence and cross
    entropy are a mean each, and count alike however many rows they are of, as in the original;
    ``counts``: both are divided by their counts together, so that each position counts alike."""
    penalty: Penalty | None = None
    """Pulls the weights that earlier tasks need back to where they were (EWC, MAS); null: nothing
    does."""
    memories: Memories | None = None
    """Rows of earlier tasks that no step may make worse (GEM, A-GEM); null: there are none."""
    adamw: Literal["torch", "original"] = "torch"
    """``original``: that of old transformers, whose ``eps`` is not divided by the bias correction
    and whose decay comes last: with the original's ``eps`` of 1e-4 its first steps are shorter."""

    @property
    def writes_replayed(self) -> bool:
        """Whether rows of earlier tasks are written."""
        return self.replay is not None

    @property
    def reads_memory(self) -> bool:
        """Whether these are taken from given ones, or earlier tasks are remembered by theirs."""
        return self.memories is not None or (self.replay is not None and self.replay.real)

    def stages(self) -> Sequence[Stage]:
        """Rows of earlier tasks before the data; once the model is exported, what it depends on,
        for the next task, and its answers."""
        stages = [] if self.replay is None else [replay_stage(self.replay)]
        if self.penalty is not None:
            stages.append(importance_stage(self.penalty, self._answers))
        return stages if self.distil is None else [*stages, distil_stage(self.distil)]

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse rows that are no questions or are shown otherwise than the loss counts, and where
        one is needed a teacher that is not live."""
        del config
        questions = run.data.questions
        if questions is None:
            raise ConfigError("data.questions: missing; method l2kd learns questions")
        if questions.modelling != (self.text_weight > 0):
            raise ConfigError(
                f"data.questions.modelling: {str(questions.modelling).lower()}, but "
                f"method.text_weight is {self.text_weight:g}"
            )
        if self.weighting == "counts" and not self.word_kd:
            raise ConfigError(
                "method.weighting: counts is of what method.word_kd teaches beside replayed rows; "
                "without it all rows have one count"
            )
        check_replay(self.replay, run, remembered=self.memories is not None)
        if self.word_kd and not isinstance(run.teacher, LiveTeacher):
            kind = "none" if run.teacher is None else run.teacher.kind
            raise ConfigError(f"teacher.kind: method.word_kd needs a live one, not {kind}")
        for part in (self.penalty, self.memories):
            if part is not None:
                part.check(run)
        if self.adamw == "original":
            check_adam(run, "method.adamw original")
            check_edits(run, "method.adamw original", gradients=False)

    def earlier_stages(self) -> Mapping[str, tuple[Path, Stage]]:
        """The importances that the penalty's are added to."""
        if self.penalty is None or self.penalty.folder is None:
            return {}
        (stage,) = (stage for stage in self.stages() if stage.name == IMPORTANCE)
        return {"penalty.earlier": (self.penalty.folder, stage)}

    def hooks(self, student: PreTrainedModel, context: StageContext) -> StepHooks | None:
        """The penalty, the projection of the gradient and the original's optimizer."""
        return hooks_of(
            student,
            context,
            self._answers(context),
            penalty=self.penalty,
            memories=self.memories,
            original_adamw=self.adamw == "original",
        )

    def _answers(self, context: StageContext) -> RowLoss:
        """The cross entropy of rows as questions alone, whoever teaches the run and whether or not
        it has texts."""
        alone = type(self)(text_weight=0.0)
        data, tokenizer = context.run.data, context.prepared.tokenizer
        questions = data.questions.model_copy(update={"modelling": False})
        view = view_for(data.model_copy(update={"questions": questions}), tokenizer, 0)
        return RowLoss(alone.loss, alone.counts, view, alone.readers(context))

    def selection(self) -> Selection | None:
        """None: what is learnt last is what the next task begins with."""
        return None

    def wants_teacher(self) -> bool:
        """Whether new rows are taught."""
        return self.word_kd

    def needs_teacher(self, step: int) -> bool:
        """At every step, or none."""
        del step
        return self.word_kd

    def columns(self) -> frozenset[str]:
        """Those of :class:`GroupPositions`."""
        return frozenset({GROUPED_POSITIONS, LABEL_WEIGHTS, ROW_GROUPS, ROW_WEIGHTS})

    def readers(self, context: StageContext) -> Sequence[Reader]:
        """The one that says which positions are of which term."""
        data = context.run.data
        replayed = [data.domains.index(domain) for domain in data.replayed_domains]
        tokenizer = context.prepared.tokenizer
        answer = tokenizer.convert_tokens_to_ids(data.questions.answer_token)
        return (GroupPositions(replayed, answer, self.answer_weight, texts=self.text_weight > 0),)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Label weights of cross entropies, positions of divergences; of both together, if so many
        is what either is divided by."""
        group_B = batch.columns[ROW_GROUPS]
        weights_B = batch.columns[ROW_WEIGHTS]
        counts = {}
        for name, groups in self._groups().items():
            summed_B = batch.counts_B if name.endswith("_kl") else weights_B
            here_B = torch.isin(group_B, torch.tensor(groups))
            counts[name] = float(summed_B[here_B].sum())
        if self.weighting == "counts":
            for name in [name for name in counts if not name.endswith("_kl")]:
                counts[name] = counts[f"{name}_kl"] = counts[name] + counts[f"{name}_kl"]
        return counts

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """``CE`` of questions and ``text_weight CE`` of texts; where new rows are taught,
        ``T^2 KL(teacher || student)`` of them instead, each over its own count."""
        del step
        places_N, weights_N = batch.columns[GROUPED_POSITIONS], batch.columns[LABEL_WEIGHTS]
        sizes = [
            int(batch.counts_B[batch.columns[ROW_GROUPS] == group].sum())
            for group in range(len(GROUPS))
        ]
        terms = {}
        for name, groups in self._groups().items():
            first = sum(sizes[: groups[0]])
            here = slice(first, first + sum(sizes[group] for group in groups))
            some = _part(positions, places_N[here])
            scale = self.text_weight if name.startswith("text") else 1.0
            if name.endswith("_kl"):
                assert isinstance(signal, ProjectedTeacher | DenseTeacher), signal
                heat = self.temperature**2
                losses = positions_kd(
                    some,
                    _part_of(signal, places_N[here]),
                    temperature=self.temperature,
                    weight=scale * heat,
                )
                parts = {name: losses.divergence_N.sum() * heat}
            else:
                losses = positions_ce(some, label_weight=weights_N[here] * scale)
                parts = {f"{name}_ce": (losses.label_N * weights_N[here]).sum()}
            terms[name] = Term(losses.total, parts)
        return terms

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """The groups of each term, those of one next to each other. The same on every rank and in
        every batch, whatever rows are in it: each term goes through the heads once."""
        shown = ("question", "text") if self.text_weight > 0 else ("question",)
        found: dict[str, tuple[int, ...]] = {}
        for number, name in enumerate(shown):
            new, replayed = 2 * number, 2 * number + 1
            if self.word_kd:
                found[f"{name}_kl"] = (new,)
            found[name] = (replayed,) if self.word_kd else (new, replayed)
        return found


def _part(positions: Positions, places_M: Tensor) -> Positions:
    """Some of the positions."""
    hidden_MD = positions.hidden_ND.index_select(0, places_M)
    return Positions(hidden_MD, positions.projection, positions.labels_N.index_select(0, places_M))


def _part_of(
    signal: ProjectedTeacher | DenseTeacher, places_M: Tensor
) -> ProjectedTeacher | DenseTeacher:
    """A teacher's signal at some of the positions."""
    if isinstance(signal, DenseTeacher):
        return DenseTeacher(signal.logits_NV.index_select(0, places_M))
    return replace(signal, hidden_NE=signal.hidden_NE.index_select(0, places_M))
