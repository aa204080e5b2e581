"""Divergence of a student's logits from a teacher's full logits, with its gradient: `dense_kd`.

Shape letters: N tokens, V student columns, W teacher columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd.fused.arguments import (
    SAME,
    LogitMap,
    Losses,
    TokenWeight,
    gradient_room,
    kind_of,
    map_of,
    matrix,
    teacher_columns,
    temperature_of,
    unit_columns,
)
from dskd.fused.backend import row_functions
from dskd.fused.gradients import detached, operator, total_of, wanted
from dskd.fused.per_token import weights_of


def dense_kd(
    student_NV: Tensor,
    teacher_NW: Tensor,
    labels_N: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: TokenWeight = 1.0,
    reverse_weight: TokenWeight | None = None,
    label_weight: TokenWeight = 0.0,
    ignore_index: int = -100,
    student_map: LogitMap = SAME,
    teacher_map: LogitMap = SAME,
    vocabulary: int | None = None,
    out: Tensor | None = None,
) -> Losses:
    """Divergence of the student from the teacher, and cross entropy with the labels.

    With p the teacher's and q the student's softmax, both at the temperature:

    - ``forward_kl``: KL(p || q); ``reverse_kl``: KL(q || p);
    - ``mixed``: ``weight * KL(p || q) + reverse_weight * KL(q || p)``, weights of each token;
    - ``jsd``: ``beta KL(p || m) + (1 - beta) KL(q || m)``, m = beta p + (1 - beta) q (Agarwal et
      al. 2024, GKD, section 2);
    - ``skew_forward_kl``: KL(p || beta p + (1 - beta) q); ``skew_reverse_kl``:
      KL(q || (1 - beta) p + beta q) (Ko et al. 2024, DistiLLM, section 3.1);
    - ``total_variation``: sum |p - q| / 2.

    There is no factor T^2: it goes into the weight, like a mask, 1/N, a rate or a schedule.

    Args:
        student_NV: logits of any floating type and strides; may hold -inf.
        teacher_NW: likewise, without gradient. W <= V: it gives the columns beyond no probability.
        labels_N: int64; the cross entropy is at temperature 1, over all V columns.
        weight: of the divergence: a number or [N], like the two that follow; no gradient.
        reverse_weight: of the reverse part of ``mixed``.
        label_weight: of the cross entropy.
        ignore_index: a token with this label counts for nothing.
        student_map: scale and softcap the model applies to its logits; the gradient is that of
            the logits before them.
        teacher_map: likewise.
        vocabulary: number of real tokens, where the teacher's columns beyond are padding.
        out: [N, V], for a caller without autograd: takes the gradient of the total, in its own
            dtype; it may be ``student_NV``, so that no further memory is needed.

    Raises:
        ValueError: an argument of a wrong shape, type, device or range, named.
    """
    matrix("student", student_NV)
    matrix("teacher", teacher_NW, rows=len(student_NV), like=student_NV)
    columns = student_NV.shape[1]
    shared = teacher_columns(teacher_NW.shape[1], columns, vocabulary)
    kind_of(kind, beta, reverse_weight, shared < columns)
    weights = weights_of(
        student_NV,
        labels_N,
        weight=weight,
        reverse_weight=reverse_weight,
        label_weight=label_weight,
        ignore_index=ignore_index,
        columns=columns,
    )
    teacher_NW = unit_columns(teacher_NW.detach()[:, :shared])
    arguments = (
        weights.divergence_N,
        weights.label_N,
        teacher_NW,
        weights.reverse_N,
        weights.labels_N,
        kind,
        float(beta),
        temperature_of(temperature),
        [*map_of("student_map", student_map), *map_of("teacher_map", teacher_map)],
    )
    if out is not None:
        gradient_room(out, student_NV)
        return Losses(*_rows(unit_columns(student_NV), *arguments, out))
    return detached(_operator(student_NV, *arguments, wanted(student_NV)))


def _rows(
    student_NV: Tensor,
    weight_N: Tensor,
    label_weight_N: Tensor | None,
    teacher_NW: Tensor,
    reverse_N: Tensor | None,
    labels_N: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    maps: list[float],
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence [N] and label loss [N] or [0]; the gradient into ``grad_NV``."""
    divergence_N, label_N = row_functions("dense", student_NV).dense_rows(
        student_NV,
        teacher_NW,
        labels_N,
        weight_N,
        reverse_N,
        label_weight_N,
        kind=kind,
        beta=beta,
        temperature=temperature,
        student_map=tuple(maps[:2]),
        teacher_map=tuple(maps[2:]),
        grad_NV=grad_NV,
    )
    once_N = torch.ones_like(weight_N) if kind == "mixed" else weight_N
    return total_of(divergence_N, once_N, label_N, label_weight_N)


_operator = operator(
    "dense_kd",
    "Tensor teacher, Tensor? reverse, Tensor? labels, str kind, float beta, float temperature, "
    "float[] maps",
    _rows,
)
