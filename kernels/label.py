"""Cross entropy with labels, and its gradient ``weight * (softmax(z) - onehot)``, z = map(x).

One program a row, which reads it twice: an online softmax, then the gradient, which may overwrite
the logits. The label's one-hot part is one more number, stored after the dense pass.

Shapes: N rows (tokens), V columns, B columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskd.kernels.common import (
    DTYPES,
    EVEN,
    HUGE,
    LN2,
    LOG2E,
    LOW,
    PLAIN,
    THREAD_COLUMNS,
    Configuration,
    columns,
    edge_tile,
    finite,
    launch,
    map_kind,
    mapped,
    online,
    row_configuration,
    row_options,
    row_shift,
    row_start,
    row_tiles,
    shown,
    slope,
    zero_row,
)


@triton.jit
def softmax_gradient(z, log_sum, weight, scale, cap, MAP: tl.constexpr):
    """d/dx of weight * log-sum-exp(z)"""
    g = weight * tl.exp2(z * LOG2E - log_sum)
    if MAP != PLAIN:
        g *= slope(z, scale, cap, MAP)
    return g


@triton.jit
def label_kernel(
    logits_ptr,
    grad_ptr,
    labels_ptr,
    weight_ptr,
    loss_ptr,
    V,
    stride,
    grad_stride,
    lead,
    scale,
    cap,
    MAP: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row: its loss and, if GRAD, its gradient, which may overwrite the logits"""
    row = tl.program_id(0).to(tl.int64)
    shift = row_shift(row, stride, lead, ALIGN)
    last = shift + V
    logits = row_start(logits_ptr, row, stride, shift, ALIGN)
    if GRAD:
        grad = row_start(grad_ptr, row, grad_stride, shift, ALIGN)
    weight = tl.load(weight_ptr + row)
    if weight == 0:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            zero_row(grad, shift, last, B)
        return

    head, full, count = row_tiles(shift, last, last, B, ALIGN)
    i = tl.arange(0, B)
    # not LOW, see divergence.py
    top = tl.full([B // THREAD_COLUMNS], 0.5 * LOW, tl.float32)
    total = tl.zeros([B // THREAD_COLUMNS], tl.float32)
    for tile in tl.range(head, full):
        at = tile * B + i
        z = columns(logits, at, shift, last, scale, cap, MAP, False, ALIGN, GRAD, False, FAST)
        top, total, _, _ = online(z, top, total, LOG2E, G)
    for edge in tl.range(-head, count - full):
        at = edge_tile(edge, full) * B + i
        z = columns(logits, at, shift, last, scale, cap, MAP, True, ALIGN, GRAD, False, FAST)
        top, total, _, _ = online(z, top, total, LOG2E, G)
    highest = tl.max(top, 0)
    log_total = tl.log2(tl.sum(total * tl.exp2((top - highest) * LOG2E), 0))

    label = shift + tl.load(labels_ptr + row)
    z_label = mapped(finite(tl.load(logits + label), False), scale, cap, MAP, FAST)
    loss = shown((highest - z_label) + log_total * LN2, highest < -HUGE)
    tl.store(loss_ptr + row, loss)
    if GRAD:
        # all threads have read the label's logit before one overwrites it
        tl.debug_barrier()
        log_sum = highest * LOG2E + log_total
        for edge in tl.range(-head, count - full):
            at = edge_tile(edge, full) * B + i
            z = columns(logits, at, shift, last, scale, cap, MAP, True, ALIGN, False, True, FAST)
            g = softmax_gradient(z, log_sum, weight, scale, cap, MAP)
            inside = (at >= shift) & (at < last)
            tl.store(grad + at, g.to(grad_ptr.dtype.element_ty), inside)
        for done in tl.range(head, full):
            at = (full + head - 1 - done) * B + i
            z = columns(logits, at, shift, last, scale, cap, MAP, False, ALIGN, False, True, FAST)
            g = softmax_gradient(z, log_sum, weight, scale, cap, MAP)
            tl.store(grad + at, g.to(grad_ptr.dtype.element_ty), eviction_policy="evict_first")
        tl.debug_barrier()
        g = softmax_gradient(z_label, log_sum, weight, scale, cap, MAP)
        hot = weight
        if MAP != PLAIN:
            hot *= slope(z_label, scale, cap, MAP)
        tl.store(grad + label, (g - hot).to(grad_ptr.dtype.element_ty))


def label_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    label_weight_N: Tensor,
    *,
    student_map: tuple[float, float],
    grad_NV: Tensor | None,
) -> Tensor:
    """Cross entropy [N] of every row with its label, fp32, in nats, unweighted.

    0 in a row of weight 0, whose label and logits are not read.

    Args:
        logits_NV: fp32, fp16 or bf16, of unit column stride and any row stride.
        labels_N: int64, in [0, V) where the weight is not 0.
        label_weight_N: fp32.
        student_map: (scale, softcap); no softcap is 0.
        grad_NV: gets the gradient of the weighted sum with respect to the logits, in its own
            dtype; ``logits_NV`` itself, another tensor, or None.
    """
    count = len(logits_NV)
    loss_N = torch.empty(count, dtype=torch.float32, device=logits_NV.device)
    if not count:
        return loss_N
    scale, cap = student_map
    with torch.cuda.device_of(logits_NV):
        label_kernel[(count,)](
            logits_ptr=logits_NV,
            labels_ptr=labels_N,
            weight_ptr=label_weight_N,
            loss_ptr=loss_N,
            V=logits_NV.shape[1],
            stride=logits_NV.stride(0),
            scale=scale,
            cap=cap,
            MAP=map_kind(student_map),
            **row_options(logits_NV, grad_NV),
            num_stages=1,
            enable_fp_fusion=True,
        )
    return loss_N


def configuration(logits: str, grad: str) -> Configuration:
    """One compiled form; types as Triton spells them."""
    pointers = {
        "logits_ptr": logits,
        "grad_ptr": grad,
        "labels_ptr": "i64",
        "weight_ptr": "fp32",
        "loss_ptr": "fp32",
    }
    return row_configuration(
        f"{logits}-{grad}/V131072",
        label_kernel,
        launch(131072, DTYPES[logits], DTYPES[grad]),
        pointers,
        {"MAP": PLAIN.value, "GRAD": True, "ALIGN": EVEN.value},
        aligned=(*pointers, "V", "stride", "grad_stride"),
        tensors_per_column=1,
    )


def configurations() -> list[Configuration]:
    """What is compiled ahead of time in the tests, see ``common.py``."""
    return [configuration("bf16", "bf16"), configuration("fp32", "bf16")]
