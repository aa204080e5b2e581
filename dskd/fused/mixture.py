"""KL of a student's logits from a mixture of several teachers' logits, and gradient: `mixture_kd`.

Shape letters: N tokens, V student columns, W_k columns of teacher k, n teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dskd.batch import SAME
from dskd.fused.arguments import (
    LogitMap,
    Losses,
    columns_within,
    map_of,
    matrix,
    refuse,
    refuse_kind,
    temperature_of,
    unit_columns,
    wide,
)
from dskd.fused.backend import row_functions
from dskd.fused.chunking import chunk_of, chunks
from dskd.fused.gradients import operator, total_of
from dskd.fused.per_token import mixture_weights
from dskd.fused.tokens import Tokens


def mixture_kd(
    student_NV: Tensor,
    teachers: Sequence[Tensor],
    weights_Nn: Tensor,
    *,
    firsts: Sequence[int] | None = None,
    temperature: float = 1.0,
    student_map: LogitMap = SAME,
    out: Tensor | None = None,
) -> Losses:
    """Forward KL from each token's own mixture of teachers, in one pass over all logits.

    ``pbar = sum_k w_k softmax(t_k / T) / sum_k w_k``; the loss of a token is
    ``(sum_k w_k) KL(pbar || q)``, whose gradient is that of ``sum_k w_k KL(p_k || q)``.
    ``divergence_N`` is the unweighted ``KL(pbar || q)``. There is no factor T^2.

    Args:
        student_NV: logits of any floating type and strides; may hold -inf.
        teachers: logits [N, W_k]; teacher k's columns are the student's from ``firsts[k]`` on: all
            of the same columns, or of disjoint classes (MUKI), or any mix. Where one has another
            type than the student, all are read in fp32 (float64 for a float64 student), of which
            a chunk of tokens is made at a time.
            Tokens of all may lie along several axes, [B, T, V] and weights [B, T, n], as those of
            :func:`~dskd.fused.dense.dense_kd`.
        weights_Nn: at least 0, numbers or a mask, without gradient; a row of zeros is a token that
            does not count.
        firsts: by default all 0.
        out: takes the gradient, for a caller without autograd; it may be ``student_NV``.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named.
        TypeError: one that is no tensor, or of no such numbers, named.
    """
    refuse_kind(
        not isinstance(teachers, Sequence), lambda: "teachers: must be a list, of logits of each"
    )
    tokens = Tokens.of("student", student_NV)
    student_NV, weights_Nn = tokens.rows("student", student_NV), tokens.rows("weights", weights_Nn)
    teachers = [tokens.rows(f"teachers[{k}]", logits) for k, logits in enumerate(teachers)]
    matrix("student", student_NV)
    refuse(not teachers, lambda: "teachers: there are none")
    firsts = [0] * len(teachers) if firsts is None else [int(first) for first in firsts]
    refuse(
        len(firsts) != len(teachers), lambda: f"firsts: {len(firsts)} for {len(teachers)} teachers"
    )
    for k, (logits, first) in enumerate(zip(teachers, firsts, strict=True)):
        _check_teacher(f"teachers[{k}]", logits, first, student_NV)
    mixture_weights(weights_Nn, student_NV, len(teachers))
    arguments = (
        weights_Nn.detach().to(wide(student_NV.dtype)).contiguous(),
        None,
        [unit_columns(logits.detach()) for logits in teachers],
        firsts,
        temperature_of(temperature),
        [*map_of("student_map", student_map)],
    )
    return tokens.losses(_operator(student_NV, arguments, tokens.room("out", out)))


def _check_teacher(name: str, logits: Tensor, first: int, student_NV: Tensor) -> None:
    count, columns = student_NV.shape
    matrix(name, logits, rows=count, like=student_NV)
    columns_within(name, first, logits.shape[1], columns)


def _rows(
    student_NV: Tensor,
    weights_Nn: Tensor,
    no_labels: None,
    teachers: list[Tensor],
    firsts: list[int],
    temperature: float,
    maps: list[float],
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence [N] and no label losses; the gradient into ``grad_NV``."""
    rows = row_functions("mixture", student_NV).mixture_rows
    how = {"temperature": temperature, "student_map": tuple(maps)}
    if all(logits.dtype == student_NV.dtype for logits in teachers):
        divergence_N = rows(student_NV, teachers, firsts, weights_Nn, grad_NV=grad_NV, **how)
        return total_of(divergence_N, weights_Nn.sum(1), None, no_labels)
    # the kernel reads all rows through pointers of one type
    dtype = wide(student_NV.dtype)
    columns = student_NV.shape[1] + sum(logits.shape[1] for logits in teachers)
    size = chunk_of(len(student_NV), columns, dtype.itemsize, student_NV.device)
    divergence_N = torch.empty(len(student_NV), dtype=dtype, device=student_NV.device)
    for part in chunks(len(student_NV), size):
        several = [logits[part].to(dtype) for logits in teachers]
        grad = None if grad_NV is None else grad_NV[part]
        divergence_N[part] = rows(
            student_NV[part].to(dtype), several, firsts, weights_Nn[part], grad_NV=grad, **how
        )
    return total_of(divergence_N, weights_Nn.sum(1), None, no_labels)


_operator = operator(
    "mixture_kd", "Tensor[] teachers, int[] firsts, float temperature, float[] maps", _rows
)
