"""The plain LM loss on held-out rows, the same for every method, stage and world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dskd.batch import Batch, Term
from dskd.data.loader import make_batch
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.errors import DataError
from dskd.system import dist

LN2 = math.log(2)


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], dict[str, Term]],
    rows: RowSet,
    view: View,
    *,
    limit: int | None,
    micro_batch: int,
    device: torch.device,
) -> dict[str, Any]:
    """Mean NLL per supervised token over ``limit`` evenly spaced rows (collective).

    Every rank makes the same number of forward calls, as ZeRO-3 needs: a rank without rows left
    repeats the first one without counting it.

    Returns:
        ``eval_nll`` (nats), ``eval_bits``, ``eval_ppl`` and ``eval_tokens``.

    Raises:
        DataError: no position of the rows is supervised.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    # Spread, because the rows lie source by source and one domain must not stand for all.
    row_ids = np.arange(count, dtype=np.int64) * len(rows) // count
    each = -(-count // dist.world())
    own = row_ids[dist.rank() * each : (dist.rank() + 1) * each]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, each, micro_batch):
        row_ids_B = own[first : first + micro_batch]
        counted = len(row_ids_B) > 0
        row_ids_B = row_ids_B if counted else row_ids[:1]
        batch = make_batch(rows, view, row_ids_B, np.zeros_like(row_ids_B))
        nll = forward(batch.to(device))["nll"].total.double()
        if counted:
            total[0] += nll
            total[1] += batch.supervised
    nll, tokens = dist.sum_over_ranks(total).tolist()
    if not tokens:
        raise DataError(f"no token of the {count} validation rows is predicted; use more rows")
    mean = nll / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf
    return {"eval_nll": mean, "eval_bits": mean / LN2, "eval_ppl": ppl, "eval_tokens": int(tokens)}
