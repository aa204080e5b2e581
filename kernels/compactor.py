"""The six products of merging compactors, for many layers in one launch each.

They are those of ``dskd/fused/cpu/products.py``, with the same arguments and results. One kernel
computes them all, a matrix product with what merging compactors needs of it:

    C = A B + Z + u v^T        or, with an extra column,        [C | u] = A [B | v] + [Z | v]

with C [M, N], A [M, K], B [K, N]; Z and the vectors only where given. In the residual products
A or B is a compactor's difference D from identity, and Z is what it is applied to. Only some of D's
rows or columns may be kept; what that means for the operands depends on the product (``GATHER``).
Operands have any strides; sums are fp32.

One program computes a tile of C of one member (a part of a layer). The members of a launch have
sizes, strides and dtype in common; their addresses stand in a table.

Shapes: P parts of a layer, N outputs, K inputs, n and k kept ones; M, N, K of a product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import Configuration, table_on

# where the kept indices belong
WHOLE, A_ROWS, B_COLUMNS, A_INNER, B_INNER, C_ROWS, C_COLUMNS = map(tl.constexpr, range(7))

# what the vectors are for
NO_VECTORS, OUTER, EXTRA_COLUMN = map(tl.constexpr, range(3))

# columns of the table of addresses; PLACE: for each of all units where it stands among the kept, -1
AT_A, AT_B, AT_C, AT_Z, AT_U, AT_V, AT_KEEP, AT_PLACE = map(tl.constexpr, range(8))
ADDRESSES = tl.constexpr(8)


@triton.jit
def address(table_ptr, member, COLUMN: tl.constexpr, like_ptr, ALIGNED: tl.constexpr):
    """A pointer of the table, typed as another one; on 16 bytes where ALIGNED"""
    number = tl.load(table_ptr + member * ADDRESSES + COLUMN)
    pointer = number.to(tl.pointer_type(like_ptr.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def product_kernel(
    table_ptr,
    like_ptr,
    index_ptr,
    M,
    N,
    K,
    a_row,
    a_column,
    b_row,
    b_column,
    c_row,
    c_column,
    z_row,
    z_column,
    GATHER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """See the head of the file; like_ptr, index_ptr: of the operands' and of the indices' type"""
    member = tl.program_id(1)
    columns = tl.cdiv(N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = address(table_ptr, member, AT_A, like_ptr, ALIGNED)
    b = address(table_ptr, member, AT_B, like_ptr, ALIGNED)
    c = address(table_ptr, member, AT_C, like_ptr, ALIGNED)
    keep = address(table_ptr, member, AT_KEEP, index_ptr, False)

    a_m, b_n, c_m, c_n = m, n, m, n
    if GATHER == A_ROWS:
        a_m = tl.load(keep + m, mask=m < M, other=0).to(tl.int32)
    if GATHER == B_COLUMNS:
        b_n = tl.load(keep + n, mask=n < N, other=0).to(tl.int32)
    if GATHER == C_ROWS:
        c_m = tl.load(keep + m, mask=m < M, other=0).to(tl.int32)
    if GATHER == C_COLUMNS:
        c_n = tl.load(keep + n, mask=n < N, other=0).to(tl.int32)

    total = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(0, K, BK):
        inner = first + k
        a_k, b_k = inner, inner
        if GATHER == A_INNER:
            a_k = tl.load(keep + inner, mask=inner < K, other=0).to(tl.int32)
        if GATHER == B_INNER:
            b_k = tl.load(keep + inner, mask=inner < K, other=0).to(tl.int32)
        left = tl.load(
            a + (a_m[:, None] * a_row + a_k[None, :] * a_column),
            mask=(m[:, None] < M) & (inner[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + (b_k[:, None] * b_row + b_n[None, :] * b_column),
            mask=(inner[:, None] < K) & (n[None, :] < N),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)

    # where Z has the row and the column of C, if it has them
    z_m, z_n = a_m, b_n
    z_rows, z_columns = m < M, n < N
    if GATHER == A_INNER:
        place = address(table_ptr, member, AT_PLACE, index_ptr, False)
        z_m = tl.load(place + m, mask=m < M, other=-1).to(tl.int32)
        z_rows = z_m >= 0
    if GATHER == B_INNER:
        place = address(table_ptr, member, AT_PLACE, index_ptr, False)
        z_n = tl.load(place + n, mask=n < N, other=-1).to(tl.int32)
        z_columns = z_n >= 0
    if RESIDUAL:
        z = address(table_ptr, member, AT_Z, like_ptr, ALIGNED)
        z_at = z_m[:, None] * z_row + z_n[None, :] * z_column
        total += tl.load(z + z_at, mask=z_rows[:, None] & z_columns[None, :], other=0.0).to(
            tl.float32
        )
    if VECTORS == OUTER:
        u = address(table_ptr, member, AT_U, like_ptr, False)
        v = address(table_ptr, member, AT_V, like_ptr, False)
        u_M = tl.load(u + m, mask=m < M, other=0.0).to(tl.float32)
        v_N = tl.load(v + n, mask=n < N, other=0.0).to(tl.float32)
        total += u_M[:, None] * v_N[None, :]
    tl.store(
        c + (c_m[:, None] * c_row + c_n[None, :] * c_column),
        total.to(like_ptr.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )
    if VECTORS == EXTRA_COLUMN:
        # A is read again, from the caches, by the programs of the first columns only
        if tl.program_id(0) % columns == 0:
            u = address(table_ptr, member, AT_U, like_ptr, False)
            v = address(table_ptr, member, AT_V, like_ptr, False)
            sums = tl.zeros([BM, BK], tl.float32)
            for first in tl.range(0, K, BK):
                inner = first + k
                a_k = inner
                if GATHER == A_INNER:
                    a_k = tl.load(keep + inner, mask=inner < K, other=0).to(tl.int32)
                left = tl.load(
                    a + (a_m[:, None] * a_row + a_k[None, :] * a_column),
                    mask=(m[:, None] < M) & (inner[None, :] < K),
                    other=0.0,
                )
                v_K = tl.load(v + inner, mask=inner < K, other=0.0).to(tl.float32)
                sums += left.to(tl.float32) * v_K[None, :]
            u_M = tl.sum(sums, 1) + tl.load(v + z_m, mask=z_rows, other=0.0).to(tl.float32)
            tl.store(u + m, u_M.to(like_ptr.dtype.element_ty), mask=m < M)


Tensors = Sequence[Tensor]
Keeps = Sequence[Tensor | None]
Both = tuple[list[Tensor], list[Tensor] | None]
"""Matrices, and vectors if some were given."""


class Tiles(NamedTuple):
    """How the product is launched: the sides of a tile, the inner step, warps, stages."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


