"""How sure a frozen classifier is of a row: what it says, and what it says on average of several
passes with dropout (Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation").

A row's masks come from (seed, row id, pass): scores are the same for any number of ranks, and but
for rounding for any number of rows or passes at once. Where a model's dropout is not of rows alone
(DeBERTa drops positions that all rows share), they come from the seed of a whole forward pass, and
depend on which rows are in it.

Shape letters: B rows, T tokens, N supervised positions (one a row), C classes, P passes of a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.batch import Batch
from dskd.data.counter import mix
from dskd.data.prepared import RowSet
from dskd.data.views import View
from dskd.errors import ConfigError
from dskd.models.counter_dropout import CounterDropout
from dskd.models.families import positions_of
from dskd.models.frozen import evaluating
from dskd.stores.fill import Words, fill
from dskd.stores.sweep import Scored
from dskd.stores.uncertainty import UncertaintyLayout

_MASKS = 7  # stream of random numbers, apart from those of the data's masks and orders

_SHARED_DROPOUT = frozenset({"deberta", "deberta-v2"})
"""Types with a dropout of something that the rows of a batch share."""

_OTHER_HEADS = ("qa_", "summary_")
"""Beginnings of probabilities of heads that classify nothing, or of none at all."""


class DropoutScores(NamedTuple):
    """What a classifier says of N rows.

    Attributes:
        logits_NC: without dropout, fp32 (float64 if they are).
        mean_NC: the mean over the passes of their distributions at temperature 1.
        entropy_N: entropy of the mean, in nats.
        mean_entropy_N: the mean of the passes' entropies. What :attr:`entropy_N` is above it, the
            passes disagree.
        differ: bool scalar, whether two passes do; true where there is one only.
    """

    logits_NC: Tensor
    mean_NC: Tensor
    entropy_N: Tensor
    mean_entropy_N: Tensor
    differ: Tensor


class DropoutScorer:
    """Scores batches by a frozen classifier.

    Args:
        model: its modules' modes are put back after each call. Where it is to drop, it attends
            eagerly from now on.
        forward: logits [N, C] of a batch, by the model in the mode that it is in.
        passes: with dropout; 1: a single one, without.
        at_once: most passes of one call of ``forward``, which gets so many copies of a batch: a
            bound of memory. The same on every rank, so that their calls are equally many.
        seed: of the masks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[[Batch], Tensor],
        *,
        passes: int,
        at_once: int,
        seed: int,
    ) -> None:
        self._model = model
        self._forward = forward
        self._passes = passes
        self._at_once = at_once
        self._seed = seed
        self._by_row = drops_by_row(model.config)
        if passes > 1 and self._by_row:
            model.set_attn_implementation("eager")
            assert model.config._attn_implementation == "eager", model.config.model_type

    @torch.no_grad()
    def __call__(self, batch: Batch) -> DropoutScores:
        """The scores of a batch on the model's device."""
        with evaluating(self._model):
            logits_NC = wide(self._forward(batch))
        if self._passes == 1:
            return folded(logits_NC, [logits_NC[None]], 1)
        firsts = range(0, self._passes, self._at_once)
        return folded(logits_NC, (self._chunk(batch, first) for first in firsts), self._passes)

    def _chunk(self, batch: Batch, first: int) -> Tensor:
        """Logits [P, N, C] of some passes from the ``first`` on."""
        count = min(self._at_once, self._passes - first)
        copies = batch.repeated(count)
        seeds_PB = mix(
            self._seed, _MASKS, np.arange(first, first + count)[:, None], batch.row_ids_B.numpy()
        ).astype(np.int64)
        with _dropping(self._model), self._masks(seeds_PB, copies.ids_BT.device):
            return self._forward(copies).unflatten(0, (count, -1))

    def _masks(self, seeds_PB: np.ndarray, device: torch.device) -> AbstractContextManager[object]:
        if self._by_row:
            seeds_K = torch.from_numpy(seeds_PB.reshape(-1))
            if device.type == "cuda":  # else the copy waits for the work before it
                seeds_K = seeds_K.pin_memory()
            return CounterDropout(seeds_K.to(device, non_blocking=True))
        return _seeded(int(seeds_PB[0, 0]), device)


def layout_of(
    config: PreTrainedConfig,
    labels: Sequence[str],
    *,
    passes: int,
    dropout: float | None,
    seed: int,
    micro_batch: int,
    at_once: int,
    where: str,
) -> UncertaintyLayout:
    """What the store of a model's scores is: with what they depend on, and nothing else.

    Args:
        config: the model's, with ``dropout`` in it already.
        labels: its classes.
        where: its setting, for messages; the others are those of :func:`score`.

    Raises:
        ConfigError: it has no dropout for several passes.
    """
    refuse_without_dropout(config, passes, where)
    if passes == 1:
        return UncertaintyLayout(tuple(labels), 1)
    layout = UncertaintyLayout(tuple(labels), passes, dropout, seed)
    if drops_by_row(config):
        return layout
    return replace(layout, micro_batch=micro_batch, at_once=at_once)


