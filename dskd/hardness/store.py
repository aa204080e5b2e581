"""The hardness store: how well a model knew each token of the training rows.

Its one column is ``nll`` float16, 2 bytes a token: the token's negative log-likelihood in nats,
and in the sign bit whether the model held another token for likelier. So the threshold and the
metric of hard tokens can be changed without scoring again. Rounding to float16 moves an NLL by at
most 1/2048 of it (3e-8 below 6e-5); what is beyond the largest float16 becomes that (65504).

The places that were scored are not stored: they follow from the spec's settings, which are an
:class:`~dskd.hardness.scoring.ScoringPlan`.

Shape letters: B rows, T tokens, N scored places, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dskd.data.prepared import RowBatch, RowSet
from dskd.errors import StoreError
from dskd.hardness.scoring import ScoringPlan, ScoringView
from dskd.settings.data import HardTokens
from dskd.stores.manifest import MANIFEST, is_count, read_spec
from dskd.stores.shard import Column, StoreSpec
from dskd.stores.store import Store

KIND = "hardness"
_COLUMNS = {"nll": Column("float16")}
_LARGEST = float(np.finfo(np.float16).max)
_MAGNITUDES = 1 << 15  # bit patterns of a float16 without its sign, which are ordered as its values
_ROWS = 1024  # read at once, for a quantile
_ROUNDING = 1e-6  # tokens: 0.29 * 100 is less than 29


def hardness_spec(
    masking: HardTokens, rows: RowSet, view: ScoringView, fingerprints: Mapping[str, str]
) -> StoreSpec:
    """What the store of the scores of ``rows``, shown by ``view``, is; ``fingerprints`` are of
    everything that they depend on, by name."""
    return StoreSpec(
        kind=KIND,
        columns=_COLUMNS,
        rows=len(rows),
        draws=view.plan.draws,
        rows_per_shard=masking.rows_per_shard,
        fingerprints=fingerprints,
        settings=view.plan.tree(),
    )


def identity(spec: StoreSpec) -> str:
    """Fingerprint of what the store says, whatever the size of its shards."""
    return replace(spec, rows_per_shard=1).fingerprint


def describe_scores(folder: Path) -> dict[str, float]:
    """Sizes of a complete store: ``tokens``, the NLLs it holds, ``bytes`` of its shards, and their
    ratio ``bytes_per_token``; the shards are not read.

    Raises:
        StoreError: it is missing or not complete, or its manifest is damaged.
    """
    _, records = read_spec(folder)
    if records is None:
        raise StoreError(f"{folder}: not complete")
    tokens = sum(record.positions for record in records)
    nbytes = sum(record.nbytes for record in records)
    return {"tokens": tokens, "bytes": nbytes, "bytes_per_token": nbytes / max(tokens, 1)}


def encode(nll_N: NDArray[np.float32], wrong_N: NDArray[np.bool_]) -> dict[str, np.ndarray]:
    """The store's column of N places; NLLs are at least 0 and no NaN."""
    rounded_N = np.minimum(np.abs(nll_N), _LARGEST).astype(np.float16)  # -log p may be -0
    return {"nll": np.where(wrong_N, -rounded_N, rounded_N)}


