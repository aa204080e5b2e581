"""The entries of compactors around a step: any piece of any one, against whole matrices."""

import math

import pytest
import torch

from dskd.fused.update import Piece, update

SHAPES = {
    "left": ((7, 7), "left"),
    "right": ((7, 7), "right"),
    "left parts": ((3, 5, 5), "left"),
    "right parts": ((3, 5, 5), "right"),
    "vector": ((1, 17), "vector"),
    "vector parts": ((3, 11), "vector"),
}


def whole(shape, dtype=torch.float64):
    """Weight, gradient and moment of a whole parameter, and five values a unit."""
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    values = torch.rand(5, shape[-1], dtype=dtype) + 0.1
    values[:, 1] = 0
    values[:, 2] = 1
    return tensors, values


def wanted(tensors, values, side):
    """Gradient, moment, weight and the units' squared entries, by the definition."""
    weight, gradient, moment = tensors
    gate, pull, fade, push, ratio = (v[:, None] if side == "right" else v for v in values)
    size = weight.shape[-1]
    eye = 0 if side == "vector" else torch.eye(size, dtype=weight.dtype)
    compactor = weight + eye
    squares = compactor.square().view(-1, 1 if side == "vector" else size, size)
    return (
        gate * gradient + pull * compactor,
        fade * moment + push * compactor,
        ratio * compactor - eye,
        squares.sum((0, 2) if side == "right" else (0, 1)),
    )


def piece_of(tensors, values, side, start, end, *, weights=False):
    """Copies of the flat entries from start to end."""
    weight, gradient, moment = (t.flatten()[start:end].clone() for t in tensors)
    *before, ratio = values
    shape = tensors[0].shape
    if weights:
        return Piece(weight, start, shape, side, ratio_K=ratio)
    return Piece(weight, start, shape, side, gradient, moment, *before)


def cuts(shape):
    """Pieces that make up the whole: within a row, over several, over parts."""
    size = math.prod(shape)
    return [(0, 3), (3, 4), (4, 4 + size // 3), (4 + size // 3, size - 2), (size - 2, size)]


@pytest.mark.parametrize(("shape", "side"), SHAPES.values(), ids=SHAPES)
def test_pieces(shape, side):
    """Before a step and after it; the norms of the pieces sum up to the whole's."""
    tensors, values = whole(shape)
    gradient, moment, weight, squares = (t.flatten() for t in wanted(tensors, values, side))
    places = cuts(shape)
    before = [piece_of(tensors, values, side, *place) for place in places]
    found = update(before)
    torch.testing.assert_close(sum(found), squares, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(torch.cat([p.gradient for p in before]), gradient)
    torch.testing.assert_close(torch.cat([p.moment for p in before]), moment)
    assert torch.equal(torch.cat([p.weight for p in before]), tensors[0].flatten())
    after = [piece_of(tensors, values, side, *place, weights=True) for place in places]
    update(after)
    torch.testing.assert_close(torch.cat([p.weight for p in after]), weight)


@pytest.mark.parametrize(("shape", "side"), SHAPES.values(), ids=SHAPES)
def test_pieces_give_the_same_bits_as_the_whole(shape, side):
    tensors, values = whole(shape, torch.float32)
    for weights in (False, True):
        one = piece_of(tensors, values, side, 0, math.prod(shape), weights=weights)
        some = [piece_of(tensors, values, side, *p, weights=weights) for p in cuts(shape)]
        update([one])
        update(some)
        for name in ("weight",) if weights else ("gradient", "moment"):
            pieces = torch.cat([getattr(piece, name) for piece in some])
            assert torch.equal(pieces, getattr(one, name))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_kept_and_what_is_gone_is_so_exactly(side):
    tensors, values = whole((7, 7), torch.float32)
    piece = piece_of(tensors, values, side, 0, 49, weights=True)
    update([piece])
    found, before = piece.weight.view(7, 7), tensors[0]
    if side == "right":
        found, before = found.T, before.T
    assert torch.equal(found[:, 2], before[:, 2])
    assert torch.equal(found[:, 1], -torch.eye(7)[:, 1])


def test_a_gate_and_a_fade_of_0_or_1_are_exact():
    tensors, _ = whole((7, 7), torch.float32)
    keep, none = torch.tensor([1.0, 0, 1, 1, 0, 0, 1]), torch.zeros(7)
    piece = piece_of(tensors, [keep, none, keep, none, none], "left", 0, 49)
    update([piece])
    for found, before in ((piece.gradient, tensors[1]), (piece.moment, tensors[2])):
        assert torch.equal(found.view(7, 7), before * keep)


def test_a_removed_unit_s_gradient_may_be_infinite():
    tensors, values = whole((7, 7))
    tensors[1][:, 1] = torch.inf
    piece = piece_of(tensors, values, "left", 0, 49)
    update([piece])
    assert (piece.gradient.view(7, 7)[:, 1] == 0).all()


def test_the_annealing_rule_in_two_calls():
    """Removed units fade by a schedule, whatever the optimizer does to kept ones."""
    weight = torch.randn(6, 6, dtype=torch.float64)
    start = weight[:, 3] + torch.eye(6, dtype=torch.float64)[:, 3]
    piece = Piece(weight.view(-1), 0, weight.shape, "left")
    for step in range(1, 6):
        ratio = torch.ones(6, dtype=torch.float64)
        ratio[3] = (1 - step / 5) / (1 - (step - 1) / 5)
        (squares,) = update([piece._replace(ratio_K=ratio)])
        torch.testing.assert_close(squares[3], (start * (1 - (step - 1) / 5)).square().sum())
    assert update([piece])[0][3] == 0


def test_refused():
    tensors, values = whole((7, 7))
    before, after = (piece_of(tensors, values, "left", 0, 9, weights=w) for w in (False, True))
    with pytest.raises(ValueError, match="some have a gradient"):
        update([before, after])
    for name in ("gate_K", "pull_K", "fade_K", "push_K", "gradient", "moment"):
        with pytest.raises(ValueError, match="a gradient needs gate and pull"):
            update([before._replace(**{name: None})])
    assert update([]) == []