def score(
    model: Callable[[], PreTrainedModel],
    rows: RowSet,
    view: View,
    folder: Path,
    layout: UncertaintyLayout,
    *,
    fingerprints: Mapping[str, str],
    seed: int,
    micro_batch: int,
    at_once: int,
    rows_per_shard: int,
    device: torch.device,
    where: str,
    present_R: NDArray[np.bool_] | None = None,
    verify: bool = False,
) -> bool:
    """Make the store of a classifier's scores, go on with an interrupted one, or do nothing if it
    is complete (collective); see :func:`~dskd.stores.fill.fill`.

    Args:
        model: builds it, frozen; called only if there is something to score.
        view: shows each row with one supervised position.
        layout: see :func:`layout_of`.
        fingerprints: of the model, the rows and the tokenizer, by name.
        seed: of the masks.
        micro_batch: rows scored together by a rank.
        at_once: most of the passes in one forward pass, which has so many times ``micro_batch``
            rows.
        where: the model's setting, for messages.
        present_R: bool, which of the R rows to score; None: all.
        verify: read a complete store whole, because nobody will open it.

    Raises:
        ConfigError: its passes do not differ.
        StoreError: the folder holds another or a damaged store, or cannot be written.
        NonFiniteError: a row's scores are no numbers.
    """

    def forward() -> Callable[[Batch], DropoutScores]:
        built = model()

        def logits(batch: Batch) -> Tensor:
            return positions_of(built, batch).logits_NV

        return DropoutScorer(built, logits, passes=layout.passes, at_once=at_once, seed=seed)

    def encode(batch: Batch, scores: DropoutScores) -> Scored:
        refuse_equal_passes(scores, layout.passes, where)
        columns = layout.encode(
            batch,
            logits=scores.logits_NC,
            mean=scores.mean_NC,
            entropy=scores.entropy_N,
            mean_entropy=scores.mean_entropy_N,
        )
        return Scored(batch.counts_B.numpy(), columns)

    def holds(folder: Path) -> str:
        del folder
        scored = len(rows) if present_R is None else int(present_R.sum())
        return f"scores of {scored:,} rows, {layout.passes} passes each"

    spec = layout.spec(rows=len(rows), rows_per_shard=rows_per_shard, fingerprints=fingerprints)
    return fill(
        folder,
        spec,
        rows,
        view,
        forward,
        encode,
        micro_batch=micro_batch,
        device=device,
        words=Words("scores", "scoring rows", holds),
        present_R=present_R,
        verify=verify,
    )


def folded(logits_NC: Tensor, chunks: Iterable[Tensor], passes: int) -> DropoutScores:
    """The scores of the logits of a pass without dropout, and of [P, N, C] of those with, in one or
    several chunks; only sums of the distributions are kept."""
    mean_NC = torch.zeros_like(logits_NC)
    mean_entropy_N = logits_NC.new_zeros(len(logits_NC))
    first_NC = None
    differ = torch.full((), passes == 1, device=logits_NC.device)
    for chunk_PNC in chunks:
        first_NC = chunk_PNC[0] if first_NC is None else first_NC
        differ = differ | (chunk_PNC != first_NC).any()
        probabilities_PNC = wide(chunk_PNC).softmax(-1)
        mean_NC = mean_NC + probabilities_PNC.sum(0) / passes
        mean_entropy_N = mean_entropy_N + entropy(probabilities_PNC).sum(0) / passes
    return DropoutScores(logits_NC, mean_NC, entropy(mean_NC), mean_entropy_N, differ)


def drops_by_row(config: PreTrainedConfig) -> bool:
    """Whether a row's masks are its own; else scores depend on which rows are scored together."""
    return config.model_type not in _SHARED_DROPOUT


def dropout_fields(config: PreTrainedConfig) -> dict[str, float]:
    """The probabilities of dropout in a config that a classifier of its type may read, by name;
    those that are None follow another one."""
    return {
        name: float(value)
        for name, value in config.to_dict().items()
        if ("drop" in name and not name.startswith(_OTHER_HEADS))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def with_dropout(config: PreTrainedConfig, probability: float) -> PreTrainedConfig:
    """The config with all of :func:`dropout_fields` set, in attention and the head as well."""
    changed = copy.deepcopy(config)
    for name in dropout_fields(config):
        setattr(changed, name, probability)
    return changed


def refuse_without_dropout(config: PreTrainedConfig, passes: int, where: str) -> None:
    """Refuse several passes of a model that would make them all alike.

    Args:
        where: the teacher's setting, for the message.

    Raises:
        ConfigError: it has no dropout, as many a large model.
    """
    fields = dropout_fields(config)
    if passes == 1 or any(fields.values()):
        return
    zeros = ", ".join(f"{name} {value:g}" for name, value in fields.items()) or "no such field"
    raise ConfigError(
        f"{where}: a {config.model_type} without dropout ({zeros}), whose {passes} passes would "
        f"all be the same; set passes to 1, or dropout to a probability"
    )


def refuse_equal_passes(scores: DropoutScores, passes: int, where: str) -> None:
    """Refuse scores of passes (on the CPU) that did not differ, whatever the config says.

    Raises:
        ConfigError: all of them were the same.
    """
    if not scores.differ.item():
        raise ConfigError(
            f"{where}: {passes} passes with dropout all gave the same, so nothing in this model "
            f"drops; set passes to 1"
        )


@contextmanager
def _dropping(model: PreTrainedModel) -> Iterator[None]:
    """Train mode for a while, in which a frozen model drops.

    All modules: attention asks for the mode of its own, not for that of a dropout inside it.
    """
    with evaluating(model):  # which puts every module's mode back
        model.train()
        yield


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own random numbers from a seed, whose state is put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed & (2**63 - 1))
        yield


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the distributions in the last axis, in nats; 0 log 0 is 0."""
    return torch.special.entr(probabilities).sum(-1)


def wide(values: Tensor) -> Tensor:
    """The values in fp32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()
