"""Amalgamation by features: the student's hidden states follow those of several teachers, through
modules that are trained beside it and thrown away.

DFA: Shen et al. 2019 (AAAI), "Amalgamating Knowledge towards Comprehensive Classification". CFL:
Luo et al. 2019 (IJCAI), "Knowledge Amalgamation from Heterogeneous Networks by Common Feature
Learning". Both add vanilla distillation (:func:`dskd.methods.integration.vkd_term`).

All sums are over real tokens: what stands on padding counts nowhere. Teachers and student read the
same tokens (or hand in one pooled state a row, T = 1).

Shape letters: B rows, T tokens, D the student's hidden size, E a teacher's, F that of the common
features, G groups of R rows, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dskd.batch import Term
from dskd.errors import ConfigError
from dskd.stores.dropout_scores import wide

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the five kernels, times the mean squared distance."""
_FLOOR = 1e-12
"""Least squared distance, bandwidth and length: below it two features count as one."""

LayerRule = Literal["even", "stride", "top"]
"""Which of a teacher's layers are aligned: ``even``: those at the same share of the depth;
``stride``: from the top by ``floor(teacher's / student's)``, as in the original code of DFA;
``top``: as many as the student's from the top, as in CFL's."""


class DfaBlock(nn.Module):
    """DFA's maps at one layer: the teachers' states into the student's space and back, and the
    student's into it. All are linear.

    Args:
        width: D.
        teacher_widths: E of each teacher.
        dtype: of the parameters; None: torch's default.
    """

    def __init__(
        self, width: int, teacher_widths: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._widths = list(teacher_widths)
        linear = partial(nn.Linear, dtype=dtype)
        self.teacher_encoder = linear(sum(self._widths), width)
        self.teacher_decoder = linear(width, sum(self._widths))
        self.student_encoder = linear(width, width)

    def forward(self, student_BTD: Tensor, teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Squared errors of each token [B, T]: of the alignment, which trains the student and its
        map; and of the reconstruction, which trains the teachers' maps."""
        common_BTD = _through(self.teacher_encoder, torch.cat(list(teachers), -1).detach())
        mapped_BTD = _through(self.student_encoder, student_BTD)
        align_BT = _squared(mapped_BTD, common_BTD.detach())
        decoded = _through(self.teacher_decoder, common_BTD).split(self._widths, -1)
        return align_BT, _reconstruction(decoded, teachers)


class CflBlock(nn.Module):
    """CFL's maps at one layer: student and teachers into F = D / 4 numbers each, then by one shared
    map to common features, and from those of a teacher back to its states.

    The arguments are those of :class:`DfaBlock`; D is at least 4.
    """

    def __init__(
        self, width: int, teacher_widths: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        common = width // 4
        linear = partial(nn.Linear, dtype=dtype)
        self.student_encoder = linear(width, common)
        self.teacher_encoders = nn.ModuleList(linear(size, common) for size in teacher_widths)
        self.extractor = nn.Sequential(linear(common, common), nn.ReLU(), linear(common, common))
        self.decoders = nn.ModuleList(
            nn.Sequential(linear(common, size), nn.ReLU(), linear(size, size))
            for size in teacher_widths
        )

    def forward(
        self, student_BTD: Tensor, teachers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The student's common features [B, T, F], each teacher's, and the squared error of each
        token's reconstruction [B, T]."""
        student_BTF = self.extractor(_through(self.student_encoder, student_BTD).relu())
        features = [
            self.extractor(_through(encoder, states_BTE.detach()).relu())
            for encoder, states_BTE in zip(self.teacher_encoders, teachers, strict=True)
        ]
        decoded = [each(found) for each, found in zip(self.decoders, features, strict=True)]
        return student_BTF, features, _reconstruction(decoded, teachers)


def dfa_term(
    blocks: Sequence[DfaBlock],
    students: Sequence[Tensor],
    teachers: Sequence[Sequence[Tensor]],
    mask_BT: Tensor,
    *,
    align_weight: float = 1.0,
    reconstruction_weight: float = 1.0,
) -> Term:
    """DFA's ``align`` and ``reconstruction``, each the sum over aligned layers (and teachers) of a
    token's mean squared error; to be divided by the number of real tokens.

    Args:
        blocks: one for each aligned layer.
        students: the student's states [B, T, D] at each.
        teachers: at each, every teacher's states [B, T, E].
        mask_BT: 1 on real tokens, 0 on padding.
    """
    align_BT, reconstruction_BT = 0.0, 0.0
    for block, student_BTD, states in zip(blocks, students, teachers, strict=True):
        aligned_BT, reconstructed_BT = block(student_BTD, states)
        align_BT, reconstruction_BT = align_BT + aligned_BT, reconstruction_BT + reconstructed_BT
    align = _over_tokens(align_BT, mask_BT)
    reconstruction = _over_tokens(reconstruction_BT, mask_BT)
    total = align_weight * align + reconstruction_weight * reconstruction
    return Term(total, {"align": align.detach(), "reconstruction": reconstruction.detach()})


def cfl_terms(
    blocks: Sequence[CflBlock],
    students: Sequence[Tensor],
    teachers: Sequence[Sequence[Tensor]],
    mask_BT: Tensor,
    *,
    rows: int,
    mmd_weight: float = 1.0,
    reconstruction_weight: float = 1.0,
) -> dict[str, Term]:
    """CFL's two terms: ``groups``, the discrepancy (:func:`mmd`) of student and teachers summed
    over layers, teachers and groups, to be divided by the number of groups; ``tokens``, the
    reconstruction, to be divided by the number of real tokens.

    Args:
        blocks: one for each aligned layer; the other arguments are those of :func:`dfa_term`.
        rows: R, of a group: rows that stand one after the other. B is a multiple of it, so that
            no geometry of micro-batches and ranks changes a group.
    """
    assert len(mask_BT) % rows == 0, (len(mask_BT), rows)
    discrepancy_G, reconstruction_BT = 0.0, 0.0
    for block, student_BTD, states in zip(blocks, students, teachers, strict=True):
        student_BTF, features, reconstructed_BT = block(student_BTD, states)
        reconstruction_BT = reconstruction_BT + reconstructed_BT
        student_GRK = _groups(student_BTF, mask_BT, rows)
        for teacher_BTF in features:
            teacher_GRK = _groups(teacher_BTF, mask_BT, rows)
            discrepancy_G = discrepancy_G + mmd(student_GRK, teacher_GRK)
    discrepancy = discrepancy_G.sum()
    reconstruction = _over_tokens(reconstruction_BT, mask_BT)
    return {
        "groups": Term(mmd_weight * discrepancy, {"mmd": discrepancy.detach()}),
        "tokens": Term(
            reconstruction_weight * reconstruction, {"reconstruction": reconstruction.detach()}
        ),
    }


def mmd(left_GRK: Tensor, right_GRK: Tensor) -> Tensor:
    """Maximum mean discrepancy of two sets of R vectors, in each of G groups [G].

    The biased estimate by a sum of five Gaussian kernels, whose widths are multiples of the mean
    squared distance, through which no gradient flows. 0 for equal sets. The differences are taken
    before they are squared, [G, R, R, K] of them: by ``x^2 + y^2 - 2 x y`` features that are
    nearly one lose all digits, and so in fp32 would the loss.
    """
    left_GRK, right_GRK = wide(left_GRK), wide(right_GRK)
    pairs = ((left_GRK, left_GRK), (right_GRK, right_GRK), (left_GRK, right_GRK))
    distances = [(a[:, :, None] - b[:, None]).square().sum(-1) for a, b in pairs]
    within_left_GRR, within_right_GRR, between_GRR = distances
    with torch.no_grad():
        spread_GRR = (within_left_GRR + within_right_GRR + 2.0 * between_GRR) / 4.0
        variance_G11 = spread_GRR.mean((1, 2), keepdim=True).clamp(min=_FLOOR)
    means = []
    for distance_GRR in distances:
        exponent_GRR = distance_GRR.clamp(min=_FLOOR) / (-2.0 * variance_G11)
        kernel_GRR = sum((exponent_GRR / factor).exp() for factor in _BANDWIDTHS)
        means.append(kernel_GRR.mean((1, 2)))
    return (means[0] + means[1] - 2.0 * means[2]).relu()


def aligned_layers(
    teacher: int, student: int, number: int | None, rule: LayerRule, where: str
) -> tuple[list[int], list[int]]:
    """Which hidden states of a teacher belong to which of the student, the top ones first; 0 would
    be the embeddings, and is none of them.

    Args:
        teacher: number of its layers.
        student: of the student's.
        number: how many of the student's layers, from the top; None: all.
        rule: see :data:`LayerRule`. Where the depths divide, ``even`` and ``stride`` say the same
            of all layers.
        where: the setting of ``number``, for messages.

    Raises:
        ConfigError: the student has not got so many layers, or the rule finds other than as many
            of the teacher.
    """
    number = student if number is None else number
    if not 1 <= number <= student:
        raise ConfigError(f"{where}: {number}, but the student has {student} layers")
    of_student = list(range(student, student - number, -1))
    if rule == "even":  # rounded half up
        of_teacher = [max(1, (2 * j * teacher + student) // (2 * student)) for j in of_student]
    elif rule == "top":
        of_teacher = list(range(teacher, max(teacher - number, 0), -1))
    else:
        step = teacher // student
        of_teacher = list(range(teacher, 0, -step)) if step else []
    if len(of_teacher) != number:
        raise ConfigError(
            f"{where}: {number} of the student's {student} layers, but by the rule {rule} these "
            f"are {len(of_teacher)} of a teacher's {teacher}; the rule even finds as many"
        )
    return of_teacher, of_student


def _through(linear: nn.Linear, states: Tensor) -> Tensor:
    """A linear map of states that may be in another number format than it."""
    return linear(states.to(linear.weight.dtype))


def _squared(found_BTE: Tensor, wanted_BTE: Tensor) -> Tensor:
    """Mean squared error of each token [B, T]."""
    return (wide(found_BTE) - wide(wanted_BTE)).square().mean(-1)


def _reconstruction(decoded: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """What is wrong with the teachers' states as decoded, summed over the teachers [B, T]."""
    errors = [_squared(a, b.detach()) for a, b in zip(decoded, teachers, strict=True)]
    return torch.stack(errors).sum(0)


def _over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT.masked_fill(mask_BT == 0, 0.0).sum()


def _groups(features_BTF: Tensor, mask_BT: Tensor, rows: int) -> Tensor:
    """Rows' features as one vector of length 1 each, in groups [G, R, T * F]."""
    real_BTF = wide(features_BTF).masked_fill(mask_BT[..., None] == 0, 0.0)
    row_BK = real_BTF.flatten(1)
    # a row of zeros stays one, and its gradient is bounded
    length_B1 = row_BK.square().sum(1, keepdim=True).clamp(min=_FLOOR).sqrt()
    return (row_BK / length_B1).unflatten(0, (-1, rows))
