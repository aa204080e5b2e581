"""What ``dskd cache info`` says of a logit cache: what it holds, what it cost, and how much of the
teacher's probability is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dskd.stores.cost import Cost, read_costs
from dskd.stores.kept_mass import kept_masses
from dskd.stores.logits import LogitCache, describe_cache
from dskd.system.log import clock


def cache_info(folder: Path) -> dict[str, Any]:
    """All of it, by what it is called; of a complete cache every shard is read.

    Raises:
        StoreError: there is no logit cache, or it is damaged.
    """
    about, costs = describe_cache(folder), read_costs(folder)
    if costs is not None:
        about["capture cost"] = cost_text(costs.total)
        if len(costs.by) > 1:
            about |= {f"of that by {run}": cost_text(cost) for run, cost in costs.by.items()}
    if about["complete"]:
        for mass in kept_masses(LogitCache(folder, {})):
            cents = [
                f"{cent} % of positions at most {m:.6f}" for cent, m in mass.percentiles.items()
            ]
            name = f"kept mass at temperature {mass.temperature:g}"
            about[name] = f"mean {mass.mean:.6f}; {'; '.join(cents)}"
    return about


def cost_text(cost: Cost) -> str:
    """A cost for a reader."""
    return (
        f"{clock(cost.seconds)} for {cost.rows:,} rows of {cost.tokens:,} tokens in "
        f"{cost.passes:,} teacher passes"
    )
