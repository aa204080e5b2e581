"""What the kernels share: loads of a row's columns, the logit map, online softmax sums, launches.

One program works on one row. A row is walked in tiles of B columns; a thread owns 8 of them, in R
groups of G neighbours (one 16-byte load each), so B = R * L * G with L threads. (16 a thread would
take 5 % fewer instructions, but more registers than 1024 threads have.) Every thread keeps its own
running maximum and sums ([L] tensors), and only at the row's end are they brought together: there
is no barrier inside a loop.

Exponentials are of base 2. After :func:`columns` every logit is finite: one of ``-inf`` (a masked
token), and a column outside of the row, has become ``LOW``, whose exponential is 0. NaN stays NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e30)
TINY = tl.constexpr(1e-37)
HUGE = tl.constexpr(1e15)  # beyond it a loss has a LOW in it, and a largest logit is one

THREAD_COLUMNS = tl.constexpr(8)
ALIGNED_COLUMNS = tl.constexpr(8)

# how rows lie in memory, see `alignment`
EVEN, RAGGED, LOOSE = map(tl.constexpr, range(3))

# what the logit map of a tensor is, see `map_kind`
PLAIN, SCALED, CAPPED = map(tl.constexpr, range(3))


@triton.jit
def log2(x, FAST: tl.constexpr):
    """One instruction where FAST (absolute error 2^-22), else tl.log2, which takes about 25"""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x, to one ulp where FAST"""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def shown(loss, none):
    """A loss as it is stored: NaN without a softmax, inf with a LOW in it"""
    return tl.where(none, float("nan"), tl.where(loss > HUGE, float("inf"), loss))


# ---- logits of a row


@triton.jit
def row_start(pointer, row, stride, shift, ALIGN: tl.constexpr):
    """Where tile 0 of an int64 row begins: `shift` elements before the row, on 16 bytes"""
    start = pointer + (row * stride - shift)
    if ALIGN != LOOSE:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def row_shift(row, stride, lead, ALIGN: tl.constexpr):
    """Elements between the aligned place below a row's first column and that column"""
    shift = 0
    if ALIGN == RAGGED:
        shift = ((row * stride + lead) % ALIGNED_COLUMNS).to(tl.int32)
    return shift


@triton.jit
def finite(x, FAST: tl.constexpr):
    """fp32 of logits, -inf raised to about LOW; NaN stays"""
    if FAST and x.dtype == tl.bfloat16:
        # two columns at once: max, then the halves of the word; 0xf149 is -9.98e29
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b32 low;
            mov.b32 low, 0xf149f149;
            max.NaN.bf16x2 both, $2, low;
            shl.b32 $0, both, 16;
            and.b32 $1, both, 0xffff0000;
            }""",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.maximum(x.to(tl.float32), LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wide(x, FAST: tl.constexpr):
    """fp32 of logits; bf16 by one instruction each instead of one and a half"""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def mapped(x, scale, cap, MAP: tl.constexpr, FAST: tl.constexpr):
    """z = scale x, or cap tanh(scale x / cap); LOW stays low"""
    z = x
    if MAP == SCALED:
        z = x * scale
    if MAP == CAPPED:
        # tanh(y) = 1 - 2 / (1 + exp(2 y)); exp2 may reach inf or 0, which give +-1
        e = tl.exp2(x * (2.0 * LOG2E * scale / cap))
        z = cap - 2.0 * cap * reciprocal(1.0 + e, FAST)
        z = tl.where(x < 0.5 * LOW, LOW, z)
    return z


@triton.jit
def slope(z, scale, cap, MAP: tl.constexpr):
    """dz/dx of `mapped`, from z"""
    if MAP == CAPPED:
        y = z * (1.0 / cap)
        return scale * tl.maximum(1.0 - y * y, 0.0)
    else:
        return scale


@triton.jit
def columns(
    start,
    at,
    first,
    last,
    scale,
    cap,
    MAP: tl.constexpr,
    EDGE: tl.constexpr,
    ALIGN: tl.constexpr,
    KEEP: tl.constexpr,
    RAW: tl.constexpr,
    FAST: tl.constexpr,
):
    """fp32 logits of a tile, mapped; LOW outside of [first, last) in a tile that has an EDGE.

    start: the row's `row_start`; at: int32 positions from there; KEEP: the row is read again;
    RAW: -inf may stay -inf, which only an exponential takes well
    """
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if EDGE and ALIGN == RAGGED:
        # whole aligned groups: what lies in 32 bytes with a wanted element can be read
        group_end = (last + ALIGNED_COLUMNS - 1) // ALIGNED_COLUMNS * ALIGNED_COLUMNS
        x = tl.load(start + at, mask=at < group_end, other=0.0, eviction_policy=policy)
    elif EDGE:
        x = tl.load(start + at, mask=at < last, other=0.0, eviction_policy=policy)
    else:
        x = tl.load(start + at, eviction_policy=policy)
    if RAW and MAP != CAPPED:
        x = wide(x, FAST)
    else:
        x = finite(x, FAST)
    z = mapped(x, scale, cap, MAP, FAST)
    if EDGE:
        inside = at < last
        if ALIGN == RAGGED:
            inside = inside & (at >= first)
        z = tl.where(inside, z, LOW)
    return z


@triton.jit
def row_end(shift, width, ALIGN: tl.constexpr):
    """The position behind a row's last column"""
    end = shift + width
    if ALIGN == EVEN:
        # no change, but now Triton knows the multiple and lets the edges go by 16 bytes, too
        end = end // ALIGNED_COLUMNS * ALIGNED_COLUMNS
    return end


