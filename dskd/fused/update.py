"""What a mask does to the entries of compactors around an optimizer step, and their norms.

A compactor is C = I + D, stored as D; unit j of it is a column (left) or a row (right). A piece is
what a rank holds of one (``dskd/shards.py``): flat entries f of the whole, row = f // columns. An
entry of unit j becomes

    gradient <- gate_j gradient + pull_j C,   moment <- fade moment + push_j C,   C <- ratio_j C

which is all that spec 3.1 and R8 ask for: dense L2 (gate 1, pull 1), reset (0, min(lambda, 1)),
injection into the first moment (fade 0.9, push 0.1 (lambda - 1)), annealing (gate 0, ratio
alpha_t / alpha_(t-1)). A ratio of 1 leaves D as it is and one of 0 makes it -I, exactly.

On a GPU it is one launch for all pieces (``dskd/kernels/compactor_update.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import refuse
from dskd.fused.backend import on_triton, row_functions


class Piece(NamedTuple):
    """A rank's flat piece of one compactor, and what is to be done with each unit's entries.

    Attributes:
        weight: D, fp32 (or float64 throughout), edited where there is a ratio.
        start: where the piece begins in the flattened compactor.
        shape: of the whole: [K, K], or [parts, K, K] with units common to all parts.
        side: "left": units are columns; "right": rows.
        gradient: edited by gate and pull, or None.
        moment: Adam's first, edited by push and the fade, or None.
        gate_K, pull_K, push_K, ratio_K: of each unit, of the weight's dtype; None where what they
            edit is None (``ratio_K``: where the weights stay).
    """

    weight: Tensor
    start: int
    shape: torch.Size
    side: Literal["left", "right"]
    gradient: Tensor | None = None
    moment: Tensor | None = None
    gate_K: Tensor | None = None
    pull_K: Tensor | None = None
    push_K: Tensor | None = None
    ratio_K: Tensor | None = None


def update(pieces: Sequence[Piece], *, fade: float = 1.0) -> list[Tensor]:
    """Edit the pieces in place; the squared norms of the units' C as they were found.

    Returns:
        [K] for each piece, of this rank's entries only: the sum over the ranks is that of the
        whole (but at ZeRO-0, where every rank holds all). 0 for units that it has nothing of.

    Raises:
        ValueError: pieces that ask for different things, or values that are missing.
    """
    if not pieces:
        return []
    asked = {_asked(piece) for piece in pieces}
    refuse(len(asked) > 1, "pieces: some have a gradient, a moment or a ratio that others lack")
    for piece in pieces:
        missing = (piece.gradient is None) != (piece.gate_K is None or piece.pull_K is None)
        missing |= (piece.moment is None) != (piece.push_K is None)
        refuse(missing, "pieces: a gradient needs gate and pull, a moment needs push")
    weight = pieces[0].weight
    if on_triton(weight) and weight.dtype == torch.float32:
        return row_functions("compactor_update", weight).update(pieces, fade)
    return [_update(piece, fade) for piece in pieces]


def _asked(piece: Piece) -> tuple[object, ...]:
    tensors = (piece.weight, piece.gradient, piece.moment, piece.ratio_K)
    return tuple(None if t is None else (t.dtype, t.device) for t in tensors)


def _update(piece: Piece, fade: float) -> Tensor:
    columns = piece.shape[-1]
    flat = torch.arange(piece.start, piece.start + piece.weight.numel(), device=piece.weight.device)
    row, column = flat // columns % columns, flat % columns
    unit = column if piece.side == "left" else row
    identity = (row == column).to(piece.weight.dtype)
    whole = piece.weight + identity
    squares = whole.new_zeros(columns).index_add_(0, unit, whole.square())
    if piece.gradient is not None:
        gate = piece.gate_K[unit]
        passed = (gate * piece.gradient).where(gate != 0, 0.0)  # not 0 * inf
        piece.gradient.copy_(passed + piece.pull_K[unit] * whole)
    if piece.moment is not None:
        piece.moment.mul_(fade).add_(piece.push_K[unit] * whole)
    if piece.ratio_K is not None:
        ratio = piece.ratio_K[unit]
        piece.weight.copy_(ratio * piece.weight - (1 - ratio) * identity)
    return squares
