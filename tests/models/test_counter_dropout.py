"""Dropout by counter: the right share, no pattern, and masks that rows, copies and calls have for
themselves, whatever stands beside them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from dskd.models import counter_dropout
from dskd.models.counter_dropout import CounterDropout

ROWS, SHAPE = 3, (64, 96)


def masks(seeds=(11, 12, 13), p=0.3, shape=SHAPE, calls=1):
    """What is left of ones, of the last of some calls."""
    with CounterDropout(torch.tensor(seeds)):
        for _ in range(calls):
            found = dropout(torch.ones(len(seeds), *shape), p)
    return found


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_share_and_scale(p):
    found = masks(p=p)
    places = found.numel()
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    kept = (found > 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / places) ** 0.5


def test_masks_have_no_pattern():
    """Of no two places, however far apart, do the masks agree more often than by chance; nor those
    of two rows, or of two calls. All lags at once: the autocorrelation by its spectrum."""
    for found in (masks(p=0.5)[0], masks(p=0.5, calls=2)[2]):
        signs = found - 1.0
        spectrum = torch.fft.rfft2(signs).abs().square()
        correlation = torch.fft.irfft2(spectrum, s=SHAPE).flatten() / signs.numel()
        assert correlation[0] == pytest.approx(1.0, abs=1e-5)
        assert correlation[1:].abs().max() < 6.0 / signs.numel() ** 0.5
    first, second = masks(p=0.5), masks(p=0.5, calls=2)
    pairs = [(first[0], first[1]), (first[0], first[2]), (first[0], second[0])]
    for left, right in pairs:
        assert ((left - 1.0) * (right - 1.0)).mean().abs() < 5.0 / left.numel() ** 0.5


def test_seeds_that_follow_each_other_have_nothing_in_common():
    found = masks(seeds=range(64), p=0.5, shape=(8, 64)).flatten(1) - 1.0
    correlation = found @ found.T / found.shape[1] - torch.eye(64)
    assert correlation.abs().max() < 6.0 / found.shape[1] ** 0.5


def test_a_row_has_the_same_mask_in_any_batch_of_any_width():
    whole = masks(shape=(4, 16, 16))
    for place, seed in ((0, 11), (2, 13)):
        assert torch.equal(masks(seeds=(seed,), shape=(4, 16, 16))[0], whole[place])
        assert torch.equal(masks(seeds=(5, seed), shape=(4, 9, 7))[1], whole[place, :, :9, :7])
    assert torch.equal(masks(shape=(4, 16, 16)), whole)
    assert not torch.equal(masks(shape=(4, 16, 16), calls=2), whole)


@pytest.mark.parametrize("places", [1, 2 * 64 * 96, 10**9])
def test_masks_are_made_of_some_rows_at_a_time(monkeypatch, places):
    whole = masks(seeds=range(5))
    monkeypatch.setattr(counter_dropout, "_AT_ONCE", places)
    assert torch.equal(masks(seeds=range(5)), whole)


def test_what_does_not_drop_is_left_alone():
    values = torch.randn(ROWS, 5)
    with CounterDropout(torch.arange(ROWS)):
        assert dropout(values, 0.5, training=False) is values
        assert dropout(values, 0.0) is values
        assert torch.equal(nn.Dropout(0.5).eval()(values), values)
        assert not torch.equal(nn.Dropout(0.5)(values), values)
        assert (dropout(values, 1.0) == 0.0).all()
        assert dropout(values.bfloat16(), 0.5).dtype == torch.bfloat16
    before = values.clone()
    with CounterDropout(torch.arange(ROWS)):
        nn.Dropout(0.5, inplace=True)(values)
    assert torch.equal(values, before)
    torch.manual_seed(0)
    wanted = dropout(values, 0.5)
    torch.manual_seed(0)
    masks()  # draws none of torch's random numbers
    assert torch.equal(dropout(values, 0.5), wanted)


def test_dropout_that_no_row_owns_is_a_defect():
    with CounterDropout(torch.arange(ROWS)):
        with pytest.raises(AssertionError, match="something else than rows first"):
            dropout(torch.ones(ROWS + 1, 4), 0.1)
        heads = torch.randn(1, 2, 4, 8)
        scaled_dot_product_attention(heads, heads, heads)
        with pytest.raises(AssertionError, match="inside of a fused attention"):
            scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)
