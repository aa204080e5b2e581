"""Cross entropy of logits with labels, with its gradient: `label_ce`.

Shape letters: N tokens, V columns.
"""

from __future__ import annotations

from torch import Tensor

from dskd.fused.arguments import (
    SAME,
    LogitMap,
    Losses,
    TokenWeight,
    gradient_room,
    map_of,
    matrix,
    refuse,
    unit_columns,
)
from dskd.fused.backend import row_functions
from dskd.fused.gradients import detached, operator, total_of, wanted
from dskd.fused.per_token import weights_of


def label_ce(
    student_NV: Tensor,
    labels_N: Tensor,
    *,
    label_weight: TokenWeight = 1.0,
    ignore_index: int = -100,
    student_map: LogitMap = SAME,
    out: Tensor | None = None,
) -> Losses:
    """Cross entropy with the labels, at temperature 1.

    The arguments are those of :func:`~dskd.fused.dense.dense_kd`; ``divergence_N`` comes back 0.

    Raises:
        ValueError: an argument of a wrong shape, type, device or range, named.
    """
    matrix("student", student_NV)
    refuse(labels_N is None, lambda: "labels: there are none")
    weights = weights_of(
        student_NV,
        labels_N,
        weight=0.0,
        reverse_weight=None,
        label_weight=label_weight,
        ignore_index=ignore_index,
        columns=student_NV.shape[1],
    )
    if weights.label_N is None:  # a label_weight of 0
        weights = weights._replace(labels_N=labels_N, label_N=weights.divergence_N)
    maps = [*map_of("student_map", student_map)]
    arguments = (weights.divergence_N, weights.label_N, weights.labels_N, maps)
    if out is not None:
        gradient_room(out, student_NV)
        return Losses(*_rows(unit_columns(student_NV), *arguments, out))
    return detached(_operator(student_NV, *arguments, wanted(student_NV)))


def _rows(
    student_NV: Tensor,
    zeros_N: Tensor,
    label_weight_N: Tensor,
    labels_N: Tensor,
    maps: list[float],
    grad_NV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence (zeros) and label loss [N]; the gradient into ``grad_NV``."""
    label_N = row_functions("label", student_NV).label_rows(
        student_NV, labels_N, label_weight_N, student_map=tuple(maps), grad_NV=grad_NV
    )
    return total_of(zeros_N.clone(), zeros_N, label_N, label_weight_N)


_operator = operator("label_ce", "Tensor labels, float[] maps", _rows)
