"""Self-questioning: ask a model for every token of the training rows, and store how hard each was.

Shape letters: N places asked about, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dskd.batch import Batch, DenseTeacher, Rows
from dskd.data.prepared import Prepared
from dskd.data.tokenizers import vocabulary_size
from dskd.errors import NonFiniteError
from dskd.hardness.scoring import ScoringView
from dskd.hardness.store import describe, encode, hardness_spec
from dskd.models.families import rows_of
from dskd.settings.data import HardTokens
from dskd.stores.shard import StoreSpec
from dskd.stores.store import Writer, is_complete
from dskd.stores.sweep import sweep
from dskd.system import dist
from dskd.system.locks import alone
from dskd.system.log import bar, say

_CHUNK = 1 << 24  # logits at once: bounds their float32 copies to some 64 MiB each

Forward = Callable[[Batch], Rows | DenseTeacher]
"""A model in eval mode on a batch of CPU tensors, up to its last linear map or with its logits."""


class Answers(NamedTuple):
    """How hard each place was.

    Attributes:
        nll_N: float32, nats.
        wrong_N: bool, whether another token's logit is larger than the label's.
    """

    nll_N: Tensor
    wrong_N: Tensor


def question(
    masking: HardTokens,
    model: Callable[[], nn.Module],
    prepared: Prepared,
    view: ScoringView,
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    device: torch.device,
) -> None:
    """Make the store, go on with an interrupted one, or do nothing if it is complete (collective).

    While another job makes it, this one waits. A complete store is not verified here but when it is
    opened.

    Args:
        masking: the settings of the store.
        model: builds the model that is asked, replicated or ZeRO-3-sharded, which is then put into
            eval mode; called only if there is something to ask.
        prepared: the data; its training rows are asked about.
        view: what the model sees of them.
        folder: the store's folder.
        fingerprints: of all that the answers depend on, by name; kept in the manifest.
        device: where the model is.

    Raises:
        StoreError: the folder holds another store, or cannot be written.
        NonFiniteError: the model's logits are not finite.
    """
    spec = hardness_spec(masking, prepared.train, view, fingerprints)
    if _is_complete(folder, spec):
        say(f"question: {folder} is complete")
        return
    with alone(folder):  # the store of several runs has one writer
        if _is_complete(folder, spec):
            return
        asked = model().eval().requires_grad_(False)

        def forward(batch: Batch) -> Rows:
            return rows_of(asked, batch.to(device))

        ask(masking, forward, prepared, view, folder, fingerprints=fingerprints)


def ask(
    masking: HardTokens,
    forward: Forward,
    prepared: Prepared,
    view: ScoringView,
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    stop: Callable[[], bool] | None = None,
) -> bool:
    """:func:`question` for any model, such as a student between two steps (collective); no other
    job may be at work in the folder.

    Args:
        forward: the model; called without gradients, equally often on every rank.
        stop: whether to stop, asked now and then on every rank; None: never.

    The other arguments and the errors are those of :func:`question`.

    Returns:
        Whether the model was asked: the store was not complete.

    Raises:
        Stopped: ``stop`` said so on one of the ranks; called again, it goes on.
    """
    rows, vocabulary = prepared.train, vocabulary_size(prepared.tokenizer)
    spec = hardness_spec(masking, rows, view, fingerprints)
    if _is_complete(folder, spec):
        return False

    def answer(batch: Batch) -> Answers:
        # with the head here: a sharded one is a collective, and not every batch is scored
        return answers_of(forward(batch), batch.labels_N, vocabulary)

    with bar("asking for every token") as report:
        sweep(
            answer,
            rows,
            view,
            Writer(folder, spec),
            micro_batch=masking.micro_batch,
            score=_score,
            progress=report,
            stop=stop,
        )
    about = describe(folder)
    say(
        f"question: {folder} holds the NLL of {about['tokens']:,} tokens in "
        f"{about['bytes_per_token']:.2f} bytes each"
    )
    return True


@torch.no_grad()
def answers_of(said: Rows | DenseTeacher, labels_N: Tensor, vocabulary: int) -> Answers:
    """How hard the labels were to a model; its head runs once, by chunks of bounded memory.

    Args:
        said: the model's supervised positions, of any dtype; the log-softmax is float32.
        labels_N: int64, their labels, on any device.
        vocabulary: number of real tokens; padding columns beyond are dropped.
    """
    if isinstance(said, DenseTeacher):
        labels_N = labels_N.to(said.logits_NV.device)
        logits_NV = said.logits_NV[:, :vocabulary]
        return _by_chunks(lambda part: logits_NV[part], labels_N, vocabulary)

    def use(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, ...]:
        weight_VD = weight_VD[:vocabulary]
        bias_V = None if bias_V is None else bias_V[:vocabulary]

        def logits(part: slice) -> Tensor:
            return linear(hidden_ND[part], weight_VD, bias_V)

        return tuple(_by_chunks(logits, said.labels_N, vocabulary))

    return Answers(*said.projection(said.hidden_ND, use))


def _by_chunks(logits: Callable[[slice], Tensor], labels_N: Tensor, vocabulary: int) -> Answers:
    """Answers from ``logits(part)`` [n, V], for one part of the N places after the other."""
    step = max(1, _CHUNK // vocabulary)
    parts = [slice(first, first + step) for first in range(0, max(len(labels_N), 1), step)]
    found = [_answers(logits(part), labels_N[part]) for part in parts]
    return Answers(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _answers(logits_NV: Tensor, labels_N: Tensor) -> Answers:
    label_N1 = labels_N[:, None]
    logprob_N1 = torch.log_softmax(logits_NV, 1, dtype=torch.float32).gather(1, label_N1)
    return Answers(-logprob_N1[:, 0], logits_NV.gather(1, label_N1)[:, 0] < logits_NV.amax(1))


def _score(batch: Batch, answers: Answers) -> dict[str, np.ndarray]:
    """The store's column; a NaN says that a logit is one or infinite, or that all are ``-inf``."""
    nll_N = answers.nll_N.cpu()
    bad_N = nll_N.isnan()
    if bad_N.any():
        row_N = batch.row_ids_B.repeat_interleave(batch.supervised_BT.sum(1))
        raise NonFiniteError(f"the model's logits are not finite in row {row_N[bad_N][0].item()}")
    return encode(nll_N.numpy(), answers.wrong_N.cpu().numpy())


def _is_complete(folder: Path, spec: StoreSpec) -> bool:
    return dist.on_rank0(lambda: is_complete(folder, spec))
