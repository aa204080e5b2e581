"""Norms of compactors, and what masks do to their gradients, moments and weights, in one launch.

What becomes of an entry is at the head of ``dskd/fused/update.py``; the norms are those of C as
found. Pieces are walked as rectangles: a program takes the columns of 128 units (left, vectors), or
the rows of 4 (right), from end to end. So a norm is summed by one program in a fixed order, and
every entry is read once.

Shapes: R rows and C columns of a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import Configuration, table_on

ROWS = 4
COLUMNS = 128
WARPS = 4
"""Four entries of a tile a thread: with more of them ptxas spills."""

# columns of the table, one row a piece
AT_WEIGHT, AT_GRADIENT, AT_MOMENT, AT_VALUES, AT_NORMS = map(tl.constexpr, range(5))
AT_START, AT_COUNT, AT_COLUMNS, AT_SIDE, AT_STRIPS = map(tl.constexpr, range(5, 10))
FIELDS = tl.constexpr(10)

SIDES = {"left": 0, "right": 1, "vector": 2}


@triton.jit
def unit_value(values, which, unit, units, inside, RIGHT: tl.constexpr):
    """Value number `which` of a strip's units, to be broadcast over a tile"""
    found = tl.load(values + which * units + unit, mask=inside, other=0.0)
    return found[:, None] if RIGHT else found[None, :]


