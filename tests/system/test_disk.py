"""What a disk is tried with."""

import os

import pytest

from dskd.errors import DiskError
from dskd.system.disk import writing


def test_a_kill_while_the_disk_is_tried_leaves_nothing(tmp_path, monkeypatch):
    seen = []

    def fsync(handle: int) -> None:
        seen.append(os.listdir(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RuntimeError, match="unexpected pos"), writing("a file", tmp_path):
        raise RuntimeError("unexpected pos")
    assert seen == [[]]


def test_a_full_disk_is_found_behind_an_error_that_does_not_say_so(tmp_path, monkeypatch):
    def fsync(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="the disk is full"), writing("a file", tmp_path):
        raise RuntimeError("unexpected pos")
