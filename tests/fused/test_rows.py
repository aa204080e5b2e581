"""What methods call: losses of a student's rows, whatever its head's padding and its teacher."""

import pytest
import torch

from dskd import ops
from dskd.batch import DenseTeacher, Positions, ProjectedTeacher
from dskd.errors import ConfigError
from dskd.fused import reference
from dskd.models.families import LinearProjection
from tests.fused.cases import D, E, N, V, W, normal, same
from tests.heads import logits_of

LABELS = torch.tensor([3, 0, 8, 5, 7])


def student_and_teacher(vocabulary):
    """Rows of a padded student, and a live teacher of the first columns."""
    own, other = LinearProjection(D, V).double(), LinearProjection(E, V).double()
    rows = Positions(normal(N, D).requires_grad_(), own, LABELS)
    return rows, ProjectedTeacher(normal(N, E, seed=1), other, vocabulary)


@pytest.mark.parametrize("dense", [False, True])
def test_the_reverse_kl_of_a_padded_student_is_of_the_shared_vocabulary(dense):
    rows, signal = student_and_teacher(W)
    teacher = DenseTeacher(logits_of(signal)) if dense else signal
    how = {"kind": "reverse_kl", "temperature": 2.0, "label_weight": 0.5}
    found = ops.positions_kd(rows, teacher, **how)
    shared_NW = rows.logits_NV[:, :W]
    divergence_N = reference.divergence(shared_NW, logits_of(signal), "reverse_kl", temperature=2.0)
    expected = divergence_N.sum() + 0.5 * reference.cross_entropy(shared_NW, LABELS).sum()
    same(found.total, expected, rows.hidden_ND, *rows.projection.parameters())


def test_the_mixed_divergence_has_its_weight():
    rows, signal = student_and_teacher(V)
    reverse_N = normal(N, seed=3).abs()
    found = ops.positions_kd(
        rows, signal, kind="mixed", temperature=1.0, weight=0.3, reverse_weight=reverse_N
    )
    forward_N, backward_N = (
        reference.divergence(rows.logits_NV, logits_of(signal), kind)
        for kind in ("forward_kl", "reverse_kl")
    )
    expected = (0.3 * forward_N + reverse_N * backward_N).sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=0)


def test_a_cached_teacher_gives_no_other_divergence():
    rows, _ = student_and_teacher(V)
    signal = ops.topk_teacher(normal(N, V), 3, 1.0)
    assert ops.positions_kd(rows, signal, temperature=1.0).total > 0
    with pytest.raises(ConfigError, match=r"teacher: a cached teacher .* divergence, jsd, needs"):
        ops.positions_kd(rows, signal, kind="jsd", temperature=1.0)
