"""Masks for the tokens that a model finds hard (Self-Evolution; Zhong et al. 2023, token masking).

The original masks every token whose negative log-likelihood exceeds 0.1 nat, always by the mask
token, and by accident masks at random where a row has fewer than two of them. Here a row loses
between ``least`` and ``most`` of its tokens: the hardest first, then random ones; and BERT's
80/10/10 holds. The original's masks are there, too, bit for bit given what the store holds.

Shape letters: B rows, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.fairseq_masks import FairseqMask, fairseq_seed
from dskd.data.mask_draws import Replacer, maskable, number, order_keys
from dskd.data.prepared import RowBatch, RowSet
from dskd.data.tokenizers import special_ids, tokenizer_fingerprint
from dskd.data.views import CausalView, Shown, draws_of
from dskd.hardness.criterion import HardCriterion, HardnessOf, select
from dskd.settings.data import Data, HardTokens
from dskd.system.files import fingerprint

HARD_LABELS = "hard_N"
"""Column of a batch, float32 [N]: 1 where a causal LM's label is a hard token, 0 elsewhere."""

_NOT_OF_THE_MASKS = ("store", "model", "shown", "micro_batch", "rows_per_shard", "draws")
"""Settings that the store's fingerprint covers, or that change no mask."""


class HardView:
    """Masks of the hard tokens, between ``least`` and ``most`` of a row's c maskable ones.

    A row's bounds are ``int(least * c + u)`` and ``int(most * c + u)``, u uniform in [0, 1), and
    its random numbers are those of :class:`~dskd.data.views.MaskedView`: with the defaults as
    many tokens are masked in each row as there, and the same ones where no token is hard.

    Args:
        masking: the settings.
        tokenizer: of the rows.
        seed: of the run.
        criterion: which tokens are hard.
        scores: fingerprint of the first store.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    def __init__(
        self,
        masking: HardTokens,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        criterion: HardCriterion,
        scores: str,
    ) -> None:
        all_mask = {"keep": 0.0, "random": 0.0} if masking.replacement == "all_mask" else {}
        self._replace = Replacer(masking.model_copy(update=all_mask), tokenizer, seed)
        self.draws = masking.draws
        self.fingerprint = _fingerprint(
            masking,
            tokenizer,
            seed,
            scores,
            unused=["keep", "random"] if all_mask else [],
        )
        self._least = masking.probability if masking.least is None else masking.least
        self._most = masking.probability if masking.most is None else masking.most
        self._seed = seed
        self._special_V = special_ids(tokenizer)
        self.criterion = criterion

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows with masks, the masked tokens as labels; see :class:`~dskd.data.views.View`."""
        draws_B = draws_of(rows, self.draws)
        maskable_BT = maskable(rows.tokens_BT, rows.lengths_B, self._special_V)
        counts_B = maskable_BT.sum(axis=1)
        nll_BT, hard_BT = self.criterion(rows)
        chosen_BT = select(
            hard_BT,
            nll_BT,
            maskable_BT,
            number(self._seed, self._least, draws_B, rows.ids_B, counts_B),
            number(self._seed, self._most, draws_B, rows.ids_B, counts_B),
            order_keys(self._seed, draws_B, rows.ids_B, rows.tokens_BT.shape[1]),
        )
        return Shown(*self._replace(draws_B, rows.ids_B, rows.tokens_BT, chosen_BT))


