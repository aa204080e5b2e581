"""What the teachers of a panel are worth, before any student is trained: how often each is right
within its own classes, and how often the surest of them is one that knows the row.

Of validation rows, by their stored scores; what takes labels is of the labelled ones.

Shape letters: R rows, N those of a batch, n teachers, C the student's classes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dskd.batch import UNLABELLED, Batch
from dskd.data.loader import evenly_spaced, make_batch
from dskd.data.prepared import Prepared
from dskd.engine.stage import StageContext
from dskd.errors import CheckpointError
from dskd.methods.integration import (
    confidences,
    integrated,
    label_map,
    margin,
    merged_logits,
    teacher_weights,
)
from dskd.settings.folders import RunFolder
from dskd.stores.panel_scores import Panelist, panelists, score_readers
from dskd.stores.uncertainty import stored_panel
from dskd.system import dist
from dskd.system.doing import next_one, pause
from dskd.system.files import read_record, write_manifest
from dskd.system.log import say
from dskd.system.markup import html_table

FILE = "panel.json"
"""In a run's folder."""

_ROWS = 1024  # read at once

By = Literal["passes", "logits"]
"""Confidences of the passes with dropout, or of the logits at the method's temperature."""

_BY: tuple[By, ...] = ("passes", "logits")


class _Part(BaseModel):
    """Numbers between 0 and 1, of the rows that they are a mean of; None: there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Confidence(_Part):
    """Mean confidence of a teacher on the rows of its classes, on others, and on all it is asked
    about, with a label or without."""

    own: float | None
    foreign: float | None
    every: float | None


class TeacherSummary(_Part):
    """One teacher.

    Attributes:
        labels: names of its classes.
        rows: labelled ones of these, about which it is asked.
        accuracy: on them.
    """

    labels: list[str]
    rows: int
    accuracy: float | None
    confidence: dict[By, Confidence]


class ChoiceSummary(_Part):
    """The surest teacher of each row.

    Attributes:
        selection: share of the rows where it is one that has the row's class.
        accuracy: share where what it says is right.
        margin: mean, by how much it is surer than the next one.
    """

    selection: float | None
    accuracy: float | None
    margin: float


class PanelSummary(_Part):
    """All of it.

    Attributes:
        rows: those that students are evaluated on.
        labelled: how many of them have a label.
        passes: with dropout; 1: a single one without.
        temperature: the method's.
        concatenated: accuracy of all logits together as one classifier's; of a class of several
            teachers the odds add up.
        choice: by either confidence.
        teachers: by name.
    """

    rows: int
    labelled: int
    passes: int
    temperature: float
    concatenated: float | None
    choice: dict[By, ChoiceSummary]
    teachers: dict[str, TeacherSummary]


def summarise_panel(context: StageContext, temperature: float) -> None:
    """Write the summary, unless it is there (collective).

    Args:
        temperature: of the teachers' distributions.

    Raises:
        StoreError: a teacher's scores of validation rows are missing or damaged.
    """
    path = context.folder.path / FILE
    if dist.broadcast_object(path.exists()):
        return
    run, prepared, view = context.run, context.prepared, context.validation_view
    found = panelists(run, prepared)
    readers = score_readers(run, view, found, "validation", confident=True)
    maps = list(teacher_maps(found, prepared).values())

    def summary() -> PanelSummary:
        rows = prepared.validation
        ids_R = evenly_spaced(len(rows), run.evaluation.rows)
        parts = []
        for first in range(0, len(ids_R), _ROWS):
            ids_N = ids_R[first : first + _ROWS]
            batch = make_batch(rows, view, ids_N, np.zeros_like(ids_N), readers)
            parts.append(answers(batch, maps, len(prepared.classes), temperature))
            next_one()
        pause()
        answered = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return summary_of(answered, found, maps, len(prepared.classes), temperature)

    made = dist.on_rank0(summary)
    with dist.agreed():
        if dist.rank() == 0:
            write_manifest(path, made.model_dump(), "what the teachers are worth")
    if made.labelled:
        choice = made.choice["passes"]
        say(
            f"panel: of {made.labelled:,} labelled validation rows the surest teacher has the class"
            f" of {choice.selection:.2%} and is right about {choice.accuracy:.2%}, all logits "
            f"together are right about {made.concatenated:.2%}"
        )


def teacher_maps(found: Sequence[Panelist], prepared: Prepared) -> dict[str, Tensor]:
    """The classes of each teacher as indices into the student's, int64 on the CPU, by its name.

    Raises:
        ConfigError: the student lacks one of them, or as
            :func:`~dskd.methods.integration.label_map`.
    """
    assert prepared.classes is not None
    return {
        each.name: label_map(each.labels, prepared.classes, f"{each.where}.labels")
        for each in found
    }


@torch.no_grad()
def answers(
    batch: Batch, maps: Sequence[Tensor], classes: int, temperature: float
) -> dict[str, Tensor]:
    """What a panel answers about the rows of a batch, which is on the CPU.

    Returns:
        By name ``labels`` [N], ``heard`` bool [N, n], ``said`` [N, n], the class that each teacher
        takes a row for, ``concatenated`` [N], that of all logits together; and by either confidence
        (``sure passes``) ``sure`` [N, n], ``surest`` [N], a teacher, ``chosen`` [N], the likeliest
        class if it is believed, and ``margin`` [N].
    """
    panel = stored_panel(batch, maps)
    said = [map_M[each.argmax(1)] for each, map_M in zip(panel.logits, maps, strict=True)]
    found = {
        "labels": batch.labels_N,
        "said": torch.stack(said, 1),
        "concatenated": merged_logits(panel, classes, "logsumexp").argmax(1),
    }
    here_Nn = torch.ones_like(found["said"], dtype=torch.bool)
    found["heard"] = here_Nn if panel.present_Nn is None else panel.present_Nn
    for by, judged in (("passes", panel), ("logits", replace(panel, confidence_Nn=None))):
        sure_Nn, present_Nn = confidences(judged, temperature), judged.present_Nn
        weights_Nn = teacher_weights(sure_Nn, present_Nn, hard=True, sharpness=1.0)
        found[f"sure {by}"] = sure_Nn
        found[f"surest {by}"] = weights_Nn.argmax(1)
        found[f"chosen {by}"] = integrated(judged, weights_Nn, classes, temperature).argmax(1)
        found[f"margin {by}"] = margin(sure_Nn, present_Nn)
    return found


def summary_of(
    found: Mapping[str, Tensor],
    teachers: Sequence[Panelist],
    maps: Sequence[Tensor],
    classes: int,
    temperature: float,
) -> PanelSummary:
    """The summary of the :func:`answers` about all rows."""
    labels_R, heard_Rn = found["labels"], found["heard"]
    known_R = labels_R != UNLABELLED
    has_nC = torch.zeros(len(maps), classes, dtype=torch.bool)
    for index, map_M in enumerate(maps):
        has_nC[index, map_M] = True
    own_Rn = has_nC.T[labels_R.clamp(min=0)] & known_R[:, None]
    choice = {
        by: ChoiceSummary(
            selection=_mean(own_Rn.gather(1, found[f"surest {by}"][:, None])[:, 0], known_R),
            accuracy=_mean(found[f"chosen {by}"] == labels_R, known_R),
            margin=found[f"margin {by}"].double().mean().item(),
        )
        for by in _BY
    }

    def teacher(index: int) -> TeacherSummary:
        own_R, heard_R = own_Rn[:, index], heard_Rn[:, index]
        confidence = {
            by: Confidence(
                own=_mean(found[f"sure {by}"][:, index], heard_R & own_R),
                foreign=_mean(found[f"sure {by}"][:, index], heard_R & known_R & ~own_R),
                every=_mean(found[f"sure {by}"][:, index], heard_R),
            )
            for by in _BY
        }
        return TeacherSummary(
            labels=list(teachers[index].labels),
            rows=int((heard_R & own_R).sum()),
            accuracy=_mean(found["said"][:, index] == labels_R, heard_R & own_R),
            confidence=confidence,
        )

    return PanelSummary(
        rows=len(labels_R),
        labelled=int(known_R.sum()),
        passes=teachers[0].layout.passes,
        temperature=temperature,
        concatenated=_mean(found["concatenated"] == labels_R, known_R),
        choice=choice,
        teachers={str(each.name): teacher(index) for index, each in enumerate(teachers)},
    )


def _mean(values_R: Tensor, where_R: Tensor) -> float | None:
    return values_R[where_R].double().mean().item() if where_R.any() else None


def read_summary(path: Path) -> PanelSummary:
    """The summary in a file.

    Raises:
        CheckpointError: it is missing, damaged, or not as :func:`summarise_panel` writes it.
    """
    return read_record(path, PanelSummary, CheckpointError)


def panel_section(runs: Mapping[str, RunFolder]) -> str:
    """HTML of the runs' panels, one that several runs have once."""
    named: dict[str, tuple[PanelSummary, list[str]]] = {}
    for name, run in runs.items():
        if (run.path / FILE).exists():
            summary = read_summary(run.path / FILE)
            named.setdefault(summary.model_dump_json(), (summary, []))[1].append(name)
    return "\n".join(_html(summary, names) for summary, names in named.values())


