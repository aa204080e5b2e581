"""What a student is evaluated by: sums over its supervised positions or what is kept of each of
them, and the numbers made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch, Positions
from dskd.ops import positions_ce


@dataclass(frozen=True)
class Metric:
    """Numbers about a student's supervised positions.

    Attributes:
        sums: of the positions of one batch, float64 [S] with S the same for every batch: what is
            added up over batches and ranks.
        results: what the S sums over all rows come to, by name. Whole numbers are counts, which
            the log does not show.
    """

    sums: Callable[[Positions, Batch], Tensor]
    results: Callable[[Sequence[float]], dict[str, float]]


@dataclass(frozen=True)
class ValueMetric:
    """Numbers about all supervised positions together, which no sums tell: a rank correlation.

    What it keeps stays in memory until the end of an evaluation, so it is for labelled rows, which
    have one supervised position each, rather than for tokens.

    Attributes:
        values: of the positions of one batch, float64 [N, S] with S the same for every batch.
        results: what the values [P, S] of all positions come to, by name; P >= 1, in the order of
            the rows.
    """

    values: Callable[[Positions, Batch], Tensor]
    results: Callable[[NDArray[np.float64]], dict[str, float]]


AnyMetric = Metric | ValueMetric


def _lm_sums(positions: Positions, batch: Batch) -> Tensor:
    del batch
    nll = positions_ce(positions).total.double()
    return torch.stack([nll, nll.new_tensor(len(positions.labels_N))])


def _lm_results(sums: Sequence[float]) -> dict[str, float]:
    nll, tokens = sums
    mean = nll / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf  # beyond, exp overflows
    return {"nll": mean, "bits": mean / math.log(2), "ppl": ppl, "tokens": int(tokens)}


LM_LOSS = Metric(_lm_sums, _lm_results)
"""The plain LM loss of a supervised position: ``nll`` (nats), ``bits``, ``ppl``, and ``tokens``,
the number of positions."""
