"""Panels of language models: all of them teach every position, mixed by a rule, live or cached."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dskd.batch import Batch, MixedTeachers, MixedTopK, MixtureRule, TopKTeacher
from dskd.data.prepared import RowBatch
from dskd.data.views import Reader, Shown
from dskd.settings.teachers import CONFIDENT, PanelTeacher
from dskd.stores.logits import TOPK_IDS, TOPK_LOGPROBS, TOPK_TAIL, TOPK_TAIL_AT_1
from dskd.teachers.teacher import FrozenTeacher


def rule_of(panel: PanelTeacher) -> MixtureRule:
    """The rule that the settings of a panel of language models say, in their order."""
    mixture = panel.mixture
    assert mixture is not None, "the checks of settings refuse a panel without"
    given = mixture.weights
    weights = tuple(1.0 if given is None else given[name] for name in panel.teachers)
    if mixture.rule not in CONFIDENT:
        return MixtureRule(weights)
    return MixtureRule(weights, 0.0 if mixture.rule == "confidence_hard" else mixture.sharpness)


class FrozenMixture:
    """Frozen models that each see every batch.

    Every rank runs all of them, in one order: they may be sharded.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher], rule: MixtureRule) -> None:
        self._teachers = teachers
        self._rule = rule

    @torch.no_grad()
    def __call__(self, batch: Batch) -> MixedTeachers:
        """Run each model on the batch, up to its last linear map."""
        return MixedTeachers([teacher(batch) for teacher in self._teachers], self._rule)


def _column(name: str, index: int) -> str:
    """Column of a teacher's in a batch; see :class:`~dskd.stores.logits.CachedLogits`."""
    return f"panel_{name}_{index}"


class MixedLogits:
    """The reader of several caches' logits; each has columns of its own.

    Args:
        readers: of each cache, all of the same positions.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """See :class:`~dskd.data.views.Reader`."""
        return {
            _column(name, index): column
            for index, reader in enumerate(self._readers)
            for name, column in reader(rows, shown).items()
        }


class StoredMixture:
    """Teachers whose signals were stored: they are in the batch's columns, by the loader's
    :class:`MixedLogits`.

    Args:
        temperature: the temperature that the loader's tail masses belong to; where the rule asks
            for confidences, they have one at 1 beside it.
        vocabulary: number of real tokens.
    """

    def __init__(self, rule: MixtureRule, temperature: float, vocabulary: int) -> None:
        self._rule = rule
        self._tails = {temperature: TOPK_TAIL}
        if rule.sharpness != math.inf:
            self._tails = {1.0: TOPK_TAIL_AT_1} | self._tails
        self._vocabulary = vocabulary

    def __call__(self, batch: Batch) -> MixedTopK:
        """The caches' values at the positions of the batch."""
        parts = [self._part(batch, index) for index in range(len(self._rule.weights))]
        return MixedTopK(parts, self._rule, self._vocabulary)

    def _part(self, batch: Batch, index: int) -> TopKTeacher:
        columns = batch.columns
        tails = {heat: columns[_column(name, index)] for heat, name in self._tails.items()}
        ids_NK, logprobs_NK = (columns[_column(n, index)] for n in (TOPK_IDS, TOPK_LOGPROBS))
        return TopKTeacher(ids_NK, logprobs_NK, tails)
