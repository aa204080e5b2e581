"""Logits on a GPU: how many bytes they take, and teachers' that are made one chunk ahead."""

import pytest
import torch

from dskd import ops
from dskd.fused import chunking, teacher_logits
from dskd.fused.topk_teacher import largest_of
from dskd.models.families import positions_of
from dskd.teachers.teacher import FrozenTeacher, RoutedTeachers
from tests.fused.cases import COMMON, gradients, head, linear_teachers
from tests.shadow.cases import in_fork
from tests.shadow.waits import Watch
from tests.teachers.test_no_whole_logits import VOCABULARY, full_batch, model_of

GPU = torch.device("cuda", 0)
D, K = 8, 16


def small_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(chunking, "GPU_BYTES", 0)
    monkeypatch.setattr(chunking, "GPU_LEAST", tokens)


def frozen(seed: int) -> FrozenTeacher:
    return FrozenTeacher(model_of(seed).bfloat16().to(GPU), VOCABULARY)


class Peak:
    """``bytes`` that were held inside at the most, beyond those before."""

    def __enter__(self):
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *problem):
        self.bytes = torch.cuda.max_memory_allocated() - self._before


def test_a_capture_takes_what_a_chunk_does(monkeypatch):
    batch, teacher, tokens = full_batch(16, 129).to(GPU), frozen(1), 128
    small_chunks(monkeypatch, tokens)
    with Watch() as watch, Peak() as peak:
        kept = largest_of(teacher(batch), K, (1.0, 2.0))
    results = 12 * K + 2 * 4
    count = batch.supervised
    formula = tokens * VOCABULARY * (2 + 12) + count * D * 2 + 2 * count * results
    assert 0.8 * formula < peak.bytes <= formula < count * VOCABULARY * 2
    assert kept.ids_NK.shape == (count, K) and kept.ids_NK.device == GPU
    assert not [wait for _, wait in watch.found if wait.own]


@in_fork
def test_a_routed_step_takes_what_a_chunk_does(monkeypatch):
    batch, student, tokens = full_batch(4, 17).to(GPU), model_of(0).bfloat16().to(GPU), 8
    teachers = RoutedTeachers({0: frozen(1), 1: frozen(2)})
    small_chunks(monkeypatch, tokens)
    positions = positions_of(student, batch)
    with Watch() as watch, Peak() as peak:
        losses = ops.positions_kd(positions, teachers(batch), temperature=2.0, label_weight=0.5)
    padded, count = -(-VOCABULARY // 64) * 64, batch.supervised
    # the student's logits, the teachers' of two chunks, the gradient; hidden states of teachers,
    # those of the student in the teachers' order and their gradient; weights, labels and losses
    formula = tokens * padded * (4 + 2 * 4 + 2) + 4 * VOCABULARY * D
    formula += count * D * (2 + 2 + 4) + count * 64
    assert 0.8 * formula < peak.bytes <= formula < count * VOCABULARY * 4
    losses.total.backward()
    assert losses.total.isfinite() and student.lm_head.weight.grad.any()
    assert not [wait for _, wait in watch.found if wait.own]


def of_linear(chunk: int) -> list[torch.Tensor]:
    """Losses and gradients of several teachers' tokens, by the kernels."""
    inputs = [x.detach().to(GPU).requires_grad_() for x in head(torch.bfloat16)]
    teacher = linear_teachers(torch.bfloat16)
    parts = [
        ops.LinearTeacher(*(x if x is None else x.to(GPU) for x in vars(part).values()))
        for part in teacher.parts
    ]
    how = {name: x.to(GPU) if hasattr(x, "to") else x for name, x in COMMON.items()}
    several = ops.LinearTeachers(parts, teacher.places_N.to(GPU))
    losses = ops.linear_kd(*inputs, teacher=several, chunk=chunk, **how)
    return [losses.total, losses.divergence_N, *gradients(losses.total, *inputs)]


@pytest.mark.parametrize("chunk", [1, 2, 3])
@in_fork
def test_one_chunk_ahead_is_the_same_bit_for_bit(monkeypatch, chunk):
    streams, side_stream = [], teacher_logits._side_stream

    def noted(device: torch.device) -> torch.cuda.Stream:
        streams.append(device)
        return side_stream(device)

    monkeypatch.setattr(teacher_logits, "_side_stream", noted)
    ahead = of_linear(chunk)
    assert streams == [GPU]
    monkeypatch.setattr(teacher_logits, "runs_ahead", lambda device: False)
    for found, wanted in zip(ahead, of_linear(chunk), strict=True):
        assert torch.equal(found, wanted)
    assert len(streams) == 1
