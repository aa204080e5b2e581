"""Views: what a model sees of a row in an epoch (inputs) and what it predicts there (labels); and
readers, which add further columns to a batch.

Masked LMs see BERT's masks (Devlin et al. 2019, section 3.1: 80 % mask token, 10 % random, 10 % as
it was). Every mask is a pure function of (seed, draw, row id, position), ``draw`` being the epoch
modulo ``masking.draws``: it does not depend on ranks, batches or the Python at hand.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dskd.batch import IGNORE
from dskd.data.fairseq_masks import FairseqMask, fairseq_seed
from dskd.data.layouts import task_ids
from dskd.data.mask_draws import Replacer, maskable, number, order_keys, smallest
from dskd.data.prepared import RowBatch
from dskd.data.tokenizers import continues_word, special_ids, tokenizer_fingerprint
from dskd.settings.data import Data, Masking, MaskShares
from dskd.system.files import fingerprint


class Shown(NamedTuple):
    """What a model sees of some rows, and what it predicts.

    A view may show each row several times: first all rows in one way, then all of them in another;
    B then counts all of them.

    Attributes:
        inputs_BT: int64, the tokens that the model sees.
        labels_BT: int64, aligned with the logits of the same place; ``IGNORE`` where nothing is
            predicted.
    """

    inputs_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]


class View(Protocol):
    """Turns rows into inputs and labels; the same for the same rows and epochs, always.

    ``draws`` is the number of different views of a row (epoch e shows number ``e % draws``), None
    for one per epoch; ``fingerprint`` covers everything else that the result depends on.
    """

    draws: int | None
    fingerprint: str

    def __call__(self, rows: RowBatch) -> Shown:
        """What the model sees of ``rows``, each in its epoch, and what it predicts there."""
        ...


class Reader(Protocol):
    """Adds columns to a batch, such as a stored teacher's logits."""

    def __call__(self, rows: RowBatch, shown: Shown) -> Mapping[str, np.ndarray]:
        """Columns of some rows, each of them as often as it is shown, by name. The first axis of
        each is B (the rows) or N (the supervised positions of ``shown``, in row-major order)."""
        ...


class CausalView:
    """The next token at every position: ``labels[t] = ids[t + 1]``, IGNORE at a row's end."""

    draws: int | None = 1
    fingerprint: str = fingerprint({"view": "causal"})

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows as they are, each token's successor as its label; see :class:`View`."""
        tokens_BT = rows.tokens_BT
        labels_BT = np.full_like(tokens_BT, IGNORE)
        labels_BT[:, :-1] = tokens_BT[:, 1:]
        labels_BT[np.arange(tokens_BT.shape[1]) >= rows.lengths_B[:, None] - 1] = IGNORE
        return Shown(tokens_BT, labels_BT)


class LabelView:
    """Rows as they are, each with the class of its example at its first place, wherever a model
    reads the row; IGNORE elsewhere."""

    draws: int | None = 1
    fingerprint: str = fingerprint({"view": "labels"})

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows as they are, and their classes; see :class:`View`."""
        assert rows.labels_B is not None
        labels_BT = np.full_like(rows.tokens_BT, IGNORE)
        labels_BT[:, 0] = rows.labels_B
        return Shown(rows.tokens_BT, labels_BT)


class QuestionView:
    """Rows of questions: each token's successor is its label from the answer token on, so that the
    answer and its end are learnt (``dskd.data.layouts``).

    With ``tasks_D``, then all rows again behind the token of their task, where every token of them
    is learnt.

    Args:
        answer: id of the answer token, which each row has once.
        tasks_D: of each domain the id of its task's token.
    """

    draws: int | None = 1

    def __init__(self, answer: int, tasks_D: Sequence[int] | None = None) -> None:
        self._answer = answer
        self._tasks_D = None if tasks_D is None else np.array(tasks_D, dtype=np.int64)
        self.fingerprint = fingerprint({"view": "questions", "answer": answer, "tasks": tasks_D})

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows as questions, and maybe as texts of their tasks; see :class:`View`."""
        tokens_BT, real_BT = rows.tokens_BT, rows.real_BT
        labels_BT = np.full_like(tokens_BT, IGNORE)
        labels_BT[:, :-1] = tokens_BT[:, 1:]
        begins_B = (tokens_BT == self._answer).argmax(axis=1)
        places_T = np.arange(tokens_BT.shape[1])
        learnt_BT = (places_T >= begins_B[:, None]) & (places_T < rows.lengths_B[:, None] - 1)
        labels_BT[~learnt_BT] = IGNORE
        if self._tasks_D is None:
            return Shown(tokens_BT, labels_BT)
        # The last token is no input: what is shown is as long as the row.
        behind_BT = np.roll(tokens_BT, 1, axis=1)
        # Domains of further rows come behind the run's; they are among those that have tokens of
        # their own, or all have the same token.
        behind_BT[:, 0] = self._tasks_D[np.minimum(rows.domains_B, len(self._tasks_D) - 1)]
        whole_BT = np.where(real_BT, tokens_BT, IGNORE)
        return Shown(np.concatenate([tokens_BT, behind_BT]), np.concatenate([labels_BT, whole_BT]))


