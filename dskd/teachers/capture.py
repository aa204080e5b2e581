"""Capture a teacher's top-k logits over the training rows into a logit cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dskd.batch import Batch, TopKTeacher
from dskd.data.prepared import Prepared
from dskd.data.tokenizers import vocabulary_size
from dskd.data.views import CausalView, View
from dskd.errors import ConfigError
from dskd.fused.topk_teacher import largest_of
from dskd.settings.teachers import CachedTeacher
from dskd.stores.fill import Words, fill
from dskd.stores.logits import LogitLayout, describe_cache
from dskd.stores.sweep import Scored
from dskd.teachers.teacher import FrozenTeacher


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
    wanted_DR: NDArray[np.bool_] | None = None,
    verify: bool = False,
    run: Path | None = None,
) -> None:
    """Make the cache, go on with an interrupted one, add the rows that one lacks, or do nothing if
    it is complete (collective); see :func:`~dskd.stores.fill.fill`.

    Args:
        model: builds the frozen teacher; called only if there is something to capture.
        prepared: its training rows are captured, in as many masks as ``view.draws``.
        fingerprints: of all that the logits depend on, by name; kept in the manifest.
        domain: index of the only domain whose rows are captured; None: all rows.
        wanted_DR: bool [draws, rows], those that are captured of these; None: all.
        verify: read a complete cache whole, because nobody will open it.
        run: folder of the run that what it costs is counted for; None: it is not counted.

    Raises:
        ConfigError: the settings do not fit the vocabulary, or no row is of the domain.
        StoreError: the folder holds another or a damaged cache, or cannot be written.
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
    assert view.draws is not None, "RowMasks.problems refuses it by name"
    layout = LogitLayout(
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

    def forward() -> Callable[[Batch], TopKTeacher]:
        teacher = FrozenTeacher(model(), layout.vocabulary)
        # with the head here: a sharded one is a collective, and not every batch is scored
        return lambda batch: largest_of(teacher(batch), layout.k, layout.temperatures)

    def score(batch: Batch, kept: TopKTeacher) -> Scored:
        return Scored(batch.counts_B.numpy(), layout.encode(batch, kept))

    def holds(folder: Path) -> str:
        about = describe_cache(folder)
        return (
            f"{about['positions']:,} positions of {about['rows_held']:,} rows, top {layout.k} of "
            f"each in {about['bytes_per_position']} bytes"
        )

    fill(
        folder,
        spec,
        rows,
        view,
        forward,
        score,
        micro_batch=cached.micro_batch,
        device=device,
        words=Words("cache", "capturing logits", holds),
        present_R=present_R if wanted_DR is None else wanted_DR & present_R,
        verify=verify,
        run=run,
    )
