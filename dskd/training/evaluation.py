"""Metrics of a student on named sets of rows, the same for every stage and world size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch
from dskd.data.loader import make_batch
from dskd.data.prefetch import prefetch
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.errors import DataError
from dskd.methods.metrics import Metric
from dskd.models.frozen import evaluating
from dskd.system import dist
from dskd.system.device import Fetched
from dskd.system.doing import next_one, pause
from dskd.training.objective import Objective

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
    """

    name: str
    rows: RowSet
    view: View
    limit: int | None = None


def by_key(scores: Scores) -> dict[str, float]:
    """The results in one dict, keyed ``<set>_<metric>``."""
    return {f"{name}_{key}": value for name in scores for key, value in scores[name].items()}


@torch.no_grad()
def evaluate(
    objective: Objective,
    sets: Sequence[EvaluationSet],
    metrics: Sequence[Metric],
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
            each.name: _evaluate(objective, each, metrics, micro_batch, device) for each in sets
        }


def _evaluate(
    objective: Objective,
    each: EvaluationSet,
    metrics: Sequence[Metric],
    micro_batch: int,
    device: torch.device,
) -> dict[str, float]:
    """Every rank makes the same number of forward passes, as ZeRO-3 needs: a rank without rows left
    repeats the first one without counting it."""
    row_ids = _spread(each)
    share = -(-len(row_ids) // dist.world())
    own = row_ids[dist.rank() * share : (dist.rank() + 1) * share]
    supervised = 0
    totals: list[Tensor] | None = None
    firsts = range(0, share, micro_batch)

    def made(first: int) -> Batch:
        row_ids_B = own[first : first + micro_batch]
        given_B = row_ids_B if len(row_ids_B) else row_ids[:1]
        return make_batch(each.rows, each.view, given_B, np.zeros_like(given_B))

    with closing(prefetch(map(made, firsts), device)) as batches:
        for first, batch in zip(firsts, batches, strict=True):
            sums = objective.forward_evaluation(batch, metrics)
            if totals is None:
                totals = [torch.zeros_like(one) for one in sums]
            if first < len(own):
                supervised += batch.supervised
                totals = [total + one for total, one in zip(totals, sums, strict=True)]
            next_one()
    pause()
    assert totals is not None, f"no row in {each.name}"
    everywhere = dist.Summing([supervised])
    values = Fetched(dist.sum_over_ranks(torch.cat(totals))).read()
    if everywhere.sums() == [0]:
        count = len(row_ids)
        raise DataError(f"no token of the {count} validation rows is predicted; use more rows")
    results: dict[str, float] = {}
    for metric, total in zip(metrics, totals, strict=True):
        found = metric.results(values[: len(total)])
        assert not results.keys() & found.keys(), f"two metrics named {results.keys() & found}"
        results |= found
        values = values[len(total) :]
    return results


def _spread(each: EvaluationSet) -> NDArray[np.int64]:
    """Ids of the rows to take: spread, because the rows lie source by source and one domain must
    not stand for all."""
    rows = len(each.rows)
    count = rows if each.limit is None else min(each.limit, rows)
    return np.arange(count, dtype=np.int64) * rows // count
