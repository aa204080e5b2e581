"""A teacher's logits one chunk ahead on a stream of their own: nothing is read or freed too early.

No GPU is needed: streams that do nothing but count tell whether one access comes before another on
any GPU, by what the streams were told to wait for (vector clocks).
"""

from contextlib import contextmanager

import pytest
import torch

from dskd.fused import teacher_logits
from dskd.fused.mixed_logits import Mixture
from tests.fused.cases import linear_mixture, linear_teachers, logits_of, mixture_of, parts_of


class Stream:
    """Knows how far each stream was at the least when its own next work begins."""

    def __init__(self, name):
        self.name, self.seen = name, {name: 0}

    def wait_event(self, seen):
        for name, count in seen.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def wait_stream(self, other):
        self.wait_event(other.seen)

    def record_event(self):
        return dict(self.seen)

    def work(self):
        self.seen[self.name] += 1
        return self.name, self.seen[self.name]

    def is_after(self, work):
        name, count = work
        return self.seen.get(name, 0) >= count


class Device:
    """Two streams and the uses of memory: each must be after those that it conflicts with."""

    def __init__(self, monkeypatch):
        self.main, self.side = Stream("main"), Stream("side")
        self.current = self.main
        self.uses = {}
        project = teacher_logits.project

        def noted(hidden_ME, weight_WE, bias_W, out_ME):
            self.use(out_ME, writes=True)
            project(hidden_ME, weight_WE, bias_W, out_ME)

        make = Mixture.make

        def mixed(mixture, out_CW, *arguments):
            self.use(out_CW, writes=True)
            make(mixture, out_CW, *arguments)

        monkeypatch.setattr(teacher_logits, "project", noted)
        monkeypatch.setattr(Mixture, "make", mixed)
        monkeypatch.setattr(teacher_logits, "runs_ahead", lambda device: True)
        monkeypatch.setattr(teacher_logits, "_side_stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    @contextmanager
    def _on(self, stream):
        self.current = stream
        yield
        self.current = self.main

    def use(self, tensor, *, writes):
        """Work of the current stream on memory; what was written there last, and for a write what
        was read since, comes before."""
        place = tensor.untyped_storage().data_ptr()
        for wrote, work in self.uses.get(place, []):
            if writes or wrote:
                assert self.current.is_after(work), f"{self.current.name} does not wait for {work}"
        self.uses.setdefault(place, []).append((writes, self.current.work()))

    def free(self):
        """Memory goes back to the stream that it was made on, whose next work may overwrite it."""
        assert self.current is self.main
        assert all(self.main.is_after(work) for uses in self.uses.values() for _, work in uses)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_it_is_the_same_and_in_order(monkeypatch, size):
    teacher = linear_teachers()
    wanted_NW = logits_of(teacher)[teacher.places_N]
    device = Device(monkeypatch)
    logits = teacher_logits.teacher_logits(parts_of(teacher.parts), 5, size, torch.float64)
    found = []
    for _ in range(0, 5, size):
        device.main.work()  # the student's product
        logits_CW = next(logits)
        device.use(logits_CW, writes=False)
        found.append(logits_CW.clone())
    logits.close()
    device.free()
    torch.testing.assert_close(torch.cat(found), wanted_NW, rtol=1e-12, atol=1e-12)
    assert len(device.uses) == (2 if size < 5 else 1)
    assert {work[0] for uses in device.uses.values() for wrote, work in uses if wrote} == {
        "side" if size < 5 else "main"
    }


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_mixture_is_made_ahead_in_the_same_order(monkeypatch, size):
    """Its spare room is used by the side stream alone, and freed once that is done."""
    teacher = linear_mixture()
    mixture = Mixture(teacher.rule.sharpness, *teacher.rule.weights, temperature=2.0)
    device = Device(monkeypatch)
    arguments = (parts_of(teacher.parts), 5, size, torch.float64, mixture)
    logits = teacher_logits.teacher_logits(*arguments)
    found = []
    for _ in range(0, 5, size):
        logits_CW = next(logits)
        device.use(logits_CW, writes=False)
        found.append(logits_CW.clone())
    logits.close()
    device.free()
    torch.testing.assert_close(torch.cat(found), mixture_of(teacher, 2.0), rtol=1e-9, atol=1e-9)
    assert len(device.uses) == (2 if size < 5 else 1) + 1  # one of the spare ones is projected into


def test_the_next_chunk_does_not_wait_for_what_is_done_with_this_one(monkeypatch):
    device = Device(monkeypatch)
    logits = teacher_logits.teacher_logits(parts_of(linear_teachers().parts), 5, 1, torch.float64)
    for _ in range(4):
        next(logits)
        loss = device.main.work()
        assert not device.side.is_after(loss)


def test_what_was_begun_is_waited_for_if_the_loss_fails(monkeypatch):
    device = Device(monkeypatch)
    logits = teacher_logits.teacher_logits(parts_of(linear_teachers().parts), 5, 2, torch.float64)
    next(logits)
    assert not all(device.main.is_after(work) for uses in device.uses.values() for _, work in uses)
    logits.close()
    device.free()
