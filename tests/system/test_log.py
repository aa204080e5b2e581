"""metrics.jsonl after an interruption, and the progress line."""

import json

import pytest
import torch

from dskd.errors import CheckpointError, DiskError
from dskd.system import log
from dskd.system.log import Metrics, clock, memory_text, progress_line, read_metrics, used_memory
from tests.disks import limited

LINES = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_nll": 2.5}]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(("step", "left"), [(0, 0), (1, 1), (2, 3), (7, 3)])
def test_lines_after_the_checkpoint_are_dropped(path, step, left):
    metrics = Metrics(path, step)
    assert read_metrics(path) == LINES[:left]
    metrics.write(step=step + 1, loss=1.5)
    assert read_metrics(path) == [*LINES[:left], {"step": step + 1, "loss": 1.5}]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\x00\x00"])
def test_a_last_line_without_its_end_is_dropped(path, half):
    path.write_text(TEXT + half)
    assert read_metrics(path) == LINES
    Metrics(path, 7)
    assert path.read_text() == TEXT


def test_another_broken_line_is_named(path):
    path.write_text(TEXT.replace('"loss": 2.0', '"loss": 2.'))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: not JSON"):
        Metrics(path, 2)


ODD = ["3", "null", '"step"', "[1]", "{}", '{"step": "2"}', '{"step": 2.0}', '{"step": true}']
ODD += ['{"step": -1}', '{"loss": 2.0}', "[" * 50_000, "\xff"]


@pytest.mark.parametrize("line", ODD)
def test_a_line_that_is_no_object_with_a_step_is_named(path, line):
    """On resume, and by whatever else reads them."""
    path.write_bytes(TEXT.encode() + line.encode("latin-1") + b"\n" + TEXT.encode())
    for read in (lambda: Metrics(path, 2), lambda: read_metrics(path)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 4: (damaged|not JSON)"):
            read()


def test_the_first_line_makes_the_file(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = Metrics(path, 0)
    assert not path.exists()
    metrics.write(step=1, loss=1.0)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_line_that_does_not_fit_is_taken_back(path):
    metrics = Metrics(path, 7)
    with limited(len(TEXT) + 10), pytest.raises(DiskError) as caught:
        metrics.write(step=3, loss=1.0)
    assert str(caught.value).startswith(f"{path}: cannot write the metrics: ")
    assert path.read_text() == TEXT
    metrics.write(step=3, loss=1.0)
    assert read_metrics(path)[:-1] == LINES


def test_what_is_reserved_beside_what_tensors_took(monkeypatch):
    assert used_memory().keys() == {"peak_memory_bytes"}
    monkeypatch.setattr(log, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    used = used_memory()
    assert used == {"peak_memory_bytes": 3 * 2**29, "reserved_memory_bytes": 2**31}
    line = progress_line(7, 200, {}, tokens_per_second=12345.6, left=75)
    assert line.endswith("  12,346 tok/s  1.50 GiB (2.00 reserved)  1:15 left")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**29)
    assert memory_text(used_memory()) == "1.50 GiB"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_progress_line():
    values = {"loss": 2.5, "ce": 0.00012, "kl": 0.0, "|g|": None}
    line = progress_line(7, 200, values, tokens_per_second=12345.6, left=75)
    assert line.startswith("step   7/200  loss 2.5000 ce 1.20e-04 kl 0.0000  12,346 tok/s  ")
    assert line.endswith(" GiB  1:15 left")