TILES = {2: Tiles(64, 64, 64, 4, 3), 4: Tiles(64, 64, 32, 4, 2)}
"""By bytes of an element."""


class Operands(NamedTuple):
    """One layer's: [P, M, K], [P, K, N], the residual or None, the vectors [P, ...] or None."""

    a: Tensor
    b: Tensor
    z: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None


def right(xs_PNK: Tensors, xs_PN: Tensors | None, factors_PNN: Tensors, keeps: Keeps) -> Both:
    """``(I + D) x``, of its kept rows, of a matrix and (if there are any) of a vector."""
    rows = xs_PNK[0].shape[1] if keeps[0] is None else len(keeps[0])
    return _right(A_ROWS, rows, xs_PNK, xs_PN, factors_PNN, keeps)


def right_input(
    grads_PnK: Tensors, grads_Pn: Tensors | None, factors_PNN: Tensors, keeps: Keeps
) -> Both:
    """The gradient of :func:`right` for what D is applied to: ``(I + D)^T grad``."""
    turned = [factor.mT for factor in factors_PNN]
    return _right(A_INNER, turned[0].shape[1], grads_PnK, grads_Pn, turned, keeps)


def left(xs_PNK: Tensors, factors_PKK: Tensors, keeps: Keeps) -> list[Tensor]:
    """``x (I + D)``, of its kept columns."""
    columns = xs_PNK[0].shape[2] if keeps[0] is None else len(keeps[0])
    given = [Operands(x, d, x) for x, d in zip(xs_PNK, factors_PKK, strict=True)]
    return _product(B_COLUMNS, (xs_PNK[0].shape[1], columns), given, keeps)