@triton.jit
def row_tiles(shift, last, shortest, B: tl.constexpr, ALIGN: tl.constexpr):
    """(head, full, count): tiles [head, full) lie inside all rows, of which `shortest` ends first.

    Tile 0 (if head is 1) and the tiles [full, count) have an edge: see `edge_tile`
    """
    head = 0
    full = shortest // B
    if ALIGN == RAGGED:
        head = tl.where(shift > 0, 1, 0)
        full = tl.maximum(full, head)
    return head, full, tl.cdiv(last, B)


@triton.jit
def edge_tile(edge, full):
    """The tile with an edge that is number `edge` of [-head, count - full)"""
    return tl.where(edge < 0, 0, full + edge)


@triton.jit
def zero_row(start, first, last, B: tl.constexpr):
    """Zeros in the columns [first, last) of a row"""
    at = tl.arange(0, B)
    for k in range(0, last, B):
        inside = (k + at >= first) & (k + at < last)
        tl.store(start + k + at, tl.zeros([B], start.dtype.element_ty), mask=inside)


# ---- a thread's own sums


@triton.jit
def grouped(x, G: tl.constexpr):
    """[B] -> [R, L, G]: axis 1 runs over the threads, the others lie inside one"""
    R: tl.constexpr = THREAD_COLUMNS // G
    L: tl.constexpr = x.shape[0] // THREAD_COLUMNS
    return tl.reshape(x, [R, L, G])


@triton.jit
def thread_sum(x, G: tl.constexpr):
    """[B] -> [L], without traffic between threads"""
    return tl.sum(tl.sum(grouped(x, G), 2), 0)


@triton.jit
def thread_max(x, G: tl.constexpr):
    """[B] -> [L], without traffic between threads; a NaN does not show"""
    return tl.max(tl.max(grouped(x, G), 2), 0)


@triton.jit
def spread(x, B: tl.constexpr, G: tl.constexpr):
    """[L] -> [B]: every thread's number for each of its columns"""
    R: tl.constexpr = THREAD_COLUMNS // G
    L: tl.constexpr = B // THREAD_COLUMNS
    return tl.reshape(tl.broadcast_to(x[None, :, None], [R, L, G]), [B])


@triton.jit
def online(z, top, total, c, G: tl.constexpr):
    """Take a tile into every thread's (top, total): total = sum 2^(c (z - top)).

    Returns the tile's exponentials [B] and the factor [L] by which older sums fade, too
    """
    higher = tl.maximum(top, thread_max(z, G))
    e = tl.exp2(z * c - spread(higher * c, z.shape[0], G))
    fade = tl.exp2((top - higher) * c)
    return higher, total * fade + thread_sum(e, G), e, fade


# ---- host


class Launch(NamedTuple):
    """How a row kernel is launched: columns in a tile, columns in a 16-byte load, warps."""

    tile: int
    group: int
    num_warps: int