class MaskedView:
    """BERT masking by counter-based random numbers.

    A row with c tokens that may be masked (all but the special ones) gets ``int(p * c + u)`` of
    them, u uniform in [0, 1), without replacement: those with the smallest random keys. With
    ``whole_word``, c counts words, and a word's tokens are all kept, random or masked.
    Random tokens come evenly from the vocabulary without the special tokens.

    Raises:
        ConfigError: the tokenizer has no mask token, or where its words begin is unknown.
    """

    def __init__(self, masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._replace = Replacer(masking, tokenizer, seed)
        self._seed = seed
        self.draws = masking.draws
        self.fingerprint = _masking_fingerprint(masking, tokenizer, seed)
        self._probability = masking.probability
        self._special_V = special_ids(tokenizer)
        self._continues_V = continues_word(tokenizer) if masking.whole_word else None

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows with masks, the masked tokens as labels; see :class:`View`."""
        draws_B = draws_of(rows, self.draws)
        maskable_BT = maskable(rows.tokens_BT, rows.lengths_B, self._special_V)
        heads_BT = self._heads(rows.tokens_BT, maskable_BT)
        # The place of the word's first token, at each of its tokens (of the token itself, if there
        # are no words).
        places_T = np.arange(rows.tokens_BT.shape[1])
        head_of_BT = np.maximum.accumulate(np.where(heads_BT, places_T, 0), axis=1)
        chosen_BT = self._choose(draws_B, rows.ids_B, heads_BT)
        chosen_BT = np.take_along_axis(chosen_BT, head_of_BT, axis=1) & maskable_BT
        return Shown(*self._replace(draws_B, rows.ids_B, rows.tokens_BT, chosen_BT, head_of_BT))

    def _heads(
        self, ids_BT: NDArray[np.int64], maskable_BT: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """What is chosen among: all maskable tokens, or those that begin a word (that continue
        none, or follow a special token)."""
        if self._continues_V is None:
            return maskable_BT
        follows_BT = np.zeros_like(maskable_BT)
        follows_BT[:, 1:] = maskable_BT[:, :-1]
        return maskable_BT & ~(self._continues_V[ids_BT] & follows_BT)

    def _choose(
        self, draws_B: NDArray[np.int64], row_ids_B: NDArray[np.int64], heads_BT: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """``int(p * heads + u)`` of each row's heads, those with the smallest keys."""
        heads_B = heads_BT.sum(axis=1)
        number_B = number(self._seed, self._probability, draws_B, row_ids_B, heads_B)
        keys_BT = order_keys(self._seed, draws_B, row_ids_B, heads_BT.shape[1])
        keys_BT[~heads_BT] = np.iinfo(np.uint64).max
        return heads_BT & smallest(keys_BT, number_B)


class FairseqView:
    """The masks of the original Knowledge Inheritance code (fairseq 0.9), bit for bit.

    Raises:
        ConfigError: the vocabulary is not laid out as fairseq's.
    """

    def __init__(self, masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._mask_row = FairseqMask(masking, tokenizer, "fairseq")
        assert not masking.whole_word, "settings.checks refuses it by name"
        self.draws = masking.draws
        self.fingerprint = _masking_fingerprint(masking, tokenizer, seed)
        self._seed = seed

    def __call__(self, rows: RowBatch) -> Shown:
        """The rows with masks, the masked tokens as labels; see :class:`View`."""
        mask_row = self._mask_row
        return masked_rows(rows, self.draws, self._seed, lambda b, item, seed: mask_row(item, seed))


def masked_rows(
    rows: RowBatch,
    draws: int | None,
    seed: int,
    mask_row: Callable[[int, NDArray[np.int64], int], tuple[NDArray[np.bool_], NDArray[np.int64]]],
) -> Shown:
    """Rows that are masked one after the other, as fairseq does it.

    ``mask_row`` takes a row's place in the batch, its tokens without padding and its own seed, and
    returns what :class:`~dskd.data.fairseq_masks.FairseqMask` does.
    """
    inputs_BT, labels_BT = rows.tokens_BT.copy(), np.full_like(rows.tokens_BT, IGNORE)
    draws_B = draws_of(rows, draws)
    each = zip(rows.ids_B.tolist(), draws_B.tolist(), rows.lengths_B.tolist(), strict=True)
    for b, (row, draw, length) in enumerate(each):
        item = rows.tokens_BT[b, :length]
        chosen, inputs_BT[b, :length] = mask_row(b, item, fairseq_seed(seed, draw, row))
        labels_BT[b, :length][chosen] = item[chosen]
    return Shown(inputs_BT, labels_BT)


def draws_of(rows: RowBatch, draws: int | None) -> NDArray[np.int64]:
    """The number of each row's view, int64 [B]: its epoch, modulo ``draws`` if that is given."""
    return rows.epochs_B if draws is None else rows.epochs_B % draws


def view_for(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> View:
    """The view of rows that are masked at random, of a causal LM's, of questions or of labelled
    ones.

    Raises:
        ConfigError: the masking settings do not fit the tokenizer.
    """
    if data.questions is not None:
        answer = tokenizer.convert_tokens_to_ids(data.questions.answer_token)
        tasks_D = task_ids(data, tokenizer) if data.questions.modelling else None
        return QuestionView(answer, tasks_D)
    if data.objective == "causal":
        return CausalView()
    if data.objective == "classification":
        return LabelView()
    masking = data.masking
    assert isinstance(masking, Masking), f"masks of kind {masking.kind} have views of their own"
    kind = FairseqView if masking.sampler == "fairseq" else MaskedView
    return kind(masking, tokenizer, seed)


def at_random(masking: MaskShares) -> Masking:
    """The plain random masking of the same shares, of validation rows whatever the training's."""
    shares = {name: getattr(masking, name) for name in MaskShares.model_fields}
    return masking if isinstance(masking, Masking) else Masking(**shares)


def _masking_fingerprint(masking: Masking, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    about = {
        "view": "masked",
        # Draw d is the same in any number of draws.
        "masking": masking.model_dump(exclude={"draws", "kind"}),
        "seed": seed,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return fingerprint(about)