def left_input(grads_PNk: Tensors, factors_PKK: Tensors, keeps: Keeps) -> list[Tensor]:
    """The gradient of :func:`left` for what D is applied to: ``grad (I + D)^T``."""
    given = [Operands(g, d.mT, g) for g, d in zip(grads_PNk, factors_PKK, strict=True)]
    shape = grads_PNk[0].shape[1], factors_PKK[0].shape[1]
    return _product(B_INNER, shape, given, keeps)


def right_factor(
    grads_PnK: Tensors,
    xs_PNK: Tensors,
    grads_Pn: Tensors | None,
    xs_PN: Tensors | None,
    keeps: Keeps,
) -> list[Tensor]:
    """The gradient of :func:`right` for D: 0 in the rows that are not kept."""
    given = [Operands(g, x.mT) for g, x in zip(grads_PnK, xs_PNK, strict=True)]
    if xs_PN is not None:
        vectors = zip(given, grads_Pn, xs_PN, strict=True)
        given = [some._replace(u=u.contiguous(), v=v.contiguous()) for some, u, v in vectors]
    size = xs_PNK[0].shape[1]
    return _product(C_ROWS, (size, size), given, keeps, OUTER if xs_PN is not None else NO_VECTORS)


def left_factor(xs_PNK: Tensors, grads_PNk: Tensors, keeps: Keeps) -> list[Tensor]:
    """The gradient of :func:`left` for D: 0 in the columns that are not kept."""
    given = [Operands(x.mT, g) for x, g in zip(xs_PNK, grads_PNk, strict=True)]
    size = xs_PNK[0].shape[2]
    return _product(C_COLUMNS, (size, size), given, keeps)


def _right(
    gather: tl.constexpr,
    rows: int,
    matrices: Tensors,
    vectors: Tensors | None,
    factors: Tensors,
    keeps: Keeps,
) -> Both:
    """A residual product with D on the left, of matrices and vectors."""
    given = [Operands(d, x, x) for d, x in zip(factors, matrices, strict=True)]
    shape = rows, matrices[0].shape[2]
    if vectors is None:
        return _product(gather, shape, given, keeps), None
    made = [v.new_empty(len(v), rows) for v in vectors]
    joined = zip(given, made, vectors, strict=True)
    given = [some._replace(u=u, v=v.contiguous()) for some, u, v in joined]
    return _product(gather, shape, given, keeps, EXTRA_COLUMN), made


