"""Masks for the tokens that a model finds hard (Self-Evolution; Zhong et al. 2023, token masking).

The original masks every token whose negative log-likelihood exceeds 0.1 nat, always by the mask
token, and by accident masks at random where a row has fewer than two of them. Here a row loses
between ``least`` and ``most`` of its tokens: the hardest first, then random ones; and BERT's
80/10/10 holds. The original's masks are there, too, bit for bit given what the store holds.

Shape letters: B rows, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.fairseq_masks import FairseqMask
from dskd.data.mask_draws import Replacer, maskable, number, order_keys
from dskd.data.prepared import RowBatch, RowSet
from dskd.data.tokenizers import special_ids, tokenizer_fingerprint
from dskd.data.views import CausalView, Shown, draws_of, masked_rows
from dskd.hardness.criterion import HardCriterion, HardnessOf, select
from dskd.settings.data import Data, HardTokens
from dskd.system.files import fingerprint

HARD_LABELS = "hard_N"
"""Column of a batch, float32 [N]: 1 where a causal LM's label is a hard token, 0 elsewhere."""

_NOT_OF_THE_MASKS = ("store", "model", "shown", "micro_batch", "rows_per_shard", "draws")
"""Settings that the store's fingerprint covers, or that change no mask."""


class HardTokenView:
    """What the views of hard tokens have in common.

    Args:
        criterion: which tokens are hard.
        scores: fingerprint of the first store.

    Raises:
        ConfigError: the masks cannot be made with this tokenizer.
    """

    _unused: tuple[str, ...] = ()
    """Settings of the masking that the view does not look at."""

    def __init__(
        self,
        masking: HardTokens,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        criterion: HardCriterion,
        scores: str,
    ) -> None:
        self._masking = masking
        self._seed = seed
        self._special_V = special_ids(tokenizer)
        self.criterion = criterion
        self._prepare(tokenizer)
        of_metric = {"confidence": "threshold", "quantile": "quantile"}
        idle = {name for metric, name in of_metric.items() if metric != masking.metric}
        unused = {*_NOT_OF_THE_MASKS, *idle, *self._unused}
        about = {
            "view": "hard",
            "masking": masking.model_dump(exclude=unused),
            "store": scores,
            "seed": seed,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        self.fingerprint = fingerprint(about)

    def _prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Get ready what makes this view's masks."""


class HardView(HardTokenView):
    """Masks of the hard tokens, between ``least`` and ``most`` of a row's c maskable ones.

    A row's bounds are ``int(least * c + u)`` and ``int(most * c + u)``, u uniform in [0, 1), and
    its random numbers are those of :class:`~dskd.data.views.MaskedView`: with the defaults as
    many tokens are masked in each row as there, and the same ones where no token is hard.
    """

    def _prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        masking = self._masking
        if masking.replacement == "all_mask":
            masking = masking.model_copy(update={"keep": 0.0, "random": 0.0})
            self._unused = ("keep", "random")
        self._replace = Replacer(masking, tokenizer, self._seed)
        self.draws = masking.draws
        self._least = masking.probability if masking.least is None else masking.least
        self._most = masking.probability if masking.most is None else masking.most

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


class OriginalHardView(HardTokenView):
    """The masks of the original Self-Evolution code, bit for bit up to the store's float16.

    A row with two or more hard tokens, special ones counted, loses exactly those to the mask token,
    in every epoch. A row with one loses it and random others, a row with none random ones, as
    fairseq masks. (A vocabulary that is not laid out as fairseq's is refused.)

    The store may round an NLL across the threshold: one between 0.1 and 0.100006 nats is hard in
    the original and, stored as 0.09998, not here.
    """

    _unused = ("least", "most", "replacement")

    def _prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._mask_row = FairseqMask(self._masking, tokenizer, "original")
        self.draws = self._masking.draws

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows with masks, the masked tokens as labels; see :class:`~dskd.data.views.View`."""
        _, hard_BT = self.criterion(rows)

        def mask_row(
            b: int, item: NDArray[np.int64], seed: int
        ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
            hard = hard_BT[b, : len(item)]
            if hard.sum() > 1:
                return hard, np.where(hard, self._mask_row.mask_id, item)
            return self._mask_row(item, seed, besides=hard)

        return masked_rows(rows, self.draws, self._seed, mask_row)


class HardCausalView(HardTokenView, CausalView):
    """The next token at every position, and which of these tokens are hard.

    :meth:`read_hard` is the reader that makes the column :data:`HARD_LABELS`.
    """

    _unused = ("probability", "keep", "random", "least", "replacement", "sampler")

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
        most = 1.0 if self._masking.most is None else self._masking.most
        most_B = number(self._seed, most, draws_B, rows.ids_B, countable_BT.sum(axis=1))
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

    ``hardness_of`` opens the stores, only when rows are read; ``rowset`` are the training rows. The
    other arguments are those of :class:`HardTokenView`.

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