class Hardness:
    """A complete store, verified and open for reading; safe in threads.

    The arguments are those of :class:`~dskd.stores.store.Store`.

    Attributes:
        plan: which places were scored.
        quantiles: those that some rank found for all, by share.
        fingerprint: of what the store says (:func:`identity`).

    Raises:
        StoreError: it is missing, incomplete, damaged or made of something else.
    """

    def __init__(
        self,
        folder: Path,
        expect: Mapping[str, str],
        share: tuple[int, int] = (0, 1),
        mend: str | None = None,
    ) -> None:
        self.store = Store(folder, kind=KIND, expect=expect, share=share, mend=mend)
        self.quantiles: dict[float, float] = {}
        self.plan = plan_of(folder, self.store.spec)
        self.fingerprint = identity(self.store.spec)

    def read(self, rows: RowBatch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """How hard the tokens of some rows were.

        Returns:
            nll_BT: nats; NaN where no score is. Entry t is about token t, of a causal model about
                the label at t, which is token t + 1.
            wrong_BT: another token was likelier; False where no score is.

        Raises:
            StoreError: the store has not got a row, or a row has other tokens than it had.
        """
        stored_BT, _ = self._stored(rows)
        nll_BT = torch.from_numpy(stored_BT).float().abs().numpy()  # 2x faster than numpy's cast
        return nll_BT, stored_BT.view(np.uint16) >= _MAGNITUDES

    def quantile(self, share: float, rowset: RowSet, special_V: NDArray[np.bool_]) -> float:
        """The NLL above which are the hardest tokens of all rows: at most ``share`` of them.

        Exactly the smallest stored NLL that no more than so many tokens exceed (fewer than
        ``share`` where tokens equal it); ``-inf`` if all are the hardest. Reads the whole store,
        alone on this rank, unless :attr:`quantiles` has it.

        Args:
            share: of the tokens that have a score and are not special, 0 to 1.
            rowset: the rows whose tokens have scores.
            special_V: bool, the tokens that are not counted.

        Raises:
            StoreError: the rows are not those of the store, or no token counts.
        """
        if share in self.quantiles:
            return self.quantiles[share]
        counts = np.zeros(_MAGNITUDES, np.int64)
        for begin in range(0, len(rowset), _ROWS):
            row_ids_B = np.arange(begin, min(begin + _ROWS, len(rowset)))
            rows = rowset.rows(row_ids_B, np.zeros_like(row_ids_B))  # scores are of no epoch
            stored_BT, scored_BT = self._stored(rows)
            counted_BT = scored_BT & ~special_V[self.plan.targets(rows)]
            magnitudes_N = stored_BT[counted_BT].view(np.uint16) % _MAGNITUDES
            counts += np.bincount(magnitudes_N, minlength=_MAGNITUDES)
        total = int(counts.sum())
        if not total:
            raise StoreError(f"{self.store.folder}: holds no token that is not special")
        most = math.floor(share * total + _ROUNDING)
        if most >= total:
            return -math.inf
        harder = total - np.cumsum(counts)  # than each magnitude
        magnitude = int(np.argmax(harder <= most))
        return float(np.array(magnitude, np.uint16).view(np.float16))

    def _stored(self, rows: RowBatch) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """What is stored of each place, NaN where nothing is, and where something is."""
        size, draws = len(rows.ids_B), self.plan.draws
        draw_of_BT = self.plan.draw_of(rows)
        scored_BT = draw_of_BT >= 0
        pair_N = (np.arange(size)[:, None] * draws + draw_of_BT)[scored_BT]  # a row in a draw
        counts_P = np.bincount(pair_N, minlength=size * draws)
        # Draws are filled in order: the first without a place shows that the row has no more.
        some_BD = counts_P.reshape(size, draws) > 0
        read = np.flatnonzero(some_BD | (some_BD.sum(1)[:, None] == np.arange(draws)))
        ids_P = rows.ids_B[read // draws]
        found, columns = self.store.read(ids_P, read % draws, ["nll"])
        misfits = ids_P[found != counts_P[read]]
        if len(misfits):
            raise StoreError(
                f"{self.store.folder}: row {misfits[0]} has other tokens than when it was scored; "
                "the data and the store do not belong together"
            )
        stored_N = np.empty(len(pair_N), np.float16)
        stored_N[np.argsort(pair_N, kind="stable") if draws > 1 else slice(None)] = columns["nll"]
        stored_BT = np.full(scored_BT.shape, np.nan, np.float16)
        stored_BT[scored_BT] = stored_N
        return stored_BT, scored_BT


def plan_of(folder: Path, spec: StoreSpec) -> ScoringPlan:
    """The plan that the manifest holds, if :func:`hardness_spec` may have written it."""
    settings = spec.settings
    right = (
        spec.columns == _COLUMNS
        and settings.keys() == {field.name for field in fields(ScoringPlan)}
        and is_count(settings["draws"])
        and settings["draws"] == spec.draws
        and isinstance(settings["special"], list)
        and all(is_count(token, 0) for token in settings["special"])
    )
    if right and settings["shown"] == "mask":
        right = type(settings["seed"]) is int
    elif right:
        unused = (settings["draws"], settings["seed"], settings["special"])
        right = settings["shown"] in ("token", "next") and unused == (1, None, [])
    if not right:
        raise StoreError(f"{folder / MANIFEST}: damaged, no hardness store has these settings")
    return ScoringPlan.from_tree(settings)
