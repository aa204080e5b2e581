"""Where a model is asked: every token once, and what it sees there."""

import numpy as np
import pytest

from dskd.batch import IGNORE
from dskd.data.views import CausalView
from dskd.errors import ConfigError
from dskd.hardness.scoring import ScoringPlan, scoring_view
from dskd.settings.data import Data, HardTokens
from tests.data.row_batches import row_batch
from tests.data.test_views import SIZE, SPECIAL, TOKENIZER, rows_of, tokenizer_of

IDS, LENGTHS = rows_of(20, 37)
ROWS = np.arange(20) * 7
MASKABLE = ~np.isin(IDS, SPECIAL) & (np.arange(37) < LENGTHS[:, None])


def view(objective="masked", seed=1, tokenizer=TOKENIZER, **masking):
    masking = HardTokens(kind="hard_tokens", **masking)
    return scoring_view(Data(objective=objective, masking=masking), tokenizer, seed)


def test_tokens_in_their_places() -> None:
    shown = view(shown="token")
    inputs_BT, labels_BT = shown(row_batch(ROWS, 3, IDS, LENGTHS))
    np.testing.assert_array_equal(inputs_BT, IDS)
    real_BT = np.arange(37) < LENGTHS[:, None]
    np.testing.assert_array_equal(labels_BT, np.where(real_BT, IDS, IGNORE))
    assert shown.draws == 1 and (labels_BT != IGNORE).sum() == LENGTHS.sum()  # specials, too


@pytest.mark.parametrize(
    ("probability", "draws"), [(0.15, 7), (0.1, 10), (1 / 49, 49), (0.3, 4), (1.0, 1)]
)
def test_every_token_is_masked_once(probability: float, draws: int) -> None:
    shown = view(shown="mask", probability=probability)
    assert shown.draws == draws
    times_BT = np.zeros_like(IDS)
    for draw in range(draws):
        inputs_BT, labels_BT = shown(row_batch(ROWS, draw, IDS, LENGTHS))
        asked_BT = labels_BT != IGNORE
        np.testing.assert_array_equal(labels_BT[asked_BT], IDS[asked_BT])
        np.testing.assert_array_equal(inputs_BT, np.where(asked_BT, SIZE - 1, IDS))
        share_B = asked_BT.sum(1) / MASKABLE.sum(1)
        assert (np.abs(share_B - 1 / draws) < 1 / MASKABLE.sum(1)).all()
        times_BT += asked_BT
    np.testing.assert_array_equal(times_BT, MASKABLE.astype(np.int64))


def test_draws_are_random() -> None:
    """Over 2000 rows of 40 tokens each place is in each of 5 draws 400 times, give or take 5 sd."""
    ids_BT = np.full((2000, 42), 9)
    ids_BT[:, 0], ids_BT[:, -1] = 0, 2
    rows = row_batch(np.arange(2000), 0, ids_BT, np.full(2000, 42))
    draw_of_BT = view(shown="mask", probability=0.2).plan.draw_of(rows)
    assert (draw_of_BT[:, [0, -1]] == -1).all()
    for draw in range(5):
        times_T = (draw_of_BT == draw)[:, 1:-1].sum(0)
        assert times_T.sum() == 2000 * 8 and np.abs(times_T - 400).max() < 5 * 18
    other = view(shown="mask", probability=0.2, seed=2).plan.draw_of(rows)
    assert np.abs((other == draw_of_BT)[:, 1:-1].mean() - 1 / 5) < 0.01


def test_a_row_is_asked_alike_in_any_batch() -> None:
    plan = view(shown="mask").plan
    whole_BT = plan.draw_of(row_batch(ROWS, 0, IDS, LENGTHS))
    for b in (0, 6, 13):
        alone = row_batch(ROWS[b : b + 1], 0, IDS[b : b + 1, : LENGTHS[b]], LENGTHS[b : b + 1])
        np.testing.assert_array_equal(plan.draw_of(alone)[0], whole_BT[b, : LENGTHS[b]])
        assert (whole_BT[b, LENGTHS[b] :] == -1).all()


def test_the_next_token_of_a_causal_model() -> None:
    shown = view("causal", shown="mask")  # which plays no part
    rows = row_batch(ROWS, 0, IDS, LENGTHS)
    for got, want in zip(shown(rows), CausalView()(rows), strict=True):
        np.testing.assert_array_equal(got, want)
    asked_BT = shown.plan.draw_of(rows) == 0
    labels_BT = shown(rows).labels_BT
    np.testing.assert_array_equal(asked_BT, labels_BT != IGNORE)
    np.testing.assert_array_equal(shown.plan.targets(rows)[asked_BT], labels_BT[asked_BT])


def test_fingerprints_tell_what_matters() -> None:
    token, mask = view(shown="token").fingerprint, view(shown="mask").fingerprint
    causal = view("causal").fingerprint
    assert len({token, mask, causal}) == 3
    alike = view(shown="token", seed=2, probability=0.3, tokenizer=tokenizer_of(40))
    assert alike.fingerprint == token
    alike = view(shown="mask", threshold=3.0, keep=0.5, probability=0.16)  # 7 draws
    assert alike.fingerprint == mask
    for other in ({"seed": 2}, {"probability": 0.2}, {"tokenizer": tokenizer_of(40)}):
        assert view(shown="mask", **other).fingerprint != mask


def test_settings_are_kept_as_json() -> None:
    for shown in (view(shown="token"), view(shown="mask"), view("causal")):
        assert ScoringPlan.from_tree(shown.plan.tree()) == shown.plan
    tree = {"shown": "mask", "draws": 7, "seed": 1, "special": SPECIAL}
    assert view(shown="mask").plan.tree() == tree


def test_no_mask_token() -> None:
    tokenizer = tokenizer_of(40)
    tokenizer.mask_token = None
    view(shown="token", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"data.masking.shown: mask, but .* no mask token"):
        view(shown="mask", tokenizer=tokenizer)
