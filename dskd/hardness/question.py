"""Let a model score every token of the training rows (self-questioning): how hard is each for it?

Shape letters: B rows, N scored places, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dskd.batch import Batch, Positions
from dskd.data.prepared import Prepared
from dskd.data.tokenizers import vocabulary_size
from dskd.fused.through_head import through_head
from dskd.hardness.scoring import ScoringView
from dskd.hardness.store import describe_scores, encode, hardness_spec
from dskd.models.families import positions_of
from dskd.settings.data import HardTokens
from dskd.stores.fill import Words, fill
from dskd.stores.sweep import Scored, refuse_non_finite


class TokenScores(NamedTuple):
    """How hard the label of each scored place was to the model.

    Attributes:
        nll_N: float32, negative log-likelihood of the label, nats.
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
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Make the store of all tokens' scores, go on with an interrupted one, or do nothing if it is
    complete (collective); see :func:`~dskd.stores.fill.fill`.

    Args:
        model: builds the model that scores, replicated or ZeRO-3-sharded, which is then put into
            eval mode; called only if something is missing.
        prepared: its training rows are scored, as ``view`` shows them.
        fingerprints: of all that the scores depend on, by name; kept in the manifest.
        stop: whether to stop, called now and then on every rank; None: never.

    Returns:
        Whether anything was missing.

    Raises:
        StoreError: the folder holds another store, or cannot be written.
        NonFiniteError: the model's logits are not finite.
        Stopped: ``stop`` returned true on one of the ranks; called again, it goes on.
    """
    vocabulary = vocabulary_size(prepared.tokenizer)

    def forward() -> Callable[[Batch], TokenScores]:
        scorer = model().eval()
        # with the head here: a sharded one is a collective, and not every batch is kept
        return lambda batch: token_scores(positions_of(scorer, batch), vocabulary)

    def holds(folder: Path) -> str:
        about = describe_scores(folder)
        each = about["bytes_per_token"]
        return f"the NLL of {about['tokens']:,} tokens in {each:.2f} bytes each"

    return fill(
        folder,
        hardness_spec(masking, prepared.train, view, fingerprints),
        prepared.train,
        view,
        forward,
        _score,
        micro_batch=masking.micro_batch,
        device=device,
        words=Words("question", "scoring every token", holds),
        stop=stop,
    )


def token_scores(positions: Positions, vocabulary: int) -> TokenScores:
    """How hard the labels were to a model; its head runs once, by chunks of bounded memory.

    Args:
        positions: of any dtype; the log-softmax is float32.
        vocabulary: number of real tokens; padding columns beyond are dropped.
    """
    labels_N = positions.labels_N
    found = through_head(
        positions.projection,
        positions.hidden_ND,
        vocabulary,
        lambda rows, logits_CV: _chunk_scores(logits_CV, labels_N[rows]),
        bytes_per_logit=8,  # two matrices in float32
    )
    return TokenScores(*found)


def _chunk_scores(logits_NV: Tensor, labels_N: Tensor) -> TokenScores:
    label_N1 = labels_N[:, None]
    logprob_N1 = torch.log_softmax(logits_NV, 1, dtype=torch.float32).gather(1, label_N1)
    return TokenScores(-logprob_N1[:, 0], logits_NV.gather(1, label_N1)[:, 0] < logits_NV.amax(1))


def _score(batch: Batch, scores: TokenScores) -> Scored:
    """The store's column; a NaN says that a logit is one or infinite, or that all are ``-inf``."""
    nll_N = scores.nll_N.cpu()
    refuse_non_finite(batch, nll_N.isnan(), "the model's")
    return Scored(batch.counts_B.numpy(), encode(nll_N.numpy(), scores.wrong_N.cpu().numpy()))
