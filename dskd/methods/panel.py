"""What all methods share that are taught by a panel of classifiers: their settings, the stage that
asks the teachers, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig

from dskd.batch import Batch, Panel, Positions, Signal, Term
from dskd.data.loader import evenly_spaced
from dskd.data.prepared import Prepared
from dskd.data.views import Reader, View
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError, DataError
from dskd.methods.integration import Overlap, vkd_term
from dskd.methods.metrics import TEACHER_KL, AnyMetric, Metric, RowScores, has_labels
from dskd.methods.panel_summary import FILE, panel_section, summarise_panel, teacher_maps
from dskd.settings.parsing import nearest
from dskd.settings.run import Run
from dskd.settings.teachers import PanelMember, PanelTeacher, each_teacher, section_name
from dskd.stores.dropout_scores import refuse_without_dropout, with_dropout
from dskd.stores.panel_scores import Part, fill_scores, heard, panelists, score_readers
from dskd.stores.uncertainty import ConfidenceFile, stored_panel
from dskd.system import dist
from dskd.system.log import say


class PanelMethod(RowScores):
    """Settings and checks of a method whose teachers are a panel; no row needs a label."""

    compares_with_teachers: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("rows",)
    objectives: ClassVar[frozenset[str]] = frozenset({"classification"})
    weighs_teachers: ClassVar[bool] = False
    """Whether it plays a part how sure a teacher is of a row."""

    temperature: float = Field(1.0, gt=0)
    """Softens the distributions of teachers and student."""
    weight: float = Field(1.0, gt=0)
    """Of the divergence."""

    def wants_teacher(self) -> bool:
        """Always."""
        return True

    def needs_teacher(self, step: int) -> bool:
        """At each step."""
        del step
        return True

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """:meth:`distilled`, summed over the rows and logged as ``kl``."""
        del batch, step
        return {"rows": self.distilled(positions.logits_NV, panel_of(signal))}

    def metrics(self, context: StageContext) -> tuple[AnyMetric, ...]:
        """All that are named, the accuracy within each teacher's classes, and the KL from the
        teachers. Rows without a label have the last one only, unless a label selects."""
        maps = teacher_maps(panelists(context.run, context.prepared), context.prepared)
        classes = {name: map_M.tolist() for name, map_M in maps.items()}
        required = context.run.evaluation.select == "metric"
        labelled = self.row_metric(
            classes, len(context.prepared.classes or ()) or None, required=required
        )
        return (labelled, self.teacher_kl([map_M.to(context.device) for map_M in maps.values()]))

    def teacher_kl(self, maps: Sequence[Tensor]) -> Metric:
        """The KL of :meth:`distilled`, a mean over all rows, with a label or without.

        Args:
            maps: of each teacher int64 [M], on the device; see :class:`~dskd.batch.Panel`.
        """

        def sums(positions: Positions, batch: Batch) -> Tensor:
            term = self.distilled(positions.logits_NV, stored_panel(batch, maps))
            kl = term.parts["kl"].double()
            return torch.stack([kl, kl.new_tensor(len(positions.labels_N))])

        return Metric(sums, lambda sums: {TEACHER_KL: sums[0] / sums[1]})

    def distilled(self, student_NC: Tensor, panel: Panel) -> Term:
        """The divergence of the student from what the method makes of the teachers, summed over the
        rows; its part ``kl`` is that of rows that all count alike."""
        raise NotImplementedError

    def evaluation_readers(self, context: StageContext) -> Sequence[Reader]:
        """What adds the teachers' stored scores of validation rows."""
        run = context.run
        found, confident = panelists(run, context.prepared), run.teacher.confidence != "logits"
        view = context.validation_view
        return score_readers(run, view, found, "validation", confident=confident)

    def stages(self) -> Sequence[Stage]:
        """The one that asks the teachers, and the one that says what they are worth."""

        def summarise(context: StageContext) -> None:
            summarise_panel(context, self.temperature)

        return (
            Stage("scores", ask_teachers, "train", ("cache",)),
            Stage("panel", summarise, "train", (FILE,), FILE, report=panel_section),
        )

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse other teachers than a panel of classifiers, rows of numbers, confidences of no
        file, domains without rows, and metrics without their library."""
        del config
        self.check_metrics(run)
        kind = getattr(self, "kind", "")
        if not isinstance(run.teacher, PanelTeacher):
            found = "none" if run.teacher is None else run.teacher.kind
            raise ConfigError(f"teacher.kind: method {kind} needs a panel, not {found}")
        if run.data.regression:
            raise ConfigError(
                f"data.sources: method {kind} is of classes, but the rows have numbers (target)"
            )
        if not self.weighs_teachers:
            _refuse_confidence(run.teacher, kind)
        file = run.teacher.confidence
        if file.endswith(".npy") and not Path(file).is_file():
            raise ConfigError(f"teacher.confidence: there is no file {file}")
        domains = [source.domain for source in (*run.data.sources, *(run.data.validation or ()))]
        for name, member in each_teacher(run.teacher).items():
            _check_member(run.teacher, member, section_name(name), domains)

    def check_teacher_model(self, run: Run, config: PreTrainedConfig, where: str) -> None:
        """Refuse several passes of a model without dropout."""
        if not isinstance(run.teacher, PanelTeacher) or not run.teacher.asks_passes:
            return
        if run.teacher.dropout is not None:
            config = with_dropout(config, run.teacher.dropout)
        refuse_without_dropout(config, run.teacher.passes, where)


def _refuse_confidence(panel: PanelTeacher, kind: str) -> None:
    """Refuse what is found or read for nothing by a method that takes all teachers alike. Of stored
    scores passes are a part, for other students and for what the teachers are worth."""
    if panel.confidence.endswith(".npy") or (panel.scores == "live" and panel.asks_passes):
        raise ConfigError(
            f"teacher.confidence: {panel.confidence}, but method {kind} does not ask how sure a "
            f"teacher is; set it to logits, for which there is nothing to find"
        )


def _check_member(
    panel: PanelTeacher, member: PanelMember, where: str, domains: Sequence[str]
) -> None:
    for domain in member.domains or ():
        if domain not in domains:
            text = f"no source has the domain {domain!r}{nearest(domain, domains)}"
            raise ConfigError(f"{where}.domains: {text}")
    if member.own_tokenizer and member.model.path is None:
        raise ConfigError(f"{where}.own_tokenizer: a random model has none; set {where}.model.path")
    if member.own_tokenizer and panel.scores == "live":
        raise ConfigError(
            f"{where}.own_tokenizer: live teachers read the student's tokens; set teacher.scores "
            f"to stored"
        )


class AllLogits(PanelMethod):
    """Settings of a method by which the logits of all teachers are one classifier's."""

    squared: bool = True
    """Whether T^2 multiplies the KL."""
    overlap: Overlap = "logsumexp"
    """What a class gets that several teachers have: the log of the summed exponentials of their
    logits, or their ``mean``."""

    def distilled(self, student_NC: Tensor, panel: Panel) -> Term:
        """The KL from the softmax of all logits together."""
        settings = self.model_dump(include={"temperature", "squared", "overlap", "weight"})
        return vkd_term(student_NC, panel, **settings)