class OriginalHardView:
    """The masks of the original Self-Evolution code, bit for bit up to the store's float16.

    A row with two or more hard tokens, special ones counted, loses exactly those to the mask token,
    in every epoch. A row with one loses it and random others, a row with none random ones, as
    fairseq masks.

    The store may round an NLL across the threshold: one between 0.1 and 0.100006 nats is hard in
    the original and, stored as 0.09998, not here.

    Args: as of :class:`HardView`.

    Raises:
        ConfigError: the vocabulary is not laid out as fairseq's.
    """

    def __init__(
        self,
        masking: HardTokens,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        criterion: HardCriterion,
        scores: str,
    ) -> None:
        self._mask_row = FairseqMask(masking, tokenizer, "original")
        self.draws = masking.draws
        self.fingerprint = _fingerprint(
            masking, tokenizer, seed, scores, unused=["least", "most", "replacement"]
        )
        self._seed = seed
        self.criterion = criterion

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows with masks, the masked tokens as labels; see :class:`~dskd.data.views.View`."""
        _, hard_BT = self.criterion(rows)
        draws_B = draws_of(rows, self.draws)
        inputs_BT = rows.tokens_BT.copy()
        labels_BT = np.full_like(inputs_BT, IGNORE)
        for b, (row, draw, length) in enumerate(
            zip(rows.ids_B.tolist(), draws_B.tolist(), rows.lengths_B.tolist(), strict=True)
        ):
            item, hard = rows.tokens_BT[b, :length], hard_BT[b, :length]
            if hard.sum() > 1:
                chosen, seen = hard, np.where(hard, self._mask_row.mask_id, item)
            else:
                numbers = np.random.RandomState(fairseq_seed(self._seed, draw, row))
                chosen, seen = self._mask_row(item, numbers, besides=hard)
            labels_BT[b, :length][chosen] = item[chosen]
            inputs_BT[b, :length] = seen
        return Shown(inputs_BT, labels_BT)


class HardCausalView(CausalView):
    """The next token at every position, and which of these tokens are hard.

    :meth:`read_hard` is the reader that makes the column :data:`HARD_LABELS`.

    Args: as of :class:`HardView`.
    """

    def __init__(
        self,
        masking: HardTokens,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        criterion: HardCriterion,
        scores: str,
    ) -> None:
        unused = ["probability", "keep", "random", "least", "replacement", "sampler"]
        self.fingerprint = _fingerprint(masking, tokenizer, seed, scores, unused=unused)
        self._most = 1.0 if masking.most is None else masking.most
        self._special_V = special_ids(tokenizer)
        self._seed = seed
        self.criterion = criterion

    def read_hard(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """A :class:`~dskd.data.views.Reader`: float32 [N], 1 where the label is hard (the hardest
        ``most`` of a row's labels that are not special) and 0 elsewhere."""
        hard_N = self.hard(rows)[shown.labels_BT != IGNORE]
        return {HARD_LABELS: hard_N.astype(np.float32)}

    def hard(self, rows: RowBatch) -> NDArray[np.bool_]:
        """``hard_BT``, true where the label is hard: the same in every epoch of a store."""
        nll_BT, hard_BT = self.criterion(rows)
        labels_BT = np.roll(rows.tokens_BT, -1, axis=1)
        countable_BT = maskable(labels_BT, rows.lengths_B - 1, self._special_V)
        draws_B = np.zeros_like(rows.ids_B)
        most_B = number(self._seed, self._most, draws_B, rows.ids_B, countable_BT.sum(axis=1))
        keys_BT = order_keys(self._seed, draws_B, rows.ids_B, labels_BT.shape[1])
        return select(hard_BT, nll_BT, countable_BT, np.zeros_like(most_B), most_B, keys_BT)


AnyHardView = HardView | OriginalHardView | HardCausalView


def hard_view(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    hardness_of: HardnessOf,
    *,
    scores: str,
    rowset: RowSet,
) -> AnyHardView:
    """The view of a run's training rows where ``data.masking`` is of hard tokens.

    Args:
        data: the settings.
        tokenizer: of the rows.
        seed: of the run.
        hardness_of: opens the stores; called only when rows are read.
        scores: fingerprint of the first store.
        rowset: the training rows.

    Raises:
        ConfigError: the masking settings do not fit the tokenizer.
    """
    masking = data.masking
    assert isinstance(masking, HardTokens), masking
    if data.objective == "causal":
        kind = HardCausalView
    else:
        kind = OriginalHardView if masking.sampler == "original" else HardView
    criterion = HardCriterion(masking, hardness_of, rowset, special_ids(tokenizer))
    return kind(masking, tokenizer, seed, criterion, scores)


def _fingerprint(
    masking: HardTokens,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    scores: str,
    unused: Sequence[str],
) -> str:
    """Fingerprint of all that the masks depend on, without the settings ``unused`` by the view."""
    of_metric = {"confidence": "threshold", "quantile": "quantile", "correctness": None}
    idle = {name for metric, name in of_metric.items() if name and metric != masking.metric}
    return fingerprint(
        {
            "view": "hard",
            "masking": masking.model_dump(exclude={*_NOT_OF_THE_MASKS, *unused, *idle}),
            "store": scores,
            "seed": seed,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
    )
