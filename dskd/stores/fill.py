"""Make a store, once for all runs that name it: complete? lock it, complete now? sweep, say what it
holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dskd.batch import Batch
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.stores.cost import Meter
from dskd.stores.manifest import MANIFEST, read_spec
from dskd.stores.shard import StoreSpec
from dskd.stores.store import Store, Writer, is_complete
from dskd.stores.sweep import Output, Scored, all_draws, sweep
from dskd.system import dist
from dskd.system.locks import alone
from dskd.system.log import bar, say


class Words(NamedTuple):
    """What the log says of a store.

    Attributes:
        name: of the stage that makes it, before each of its lines.
        doing: beside the progress bar.
        holds: what a complete store's folder holds.
    """

    name: str
    doing: str
    holds: Callable[[Path], str]


def fill(
    folder: Path,
    spec: StoreSpec,
    rowset: RowSet,
    view: View,
    forward: Callable[[], Callable[[Batch], Output]],
    score: Callable[[Batch, Output], Scored],
    *,
    micro_batch: int,
    device: torch.device,
    words: Words,
    present_R: NDArray[np.bool_] | None = None,
    stop: Callable[[], bool] | None = None,
    verify: bool = False,
    run: Path | None = None,
) -> bool:
    """Make the store, go on with an interrupted one, add rows that one lacks, or do nothing if it
    is complete (collective).

    While another job makes it, this one waits. Of the shards of a complete store only the sizes are
    looked at, for who opens it verifies it.

    Args:
        folder: the store's folder.
        spec: what the store is.
        forward: builds the model and returns its forward pass; called only if something is missing.
        words: for the log.
        verify: read a complete store whole, because nobody will open it.
        run: folder of the run that what it costs is counted for; None: it is not counted.

    The other arguments are those of :func:`~dskd.stores.sweep.sweep`.

    Returns:
        Whether anything was missing.

    Raises:
        StoreError: the folder holds another or a damaged store, or cannot be written.
        Stopped: ``stop`` returned true on one of the ranks; called again, it goes on.
        DskdError: what went wrong on one of the ranks, on all of them.
    """
    present_DR = all_draws(spec, present_R)
    if _is_complete(folder, spec, present_DR):
        if verify:
            with dist.agreed():
                Store(folder, kind=spec.kind, expect={}, share=(dist.rank(), dist.world()))
        say(f"{words.name}: {folder} is complete")
        return False
    with alone(folder):  # the store of several runs has one writer
        if _is_complete(folder, spec, present_DR):  # by the one that was waited for
            return False
        meter = None if run is None else Meter(folder, run)
        spec = dist.on_rank0(lambda: _as_begun(folder, spec))
        model = forward()
        with bar(words.doing) as report:
            sweep(
                model,
                rowset,
                view,
                Writer(folder, spec),
                micro_batch=micro_batch,
                device=device,
                score=score,
                present_R=present_R,
                progress=report,
                stop=stop,
                done_with=None if meter is None else meter.add,
            )
    say(f"{words.name}: {folder} holds {words.holds(folder)}")
    return True


def _is_complete(folder: Path, spec: StoreSpec, present_DR: NDArray[np.bool_]) -> bool:
    return dist.on_rank0(lambda: is_complete(folder, spec, present_DR))


def _as_begun(folder: Path, spec: StoreSpec) -> StoreSpec:
    """The spec with the size of shards that a complete store has, to which rows are added."""
    if not (folder / MANIFEST).exists():
        return spec
    there, records = read_spec(folder)
    return spec if records is None else replace(spec, rows_per_shard=there.rows_per_shard)
