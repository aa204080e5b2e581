"""What methods share that make one student of several teachers, each of classes of its own; and the
two of them that ask for no more than the teachers' logits.

Vanilla distillation takes the logits of all classes together for one classifier's. UHC
(Vongkulbhisal et al. 2019 (CVPR), "Unifying Heterogeneous Classifiers with Distillation") compares
student and teacher within each teacher's classes only.

Nothing here assumes an order of the classes, nor that only one teacher has a class: a teacher's are
found in the student's by name. No gradient flows into a teacher.

Shape letters: N supervised positions, n teachers, C the student's classes, M those of one teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dskd.batch import Panel, Term
from dskd.errors import ConfigError
from dskd.stores.dropout_scores import entropy, wide
from dskd.stores.uncertainty import confidence

Overlap = Literal["logsumexp", "mean"]
"""How the logits of several teachers of one class become one: ``logsumexp``: their odds add up;
``mean``: over the teachers that have it."""

_LEAST_MARGIN = 1e-6
"""What the original adds to every margin, so that none is 0."""


def label_map(own: Sequence[str], union: Sequence[str], where: str) -> Tensor:
    """The classes of a teacher as indices into the student's, int64 [M] on the CPU.

    Args:
        own: names of the teacher's classes, in the order of its logits.
        union: names of the student's.
        where: the teacher's setting, for messages.

    Raises:
        ConfigError: a name is there twice or the student has no such class, or there is one class
            only, of which a teacher is always sure.
    """
    places = {label: place for place, label in enumerate(union)}
    if len(own) < 2:
        raise ConfigError(f"{where}: {len(own)} class, but a teacher has to tell at least 2 apart")
    for number, label in enumerate(own):
        if label in own[:number]:
            raise ConfigError(f"{where}: the label {label!r} is there twice")
        if label not in places:
            raise ConfigError(
                f"{where}: the student has no class {label!r}; its classes are {', '.join(union)}"
            )
    return torch.tensor([places[label] for label in own])


@torch.no_grad()
def confidences(panel: Panel, temperature: float) -> Tensor:
    """How sure each teacher is [N, n]: as found beforehand, or of its distribution at the
    temperature."""
    if panel.confidence_Nn is not None:
        return panel.confidence_Nn
    found = [
        confidence(entropy((wide(logits_NM) / temperature).softmax(-1)), logits_NM.shape[1])
        for logits_NM in panel.logits
    ]
    return torch.stack(found, 1)


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
    for index in range(len(panel.logits)):
        # Of a teacher that is not heard the logits are anything; one that is, and gives no numbers,
        # must be seen in the loss, whatever its share.
        said_NC = teacher_probabilities(panel, index, classes, temperature)
        part_NC = _or_else(panel, index, weights_Nn[:, index, None] * said_NC, 0.0)
        target_NC = part_NC if target_NC is None else target_NC + part_NC
    assert target_NC is not None, "a panel of nobody"
    return target_NC


@torch.no_grad()
def merged_logits(panel: Panel, classes: int, overlap: Overlap) -> Tensor:
    """The logits of all teachers as those of one classifier [N, C]; -inf for a class that no
    teacher has who is heard.

    Its argmax is the ensemble's answer.
    """
    merged_NC = count_NC = None
    for index, (logits_NM, map_M) in enumerate(zip(panel.logits, panel.maps, strict=True)):
        heard_NM = _or_else(panel, index, wide(logits_NM), -math.inf)
        placed_NC = placed(heard_NM, map_M, classes, -math.inf)
        if overlap == "logsumexp":
            merged_NC = placed_NC if merged_NC is None else torch.logaddexp(merged_NC, placed_NC)
            continue
        heard_NC = placed_NC != -math.inf  # a NaN stays one
        placed_NC = placed_NC.where(heard_NC, 0.0)
        merged_NC = placed_NC if merged_NC is None else merged_NC + placed_NC
        count_NC = heard_NC.long() if count_NC is None else count_NC + heard_NC
    assert merged_NC is not None, "a panel of nobody"
    if count_NC is None:
        return merged_NC
    return (merged_NC / count_NC.clamp(min=1)).where(count_NC > 0, -math.inf)


@torch.no_grad()
def teacher_probabilities(panel: Panel, index: int, classes: int, temperature: float) -> Tensor:
    """One teacher's distribution at its classes, 0 at the others [N, C]."""
    probabilities_NM = (wide(panel.logits[index]) / temperature).softmax(-1)
    return placed(probabilities_NM, panel.maps[index], classes, 0.0)


