"""Cross entropy of logits with labels, with its gradient: `label_ce`.

Shape letters: N tokens, V columns.
"""

from __future__ import annotations

from torch import Tensor

from dskd.batch import SAME
from dskd.fused.arguments import LogitMap, Losses, TokenWeight, map_of, matrix, refuse
from dskd.fused.logit_loss import NO_BETA, LossForm, logit_loss
from dskd.fused.per_token import weights_of
from dskd.fused.tokens import Tokens


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

    The arguments are those of :func:`~dskd.fused.dense.dense_kd`, tokens along any axes, too;
    ``divergence_N`` comes back 0.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named.
        TypeError: one that is no tensor, or of no such numbers, named.
    """
    tokens = Tokens.of("student", student_NV)
    student_NV, labels_N = tokens.rows("student", student_NV), tokens.each("labels", labels_N)
    label_weight = tokens.each("label_weight", label_weight)
    matrix("student", student_NV)
    refuse(labels_N is None, lambda: "labels: there are none")
    columns = student_NV.shape[1]
    weights = weights_of(student_NV, labels_N, ignore_index, columns, 0.0, None, label_weight)
    if weights.label_N is None:  # a label_weight of 0
        weights = weights._replace(labels_N=labels_N.long(), label_N=weights.divergence_N)
    maps = [*map_of("student_map", student_map)]
    loss = LossForm("label", [], weights, "", NO_BETA, 1.0, maps)
    return tokens.losses(logit_loss(student_NV, loss, tokens.room("out", out)))