def _html(summary: PanelSummary, names: Sequence[str]) -> str:
    rows, passes = f"{summary.rows:,} validation rows", summary.passes
    how = f"{passes} passes with dropout" if passes > 1 else "one pass without dropout"
    choices = [
        [f"by {by}", _share(each.selection), _share(each.accuracy), f"{each.margin:.4f}"]
        for by, each in summary.choice.items()
    ]
    teachers = []
    for name, each in summary.teachers.items():
        numbers = [
            getattr(each.confidence[by], part) for by in _BY for part in ("own", "foreign", "every")
        ]
        about = [name, str(len(each.labels)), f"{each.rows:,}", _share(each.accuracy)]
        teachers.append([*about, *("-" if n is None else f"{n:.4f}" for n in numbers)])
    header = [f"confidence by {by}, {on}" for by in _BY for on in ("own rows", "others", "all")]
    return "\n".join(
        [
            f"<h2>What the teachers know: {html.escape(', '.join(names))}</h2>",
            f"<p>Of {rows}, {summary.labelled:,} of them labelled; {how}; logits at temperature "
            f"{summary.temperature:g}. All logits together are right about "
            f"{_share(summary.concatenated)}.</p>",
            html_table(["surest teacher", "has the class", "is right", "mean margin"], choices),
            html_table(["teacher", "classes", "its rows", "accuracy on them", *header], teachers),
        ]
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
