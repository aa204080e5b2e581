"""MUKI: which of several teachers knows a text is judged by how sure each of them is.

Li et al. 2022 (Findings of EMNLP), "From Mimicking to Integrating: Knowledge Integration for
Pre-Trained Language Models". No text needs a label. The golden distribution over all classes is
approximated by ``q = sum_i alpha_i P_i``, P_i a teacher's distribution over its own classes and 0
elsewhere, alpha_i of its confidence ``1 - H / ln M`` (of the mean of several passes with dropout,
or of a single one). A text about which the two surest teachers are equally sure counts for little
(the margin).

Shape letters: N supervised positions, n teachers, C the student's classes, M those of one teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from dskd.batch import Panel, Term
from dskd.methods.integration import confidences, divergence, heat, placed, wide

_LEAST_MARGIN = 1e-6
"""What the original adds to every margin, so that none is 0."""


@torch.no_grad()
def teacher_weights(
    confidence_Nn: Tensor, present_Nn: Tensor | None, *, hard: bool, sharpness: float
) -> Tensor:
    """alpha [N, n], summing to 1: how much each teacher says about a position.

    Args:
        confidence_Nn: see :class:`~dskd.batch.Panel`, as is ``present_Nn``.
        hard: all to the surest teacher, of equally sure ones to the first; else the softmax of
            ``confidence / sharpness``.
    """
    heard_Nn = _heard(confidence_Nn, present_Nn)
    if hard:
        first_N1 = heard_Nn.argmax(1, keepdim=True)
        return torch.zeros_like(heard_Nn).scatter(1, first_N1, 1.0)
    return (heard_Nn / sharpness).softmax(1)


@torch.no_grad()
def margin(confidence_Nn: Tensor, present_Nn: Tensor | None) -> Tensor:
    """By how much the surest teacher is surer than the next one [N], 1e-6 to 1 + 1e-6; one that is
    alone is compared with 0.

    Of the positions of a whole step, the sum of these is what the loss is divided by where margins
    are normalised by their mean: ``mean(m KL) / mean(m)``. So it is known before the first pass
    only if the confidences are.
    """
    alone_Nn = pad(_heard(confidence_Nn, present_Nn), (0, 1), value=-math.inf)
    first_N, second_N = alone_Nn.topk(2, dim=1).values.unbind(1)
    return first_N - second_N.where(second_N > -math.inf, 0.0) + _LEAST_MARGIN


@torch.no_grad()
def integrated(panel: Panel, weights_Nn: Tensor, classes: int, temperature: float) -> Tensor:
    """q [N, C]: the teachers' distributions at the temperature, each at its own classes, weighted;
    a class of several teachers gets something of each."""
    target_NC = None
    for index, (logits_NM, map_M) in enumerate(zip(panel.logits, panel.maps, strict=True)):
        share_N1 = weights_Nn[:, index, None]
        part_NM = share_N1 * (wide(logits_NM) / temperature).softmax(-1)
        part_NM = part_NM.where(share_N1 > 0, 0.0)  # of one who is not heard they are anything
        part_NC = placed(part_NM, map_M, classes, 0.0)
        target_NC = part_NC if target_NC is None else target_NC + part_NC
    assert target_NC is not None, "a panel of nobody"
    return target_NC


def muki_term(
    student_NC: Tensor,
    panel: Panel,
    *,
    hard: bool,
    by_margin: bool,
    sharpness: float = 0.2,
    temperature: float = 1.0,
    squared: bool = False,
    weight: float = 1.0,
) -> Term:
    """``KL(q || softmax(student / T))``, each position's times its margin or 1.

    To be divided by the number of positions or, to normalise the margins, by their sum. The
    gradient of a position's logits is ``weight * m * (p - q) / T``.

    Args:
        student_NC: the student's logits.
        panel: the teachers at the same positions.
        hard: see :func:`teacher_weights`, as is ``sharpness`` (tau; 0.2 in the original).
        by_margin: whether positions count by their margin.
        temperature: T, of the student, of the teachers' distributions and, where the panel brings
            no confidences, of these.
        squared: whether T^2 multiplies the KL; not in the original.
        weight: of the term.
    """
    confidence_Nn = confidences(panel, temperature)
    alpha_Nn = teacher_weights(confidence_Nn, panel.present_Nn, hard=hard, sharpness=sharpness)
    target_NC = integrated(panel, alpha_Nn, student_NC.shape[1], temperature)
    kl_N = divergence(target_NC, student_NC, temperature) * heat(temperature, squared)
    parts = {"kl": kl_N.detach().sum()}
    if by_margin:
        margin_N = margin(confidence_Nn, panel.present_Nn)
        kl_N = margin_N * kl_N
        parts["margin"] = margin_N.sum()
    return Term(weight * kl_N.sum(), parts)


def _heard(confidence_Nn: Tensor, present_Nn: Tensor | None) -> Tensor:
    """Confidences, -inf where a teacher is not heard."""
    return confidence_Nn if present_Nn is None else confidence_Nn.where(present_Nn, -math.inf)