def _product(
    gather: tl.constexpr,
    shape: tuple[int, int],
    layers: Sequence[Operands],
    keeps: Keeps,
    vectors: tl.constexpr = NO_VECTORS,
) -> list[Tensor]:
    """``a b + z`` of every layer, [P, *shape]; see the head of the file."""
    a, b, z = layers[0].a, layers[0].b, layers[0].z
    rows, columns = shape
    if keeps[0] is None:
        gather = WHOLE
    # what is not kept stays 0
    make = torch.zeros if gather in (C_ROWS, C_COLUMNS) else torch.empty
    out = [make((len(a), *shape), dtype=a.dtype, device=a.device) for _ in layers]
    if gather == C_ROWS:
        rows = len(keeps[0])
    if gather == C_COLUMNS:
        columns = len(keeps[0])
    places = [_places(keep, gather, shape) for keep in keeps]
    table, aligned = _table(layers, out, keeps, places)
    tiles = TILES[a.element_size()]
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns), len(table))
    product_kernel[grid](
        table,
        a,
        table,
        rows,
        columns,
        min(a.shape[2], b.shape[1]),
        *a.stride()[1:],
        *b.stride()[1:],
        *out[0].stride()[1:],
        *((0, 0) if z is None else z.stride()[1:]),
        GATHER=gather.value,
        RESIDUAL=z is not None,
        VECTORS=vectors.value,
        ALIGNED=aligned,
        PRECISION=precision(),
        BM=tiles.rows,
        BN=tiles.columns,
        BK=tiles.inner,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def _places(keep: Tensor | None, gather: tl.constexpr, shape: tuple[int, int]) -> Tensor | None:
    """For each row or column of C where it stands among the kept ones, or -1."""
    if keep is None or gather not in (A_INNER, B_INNER):
        return None
    size = shape[0] if gather == A_INNER else shape[1]
    place = torch.full((size,), -1, dtype=torch.int64, device=keep.device)
    place[keep] = torch.arange(len(keep), device=keep.device)
    return place


def _table(
    layers: Sequence[Operands], out: Tensors, keeps: Keeps, places: Keeps
) -> tuple[Tensor, bool]:
    """int64 [members, addresses], on the layers' device; whether all matrices are on 16 bytes."""
    rows = []
    for (a, b, z, u, v), c, keep, place in zip(layers, out, keeps, places, strict=True):
        for part in range(len(a)):
            parts = [0 if t is None else t[part].data_ptr() for t in (a, b, c, z, u, v)]
            rows.append(parts + [0 if t is None else t.data_ptr() for t in (keep, place)])
    aligned = not any(number % 16 for row in rows for number in row[:4])
    return table_on(out[0].device, rows), aligned


def precision() -> str:
    """What fp32 operands are multiplied in: as torch's own products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def configuration(
    dtype: str, gather: tl.constexpr, vectors: tl.constexpr, *, residual: bool, turned: str = ""
) -> Configuration:
    """One compiled form; ``turned`` names the operand that is read transposed."""
    tiles = TILES[2 if dtype in ("bf16", "fp16") else 4]
    strides = {}
    for operand in "abcz":
        unit, free = ("row", "column") if operand == turned else ("column", "row")
        strides |= {f"{operand}_{unit}": 1, f"{operand}_{free}": "i32"}
    if not residual:
        strides |= {"z_row": 0, "z_column": 0}
    runtime = {name: type_ for name, type_ in strides.items() if isinstance(type_, str)}
    return Configuration(
        name=f"product/{dtype}/gather{gather.value}-vectors{vectors.value}-turned{turned or 0}",
        kernel=product_kernel,
        signature={
            "table_ptr": "*i64",
            "like_ptr": f"*{dtype}",
            "index_ptr": "*i64",
            **dict.fromkeys(("M", "N", "K"), "i32"),
            **runtime,
        },
        constants={
            **{name: value for name, value in strides.items() if not isinstance(value, str)},
            "GATHER": gather.value,
            "RESIDUAL": residual,
            "VECTORS": vectors.value,
            "ALIGNED": True,
            "PRECISION": "ieee",
            "BM": tiles.rows,
            "BN": tiles.columns,
            "BK": tiles.inner,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        aligned=("table_ptr", "M", "N", "K", *runtime),
        # a product reads no rows of columns one after the other
        tensors_per_column=0,
    )


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests: each product, with and without kept units."""
    products = [
        (WHOLE, EXTRA_COLUMN, True, ""),
        (A_ROWS, EXTRA_COLUMN, True, ""),
        (B_COLUMNS, NO_VECTORS, True, ""),
        (WHOLE, EXTRA_COLUMN, True, "a"),
        (A_INNER, EXTRA_COLUMN, True, "a"),
        (WHOLE, NO_VECTORS, True, "b"),
        (B_INNER, NO_VECTORS, True, "b"),
        (C_ROWS, OUTER, False, "b"),
        (C_COLUMNS, NO_VECTORS, False, "a"),
    ]
    forms = [
        configuration("bf16", gather, vectors, residual=residual, turned=turned)
        for gather, vectors, residual, turned in products
    ]
    return [*forms, configuration("fp32", WHOLE, EXTRA_COLUMN, residual=True)]
