"""The update of many compactors in one launch, against float64."""

import pytest
import torch

from dskd.fused.backend import triton_everywhere
from dskd.fused.update import Piece, update
from dskd.kernels import compactor_update
from tests.fused.test_update import cuts, piece_of, wanted, whole
from tests.kernels.cases import ROUNDING, close
from tests.kernels.conftest import CUDA

SHAPES = [(7, 7), (3, 10, 10), (37, 37)]
LOW = torch.bfloat16 if CUDA else torch.float16


def moved(piece, device, gradient):
    """On the device; the gradient in a type of its own; nothing on 16 bytes."""

    def place(value, dtype=torch.float32):
        room = torch.full((len(value) + 2,), torch.nan, dtype=dtype, device=device)
        return room[1:-1].copy_(value)

    made = piece._replace(weight=place(piece.weight))
    if piece.gradient is not None:
        made = made._replace(gradient=place(piece.gradient, gradient), moment=place(piece.moment))
    names = ("gate_K", "pull_K", "push_K", "ratio_K")
    given = {n: getattr(piece, n) for n in names if getattr(piece, n) is not None}
    return made._replace(**{n: v.to(device, torch.float32) for n, v in given.items()})


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
    for shape in SHAPES:
        for side in ("left", "right"):
            tensors, values = whole(shape, torch.float32)
            tensors[1] = tensors[1].to(gradient).float()
            double = [t.double() for t in tensors]
            cases.append((shape, side, wanted(double, values.double(), side, 0.9)))
            for place in cuts(shape):
                before = piece_of(tensors, values, side, *place)
                after = piece_of(tensors, values, side, *place, weights=True)
                pieces.append(moved(before, device, gradient))
                afters.append(moved(after, device, gradient))
    with triton_everywhere():
        norms = update(pieces, fade=0.9)
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


def test_infinite_gradients_of_removed_units(device):
    tensors, values = whole((7, 7), torch.float32)
    tensors[1][:, 1] = torch.inf
    piece = moved(piece_of(tensors, values, "left", 0, 49), device, torch.float32)
    with triton_everywhere():
        update([piece])
    assert (piece.gradient.view(7, 7)[:, 1] == 0).all()
    assert piece.gradient.isfinite().all()
