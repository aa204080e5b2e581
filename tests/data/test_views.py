"""Masking: the original's masks bit for bit, and ours by their numbers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dskd.batch import IGNORE
from dskd.data.fairseq_masks import _tuple_hash, fairseq_seed
from dskd.data.tokenizers import tokenizer_fingerprint
from dskd.data.views import CausalView, FairseqView, MaskedView, at_random, view_for
from dskd.errors import ConfigError
from dskd.settings.data import Data, HardTokens, Masking
from dskd.system.files import fingerprint
from tests.data.row_batches import row_batch
from tests.goldens import golden

GOLDEN = golden("ki")["masking"]


def tokenizer_of(size: int, pieces: bool = False) -> PreTrainedTokenizerFast:
    """<s> <pad> </s> <unk>, ``size - 5`` tokens (every third continues a word), <mask>."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens += [f"##t{i}" if pieces and i % 3 == 0 else f"t{i}" for i in range(4, size - 1)]
    vocab = {token: i for i, token in enumerate([*tokens, "<mask>"])}
    kind = models.WordPiece if pieces else models.WordLevel
    backend = Tokenizer(kind(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **roles)


SIZE = 500
TOKENIZER = tokenizer_of(SIZE)
SPECIAL = [0, 1, 2, 3, SIZE - 1]


def rows_of(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random rows <s> ... </s> of falling lengths, padded."""
    ids_BT = np.random.default_rng(seed).integers(4, SIZE - 1, (rows, length))
    lengths_B = length - np.arange(rows) % 7
    ids_BT[:, 0] = 0
    ids_BT[np.arange(rows), lengths_B - 1] = 2
    ids_BT[np.arange(length) >= lengths_B[:, None]] = 1
    return ids_BT, lengths_B


def view(size: int = SIZE, seed: int = 1, **masking: object) -> MaskedView:
    return MaskedView(Masking(**masking), tokenizer_of(size), seed)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['epoch']}-{c['index']}")
def test_golden_fairseq_masks(case: dict) -> None:
    masking = Masking(
        sampler="fairseq",
        probability=GOLDEN["mask_prob"],
        keep=GOLDEN["leave_unmasked_prob"],
        random=GOLDEN["random_token_prob"],
    )
    fairseq = FairseqView(masking, tokenizer_of(GOLDEN["vocab_size"]), GOLDEN["seed"])
    assert fairseq_seed(GOLDEN["seed"], case["epoch"], case["index"]) == case["numpy_seed"]
    item = GOLDEN["items"][case["index"]]
    padded = np.array([item + [GOLDEN["pad"]] * 3])
    inputs_BT, labels_BT = fairseq(row_batch([case["index"]], case["epoch"], padded, [len(item)]))
    assert inputs_BT[0].tolist() == case["source"] + [GOLDEN["pad"]] * 3
    want = [IGNORE if t == GOLDEN["pad"] else t for t in case["target"]] + [IGNORE] * 3
    assert labels_BT[0].tolist() == want


@pytest.mark.parametrize(
    "parts", [(1, 0, 0), (-1, -2, 5), (2**63 - 1, 2**61 - 1, 10**12), (0,), (7, 7)]
)
def test_tuple_hash_is_cpythons(parts: tuple[int, ...]) -> None:
    assert _tuple_hash(parts) == hash(parts)


@pytest.mark.parametrize(("keep", "random"), [(0.0, 0.0), (0.0, 0.2), (0.2, 0.0), (0.0, 1.0)])
def test_fairseq_without_one_of_the_replacements(keep: float, random: float) -> None:
    fairseq = FairseqView(Masking(sampler="fairseq", keep=keep, random=random), TOKENIZER, 1)
    ids_BT, lengths_B = rows_of(50, 60)
    inputs_BT, labels_BT = fairseq(row_batch(np.arange(50), 0, ids_BT, lengths_B))
    chosen_BT = labels_BT != IGNORE
    assert (labels_BT[chosen_BT] == ids_BT[chosen_BT]).all()
    masked = (inputs_BT[chosen_BT] == SIZE - 1).mean()
    kept = (inputs_BT[chosen_BT] == ids_BT[chosen_BT]).mean()
    assert abs(masked - (1 - keep - random)) < 0.06 and abs(kept - keep) < 0.06
    assert (inputs_BT[~chosen_BT] == ids_BT[~chosen_BT]).all()


def test_pinned_counter_mask() -> None:
    # Numbers of this sampler as first released: caches and runs depend on them.
    ids_BT = np.array([[0, *range(10, 38), 2]])
    inputs_BT, labels_BT = view(seed=7)(row_batch([3], 2, ids_BT, [30]))
    places = np.flatnonzero(labels_BT[0] != IGNORE).tolist()
    assert places == [11, 13, 19, 27]
    assert inputs_BT[0, places].tolist() == [499, 499, 394, 36]


def test_share_and_replacements() -> None:
    ids_BT, lengths_B = rows_of(4000, 64)
    inputs_BT, labels_BT = view()(row_batch(np.arange(4000), 0, ids_BT, lengths_B))
    chosen_BT = labels_BT != IGNORE
    maskable_BT = ~np.isin(ids_BT, SPECIAL)
    assert not (chosen_BT & ~maskable_BT).any()
    assert (labels_BT[chosen_BT] == ids_BT[chosen_BT]).all()
    assert (inputs_BT[~chosen_BT] == ids_BT[~chosen_BT]).all()
    # int(p c + u) is one of the two integers next to p c, and p c on average.
    number_B, expected_B = chosen_BT.sum(axis=1), 0.15 * maskable_BT.sum(axis=1)
    assert (abs(number_B - expected_B) < 1).all()
    assert abs((number_B - expected_B).mean()) < 4 * 0.5 / 4000**0.5
    seen, true = inputs_BT[chosen_BT], ids_BT[chosen_BT]
    error = 4 * (0.1 * 0.9 / len(seen)) ** 0.5
    assert abs((seen == SIZE - 1).mean() - 0.8) < 4 * (0.8 * 0.2 / len(seen)) ** 0.5
    assert abs((seen == true).mean() - 0.1 - 0.1 / (SIZE - 5)) < error
    random = seen[(seen != SIZE - 1) & (seen != true)]
    assert abs(len(random) / len(seen) - 0.1 * (1 - 1 / (SIZE - 5))) < error
    counts = np.bincount(random, minlength=SIZE)
    assert counts[SPECIAL].sum() == 0 and (counts[4 : SIZE - 1] > 0).mean() > 0.98
    # Every place is as likely as every other (62 places, 5 standard errors).
    per_place = chosen_BT[lengths_B == 64, 1:63].mean(axis=0)
    assert abs(per_place - 0.15).max() < 5 * (0.15 * 0.85 / (lengths_B == 64).sum()) ** 0.5


@pytest.mark.parametrize("masking", [{}, {"whole_word": True}, {"sampler": "fairseq"}])
def test_a_mask_depends_on_its_own_row_only(masking: dict) -> None:
    tokenizer = tokenizer_of(SIZE, pieces="whole_word" in masking)
    masker = view_for(Data(masking=Masking(**masking)), tokenizer, 1)
    ids_BT, lengths_B = rows_of(20, 40)
    rows_B, epochs_B = np.arange(20) + 5, np.arange(20) % 3
    inputs_BT, labels_BT = masker(row_batch(rows_B, epochs_B, ids_BT, lengths_B))
    order = np.random.default_rng(1).permutation(20)
    wider = np.pad(ids_BT, ((0, 0), (0, 8)), constant_values=1)
    mixed = row_batch(rows_B, epochs_B, wider, lengths_B).select(order)
    again, labels_again = masker(mixed)
    assert (again[:, :40] == inputs_BT[order]).all() and (again[:, 40:] == 1).all()
    assert (labels_again[:, :40] == labels_BT[order]).all() and (labels_again[:, 40:] < 0).all()
    for b in range(20):
        here, short_BT = slice(b, b + 1), ids_BT[b : b + 1, : lengths_B[b]]
        alone = masker(row_batch(rows_B[here], epochs_B[b], short_BT, lengths_B[here]))
        assert (alone[0][0] == inputs_BT[b, : lengths_B[b]]).all()


def test_seed_epoch_and_row_each_change_the_mask() -> None:
    ids_BT, lengths_B = rows_of(1, 64)

    def chosen(seed: int, epoch: int, row: int) -> list[int]:
        labels_BT = view(seed=seed)(row_batch([row], epoch, ids_BT, lengths_B)).labels_BT
        return np.flatnonzero(labels_BT[0] != IGNORE).tolist()

    base = chosen(1, 0, 0)
    assert base == chosen(1, 0, 0)
    assert base != chosen(2, 0, 0) and base != chosen(1, 1, 0) and base != chosen(1, 0, 1)


@pytest.mark.parametrize("sampler", ["counter", "fairseq"])
def test_draws_repeat(sampler: str) -> None:
    masker = view_for(Data(masking=Masking(draws=3, sampler=sampler)), TOKENIZER, 1)
    endless = view_for(Data(masking=Masking(sampler=sampler)), TOKENIZER, 1)
    assert masker.draws == 3 and endless.draws is None
    ids_BT, lengths_B = rows_of(1, 64)
    ids_BT, lengths_B = np.repeat(ids_BT, 9, axis=0), np.repeat(lengths_B, 9)
    inputs_BT, _ = masker(row_batch(np.zeros(9, np.int64), np.arange(9), ids_BT, lengths_B))
    assert (inputs_BT[3:6] == inputs_BT[:3]).all() and (inputs_BT[6:] == inputs_BT[:3]).all()
    assert len(np.unique(inputs_BT, axis=0)) == 3
    endless_BT, _ = endless(row_batch(np.zeros(9, np.int64), np.arange(9), ids_BT, lengths_B))
    assert (endless_BT[:3] == inputs_BT[:3]).all() and len(np.unique(endless_BT, axis=0)) == 9


def test_whole_words_are_replaced_alike() -> None:
    masker = MaskedView(Masking(whole_word=True), tokenizer_of(SIZE, pieces=True), 1)
    ids_BT, lengths_B = rows_of(2000, 64)
    inputs_BT, labels_BT = masker(row_batch(np.arange(2000), 0, ids_BT, lengths_B))
    chosen_BT = labels_BT != IGNORE
    maskable_BT = ~np.isin(ids_BT, SPECIAL)
    joined_BT = np.zeros_like(chosen_BT)  # a piece behind another token of its word
    joined_BT[:, 1:] = maskable_BT[:, 1:] & (ids_BT[:, 1:] % 3 == 0) & maskable_BT[:, :-1]
    assert joined_BT.sum() > 10_000
    rows, places = np.nonzero(joined_BT)
    both = chosen_BT[rows, places]
    assert (both == chosen_BT[rows, places - 1]).all()
    first, second = inputs_BT[rows, places - 1][both], inputs_BT[rows, places][both]
    assert ((first == SIZE - 1) == (second == SIZE - 1)).all()
    heads_B = (maskable_BT & ~joined_BT).sum(axis=1)
    number_B = (chosen_BT & ~joined_BT).sum(axis=1)
    assert (abs(number_B - 0.15 * heads_B) < 1).all()


def test_probability_one_asks_for_every_token() -> None:
    ids_BT, lengths_B = rows_of(5, 24)
    masker = view(probability=1.0, keep=0.0, random=0.0)
    inputs_BT, labels_BT = masker(row_batch(np.arange(5), 0, ids_BT, lengths_B))
    maskable_BT = ~np.isin(ids_BT, SPECIAL)
    assert (inputs_BT[maskable_BT] == SIZE - 1).all()
    assert ((labels_BT != IGNORE) == maskable_BT).all()


def test_row_without_anything_to_mask() -> None:
    ids_BT = np.array([[0, 2, 1, 1]])
    inputs_BT, labels_BT = view()(row_batch([0], 0, ids_BT, [2]))
    assert (inputs_BT == ids_BT).all() and (labels_BT == IGNORE).all()


def test_causal_labels() -> None:
    ids_BT = np.array([[5, 6, 7, 8], [5, 6, 0, 0], [9, 0, 0, 0]])
    inputs_BT, labels_BT = CausalView()(row_batch(np.arange(3), 0, ids_BT, [4, 2, 1]))
    assert (inputs_BT == ids_BT).all()
    assert labels_BT.tolist() == [[6, 7, 8, IGNORE], [6, *[IGNORE] * 3], [IGNORE] * 4]


def test_fingerprint_covers_what_masks_depend_on() -> None:
    base = view().fingerprint
    assert base == view(draws=4).fingerprint
    others = [
        view(seed=2), view(size=SIZE + 1), view(probability=0.2), view(keep=0.2),
        FairseqView(Masking(sampler="fairseq"), TOKENIZER, 1), CausalView(),
    ]  # fmt: skip
    assert len({base, *(other.fingerprint for other in others)}) == 7


def test_fingerprints_of_caches_already_made_still_hold() -> None:
    # As computed before there were kinds of masking: caches are bound to it.
    masking = {"probability": 0.15, "keep": 0.1, "random": 0.1, "whole_word": False}
    told = {"view": "masked", "seed": 5, "tokenizer": tokenizer_fingerprint(TOKENIZER)}
    told["masking"] = masking | {"sampler": "counter"}
    assert view(seed=5).fingerprint == fingerprint(told)


def test_at_random_keeps_the_shares() -> None:
    random = Masking(probability=0.3, whole_word=True)
    assert at_random(random) is random
    hard = HardTokens(kind="hard_tokens", probability=0.3, keep=0.2, random=0.0, draws=4, most=0.5)
    assert at_random(hard) == Masking(probability=0.3, keep=0.2, random=0.0, draws=4)


def test_refusals() -> None:
    no_mask = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        view_for(Data(), no_mask, 1)
    other = tokenizer_of(SIZE)
    other.add_tokens(["more"])
    with pytest.raises(ConfigError, match="needs RoBERTa's vocabulary"):
        FairseqView(Masking(sampler="fairseq"), other, 1)