def divergence(target_NC: Tensor, student_NC: Tensor, temperature: float) -> Tensor:
    """``KL(target || softmax(student / T))`` of each position [N], in nats."""
    log_student_NC = (wide(student_NC) / temperature).log_softmax(-1)
    return (torch.xlogy(target_NC, target_NC) - target_NC * log_student_NC).sum(-1)


def vkd_term(
    student_NC: Tensor,
    panel: Panel,
    *,
    temperature: float = 1.0,
    squared: bool = True,
    overlap: Overlap = "logsumexp",
    weight: float = 1.0,
) -> Term:
    """Vanilla distillation: the KL from the softmax of all logits together, to be divided by the
    number of positions.

    Args:
        temperature: T, of both distributions.
        squared: whether T^2 multiplies the KL, so that its gradient is as large at any T.
    """
    merged_NC = merged_logits(panel, student_NC.shape[1], overlap)
    target_NC = (merged_NC / temperature).softmax(-1)
    kl = divergence(target_NC, student_NC, temperature).sum() * heat(temperature, squared)
    return Term(weight * kl, {"kl": kl.detach()})


def uhc_term(
    student_NC: Tensor,
    panel: Panel,
    *,
    temperature: float = 1.0,
    squared: bool = True,
    weight: float = 1.0,
) -> Term:
    """UHC: the KL from each teacher, of the student's distribution within that teacher's classes,
    summed over the teachers; to be divided by the number of positions.

    Nothing ties the classes of one teacher to another's: a constant added to the student's logits
    of one teacher's classes, if no other has them, changes nothing.
    """
    kl = student_NC.new_zeros((), dtype=wide(student_NC).dtype)
    for index, (logits_NM, map_M) in enumerate(zip(panel.logits, panel.maps, strict=True)):
        heard_NM = _or_else(panel, index, wide(logits_NM.detach()), 0.0)
        target_NM = (heard_NM / temperature).softmax(-1)
        kl_N = divergence(target_NM, student_NC.index_select(1, map_M), temperature)
        kl = kl + _or_else(panel, index, kl_N, 0.0).sum()
    kl = kl * heat(temperature, squared)
    return Term(weight * kl, {"kl": kl.detach()})


def heat(temperature: float, squared: bool) -> float:
    """What a divergence at a temperature is multiplied by (Hinton et al. 2015, section 2)."""
    return temperature**2 if squared else 1.0


def placed(values_NM: Tensor, map_M: Tensor, classes: int, elsewhere: float) -> Tensor:
    """A teacher's values as columns of the student's classes [N, C]."""
    shape = (len(values_NM), classes)
    return values_NM.new_full(shape, elsewhere).index_copy(1, map_M, values_NM)


def _or_else(panel: Panel, index: int, values: Tensor, absent: float) -> Tensor:
    """Values [N, ...] of a teacher where it is heard."""
    if panel.present_Nn is None:
        return values
    heard_N = panel.present_Nn[:, index]
    return values.where(heard_N.view(-1, *[1] * (values.dim() - 1)), absent)


def _heard(confidence_Nn: Tensor, present_Nn: Tensor | None) -> Tensor:
    """Confidences, -inf where a teacher is not heard."""
    return confidence_Nn if present_Nn is None else confidence_Nn.where(present_Nn, -math.inf)
