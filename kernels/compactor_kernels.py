"""One matrix product, of many layers at a time, with what merging compactors asks of it.

    C = A B + Z + u v^T        or, with an extra column,        [C | u] = A [B | v] + [Z | v]

with C [M, N], A [M, K], B [K, N]; Z and the vectors only where asked for. In the residual products
A or B is a compactor's difference D from identity, and Z is what it is applied to. Only some of D's
rows or columns may be kept; what that means for the operands depends on the product (``GATHER``).
Operands have any strides; sums are fp32.

One program computes a tile of C of one member (a part of a layer). The members of a launch have
sizes, strides and dtype in common; their addresses stand in a table.
"""

import triton
import triton.language as tl

# where the kept indices belong
WHOLE = tl.constexpr(0)
A_ROWS = tl.constexpr(1)
B_COLUMNS = tl.constexpr(2)
A_INNER = tl.constexpr(3)
B_INNER = tl.constexpr(4)
C_ROWS = tl.constexpr(5)
C_COLUMNS = tl.constexpr(6)

# what the vectors are for
NO_VECTORS = tl.constexpr(0)
OUTER = tl.constexpr(1)
EXTRA_COLUMN = tl.constexpr(2)

# columns of the table of addresses; PLACE: for each of all units where it stands among the kept, -1
AT_A = tl.constexpr(0)
AT_B = tl.constexpr(1)
AT_C = tl.constexpr(2)
AT_Z = tl.constexpr(3)
AT_U = tl.constexpr(4)
AT_V = tl.constexpr(5)
AT_KEEP = tl.constexpr(6)
AT_PLACE = tl.constexpr(7)
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