def panel_of(signal: Signal | None) -> Panel:
    """The signal of a method of panels, which has no other."""
    assert isinstance(signal, Panel), signal
    return signal


def _refuse_unlabelled(run: Run, prepared: Prepared) -> None:
    """Refuse to select by labels that no row has, before hours go into the teachers."""
    if run.evaluation.select == "metric" and not has_labels(run, prepared):
        taken = len(evenly_spaced(len(prepared.validation), run.evaluation.rows))
        raise DataError(
            f"data.validation: none of the {taken} validation rows has a label; set "
            f"evaluation.select to {TEACHER_KL} or last, which take none"
        )


def ask_teachers(context: StageContext) -> None:
    """Store what each teacher says of the training rows, unless they are asked live, and of the
    validation rows, after a look at what they all are (collective).

    Raises:
        ConfigError: a teacher's classes are not the student's, or as
            :func:`~dskd.stores.panel_scores.fill_scores`.
        DataError: no validation row has a label, and ``evaluation.select`` does not do without.
        StoreError: a file of confidences is none, or of other rows or teachers; or as of scores.
    """
    run, prepared = context.run, context.prepared
    found = panelists(run, prepared)
    heard(run, prepared)
    teacher_maps(found, prepared)
    _refuse_unlabelled(run, prepared)
    views: dict[Part, View] = {"validation": context.validation_view}
    if run.teacher.scores == "stored":
        views = {"train": context.view, **views}
    if run.teacher.confidence.endswith(".npy"):
        say(
            f"scores: {run.teacher.confidence} is of training rows; of validation rows it is the "
            f"passes that say how sure a teacher is"
        )
        with dist.agreed():  # before hours go into scores that it is not of
            ConfidenceFile(Path(run.teacher.confidence), len(prepared.train), len(found))
    verify = run.until == "scores"  # else later stages open them
    fill_scores(run, views, found, context.device, verify=verify)
