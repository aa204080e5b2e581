"""The update of many compactors in one launch, against float64."""

import pytest
import torch

from dskd.fused.backend import triton_everywhere
from dskd.fused.update import Piece, update
from dskd.kernels import compactor_update
from tests.fused.test_update import cuts, piece_of, wanted, whole
from tests.kernels.cases import GPU, ROUNDING, close

SHAPES = [
    *[(shape, side) for shape in ((7, 7), (3, 10, 10), (37, 37)) for side in ("left", "right")],
    ((1, 37), "vector"),
    ((3, 10), "vector"),
]
LOW = torch.bfloat16 if GPU else torch.float16


def moved(piece, device, gradient):
    """On the device; the gradient in a type of its own; nothing on 16 bytes."""

    def place(value, dtype=torch.float32):
        room = torch.full((len(value) + 2,), torch.nan, dtype=dtype, device=device)
        return room[1:-1].copy_(value)

    made = piece._replace(weight=place(piece.weight))
    if piece.gradient is not None:
        made = made._replace(gradient=place(piece.gradient, gradient), moment=place(piece.moment))
    values = {n: v for n, v in piece._asdict().items() if n.endswith("_K") and v is not None}
    return made._replace(**{n: v.to(device, torch.float32) for n, v in values.items()})


def surrounded(value):
    """Whether what lies around a piece is as it was."""
    room = value.new_empty(0).set_(value.untyped_storage())
    return room[0].isnan() and room[-1].isnan()


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """So that there are several of both kinds in a matrix that the interpreter can do."""
    monkeypatch.setattr(compactor_update, "COLUMNS", 16)


@pytest.mark.parametrize("gradient", [torch.float32, LOW])
def test_pieces_of_all_sizes_and_sides_at_once(gradient, device):
    cases, pieces, afters = [], [], []
    for shape, side in SHAPES:
        tensors, values = whole(shape, torch.float32)
        tensors[1] = tensors[1].to(gradient).float()
        double = [t.double() for t in tensors]
        cases.append((shape, side, wanted(double, values.double(), side)))
        for place in cuts(shape):
            before = piece_of(tensors, values, side, *place)
            after = piece_of(tensors, values, side, *place, weights=True)
            pieces.append(moved(before, device, gradient))
            afters.append(moved(after, device, gradient))
    with triton_everywhere():
        norms = update(pieces)
        update(afters)
    for value in (t for p in pieces for t in (p.weight, p.gradient, p.moment)):
        assert surrounded(value)
    for at, (shape, side, (g, m, w, squares)) in enumerate(cases):
        mine = slice(5 * at, 5 * at + 5)
        name = f"{shape} {side}"
        close(name + " norms", sum(norms[mine]), squares, 1e-5)
        found = torch.cat([p.gradient for p in pieces[mine]])
        close(name + " gradient", found, g.flatten(), ROUNDING[gradient] + 1e-6, 1e-5)
        close(name + " moment", torch.cat([p.moment for p in pieces[mine]]), m.flatten(), 1e-6)
        found = torch.cat([p.weight for p in afters[mine]])
        close(name + " weight", found, w.flatten(), 1e-6)


def test_exact_ends_and_repeatable_norms(device):
    weight = torch.randn(40, 40, device=device)
    ratio = torch.ones(40, device=device)
    ratio[5] = 0.0
    for side in ("left", "right"):
        found = weight.clone()
        piece = Piece(found.view(-1), 0, weight.shape, side, ratio_K=ratio)
        with triton_everywhere():
            (norms,) = update([piece])
            (again,) = update([piece])
        seen, before = (found, weight) if side == "left" else (found.T, weight.T)
        kept = torch.arange(40, device=device) != 5
        assert torch.equal(seen[:, kept], before[:, kept])
        assert torch.equal(seen[:, 5], -torch.eye(40, device=device)[:, 5])
        assert torch.equal(norms[kept], again[kept])
        assert again[5] == 0


@pytest.mark.parametrize("gradient", [torch.float32, LOW])
def test_gates_and_fades_of_0_and_1_are_exact(gradient, device):
    """Of several pieces that share their values."""
    keep, none = (torch.arange(37, device=device) % 3 > 0).float(), torch.zeros(37, device=device)
    places = [(side, place) for side in ("left", "right") for place in cuts((37, 37))]
    tensors, values = whole((37, 37), torch.float32)
    pieces, afters, wholes = [], [], [tensors[1].to(gradient), tensors[2]]
    for side, place in places:
        piece = moved(piece_of(tensors, values, side, *place), device, gradient)
        pieces.append(piece._replace(gate_K=keep, pull_K=none, fade_K=keep, push_K=none))
        after = piece_of(tensors, values, side, *place, weights=True)
        afters.append(moved(after, device, gradient)._replace(ratio_K=keep))
    with triton_everywhere():
        norms = update(pieces)
        again = update([piece._replace(ratio_K=None) for piece in afters])
        update(afters)
    assert all(map(torch.equal, norms, again))
    for at, side in ((0, "left"), (5, "right")):
        kept = (keep[:, None] if side == "right" else keep[None, :]).to("cpu", torch.bool)
        for name, before in zip(("gradient", "moment"), wholes, strict=True):
            found = torch.cat([getattr(p, name) for p in pieces[at : at + 5]]).cpu()
            assert torch.equal(found.view(37, 37), torch.where(kept, before, 0))
        found = torch.cat([piece.weight for piece in afters[at : at + 5]]).cpu()
        assert torch.equal(found.view(37, 37), torch.where(kept, tensors[0], -torch.eye(37)))


def test_infinite_gradients_of_removed_units(device):
    tensors, values = whole((7, 7), torch.float32)
    tensors[1][:, 1] = torch.inf
    piece = moved(piece_of(tensors, values, "left", 0, 49), device, torch.float32)
    with triton_everywhere():
        update([piece])
    assert (piece.gradient.view(7, 7)[:, 1] == 0).all()
    assert piece.gradient.isfinite().all()
