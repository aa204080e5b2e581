"""Metrics of a student on named sets of rows, the same for every stage and world size.

Of the validation rows also by domain, in the same passes: every batch is of one domain, so that
what a metric takes of it is that domain's. A domain's sums are divided by its own counts, and the
sums of all are those of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch
from dskd.data.bytes_of_text import SplitText, Text
from dskd.data.loader import evenly_spaced, make_batch
from dskd.data.prefetch import prefetch
from dskd.data.prepared import RowSet
from dskd.data.views import Reader, View
from dskd.errors import ConfigError, DataError
from dskd.methods.metrics import LM_LOSS, AnyMetric, ValueMetric, bits_per_byte
from dskd.models.frozen import evaluating
from dskd.system import dist
from dskd.system.device import Fetched
from dskd.system.doing import next_one, pause
from dskd.training.objective import Objective

VALIDATION = "eval"
"""What the set of the validation rows is called."""

ROWS = "rows"
"""Of a domain: how many of its rows were used."""

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
        domains: names; where the rows that are used are of several, there are also results of each,
            as of a set ``<name>.<domain>``, with their number of ``rows``. Empty: never.
        text: what text all rows stand for, if that is known: for the loss in bits per byte.
    """

    name: str
    rows: RowSet
    view: View
    limit: int | None = None
    readers: Sequence[Reader] = ()
    further: Sequence[AnyMetric] = ()
    domains: Sequence[str] = ()
    text: SplitText | None = None


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
    found: Scores = {}
    with evaluating(objective):
        for each in sets:
            more = _evaluate(objective, each, metrics, micro_batch, device)
            assert not found.keys() & more.keys(), f"two sets named {found.keys() & more.keys()}"
            found |= more
    return found


def _evaluate(
    objective: Objective,
    each: EvaluationSet,
    metrics: Sequence[AnyMetric],
    micro_batch: int,
    device: torch.device,
) -> Scores:
    """Every rank makes the same number of forward passes, as ZeRO-3 needs: a rank without rows left
    repeats the first one without counting it."""
    row_ids = evenly_spaced(len(each.rows), each.limit)
    domains_R = each.rows.domains_B(row_ids) if each.domains else np.zeros_like(row_ids)
    ranks = _batches(domains_R, micro_batch, dist.world())
    passes, own = max(map(len, ranks)), ranks[dist.rank()]
    every = (*metrics, *each.further)
    taken = _Taken(every, len(each.domains) or 1)

    def made(n: int) -> Batch:
        given_B = row_ids[own[n]] if n < len(own) else row_ids[:1]
        return make_batch(each.rows, each.view, given_B, np.zeros_like(given_B), each.readers)

    with closing(prefetch(map(made, range(passes)), device)) as batches:
        for n, sent in enumerate(batches):
            values = objective.forward_evaluation(sent.on_device(), every)
            counted = n < len(own)
            domain = int(domains_R[own[n].start]) if counted else 0
            taken.add(values, domain, sent.batch.supervised, counted=counted)
            next_one()
    pause()
    whole = taken.everywhere()
    if not whole.supervised:
        count = len(row_ids)
        of = "validation rows" if each.name == VALIDATION else f"rows of set {each.name}"
        raise DataError(f"no token of the {count} {of} is predicted; use more rows")
    return _scores(each, metrics, whole, domains_R)


def _scores(
    each: EvaluationSet, metrics: Sequence[AnyMetric], whole: _Whole, domains_R: NDArray[np.int64]
) -> Scores:
    """The results of a set, and of each domain where there are several."""
    text = each.text if len(domains_R) == len(each.rows) else None
    every = (*metrics, *each.further)
    found = {each.name: _results(every, whole.values, None if text is None else text.whole)}
    domains = np.unique(domains_R).tolist()
    for domain in domains if len(domains) > 1 else ():
        part, name = whole.of_domain(domain), each.domains[domain]
        if part.supervised:
            own = None if text is None else text.domains.get(name)
            # Without the further ones, which may keep what they are given.
            results = _results(metrics, part.values[: len(metrics)], own, part=True)
            rows = int((domains_R == domain).sum())
            found[f"{each.name}.{name}"] = {**results, ROWS: rows}
    return found


