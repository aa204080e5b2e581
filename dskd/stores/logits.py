"""The logit cache: a teacher's K largest log-probabilities at every supervised position.

Besides them it keeps, for each stored temperature T, the log-sum-exp of ``logprob / T`` over the
tokens that are not kept. It is summed from those tokens themselves, so the teacher's tail mass at T
is exact for any K; ``1 - sum of the kept`` would lose all its digits where K holds nearly
everything. The masks that the logits belong to are in the cache too: the supervised positions and
what the teacher saw there.

Columns of a position (bytes for V up to 65536 and the defaults; at most 6 per kept entry)::

    ids [K] uint16        2 K   token ids by falling probability
    ids_high [K] uint8          their third byte, for V > 65536 only
    logprobs [K] float16  2 K   log-probabilities at temperature 1, over the whole vocabulary
    tail [temperatures]   4     float32, see above; -inf when K = V
    pos uint8 or more     1-2   place in the row: masked LMs only, a causal one predicts everywhere
    input uint16          2     token shown at that place (masked LMs only); input_high as above

Shape letters: B rows, T tokens, N supervised positions, V vocabulary, K kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dskd.batch import IGNORE, Batch, TopKTeacher
from dskd.data.prepared import RowBatch
from dskd.data.views import CausalView, Shown, draws_of
from dskd.errors import ConfigError, StoreError
from dskd.fused.topk_teacher import check_ids, check_masses
from dskd.stores.manifest import MANIFEST, is_count, read_spec
from dskd.stores.shard import Column, StoreSpec
from dskd.stores.store import Store
from dskd.stores.sweep import refuse_non_finite

KIND = "logits"

# Columns of a batch, at its N supervised positions in row-major order; see TopKTeacher.
TOPK_IDS = "topk_ids"
"""int64 [N, K], token ids by falling probability."""
TOPK_LOGPROBS = "topk_logprobs"
"""float32 [N, K], their log-probabilities at temperature 1 over the whole vocabulary."""
TOPK_TAIL = "tail"
"""float32 [N], log-sum-exp of ``logprob / T`` over the tokens that are not kept."""
TOPK_TAIL_AT_1 = "tail_at_1"
"""float32 [N], the same at temperature 1, where it is asked for."""
UNUSED_SLOTS = {TOPK_IDS: -1, TOPK_LOGPROBS: -math.inf, TOPK_TAIL: -math.inf}
"""What the columns hold in a slot k without a token."""

MAX_VOCABULARY = 1 << 24
_SAMPLED_ROWS, _SAMPLED_POSITIONS = 64, 32  # looked at when a cache is opened, by each rank


@dataclass(frozen=True)
class LogitLayout:
    """What a cache keeps of each position, and of which rows; stored in its manifest.

    Attributes:
        k: kept tokens.
        vocabulary: number of real tokens, no padding columns.
        temperatures: those whose tails are kept.
        values: type of the log-probabilities.
        block_size: most tokens of a row.
        masked: of a masked LM (else causal: every place but the last is kept).
        domain: the only domain whose rows are kept; None: all rows.

    Raises:
        ConfigError: k or the vocabulary is out of range.
    """

    k: int
    vocabulary: int
    temperatures: tuple[float, ...]
    values: Literal["fp16", "fp32"]
    block_size: int
    masked: bool
    domain: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocabulary:
            raise ConfigError(
                f"teacher.k: {self.k} is not between 1 and the {self.vocabulary} tokens of the "
                "vocabulary"
            )
        if self.vocabulary > MAX_VOCABULARY:
            raise ConfigError(
                f"a logit cache holds at most {MAX_VOCABULARY} token ids, the vocabulary has "
                f"{self.vocabulary}"
            )
        assert all(math.isfinite(t) and t > 0 for t in self.temperatures), self.temperatures
        assert len(set(self.temperatures)) == len(self.temperatures), self.temperatures

    def columns(self) -> dict[str, Column]:
        """The store's columns."""
        wide = self.vocabulary > 1 << 16
        columns = {
            "ids": Column("uint16", (self.k,)),
            "logprobs": Column("float16" if self.values == "fp16" else "float32", (self.k,)),
            "tail": Column("float32", (len(self.temperatures),)),
        }
        if wide:
            columns["ids_high"] = Column("uint8", (self.k,))
        if self.masked:
            columns["pos"] = Column(np.min_scalar_type(self.block_size - 1).name)
            columns["input"] = Column("uint16")
        if self.masked and wide:
            columns["input_high"] = Column("uint8")
        return columns

    def parts(self, name: str) -> list[str]:
        """The columns in which the token ids of ``name`` are kept."""
        return [part for part in (name, f"{name}_high") if part in self.columns()]

    def spec(
        self, *, rows: int, draws: int, rows_per_shard: int, fingerprints: Mapping[str, str]
    ) -> StoreSpec:
        """The spec of a store of this layout; see :class:`~dskd.stores.shard.StoreSpec`."""
        return StoreSpec(
            kind=KIND,
            columns=self.columns(),
            rows=rows,
            draws=draws,
            rows_per_shard=rows_per_shard,
            fingerprints=fingerprints,
            settings=asdict(self),
        )

    def encode(self, batch: Batch, kept: TopKTeacher) -> dict[str, np.ndarray]:
        """The columns of a batch's supervised positions.

        Args:
            batch: the batch that the teacher saw, on the CPU.
            kept: the ``k`` largest of its logits there and the tails at the ``temperatures``, on
                the CPU; -inf is allowed, NaN is not.

        Raises:
            NonFiniteError: a row's logits are NaN, infinite, or -inf throughout.
        """
        assert kept.ids_NK.shape[1] == self.k and (*kept.tail_N,) == self.temperatures, kept
        logprobs_NK = kept.logprobs_NK
        refuse_non_finite(batch, ~torch.isfinite(logprobs_NK[:, 0]), "the teacher's")
        columns = {
            **_split("ids", kept.ids_NK.numpy(), self.vocabulary),
            "logprobs": logprobs_NK.numpy().astype(self.columns()["logprobs"].dtype),
            "tail": torch.stack([*kept.tail_N.values()], 1).numpy(),
        }
        supervised_BT = batch.supervised_BT
        if self.masked:
            pos_N = supervised_BT.nonzero()[:, 1].numpy()
            columns["pos"] = pos_N.astype(self.columns()["pos"].dtype)
            input_N = batch.ids_BT[supervised_BT].numpy()
            columns |= _split("input", input_N, self.vocabulary)
        else:
            followed_BT = batch.mask_BT[:, 1:].bool()
            assert (
                torch.equal(supervised_BT[:, :-1], followed_BT) and not supervised_BT[:, -1].any()
            )
        return columns