def launch(columns: int, *dtypes: torch.dtype, least: int = 1, most: int = 32) -> Launch:
    """The launch of a row kernel; a table and not an autotuner, which would run kernels twice.

    dtypes: of the student's logits, then of other tensors whose rows are walked, too; least, most:
    warps.

    What counts is how many rows are under way: their logits should still be in the caches (40 MB)
    when the second pass comes for them. 132 processors take 1024 threads each, so a row of more
    than 80 KB gets all of them, a shorter one half, and so on.
    """
    row_bytes = columns * dtypes[0].itemsize
    table = ((80 << 10, 32), (40 << 10, 16), (20 << 10, 8), (4 << 10, 4))
    warps = next((warps for more_than, warps in table if row_bytes > more_than), 1)
    warps = min(max(warps, least), most)
    # a thread's columns lie as the narrowest tensor wants them
    group = max(16 // dtype.itemsize for dtype in dtypes)
    return Launch(32 * warps * THREAD_COLUMNS.value, group, warps)


def fast() -> bool:
    """Whether the kernels may use NVIDIA's approximate instructions (not in the interpreter)."""
    return not triton.knobs.runtime.interpret


def alignment(*tensors: Tensor, widths: tuple[int, ...]) -> tuple[int, int]:
    """How the rows of several tensors lie in memory, and the first row's phase (0 to 7 elements).

    EVEN: every row starts on 8 elements and the widths are multiples of 8. RAGGED: row n of all
    tensors has the same phase, so that columns can be read by 16 bytes from the aligned place
    below the row. LOOSE: phases differ, single elements are read.
    """
    phases = {
        (t.data_ptr() // t.element_size() % ALIGNED_COLUMNS.value,
         t.stride(0) % ALIGNED_COLUMNS.value)
        for t in tensors
    }  # fmt: skip
    if len(phases) > 1:
        return LOOSE.value, 0
    ((lead, stride),) = phases
    even = not lead and not stride and not any(w % ALIGNED_COLUMNS.value for w in widths)
    return (EVEN.value if even else RAGGED.value), lead


def map_kind(logit_map: tuple[float, float]) -> int:
    """PLAIN, SCALED or CAPPED for (scale, softcap)."""
    scale, softcap = logit_map
    if softcap > 0:
        return CAPPED.value
    return PLAIN.value if scale == 1 else SCALED.value


def row_options(
    student_NV: Tensor, grad_NV: Tensor | None, *teachers: Tensor, least: int = 1
) -> dict[str, Any]:
    """Arguments and options of a launch whose kernel walks the rows of these tensors together.

    least: warps.
    """
    tensors = (student_NV, *teachers, *(() if grad_NV is None else (grad_NV,)))
    align, lead = alignment(*tensors, widths=tuple(t.shape[1] for t in tensors))
    tile, group, num_warps = launch(student_NV.shape[1], *(t.dtype for t in tensors), least=least)
    return {
        "grad_ptr": grad_NV,
        "grad_stride": 0 if grad_NV is None else grad_NV.stride(0),
        "lead": lead,
        "GRAD": grad_NV is not None,
        "ALIGN": align,
        "B": tile,
        "G": group,
        "FAST": fast(),
        "num_warps": num_warps,
    }


def table_on(device: torch.device, rows: Sequence[Sequence[int]]) -> Tensor:
    """An int64 table of addresses and numbers, on a device."""
    table = torch.tensor(rows, dtype=torch.int64)
    # from pageable memory the host would wait for the device
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


class Configuration(TypedDict):
    """A compiled form of a kernel that runs meet, for the ahead-of-time check.

    signature: type of every argument that is no constexpr (``"*bf16"``, ``"i32"``, ``"fp32"``);
    constants: value of every constexpr, with ``FAST`` True; num_warps: of 32 threads; num_stages;
    aligned: the arguments divisible by 16; tensors_per_column: [N, V] tensors that a hot loop
    loads, or that each of them does; 0: no such loop; maxnreg: as launched, if launched with it.
    """

    name: str
    kernel: triton.runtime.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]
    tensors_per_column: int | tuple[int, ...]
    maxnreg: NotRequired[int]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the names that Triton has for them."""

_FLOATS = ("inverse_t", "beta", "scale", "cap") + tuple(
    f"{side}_{of}" for side in ("student", "teacher") for of in ("scale", "cap")
)
"""The arguments of row kernels that are fp32; the other numbers are i32."""


def row_configuration(
    name: str,
    kernel: triton.runtime.JITFunction,
    how: Launch,
    pointers: Mapping[str, str | None],
    constants: Mapping[str, object],
    *,
    aligned: Sequence[str],
    tensors_per_column: int | tuple[int, ...],
) -> Configuration:
    """One compiled form of a row kernel.

    pointers: what they point to (``"bf16"``), None for those that are not given; constants: of the
    constexprs, those of ``how`` and ``FAST`` left out. What the kernel has not got is left out.
    """
    constants = {**constants, "B": how.tile, "G": how.group, "FAST": True}
    constants |= {pointer: None for pointer, type_ in pointers.items() if type_ is None}
    signature = {pointer: f"*{type_}" for pointer, type_ in pointers.items()}
    signature |= dict.fromkeys(_FLOATS, "fp32")
    takes = [argument for argument in kernel.arg_names if argument not in constants]
    return Configuration(
        name=name,
        kernel=kernel,
        signature={argument: signature.get(argument, "i32") for argument in takes},
        constants={n: value for n, value in constants.items() if n in kernel.arg_names},
        num_warps=how.num_warps,
        num_stages=1,
        aligned=tuple(argument for argument in aligned if argument in takes),
        tensors_per_column=tensors_per_column,
    )
