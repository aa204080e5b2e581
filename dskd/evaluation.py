"""The plain LM loss on held-out rows, the same for every method, stage and world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dskd import dist
from dskd.batch import Batch, Term
from dskd.data.blocks import RowSet
from dskd.data.loader import sequential
from dskd.data.masking import View

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
    """Mean NLL per supervised token over the first ``limit`` rows, masks of epoch 0 (collective).

    Every rank makes the same number of forward calls, as ZeRO-3 needs: a rank without rows left
    repeats its first one without counting it.

    Returns:
        ``eval_nll`` (nats), ``eval_bits``, ``eval_ppl`` and ``eval_tokens``.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    each = -(-count // dist.world())
    begin, end = dist.rank() * each, min((dist.rank() + 1) * each, count)
    calls = -(-each // micro_batch)
    own = sequential(rows, view, begin=begin, end=end, micro_batch=micro_batch, epoch=0)
    spare = sequential(rows, view, begin=0, end=1, micro_batch=1, epoch=0)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    dummy: Batch | None = None
    for _ in range(calls):
        batch = next(own, None)
        if batch is None:
            dummy = dummy or next(spare)
            forward(dummy.to(device))
            continue
        batch = batch.to(device)
        total[0] += forward(batch)["nll"].total.double()
        total[1] += batch.supervised()
    nll, tokens = dist.sum_over_ranks(total).tolist()
    mean = nll / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf
    return {"eval_nll": mean, "eval_bits": mean / LN2, "eval_ppl": ppl, "eval_tokens": int(tokens)}