def _batches(domains_R: NDArray[np.int64], size: int, world: int) -> list[list[slice]]:
    """What each rank takes: slices of at most ``size`` rows, each of one domain. A rank's follow
    each other, and those of the next rank follow them."""
    share = -(-len(domains_R) // world)
    borders = (np.flatnonzero(np.diff(domains_R)) + 1).tolist()
    ranks = []
    for begin in range(0, share * world, share):
        end = min(begin + share, len(domains_R))
        stops = [*(border for border in borders if begin < border < end), end]
        firsts = [begin, *stops[:-1]]
        ranks.append(
            [
                slice(first, min(first + size, stop))
                for start, stop in zip(firsts, stops, strict=True)
                for first in range(start, stop, size)
            ]
        )
    return ranks


def _results(
    metrics: Sequence[AnyMetric], values: Sequence[Any], text: Text | None, part: bool = False
) -> dict[str, float]:
    """All results by name.

    Args:
        values: what each metric's are made of.
        text: what the rows stand for, if that is known.
        part: whether they are of a part of the set's rows.
    """
    results: dict[str, float] = {}
    for metric, own in zip(metrics, values, strict=True):
        of_part = metric.of_part if part and isinstance(metric, ValueMetric) else None
        named = metric.results(own) if of_part is None else of_part(own)
        if metric is LM_LOSS and text is not None:
            named |= bits_per_byte(named, text)
        assert not results.keys() & named.keys(), f"two metrics named {results.keys() & named}"
        results |= named
    return results


@dataclass(frozen=True)
class _Whole:
    """What metrics took of all rows.

    Attributes:
        supervised_D: positions of each domain.
        sums: of each metric of sums [D, S], float64, by its place among the metrics.
        kept: what the others keep [P, S], float64.
        domains_P: of each position of those, its domain.
    """

    supervised_D: NDArray[np.float64]
    sums: dict[int, NDArray[np.float64]]
    kept: dict[int, NDArray[np.float64]]
    domains_P: dict[int, NDArray[np.int64]]

    @property
    def supervised(self) -> int:
        """Number of positions."""
        return int(self.supervised_D.sum())

    @property
    def values(self) -> list[Any]:
        """What the results of each metric are made of."""
        found = {n: own_DS.sum(0).tolist() for n, own_DS in self.sums.items()} | self.kept
        return [found[n] for n in sorted(found)]

    def of_domain(self, domain: int) -> _Whole:
        """That of one domain."""
        kept = {n: own_PS[self.domains_P[n] == domain] for n, own_PS in self.kept.items()}
        at = slice(domain, domain + 1)
        sums = {n: own_DS[at] for n, own_DS in self.sums.items()}
        return _Whole(self.supervised_D[at], sums, kept, {})


class _Taken:
    """What metrics took of the batches so far, on the device: the host waits for it once."""

    def __init__(self, metrics: Sequence[AnyMetric], domains: int) -> None:
        self._metrics = metrics
        self._supervised = [0] * domains
        self._sums: dict[int, Tensor] = {}
        self._values: dict[int, list[Tensor]] = {}
        self._of: list[int] = []

    def add(self, found: Sequence[Tensor], domain: int, supervised: int, *, counted: bool) -> None:
        """Take each metric's of one batch, which is of one domain; of one that is not counted, only
        their shapes."""
        self._supervised[domain] += counted * supervised
        self._of.append(domain)
        for n, (metric, each) in enumerate(zip(self._metrics, found, strict=True)):
            if isinstance(metric, ValueMetric):
                self._values.setdefault(n, []).append(each if counted else each[:0])
            else:
                if n not in self._sums:
                    self._sums[n] = each.new_zeros(len(self._supervised), *each.shape)
                if counted:
                    self._sums[n][domain] += each

    def everywhere(self) -> _Whole:
        """Over all ranks (collective): the sums of each metric, or its values in the order of the
        rows, which follow each other from rank to rank."""
        supervised = dist.Summing(self._supervised)
        found = {n: dist.sum_over_ranks(total) for n, total in self._sums.items()}
        found |= {n: torch.cat(parts) for n, parts in self._values.items()}
        read = {n: each.numpy() for n, each in Fetched(found).read().items()}
        own = {
            n: (read[n], np.repeat(self._of, [len(part) for part in parts]))
            for n, parts in self._values.items()
        }
        ranks = dist.gather_objects(own) if own else []
        kept = {n: np.concatenate([rank[n][0] for rank in ranks]) for n in own}
        of = {n: np.concatenate([rank[n][1] for rank in ranks]) for n in own}
        sums = {n: read[n] for n in self._sums}
        return _Whole(np.array(supervised.sums()), sums, kept, of)
