"""Capture a teacher's top-k logits over the training rows into a logit cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dskd.batch import Batch, DenseTeacher
from dskd.data.prepared import Prepared, RowSet
from dskd.data.tokenizers import vocabulary_size
from dskd.data.views import CausalView, View
from dskd.errors import ConfigError
from dskd.settings.teachers import CachedTeacher
from dskd.stores.logits import Layout, describe
from dskd.stores.shard import StoreSpec
from dskd.stores.store import Writer, is_complete
from dskd.stores.sweep import sweep
from dskd.system import dist
from dskd.system.locks import alone
from dskd.system.log import bar, say
from dskd.teachers.teacher import Live


def capture(
    cached: CachedTeacher,
    model: Callable[[], nn.Module],
    prepared: Prepared,
    view: View,
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    device: torch.device,
    domain: int | None = None,
) -> None:
    """Make the cache, go on with an interrupted one, or do nothing if it is complete (collective).

    While another job makes it, this one waits. A complete cache is not verified here but when it is
    opened.

    Args:
        cached: the settings of the cache.
        model: builds the frozen teacher; called only if there is something to capture.
        prepared: the data; its training rows are captured.
        view: masks them; its ``draws`` masks of each row are captured.
        folder: the cache's folder.
        fingerprints: of all that the logits depend on, by name; kept in the manifest.
        device: where the teacher is.
        domain: index of the only domain whose rows are captured; None: all rows.

    Raises:
        ConfigError: the settings do not fit the vocabulary or the view.
        StoreError: the folder holds another cache, or cannot be written.
        NonFiniteError: the teacher's logits are not finite.
    """
    rows = prepared.train
    present_R = np.ones(len(rows), bool)
    if domain is not None:
        present_R = rows.domains_B(np.arange(len(rows))) == domain
        if not present_R.any():
            raise ConfigError(
                f"teacher.domains.{prepared.domains[domain]}: no training row is of this domain"
            )
    if view.draws is None:
        raise ConfigError("data.masking.draws: missing; a cache holds so many masks of each row")
    layout = Layout(
        k=cached.k,
        vocabulary=vocabulary_size(prepared.tokenizer),
        temperatures=tuple(float(t) for t in cached.temperatures),
        values=cached.values,
        block_size=rows.block_size,
        masked=not isinstance(view, CausalView),
        domain=None if domain is None else prepared.domains[domain],
    )
    spec = layout.spec(
        rows=len(rows),
        draws=view.draws,
        rows_per_shard=cached.rows_per_shard,
        fingerprints=fingerprints,
    )
    if _is_complete(folder, spec):
        say(f"cache: {folder} is complete")
        return
    with alone(folder):  # the cache of several runs has one writer
        if not _is_complete(folder, spec):
            _fill(cached, model, rows, view, Writer(folder, spec), layout, present_R, device)


def _is_complete(folder: Path, spec: StoreSpec) -> bool:
    return dist.on_rank0(lambda: is_complete(folder, spec))


def _fill(
    cached: CachedTeacher,
    model: Callable[[], nn.Module],
    rows: RowSet,
    view: View,
    writer: Writer,
    layout: Layout,
    present_R: NDArray[np.bool_],
    device: torch.device,
) -> None:
    live = Live(model(), layout.vocabulary)

    def forward(batch: Batch) -> DenseTeacher:
        # with the head here: a sharded one is a collective, and not every batch is scored
        return DenseTeacher(live(batch.to(device)).logits_NV)

    def score(batch: Batch, signal: DenseTeacher) -> dict[str, np.ndarray]:
        return layout.encode(batch, signal.logits_NV)

    with bar("capturing logits") as report:
        sweep(
            forward,
            rows,
            view,
            writer,
            micro_batch=cached.micro_batch,
            score=score,
            present_R=present_R,
            progress=report,
        )
    about = describe(writer.folder)
    say(
        f"cache: {writer.folder} holds {about['positions']:,} positions, top {layout.k} of each in "
        f"{about['bytes_per_position']} bytes"
    )
