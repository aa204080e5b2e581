"""Panels: several teachers of different classes, asked about the same rows, from stores of their
scores or live. A loss cannot tell the two apart.

Shape letters: N supervised positions (one a row), n teachers, M classes of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dskd.batch import Batch, Panel
from dskd.stores.uncertainty import (
    PANEL_CONFIDENCE,
    PANEL_PRESENT,
    confidence,
    panel_logits,
)
from dskd.teachers.dropout_scores import DropoutScorer


class StoredPanelists:
    """Teachers whose scores the loader reads (:class:`~dskd.stores.uncertainty.StoredPanel`).

    Args:
        maps: of each teacher int64 [M], on the device; see :class:`~dskd.batch.Panel`.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self._maps = maps

    def __call__(self, batch: Batch) -> Panel:
        """The panel of the batch's columns."""
        columns = batch.columns
        logits = [columns[panel_logits(index)] for index in range(len(self._maps))]
        return Panel(logits, self._maps, columns.get(PANEL_CONFIDENCE), columns[PANEL_PRESENT])


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
        return Panel(logits, self._maps, confidence_Nn)
