"""Edits of compactors' gradients, moments and weights around an optimizer step, and their norms.

A compactor is C = I + D, stored as D; unit j of it is a column (left) or a row (right). A norm's or
bias's vector is C as it is. A piece is what a rank holds of one (``dskd/engine/shards.py``): flat
entries f of the whole, row = f // columns. An entry of unit j becomes

    gradient <- gate_j gradient + pull_j C
    moment <- fade_j moment + push_j C
    C <- ratio_j C

which is all that the rules of ``dskd/narrowing/rules.py`` need. That of Wu et al. 2024: dense L2
(gate 1, pull 1), reset (0, min(lambda, 1)), injection into the first moment (fade 0.9, push 0.1
(lambda - 1)); the exact one: annealing (gate 0, fade 0, ratio alpha_t / alpha_(t-1)), decay (ratio
1 - lr decay). Gate and fade 1 with pull and push 0, or a ratio of 1, leave an entry as it is, bit
for bit; a ratio of 0 makes D exactly -I.

On a GPU it is one launch for all pieces (``kernels/compactor_update.py``). In plain torch a
piece is edited as rectangles of its matrix, of which rows, columns and the diagonal are views: the
rest of a row, whole rows, the beginning of one.

Shapes: K units of a piece, R rows and C columns of a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dskd.fused.arguments import refuse
from dskd.fused.backend import on_triton, row_functions


class Piece(NamedTuple):
    """A rank's flat piece of one parameter, and what is to be done with each unit's entries.

    Attributes:
        weight: D, or a vector; fp32 (or float64 throughout), edited where there is a ratio.
        start: where the piece begins in the flattened parameter.
        shape: of the whole: [K, K], or [parts, K, K] with units common to all parts; of a vector
            [parts, K].
        side: "left": units are columns; "right": rows; "vector": columns, and no identity.
        gradient: edited by gate and pull, or None.
        moment: Adam's first, edited by fade and push, or None.
        gate_K, pull_K, fade_K, push_K, ratio_K: of each unit, of the weight's dtype; None where
            what they edit is None (``ratio_K``: where the weights stay). Pieces that share them
            should have the same tensors.
    """

    weight: Tensor
    start: int
    shape: torch.Size
    side: Literal["left", "right", "vector"]
    gradient: Tensor | None = None
    moment: Tensor | None = None
    gate_K: Tensor | None = None
    pull_K: Tensor | None = None
    fade_K: Tensor | None = None
    push_K: Tensor | None = None
    ratio_K: Tensor | None = None


def update(pieces: Sequence[Piece]) -> list[Tensor]:
    """Edit the pieces in place; the squared norms of the units' C as they were found.

    Returns:
        [K] for each piece, of this rank's entries only: the sum over the ranks is that of the
        whole (but at ZeRO-0, where every rank holds all). 0 for units that it has nothing of.

    Raises:
        ValueError: pieces with different kinds of edits, or values that are missing.
    """
    if not pieces:
        return []
    differ = len({_form(piece) for piece in pieces}) > 1
    refuse(differ, lambda: "pieces: some have a gradient, a moment or a ratio that others lack")
    for piece in pieces:
        gated = piece.gate_K is not None and piece.pull_K is not None
        pushed = piece.fade_K is not None and piece.push_K is not None
        missing = (piece.gradient is not None) != gated or (piece.moment is not None) != pushed
        refuse(
            missing, lambda: "pieces: a gradient needs gate and pull, a moment needs fade and push"
        )
    weight = pieces[0].weight
    if on_triton(weight) and weight.dtype == torch.float32:
        return row_functions("compactor_update", weight).update(pieces)
    return [_update(piece) for piece in pieces]


def _form(piece: Piece) -> tuple[object, ...]:
    tensors = (piece.weight, piece.gradient, piece.moment, piece.ratio_K)
    return tuple(None if t is None else (t.dtype, t.device) for t in tensors)


def _update(piece: Piece) -> Tensor:
    squares_K = piece.weight.new_zeros(piece.shape[-1])
    for flat, row, column, width in _rectangles(piece):
        height = (flat.stop - flat.start) // width
        units = slice(row, row + height) if piece.side == "right" else slice(column, column + width)
        squares_K[units] += _edit(piece, flat, units, row - column, width)
    return squares_K


def _rectangles(piece: Piece) -> Iterator[tuple[slice, int, int, int]]:
    """At most three of each part: place in the piece, first row and column in the part, width."""
    rows, columns = piece.shape[-2:]
    at, end = piece.start, piece.start + piece.weight.numel()
    while at < end:
        row, column = divmod(at, columns)
        row %= rows
        whole_rows = min((end - at) // columns, rows - row) if column == 0 else 0
        width = columns if whole_rows else min(columns - column, end - at)
        size = max(whole_rows, 1) * width
        yield slice(at - piece.start, at - piece.start + size), row, column, width
        at += size


def _edit(piece: Piece, flat: slice, units: slice, diagonal: int, width: int) -> Tensor:
    """One rectangle, with C's diagonal on this one of its own; the squared norms of its units."""
    right = piece.side == "right"

    def each(values_K: Tensor) -> Tensor:
        return values_K[units][:, None] if right else values_K[units][None, :]

    weight_RC = piece.weight[flat].view(-1, width)
    value_RC = weight_RC.clone()
    if piece.side != "vector":
        value_RC.diagonal(diagonal).add_(1)
    if piece.gradient is not None:
        gradient_RC, gate = piece.gradient[flat].view(-1, width), each(piece.gate_K)
        passed_RC = (gate * gradient_RC).masked_fill_(gate == 0, 0.0)  # not 0 * inf
        gradient_RC.copy_(passed_RC.add_(each(piece.pull_K) * value_RC))
    if piece.moment is not None:
        moment_RC = piece.moment[flat].view(-1, width)
        moment_RC.mul_(each(piece.fade_K)).add_(each(piece.push_K) * value_RC)
    if piece.ratio_K is not None:
        ratio_RC = each(piece.ratio_K).expand_as(weight_RC)
        weight_RC.mul_(ratio_RC)
        if piece.side != "vector":  # ratio C - I = ratio D - (1 - ratio) I
            weight_RC.diagonal(diagonal).sub_(1 - ratio_RC.diagonal(diagonal))
    return value_RC.square_().sum(1 if right else 0)
