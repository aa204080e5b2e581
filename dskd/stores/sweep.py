"""One pass of a frozen model over the data, all ranks in parallel, its values kept in a store.

The missing shards are dealt out in rounds of one a rank. A shard's rows are taken in order in
batches of ``micro_batch``, on whichever rank it falls, so its bytes depend neither on the number of
ranks nor on interruptions. In a round every rank makes as many forward passes as the rank with the
most batches, of a row it then forgets where it has none left: under ZeRO-3 a pass that only some of
the ranks make would hang them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dskd.batch import Batch
from dskd.data.loader import make_batch
from dskd.data.prefetch import Sent, prefetch
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.errors import DskdError, NonFiniteError
from dskd.stores.shard import StoreSpec
from dskd.stores.store import Writer
from dskd.system import dist
from dskd.system.device import Fetched
from dskd.system.doing import next_one, pause


class Stopped(Exception):
    """A sweep ended between two rounds because it was to stop; what it wrote is whole."""


Output = TypeVar("Output")


class Scored(NamedTuple):
    """A store's values for the rows of a batch.

    Attributes:
        counts_B: int64, number of positions that the store holds of each row; the supervised ones,
            or as many as it has values for.
        columns: arrays [sum of counts, ...] by name, in the order of the rows.
    """

    counts_B: NDArray[np.int64]
    columns: Mapping[str, np.ndarray]


def sweep(
    forward: Callable[[Batch], Output],
    rowset: RowSet,
    view: View,
    writer: Writer,
    *,
    micro_batch: int,
    device: torch.device,
    score: Callable[[Batch, Output], Scored],
    present_R: NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Fill a store; collective, and called again after an interruption it goes on.

    Args:
        forward: the frozen model on a batch on the device; a tensor, or a tuple, mapping or
            dataclass of tensors. Called without gradients, equally often on every rank, so it must
            use the same parameters in every call.
        rowset: the rows; the store's row ids are theirs.
        view: what the model sees of them; the store's draw d is epoch d.
        writer: this rank's writer of the store.
        micro_batch: rows of a forward pass.
        device: where the model is, and the batches are sent.
        score: the store's values for a batch and what ``forward`` returned for it, both on the CPU
            by then.
        present_R: bool, which of the R rows to take; None: all.
        progress: ``progress(done, total)`` is called after each forward pass: row views kept so far
            by all ranks, and how many there are.
        stop: whether to stop, called before each round on every rank; None: never.

    Raises:
        Stopped: ``stop`` returned true on one of the ranks, on all of them.
        DskdError: what went wrong on one of the ranks, on all of them.
    """
    spec = writer.spec
    assert spec.rows == len(rowset), (spec.rows, len(rowset))
    if present_R is None:
        present_R = np.ones(spec.rows, bool)
    missing = _missing(writer)
    total = spec.draws * int(present_R.sum())
    done = total - sum(len(_row_ids(spec, present_R, shard)) for shard in missing)
    idle = np.flatnonzero(present_R)[:1]
    for first in range(0, len(missing), dist.world()):
        if stop is not None and any(dist.gather_objects(stop())):
            raise Stopped
        shards = missing[first : first + dist.world()]
        ids_by_rank = [_row_ids(spec, present_R, shard) for shard in shards]
        calls = -(-max(len(ids) for ids in ids_by_rank) // micro_batch)
        shard = shards[dist.rank()] if dist.rank() < len(shards) else None
        ids = ids_by_rank[dist.rank()] if shard is not None else idle[:0]
        epoch = 0 if shard is None else spec.span(shard)[0]
        shares = [ids[c * micro_batch : (c + 1) * micro_batch] for c in range(calls)]
        parts: list[Scored] = []
        failed: list[DskdError] = []  # raised after the round: the others expect this rank's passes
        made = _batches(shares, idle, partial(_batch, rowset, view, epoch), failed)
        with closing(prefetch(made, device)) as batches:
            passes = zip(shares, _passes(forward, batches), strict=True)
            for call, (ids_B, (batch, fetched)) in enumerate(passes):
                try:
                    if len(ids_B) and not failed:
                        parts.append(score(batch, fetched.read()))
                except DskdError as found:
                    failed.append(found)
                part = slice(call * micro_batch, (call + 1) * micro_batch)
                done += sum(len(theirs[part]) for theirs in ids_by_rank)
                if progress is not None:
                    progress(done, total)
                next_one()
        pause()
        with dist.agreed():
            if failed:
                raise failed[0]
            if shard is not None:
                _write(writer, shard, ids, present_R, parts)
    _finish(writer)


def _batches(
    shares: Sequence[NDArray[np.int64]],
    idle: NDArray[np.int64],
    make: Callable[[NDArray[np.int64]], Batch],
    failed: list[DskdError],
) -> Iterator[Batch]:
    """A batch of each share of the rows, or of an idle one where it is empty or something has
    ``failed``, which a batch that cannot be made is added to."""
    for ids_B in shares:
        try:
            batch = make(ids_B if len(ids_B) and not failed else idle)
        except DskdError as found:
            failed.append(found)
            batch = make(idle)
        yield batch


def _passes(
    forward: Callable[[Batch], Output], batches: Iterable[Sent]
) -> Iterator[tuple[Batch, Fetched[Output]]]:
    """Each batch, on the CPU, and what the model makes of it: given out when the device has the
    next one to work on."""
    last: tuple[Batch, Fetched[Output]] | None = None
    for sent in batches:
        with torch.no_grad():
            fetched = Fetched(forward(sent.on_device()))
        if last is not None:
            yield last
        last = sent.batch, fetched
    if last is not None:
        yield last


def _batch(rowset: RowSet, view: View, epoch: int, ids_B: NDArray[np.int64]) -> Batch:
    return make_batch(rowset, view, ids_B, np.full_like(ids_B, epoch))


def refuse_non_finite(batch: Batch, bad_N: Tensor, whose: str) -> None:
    """Refuse logits by the row of the first supervised position that is bad (bool, on the CPU).

    Raises:
        NonFiniteError: there is one.
    """
    if bad_N.any():
        row_N = batch.row_ids_B.repeat_interleave(batch.counts_B)
        raise NonFiniteError(f"{whose} logits are not finite in row {row_N[bad_N][0].item()}")


def _missing(writer: Writer) -> list[int]:
    """The shards to be written, the same list on every rank; each checks its share."""
    with dist.agreed():
        if dist.rank() == 0:
            writer.prepare()
    with dist.agreed():
        mine = writer.missing(range(dist.rank(), writer.spec.shards, dist.world()))
    return sorted(shard for theirs in dist.gather_objects(mine) for shard in theirs)


def _write(
    writer: Writer,
    shard: int,
    ids: NDArray[np.int64],
    present_R: NDArray[np.bool_],
    parts: list[Scored],
) -> None:
    """Put a shard's batches together and write it."""
    _, begin, end = writer.spec.span(shard)
    counts_S = np.zeros(end - begin, np.int64)
    if parts:
        counts_S[ids - begin] = np.concatenate([part.counts_B for part in parts])
    columns = {
        name: column.joined(part.columns[name] for part in parts)
        for name, column in writer.spec.columns.items()
    }
    writer.write_shard(shard, counts_S, present_R[begin:end], columns)


def _finish(writer: Writer) -> None:
    """Declare the store complete, once all ranks have written what was theirs."""
    records = ChainMap(*dist.gather_objects(writer.records))
    with dist.agreed():
        if dist.rank() == 0:
            writer.finish(records)


def _row_ids(spec: StoreSpec, present_R: NDArray[np.bool_], shard: int) -> NDArray[np.int64]:
    """The rows that a shard really holds."""
    _, begin, end = spec.span(shard)
    return begin + np.flatnonzero(present_R[begin:end])
