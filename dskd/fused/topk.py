"""KL of a student's logits from a teacher's K largest log-probabilities, and gradient: `topk_kd`.

Shape letters: N tokens, V columns, K kept.
"""

from __future__ import annotations

from torch import Tensor

from dskd.batch import SAME
from dskd.fused.arguments import LogitMap, Losses, TokenWeight, map_of, matrix, temperature_of
from dskd.fused.logit_loss import NO_BETA, LossForm, logit_loss
from dskd.fused.per_token import weights_of
from dskd.fused.tokens import Tokens
from dskd.fused.topk_teacher import check_masses, topk_of


def topk_kd(
    student_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None = None,
    labels_N: Tensor | None = None,
    *,
    mode: str = "tail",
    temperature: float = 1.0,
    weight: TokenWeight = 1.0,
    label_weight: TokenWeight | None = None,
    ignore_index: int = -100,
    student_map: LogitMap = SAME,
    out: Tensor | None = None,
) -> Losses:
    """Forward KL from a top-k teacher, and cross entropy with the labels.

    ``tail``: K + 1 buckets, the last one being all dropped tokens together; it never exceeds the
    dense KL and equals it at K = V. ``renormalised``: the teacher's kept tokens are scaled up to
    mass 1, the student keeps its full softmax. ``truncated``: both are restricted to the kept
    tokens (NaN where the student has masked all of them). There is no factor T^2,
    see :func:`~dskd.fused.dense.dense_kd`.

    Args:
        ids_NK: int32 or int64 tokens; negative on unused slots.
        logprobs_NK: the teacher's log-probabilities AT the temperature, over its whole vocabulary;
            -inf on unused slots.
        tail_N: for ``tail``: log of the mass of all that is not kept, at the temperature; -inf
            where nothing is left. It and the kept tokens have the mass 1 together, which is
            checked on a CPU and in debug mode, in rows that have a weight.

    The other arguments are those of :func:`~dskd.fused.dense.dense_kd`.

    Raises:
        ValueError: an argument of a wrong shape, device or range, named.
        TypeError: one that is no tensor, or of no such numbers, named.
    """
    tokens = Tokens.of("student", student_NV)
    student_NV, ids_NK = tokens.rows("student", student_NV), tokens.rows("ids", ids_NK)
    logprobs_NK, tail_N = tokens.rows("logprobs", logprobs_NK), tokens.each("tail", tail_N)
    labels_N, weight = tokens.each("labels", labels_N), tokens.each("weight", weight)
    label_weight = tokens.each("label_weight", label_weight)
    matrix("student", student_NV)
    columns = student_NV.shape[1]
    kept = topk_of(ids_NK, logprobs_NK, tail_N, mode, student_NV, columns)
    weights = weights_of(student_NV, labels_N, ignore_index, columns, weight, None, label_weight)
    check_masses(
        ids_NK, logprobs_NK, tail_N, weights.divergence_N, temperature=1.0, columns=columns
    )
    teacher = [part for part in kept if part is not None]
    heat, maps = temperature_of(temperature), [*map_of("student_map", student_map)]
    loss = LossForm("topk", teacher, weights, mode, NO_BETA, heat, maps)
    return tokens.losses(logit_loss(student_NV, loss, tokens.room("out", out)))
