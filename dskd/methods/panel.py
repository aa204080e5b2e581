"""What all methods share that are taught by a panel of classifiers: their settings, the stage that
asks the teachers, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedConfig

from dskd.batch import Panel, Signal
from dskd.data.views import View
from dskd.engine.stage import Stage, StageContext
from dskd.errors import ConfigError
from dskd.methods.metrics import AnyMetric, RowScores
from dskd.methods.panel_summary import FILE, panel_section, summarise_panel, teacher_maps
from dskd.models.configs import config_at_hand
from dskd.settings.parsing import nearest
from dskd.settings.run import Run
from dskd.settings.teachers import PanelMember, PanelTeacher, each_teacher, section_name
from dskd.stores.dropout_scores import refuse_without_dropout, with_dropout
from dskd.stores.panel_scores import Part, fill_scores, heard, panelists


class PanelMethod(RowScores):
    """Settings and checks of a method whose teachers are a panel; no row needs a label."""

    terms: ClassVar[tuple[str, ...]] = ("rows",)
    objectives: ClassVar[frozenset[str]] = frozenset({"classification"})

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

    def metrics(self, context: StageContext) -> tuple[AnyMetric, ...]:
        """All that are named, and the accuracy within each teacher's classes."""
        maps = teacher_maps(panelists(context.run, context.prepared), context.prepared)
        return (self.row_metric({name: map_M.tolist() for name, map_M in maps.items()}),)

    def stages(self) -> Sequence[Stage]:
        """The one that asks the teachers, and the one that says what they are worth."""

        def summarise(context: StageContext) -> None:
            summarise_panel(context, self.temperature)

        return (
            Stage("scores", ask_teachers, "train", ("cache",)),
            Stage("panel", summarise, "train", (FILE,), FILE, report=panel_section),
        )

    def check(self, run: Run, config: PreTrainedConfig | None) -> None:
        """Refuse other teachers than a panel of classifiers, rows of numbers, domains without a
        teacher, several passes of a model without dropout, and metrics without their library."""
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
        domains = [source.domain for source in (*run.data.sources, *(run.data.validation or ()))]
        for name, member in each_teacher(run.teacher).items():
            _check_member(run.teacher, member, section_name(name), domains)


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
    # What an earlier run exports is not there yet; it is looked at before it is asked.
    if member.model.path is None or Path(member.model.path).is_dir():
        config = config_at_hand(member.model, f"{where}.model")
        if panel.dropout is not None:
            config = with_dropout(config, panel.dropout)
        if panel.asks_passes:
            refuse_without_dropout(config, panel.passes, f"{where}.model")


def panel_of(signal: Signal | None) -> Panel:
    """The signal of a method of panels, which has no other."""
    assert isinstance(signal, Panel), signal
    return signal


def ask_teachers(context: StageContext) -> None:
    """Store what each teacher says of the training rows, unless they are asked live, and of the
    validation rows, after a look at what they all are (collective).

    Raises:
        ConfigError: a teacher's classes are not the student's, or as
            :func:`~dskd.stores.panel_scores.fill_scores`.
    """
    run, prepared = context.run, context.prepared
    found = panelists(run, prepared)
    heard(run, prepared)
    teacher_maps(found, prepared)
    views: dict[Part, View] = {"validation": context.validation_view}
    if run.teacher.scores == "stored":
        views = {"train": context.view, **views}
    verify = run.until == "scores"  # else later stages open them
    fill_scores(run, views, found, context.device, verify=verify)
