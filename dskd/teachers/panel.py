"""Panels: several teachers of different classes, asked about the same rows, from stores of their
scores or live. A loss cannot tell the two apart.

Shape letters: N supervised positions (one a row), n teachers, M classes of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dskd.batch import Batch, Panel
from dskd.data.prepared import Prepared
from dskd.data.views import Reader, View
from dskd.methods.base import build_method
from dskd.methods.panel_summary import teacher_maps
from dskd.models.families import positions_of
from dskd.models.frozen import evaluating
from dskd.settings.run import Run
from dskd.settings.teachers import PanelTeacher
from dskd.stores.dropout_scores import DropoutScorer
from dskd.stores.panel_scores import heard, panelists, score_readers
from dskd.stores.uncertainty import (
    PANEL_CONFIDENCE,
    PANEL_PRESENT,
    ConfidenceFile,
    PanelPresence,
    confidence,
    stored_panel,
)
from dskd.system import dist


def panel_teacher(
    run: Run, prepared: Prepared, view: View, device: torch.device
) -> tuple[StoredPanelists | LivePanelists | PanelistsWithStates, tuple[Reader, ...]]:
    """The panel of a run, and what the loader reads for it (collective).

    Raises:
        ConfigError: a teacher's classes are not the student's.
        StoreError: a store or a file of confidences is missing, damaged, or of something else.
    """
    panel = run.teacher
    assert isinstance(panel, PanelTeacher), panel
    found = panelists(run, prepared)
    with dist.agreed():
        maps = [map_M.to(device) for map_M in teacher_maps(found, prepared).values()]
        readers: list[Reader] = []
        if panel.confidence.endswith(".npy"):
            file = Path(panel.confidence)
            readers.append(ConfidenceFile(file, len(prepared.train), len(found)))
    confident = panel.confidence == "passes"
    if panel.scores == "stored":
        stored = score_readers(run, view, found, "train", confident=confident)
        return StoredPanelists(maps), (*readers, *stored)
    with dist.agreed():
        heard_Dn = heard(run, prepared)
    if heard_Dn is not None:
        readers.append(PanelPresence(heard_Dn))
    if build_method(run.method).reads_states:
        models = [each.build(run, device) for each in found]
        return PanelistsWithStates(models, maps), tuple(readers)
    scorers = []
    for each in found:
        model = each.build(run, device)

        def logits(batch: Batch, model: torch.nn.Module = model) -> Tensor:
            return positions_of(model, batch).logits_NV

        passes = panel.passes if confident else 1
        scorers.append(
            DropoutScorer(model, logits, passes=passes, at_once=panel.at_once, seed=run.seed)
        )
    return LivePanelists(scorers, maps, confident=confident), tuple(readers)


class StoredPanelists:
    """Teachers whose scores the loader reads (:class:`~dskd.stores.uncertainty.StoredPanel`).

    Args:
        maps: of each teacher int64 [M], on the device; see :class:`~dskd.batch.Panel`.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self._maps = maps

    def __call__(self, batch: Batch) -> Panel:
        """The panel of the batch's columns."""
        return stored_panel(batch, self._maps)


class LivePanelists:
    """Frozen classifiers that are asked about every batch, with all their passes.

    Every rank asks all of them, in one order: they may be sharded.

    Args:
        scorers: of each teacher.
        maps: as for :class:`StoredPanelists`.
        confident: whether confidences are those of the scorers' passes; else they are found from
            the logits, at the temperature of training. A column :data:`PANEL_CONFIDENCE` that the
            loader read comes before both.
    """

    def __init__(
        self, scorers: Sequence[DropoutScorer], maps: Sequence[Tensor], *, confident: bool
    ) -> None:
        self._scorers = scorers
        self._maps = maps
        self._confident = confident

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Panel:
        """Ask each teacher."""
        scores = [scorer(batch) for scorer in self._scorers]
        logits = [each.logits_NC for each in scores]
        confidence_Nn = batch.columns.get(PANEL_CONFIDENCE)
        if confidence_Nn is None and self._confident:
            found = [confidence(each.entropy_N, each.logits_NC.shape[1]) for each in scores]
            confidence_Nn = torch.stack(found, 1)
        return Panel(logits, self._maps, confidence_Nn, batch.columns.get(PANEL_PRESENT))


class PanelistsWithStates:
    """Frozen classifiers whose hidden states a method reads, too; asked as :class:`LivePanelists`
    are, but by one pass each, without dropout.

    Args:
        models: the teachers.
        maps: as for :class:`StoredPanelists`.
    """

    def __init__(self, models: Sequence[torch.nn.Module], maps: Sequence[Tensor]) -> None:
        self._models = models
        self._maps = maps

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Panel:
        """Ask each teacher."""
        logits, states = [], []
        for model in self._models:
            with evaluating(model):
                found = positions_of(model, batch, states=True)
                logits.append(found.logits_NV)
                states.append(found.states)
        columns = batch.columns
        confidence_Nn, present_Nn = columns.get(PANEL_CONFIDENCE), columns.get(PANEL_PRESENT)
        return Panel(logits, self._maps, confidence_Nn, present_Nn, states)
