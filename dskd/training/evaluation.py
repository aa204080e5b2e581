"""Metrics of a student on named sets of rows, the same for every stage and world size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dskd.batch import Batch
from dskd.data.loader import evenly_spaced, make_batch
from dskd.data.prefetch import prefetch
from dskd.data.prepared import RowSet
from dskd.data.views import Reader, View
from dskd.errors import ConfigError, DataError
from dskd.methods.metrics import AnyMetric, ValueMetric
from dskd.models.frozen import evaluating
from dskd.system import dist
from dskd.system.device import Fetched
from dskd.system.doing import next_one, pause
from dskd.training.objective import Objective

VALIDATION = "eval"
"""What the set of the validation rows is called."""

Scores = dict[str, dict[str, float]]
"""Results of the metrics by name, for each set by its name."""


@dataclass(frozen=True)
class EvaluationSet:
    """Rows that a student is evaluated on.

    Attributes:
        name: of the set; results are keyed ``<name>_<metric>``.
        rows: all rows.
        view: what the student sees of them; they are seen as in epoch 0.
        limit: use only so many of them, evenly spaced; None: all.
        readers: add columns to the batches, which metrics read.
        further: metrics of this set alone.
    """

    name: str
    rows: RowSet
    view: View
    limit: int | None = None
    readers: Sequence[Reader] = ()
    further: Sequence[AnyMetric] = ()


def by_key(scores: Scores) -> dict[str, float]:
    """The results in one dict, keyed ``<set>_<metric>``.

    Raises:
        ConfigError: two of them would have one key.
    """
    found: dict[str, float] = {}
    for name, results in scores.items():
        for metric, value in results.items():
            key = f"{name}_{metric}"
            if key in found:
                raise ConfigError(f"evaluation.sets.{name}: two results are called {key}")
            found[key] = value
    return found


@torch.no_grad()
def evaluate(
    objective: Objective,
    sets: Sequence[EvaluationSet],
    metrics: Sequence[AnyMetric],
    *,
    micro_batch: int,
    device: torch.device,
) -> Scores:
    """Results of the metrics on each of the sets, all of different names, in eval mode, by forward
    passes of ``micro_batch`` rows (collective). The student is in its engine or plain.

    Raises:
        DataError: no position of a set is supervised.
    """
    with evaluating(objective):
        return {
            each.name: _evaluate(objective, each, (*metrics, *each.further), micro_batch, device)
            for each in sets
        }


def _evaluate(
    objective: Objective,
    each: EvaluationSet,
    metrics: Sequence[AnyMetric],
    micro_batch: int,
    device: torch.device,
) -> dict[str, float]:
    """Every rank makes the same number of forward passes, as ZeRO-3 needs: a rank without rows left
    repeats the first one without counting it."""
    row_ids = evenly_spaced(len(each.rows), each.limit)
    share = -(-len(row_ids) // dist.world())
    own = row_ids[dist.rank() * share : (dist.rank() + 1) * share]
    supervised = 0
    taken = _Taken(metrics)
    firsts = range(0, share, micro_batch)

    def made(first: int) -> Batch:
        row_ids_B = own[first : first + micro_batch]
        given_B = row_ids_B if len(row_ids_B) else row_ids[:1]
        return make_batch(each.rows, each.view, given_B, np.zeros_like(given_B), each.readers)

    with closing(prefetch(map(made, firsts), device)) as batches:
        for first, sent in zip(firsts, batches, strict=True):
            counted = first < len(own)
            taken.add(objective.forward_evaluation(sent.on_device(), metrics), counted=counted)
            supervised += counted * sent.batch.supervised
            next_one()
    pause()
    everywhere = dist.Summing([supervised])
    over_all = taken.everywhere()
    if everywhere.sums() == [0]:
        count = len(row_ids)
        of = "validation rows" if each.name == VALIDATION else f"rows of set {each.name}"
        raise DataError(f"no token of the {count} {of} is predicted; use more rows")
    results: dict[str, float] = {}
    for metric, values in zip(metrics, over_all, strict=True):
        named = metric.results(values)
        assert not results.keys() & named.keys(), f"two metrics named {results.keys() & named}"
        results |= named
    return results


class _Taken:
    """What metrics took of the batches so far, on the device: the host waits for it once."""

    def __init__(self, metrics: Sequence[AnyMetric]) -> None:
        self._metrics = metrics
        self._sums: dict[int, Tensor] = {}
        self._values: dict[int, list[Tensor]] = {}

    def add(self, found: Sequence[Tensor], *, counted: bool) -> None:
        """Take each metric's of one batch; of one that is not counted, only their shapes."""
        for n, (metric, each) in enumerate(zip(self._metrics, found, strict=True)):
            if isinstance(metric, ValueMetric):
                self._values.setdefault(n, []).append(each if counted else each[:0])
            else:
                own = each if counted else torch.zeros_like(each)
                self._sums[n] = self._sums[n] + own if n in self._sums else own

    def everywhere(self) -> list[Any]:
        """Over all ranks (collective): the sums of each metric, or its values in the order of the
        rows, which follow each other from rank to rank."""
        found = {n: dist.sum_over_ranks(total) for n, total in self._sums.items()}
        found |= {n: torch.cat(parts) for n, parts in self._values.items()}
        read = Fetched(found).read()
        own = {n: read[n].numpy() for n in self._values}
        ranks = dist.gather_objects(own) if own else []
        kept = {n: np.concatenate([rank[n] for rank in ranks]) for n in own}
        return [kept[n] if n in kept else read[n].tolist() for n in range(len(self._metrics))]