@triton.jit
def strip(
    fields,
    weight_ptr,
    gradient_ptr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    RIGHT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Every entry of the units of one strip, and their norms"""
    number = tl.program_id(0)
    start = tl.load(fields + AT_START)
    count = tl.load(fields + AT_COUNT)
    columns = tl.load(fields + AT_COLUMNS).to(tl.int32)
    identity = tl.load(fields + AT_SIDE) != 2
    floats = tl.pointer_type(tl.float32)
    weight = tl.load(fields + AT_WEIGHT).to(tl.pointer_type(weight_ptr.dtype.element_ty))
    gradient = tl.load(fields + AT_GRADIENT).to(tl.pointer_type(gradient_ptr.dtype.element_ty))
    moment = tl.load(fields + AT_MOMENT).to(floats)
    values = tl.load(fields + AT_VALUES).to(floats)
    norms = tl.load(fields + AT_NORMS).to(floats)

    first = start // columns
    rows = (start + count - 1) // columns - first + 1
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    if RIGHT:
        begin = number * R
        steps = tl.cdiv(columns, C)
        unit = (((first + begin) % columns).to(tl.int32) + r) % columns
        inside = begin + r < rows
    else:
        begin = number * C
        steps = tl.cdiv(rows, R)
        unit = begin + c
        inside = unit < columns
    if GRADIENT:
        gate = unit_value(values, 0, unit, columns, inside, RIGHT)
        pull = unit_value(values, 1, unit, columns, inside, RIGHT)
    if MOMENT:
        fade = unit_value(values, 2, unit, columns, inside, RIGHT)
        push = unit_value(values, 3, unit, columns, inside, RIGHT)
    if WEIGHT:
        ratio = unit_value(values, 4, unit, columns, inside, RIGHT)

    squares = tl.zeros([R, C], tl.float32)
    for step in tl.range(0, steps):
        if RIGHT:
            row = first + begin
            column = step * C + c
        else:
            row = first + step * R
            column = begin + c
        # flat positions in the piece, as the distance from that of the tile's first row
        base = row * columns - start
        at = r[:, None] * columns + column[None, :]
        low = tl.maximum(-base, 0).to(tl.int32)
        high = tl.minimum(count - base, R * columns.to(tl.int64)).to(tl.int32)
        here = (at >= low) & (at < high) & (column < columns)[None, :]
        diagonal = tl.where(identity, ((row % columns).to(tl.int32) + r) % columns, -1)
        one = diagonal[:, None] == column[None, :]
        difference = tl.load(weight + base + at, mask=here, other=0.0)
        whole = tl.where(one & here, difference + 1.0, difference)
        squares += whole * whole
        if GRADIENT:
            g = tl.load(gradient + base + at, mask=here, other=0.0).to(tl.float32)
            # not 0 * inf
            g = gate * tl.where(gate == 0.0, 0.0, g) + pull * whole
            tl.store(gradient + base + at, g.to(gradient.dtype.element_ty), mask=here)
        if MOMENT:
            m = tl.load(moment + base + at, mask=here, other=0.0)
            tl.store(moment + base + at, fade * m + push * whole, mask=here)
        if WEIGHT:
            # exactly D where the ratio is 1, and exactly -I where it is 0
            scaled = ratio * difference - tl.where(one, 1.0 - ratio, 0.0)
            tl.store(weight + base + at, scaled, mask=here)
    if RIGHT:
        tl.store(norms + first + begin + r, tl.sum(squares, 1), mask=inside)
    else:
        tl.store(norms + unit, tl.sum(squares, 0), mask=inside)


@triton.jit
def update_kernel(
    table_ptr,
    weight_ptr,
    gradient_ptr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """See the head of the file; the pointers but for the table's only tell types"""
    fields = table_ptr + tl.program_id(1) * FIELDS
    # some pieces have more strips than others
    if tl.program_id(0) < tl.load(fields + AT_STRIPS):
        if tl.load(fields + AT_SIDE) == 1:
            strip(fields, weight_ptr, gradient_ptr, GRADIENT, MOMENT, WEIGHT, True, R, C)
        else:
            strip(fields, weight_ptr, gradient_ptr, GRADIENT, MOMENT, WEIGHT, False, R, C)


def update(pieces: Sequence[Any]) -> list[Tensor]:
    """Edit the pieces in place; the squared norms of their units' entries, fp32 [columns] each.

    pieces: see :class:`dskd.fused.update.Piece`, all with the same ones of gradient, moment and
    ratio; weights and moments fp32, gradients of one dtype, all contiguous.
    """
    one = pieces[0]
    squares, values = _norms(pieces), _values(pieces)  # of which the table holds addresses
    rows = []
    for piece, norms, value in zip(pieces, squares, values, strict=True):
        count, columns = piece.weight.numel(), piece.shape[-1]
        height = (piece.start + count - 1) // columns - piece.start // columns + 1
        right = piece.side == "right"
        strips = triton.cdiv(height, ROWS) if right else triton.cdiv(columns, COLUMNS)
        tensors = (piece.weight, piece.gradient, piece.moment, value, norms)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        rows.append([*addresses, piece.start, count, columns, SIDES[piece.side], strips])
    update_kernel[max(row[-1] for row in rows), len(pieces)](
        table_on(one.weight.device, rows),
        one.weight,
        one.weight if one.gradient is None else one.gradient,
        GRADIENT=one.gradient is not None,
        MOMENT=one.moment is not None,
        WEIGHT=one.ratio_K is not None,
        R=ROWS,
        C=COLUMNS,
        num_warps=WARPS,
        num_stages=1,
    )
    return [
        n.view(-1, p.shape[-1]).sum(0) if len(n) > p.shape[-1] else n
        for p, n in zip(pieces, squares, strict=True)
    ]


def _norms(pieces: Sequence[Any]) -> list[Tensor]:
    """Room for them: by column (left, vector), or by row of each part; views of one tensor."""
    counts = []
    for piece in pieces:
        stacked = piece.side == "right" and len(piece.shape) == 3
        counts.append(piece.shape[-1] * (piece.shape[0] if stacked else 1))
    room = torch.zeros(sum(counts), dtype=torch.float32, device=pieces[0].weight.device)
    return list(room.split(counts))


def _values(pieces: Sequence[Any]) -> list[Tensor | None]:
    """fp32 [5, units] for each piece, made once of the same tensors; one not given is not read."""
    made: dict[tuple[int, ...], Tensor | None] = {}
    keys = []
    for piece in pieces:
        given = (piece.gate_K, piece.pull_K, piece.fade_K, piece.push_K, piece.ratio_K)
        some = next((v for v in given if v is not None), None)
        keys.append(tuple(map(id, given)))
        if keys[-1] not in made:
            filled = [some if v is None else v for v in given]
            made[keys[-1]] = None if some is None else torch.stack(filled).to(torch.float32)
    return [made[key] for key in keys]


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests: before a step, after it, and norms only."""
    edited = {"before": {"GRADIENT", "MOMENT"}, "gradient": {"GRADIENT"}, "after": {"WEIGHT"}}
    forms = [
        ("before", "fp32"),
        ("before", "bf16"),
        ("gradient", "bf16"),
        ("after", "fp32"),
        ("norms", "fp32"),
    ]
    return [
        Configuration(
            name=f"{when}/{dtype}",
            kernel=update_kernel,
            signature={"table_ptr": "*i64", "weight_ptr": "*fp32", "gradient_ptr": f"*{dtype}"},
            constants={
                **{what: what in edited.get(when, ()) for what in ("GRADIENT", "MOMENT", "WEIGHT")},
                "R": ROWS,
                "C": COLUMNS,
            },
            num_warps=WARPS,
            num_stages=1,
            aligned=("table_ptr", "weight_ptr", "gradient_ptr"),
            # a piece may begin and end anywhere: all its loads are guarded
            tensors_per_column=0,
        )
        for when, dtype in forms
    ]
