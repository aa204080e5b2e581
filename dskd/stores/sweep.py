"""One pass of a frozen model over the data, all ranks in parallel, its values kept in a store.

The missing shards are dealt out in rounds of one a rank. A shard's rows are taken in order in
batches of ``micro_batch``, on whichever rank it falls, so its bytes depend neither on the number of
ranks nor on interruptions; rows that are added to a whole shard are taken in the same way, by
themselves. In a round every rank makes as many forward passes as the rank with the most batches, of
a row it then forgets where it has none left: under ZeRO-3 a pass that only some of the ranks make
would hang them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

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


class Work(NamedTuple):
    """What all ranks did in a round.

    Attributes:
        rows: that the model read, each once for each draw.
        tokens: of these rows.
        passes: of the model over them.
    """

    rows: int
    tokens: int
    passes: int


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
    done_with: Callable[[Work], object] | None = None,
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
        present_R: bool, which of the R rows to take, or [draws, R], which in each draw; None: all.
        progress: ``progress(done, total)`` is called after each forward pass: row views kept so far
            by all ranks, and how many there are.
        stop: whether to stop, called before each round on every rank; None: never.
        done_with: called on rank 0 after each round.

    Raises:
        Stopped: ``stop`` returned true on one of the ranks, on all of them.
        DskdError: what went wrong on one of the ranks, on all of them.
    """
    spec = writer.spec
    assert spec.rows == len(rowset), (spec.rows, len(rowset))
    present_DR = all_draws(spec, present_R)
    missing = _missing(writer, present_DR)
    to_take = {shard: _row_ids(spec, present_DR, shard, held) for shard, held in missing.items()}
    total = int(present_DR.sum())
    done = total - sum(map(len, to_take.values()))
    idle = np.flatnonzero(present_DR.any(0))[:1]
    for first in range(0, len(missing), dist.world()):
        if stop is not None and any(dist.gather_objects(stop())):
            raise Stopped
        shards = [*missing][first : first + dist.world()]
        ids_by_rank = [to_take[shard] for shard in shards]
        calls = -(-max(len(ids) for ids in ids_by_rank) // micro_batch)
        shard = shards[dist.rank()] if dist.rank() < len(shards) else None
        ids = ids_by_rank[dist.rank()] if shard is not None else idle[:0]
        epoch = 0 if shard is None else spec.span(shard)[0]
        shares = [ids[c * micro_batch : (c + 1) * micro_batch] for c in range(calls)]
        parts: list[Scored] = []
        tokens = 0
        failed: list[DskdError] = []  # raised after the round: the others expect this rank's passes
        made = _batches(shares, idle, partial(_batch, rowset, view, epoch), failed)
        with closing(prefetch(made, device)) as batches:
            passes = zip(shares, _passes(forward, batches), strict=True)
            for call, (ids_B, (batch, fetched)) in enumerate(passes):
                try:
                    if len(ids_B) and not failed:
                        parts.append(score(batch, fetched.read()))
                        tokens += int(batch.mask_BT.sum())
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
                _write(writer, shard, ids, parts, add=missing[shard] is not None)
        if done_with is not None:
            _tell(done_with, list(map(len, ids_by_rank)), tokens, micro_batch)
    _finish(writer)


def _tell(
    done_with: Callable[[Work], object], rows: list[int], tokens: int, micro_batch: int
) -> None:
    """Say what a round was, each rank's rows of it and this rank's tokens."""
    every = dist.gather_objects(tokens)
    passes = sum(-(-count // micro_batch) for count in rows)
    with dist.agreed():
        if dist.rank() == 0:
            done_with(Work(sum(rows), sum(every), passes))


def all_draws(spec: StoreSpec, present_R: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which rows of each draw are meant, bool [draws, rows], by what :func:`sweep` is given."""
    given = np.ones(spec.rows, bool) if present_R is None else present_R
    return np.broadcast_to(given, (spec.draws, spec.rows))


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


def _missing(writer: Writer, present_DR: NDArray[np.bool_]) -> dict[int, NDArray[np.bool_] | None]:
    """The shards to be written, in order, each with the rows that it holds (None: there is no such
    file), the same on every rank; each checks its share."""
    with dist.agreed():
        if dist.rank() == 0:
            writer.prepare()
    with dist.agreed():
        mine = writer.missing(range(dist.rank(), writer.spec.shards, dist.world()), present_DR)
    every = dist.gather_objects({shard: writer.held.get(shard) for shard in mine})
    found: dict[int, Any] = dict(ChainMap(*every))
    return {shard: found[shard] for shard in sorted(found)}


def _write(
    writer: Writer,
    shard: int,
    ids: NDArray[np.int64],
    parts: list[Scored],
    *,
    add: bool,
) -> None:
    """Put a shard's batches together and write it, or ``add`` them to it."""
    _, begin, end = writer.spec.span(shard)
    counts_S, present_S = np.zeros(end - begin, np.int64), np.zeros(end - begin, bool)
    present_S[ids - begin] = True
    if parts:
        counts_S[ids - begin] = np.concatenate([part.counts_B for part in parts])
    columns = {
        name: column.joined(part.columns[name] for part in parts)
        for name, column in writer.spec.columns.items()
    }
    write = writer.add_rows if add else writer.write_shard
    write(shard, counts_S, present_S, columns)


def _finish(writer: Writer) -> None:
    """Declare the store complete, once all ranks have written what was theirs."""
    records = ChainMap(*dist.gather_objects(writer.records))
    with dist.agreed():
        if dist.rank() == 0:
            writer.finish(records)


def _row_ids(
    spec: StoreSpec, present_DR: NDArray[np.bool_], shard: int, held_R: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """The rows that a shard is to get, besides those that it holds."""
    draw, begin, end = spec.span(shard)
    wanted_R = present_DR[draw, begin:end]
    return begin + np.flatnonzero(wanted_R if held_R is None else wanted_R & ~held_R)