class LogitCache:
    """A complete cache, verified and open for reading.

    Args:
        folder: where it is.
        expect: fingerprints it must have been made with, by name.
        share: ``(rank, world)``: the share of the shards that this process verifies; all ranks'
            shares cover the cache, and they must agree on the outcome (``dist.agree``).

    Raises:
        StoreError: it is missing, incomplete, damaged or made of something else, or a sample of its
            rows holds what no teacher gives.
    """

    def __init__(
        self, folder: Path, expect: Mapping[str, str], share: tuple[int, int] = (0, 1)
    ) -> None:
        self.store = Store(folder, kind=KIND, expect=expect, share=share)
        self.layout = _layout(folder, self.store.spec)
        self._check_sample(range(share[0], self.store.spec.shards, share[1]))

    def read(
        self, rows: RowBatch, *columns: str
    ) -> tuple[NDArray[np.int64], dict[str, np.ndarray]]:
        """Number of positions of each row in its epoch's draw, and some columns of theirs; epoch e
        has draw ``e % draws``. See :meth:`dskd.stores.store.Store.read`."""
        return self.store.read(rows.ids_B, draws_of(rows, self.store.spec.draws), columns)

    def _check_sample(self, shards: range) -> None:
        """Look at rows that are spread over some shards.

        Hashes say that the files are what was written, not that it was a teacher's: the writer may
        have been another program.
        """
        each = -(-_SAMPLED_ROWS // max(1, len(shards)))
        for shard in shards[:: max(1, len(shards) // _SAMPLED_ROWS)]:
            draw, *_ = self.store.spec.span(shard)
            held = self.store.held(shard)
            for row in held[:: max(1, len(held) // each)].tolist():
                self._check_row(row, draw)

    def _check_row(self, row: int, draw: int) -> None:
        layout = self.layout
        names = (*layout.parts("ids"), "logprobs", "tail")
        _, columns = self.store.read(np.array([row]), np.array([draw]), names)
        some = slice(None, None, max(1, len(columns["tail"]) // _SAMPLED_POSITIONS))
        columns = {name: column[some] for name, column in columns.items()}
        ids_NK, logprobs_NK, tail_NS = (
            torch.from_numpy(x)
            for x in (_join("ids", columns), columns["logprobs"], columns["tail"])
        )
        how = {"counted_N": torch.ones(len(ids_NK)), "columns": layout.vocabulary}
        try:
            check_ids(ids_NK, layout.vocabulary)
            for tail_N, temperature in zip(tail_NS.unbind(1), layout.temperatures, strict=True):
                check_masses(ids_NK, logprobs_NK, tail_N, temperature=temperature, **how)
        except ValueError as problem:
            raise StoreError(
                f"{self.store.folder}: row {row} of draw {draw} holds what no teacher gives; of "
                f"the positions looked at, {problem}"
            ) from problem

    def check(self, use_k: int | None, temperature: float) -> None:
        """Refuse what the cache cannot give, before training starts.

        Raises:
            ConfigError: fewer logits are stored than wanted, or the temperature is not stored.
        """
        if use_k is not None and not 1 <= use_k <= self.layout.k:
            raise ConfigError(
                f"teacher.use_k: {use_k} is not between 1 and the {self.layout.k} logits that "
                f"{self.store.folder} keeps"
            )
        if float(temperature) not in self.layout.temperatures:
            raise ConfigError(
                f"method.temperature: {temperature} is not stored in {self.store.folder}, which "
                f"has {', '.join(map(str, self.layout.temperatures))} (teacher.temperatures)"
            )


class CachedMasks:
    """The view of the rows that a cache's logits belong to: masks, or none of a causal LM.

    Attributes:
        draws: number of different masks of each row.
        fingerprint: of the cache.
    """

    def __init__(self, cache: LogitCache) -> None:
        self._cache = cache
        self.draws: int | None = cache.store.spec.draws
        self.fingerprint = cache.store.spec.fingerprint

    def __call__(self, rows: RowBatch) -> Shown:
        """What the teacher saw of ``rows``, and the labels there.

        Raises:
            StoreError: the cache has not got a row, or a row has another length than it had.
        """
        if not self._cache.layout.masked:
            counts_B, _ = self._cache.read(rows)
            self._refuse_misfits(rows.ids_B[counts_B != rows.lengths_B - 1])
            return CausalView()(rows)
        counts_B, columns = self._cache.read(rows, "pos", *self._cache.layout.parts("input"))
        row_N, pos_N = np.repeat(np.arange(len(counts_B)), counts_B), columns["pos"]
        self._refuse_misfits(rows.ids_B[row_N[pos_N >= rows.lengths_B[row_N]]])
        inputs_BT, labels_BT = rows.tokens_BT.copy(), np.full_like(rows.tokens_BT, IGNORE)
        labels_BT[row_N, pos_N] = rows.tokens_BT[row_N, pos_N]
        inputs_BT[row_N, pos_N] = _join("input", columns)
        return Shown(inputs_BT, labels_BT)

    def _refuse_misfits(self, row_ids: NDArray[np.int64]) -> None:
        if len(row_ids):
            raise StoreError(
                f"{self._cache.store.folder}: row {row_ids[0]} has another length than when it was "
                "captured; the data and the cache do not belong together"
            )


class CachedLogits:
    """The reader of a cache's logits, at the positions that its :class:`CachedMasks` show.

    Args:
        cache: the cache; it passed :meth:`LogitCache.check` with the two others.
        use_k: logits per position, the others join the tail; None: all that are kept.
        temperature: the temperature of the tail.
        at_1: read the tail at temperature 1, too, which the cache has.
    """

    def __init__(
        self, cache: LogitCache, use_k: int | None, temperature: float, *, at_1: bool = False
    ) -> None:
        self._cache = cache
        self._k = use_k or cache.layout.k
        self._tails = {TOPK_TAIL: float(temperature)} | ({TOPK_TAIL_AT_1: 1.0} if at_1 else {})

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """The columns :data:`TOPK_IDS`, :data:`TOPK_LOGPROBS` and :data:`TOPK_TAIL`, and
        :data:`TOPK_TAIL_AT_1` if it is asked for.

        Raises:
            StoreError: the cache has not got a row.
        """
        names = (*self._cache.layout.parts("ids"), "logprobs", "tail")
        counts_B, columns = self._cache.read(rows, *names)
        assert (counts_B == (shown.labels_BT != IGNORE).sum(1)).all(), "logits of other masks"
        k = self._k
        logprobs_NK = torch.from_numpy(columns["logprobs"]).float()  # 2x faster than numpy's cast
        tails = {}
        for name, heat in self._tails.items():
            tail_N = columns["tail"][:, self._cache.layout.temperatures.index(heat)]
            if k < self._cache.layout.k:
                dropped_N = torch.logsumexp(logprobs_NK[:, k:] / heat, 1)
                tail_N = torch.logaddexp(torch.from_numpy(tail_N), dropped_N).numpy()
            tails[name] = np.ascontiguousarray(tail_N)
        return {
            TOPK_IDS: np.ascontiguousarray(_join("ids", columns)[:, :k]),
            TOPK_LOGPROBS: logprobs_NK[:, :k].contiguous().numpy(),
            **tails,
        }


def describe_cache(folder: Path) -> dict[str, Any]:
    """What a cache holds and what that costs; the shards are not read.

    Raises:
        StoreError: there is no logit cache, or its manifest is damaged.
    """
    spec, records = read_spec(folder)
    if spec.kind != KIND:
        raise StoreError(f"{folder}: holds {spec.kind!r}, not {KIND!r}")
    layout = _layout(folder, spec)
    per_position = sum(column.nbytes for column in spec.columns.values())
    about = {
        "complete": records is not None,
        "domain": layout.domain,
        "rows": spec.rows,
        "draws": spec.draws,
        "shards": spec.shards,
        "k": layout.k,
        "vocabulary": layout.vocabulary,
        "objective": "masked" if layout.masked else "causal",
        "values": layout.values,
        "temperatures": list(layout.temperatures),
        "bytes_per_position": per_position,
        "bytes_per_kept_entry": per_position / layout.k,
    }
    if records is not None:
        positions = sum(record.positions for record in records)
        nbytes = sum(record.nbytes for record in records)
        held = [record.rows for record in records if record.rows is not None]
        if len(held) == len(records):
            about["rows_held"] = sum(held)  # of all draws together
        about |= {"positions": positions, "bytes": nbytes}
        if positions:
            about["file_bytes_per_position"] = nbytes / positions
            about["file_bytes_per_kept_entry"] = nbytes / positions / layout.k
    return about | {f"{name} fingerprint": value for name, value in spec.fingerprints.items()}


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a cache and check it; what :func:`describe_cache` says, if all is well.

    Raises:
        StoreError: names what is missing, truncated, damaged or foreign.
    """
    LogitCache(folder, {})
    return describe_cache(folder)


def _layout(folder: Path, spec: StoreSpec) -> LogitLayout:
    """What the manifest says of each position, if :meth:`LogitLayout.spec` may have written it."""
    settings = spec.settings
    names = {field.name for field in fields(LogitLayout)}
    temperatures = settings.get("temperatures")
    right = (
        settings.keys() == names
        and isinstance(temperatures, list)
        and all(type(t) in (int, float) and math.isfinite(t) and t > 0 for t in temperatures)
        and len(set(temperatures)) == len(temperatures)
        and all(is_count(settings[name]) for name in ("k", "vocabulary", "block_size"))
        and settings["k"] <= settings["vocabulary"] <= MAX_VOCABULARY
        and settings["values"] in ("fp16", "fp32")
        and isinstance(settings["masked"], bool)
        and isinstance(settings["domain"], str | None)
    )
    layout = LogitLayout(**{**settings, "temperatures": tuple(temperatures)}) if right else None
    if layout is None or layout.columns() != spec.columns:
        raise StoreError(
            f"{folder / MANIFEST}: damaged, no logit cache has these settings and columns"
        )
    return layout


def _split(name: str, ids: NDArray[np.int64], vocabulary: int) -> dict[str, np.ndarray]:
    """Token ids as 2 bytes, and a third one if the vocabulary needs it."""
    low = {name: ids.astype(np.uint16)}
    return low | ({f"{name}_high": (ids >> 16).astype(np.uint8)} if vocabulary > 1 << 16 else {})


def _join(name: str, columns: Mapping[str, np.ndarray]) -> NDArray[np.int64]:
    """The inverse of :func:`_split`, int64."""
    ids = columns[name].astype(np.int64)
    if f"{name}_high" in columns:
        ids |= columns[f"{name}_high"].astype(np.int64) << 16
    return ids
