"""Divergence of a student's logits from a teacher's full logits, with its gradient: `dense_kd`.

Shape letters: N tokens, V student columns, W teacher columns.
"""

from __future__ import annotations

from torch import Tensor

from dskd.batch import SAME
from dskd.fused.arguments import (
    LogitMap,
    Losses,
    TokenWeight,
    kind_of,
    map_of,
    matrix,
    teacher_columns,
    temperature_of,
    unit_columns,
)
from dskd.fused.logit_loss import LossForm, logit_loss
from dskd.fused.per_token import weights_of
from dskd.fused.tokens import Tokens


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
    label_weight: TokenWeight | None = None,
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

    Tokens may lie along several axes: for logits [B, T, V], all that is written [N] here is
    [B, T], and so are the losses that come back (see ``tokens.py``).

    Args:
        student_NV: logits of any floating type and strides; may hold -inf.
        teacher_NW: likewise, without gradient. W <= V: it gives the columns beyond no probability.
        labels_N: int64 or int32; the cross entropy is at temperature 1, over all V columns.
        weight: of the divergence: a number or [N], numbers or a mask, like the two that follow; no
            gradient.
        reverse_weight: of the reverse part of ``mixed``.
        label_weight: of the cross entropy; to be given with labels. 0: they only say which tokens
            are ignored.
        ignore_index: a token with this label counts for nothing.
        student_map: scale and softcap the model applies to its logits; the gradient is that of
            the logits before them.
        teacher_map: likewise.
        vocabulary: number of real tokens, where the teacher's columns beyond are padding.
        out: [N, V], for a caller without autograd: takes the gradient of the total, in its own
            dtype; it may be ``student_NV``, so that no further memory is needed. Without it the
            gradient waits in fp32 (float64 for float64 logits) for the upstream one.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named.
        TypeError: one that is no tensor, or of no such numbers, named.
    """
    tokens = Tokens.of("student", student_NV)
    student_NV, teacher_NW = tokens.rows("student", student_NV), tokens.rows("teacher", teacher_NW)
    matrix("student", student_NV)
    matrix("teacher", teacher_NW, rows=len(student_NV), like=student_NV)
    columns = student_NV.shape[1]
    shared = teacher_columns(teacher_NW.shape[1], columns, vocabulary)
    kind_of(kind, beta, reverse_weight, shared < columns)
    weights = weights_of(
        student_NV,
        tokens.each("labels", labels_N),
        ignore_index,
        columns,
        tokens.each("weight", weight),
        tokens.each("reverse_weight", reverse_weight),
        tokens.each("label_weight", label_weight),
    )
    teacher_NW = unit_columns(teacher_NW.detach()[:, :shared])
    maps = [*map_of("student_map", student_map), *map_of("teacher_map", teacher_map)]
    heat = temperature_of(temperature)
    loss = LossForm("dense", [teacher_NW], weights, kind, float(beta), heat, maps)
    return tokens.losses(logit_loss(student_NV, loss, tokens.room("out", out)))
