"""A rank that dies, hangs or never comes is named by one of the others, and all leave by
themselves; so they do when their launcher dies."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dskd.data import preparing
from dskd.errors import LostRankError
from dskd.training import trainer
from tests.faults.runs import Ranks, steps_saved, train, write_recipe
from tests.faults.test_kills import _trap, signal_in_step
from tests.launching import deepspeed, environment, launched

LOST = LostRankError.status
SHORT = "ranks_timeout=0.05"
"""Three seconds."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[str, list[str]]:
    """A recipe, and the words that let it start from rows and a cache that are there."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = write_recipe(folder)
    train(folder, recipe, "until=cache", "teacher.cache.epochs=1", world=1)
    return recipe, [f"teacher.path={folder / 'run/cache'}", "teacher.model=null", "until=train"]


def the_message(ranks: Ranks) -> str:
    """What the ranks print of it: one message, in one line."""
    output = ranks.output()
    assert "Traceback" not in output, output
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return message


def named(rank: int, folder: Path) -> tuple[str, str]:
    """How a message begins and how it ends, for what happens in step 6."""
    node = socket.gethostname()
    checkpoint = folder / "train/checkpoints/step-00000004"
    end = f"; the newest checkpoint is {checkpoint}; the same command goes on from there"
    return f"error: rank {rank} (node {node}) ", end


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_dies(prepared, tmp_path, rank):
    recipe, words = prepared
    words = [recipe, f"out={tmp_path}", *words, "train.micro_batch=1"]
    ranks = Ranks(tmp_path, *words, world=4, trap=signal_in_step(6, signal.SIGKILL, rank))
    statuses = ranks.statuses(launcher=False)
    assert statuses == [-signal.SIGKILL if r == rank else LOST for r in range(4)], ranks.output()
    begin, end = named(rank, tmp_path)
    assert the_message(ranks) == f"{begin}has died in step 6{end}"
    assert steps_saved(tmp_path) == [4]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_stopped(prepared, tmp_path, rank):
    recipe, words = prepared
    trap = signal_in_step(6, signal.SIGSTOP, rank)
    ranks = Ranks(tmp_path, recipe, f"out={tmp_path}", *words, SHORT, trap=trap)
    try:
        assert ranks.status(1 - rank) == LOST, ranks.output()
    finally:
        ranks.kill()
    begin, end = named(rank, tmp_path)
    text = "has not answered for 0.05 minutes (`ranks_timeout`), in step 6"
    assert the_message(ranks) == f"{begin}{text}{end}"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stands_still(prepared, tmp_path, rank):
    """It answers, but the others wait for it."""
    recipe, words = prepared

    def sleep(original, settings, taken):
        if taken == 5:
            time.sleep(1000)
        return original(settings, taken)

    trap = _trap(trainer, "learning_rate", sleep, None, rank)
    every = ["checkpoint.every=4", "evaluation.every=4"]
    ranks = Ranks(tmp_path, recipe, f"out={tmp_path}", *words, SHORT, *every, trap=trap)
    assert ranks.statuses() == [LOST, LOST], ranks.output()
    begin, end = named(rank, tmp_path)
    message = the_message(ranks)
    assert message.startswith(f"{begin}stands still for 0.05") and message.endswith(end)
    assert " in step 6 (" in message and " in training/trainer.py:" in message


def test_long_work_of_rank_0_alone_is_no_hang(tmp_path):
    """Longer than nine times what is allowed."""
    recipe = write_recipe(tmp_path)

    def work(original, *args, **kwargs):
        time.sleep(10)
        return original(*args, **kwargs)

    trap = _trap(preparing, "_write_manifest", work, 1, 0)
    ranks = Ranks(tmp_path, recipe, "until=data", SHORT, trap=trap)
    assert ranks.statuses() == [0, 0], ranks.output()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_never_comes(prepared, tmp_path, rank):
    recipe, words = prepared

    def absent(this: int) -> None:
        if this == rank:
            os._exit(0)

    ranks = Ranks(tmp_path, recipe, f"out={tmp_path}", *words, SHORT, trap=absent)
    assert ranks.statuses()[1 - rank] == LOST, ranks.output()
    message = the_message(ranks)
    assert f"rank {rank} has not come within 0.05 minutes (`ranks_timeout`)" in message


def test_an_error_of_one_rank_ends_the_others(prepared, tmp_path):
    """A defect keeps its traceback, and is said to be another rank's by the one that waits."""
    recipe, words = prepared

    def work(original, settings, taken):
        if taken == 5:
            raise KeyError("a defect")
        return original(settings, taken)

    trap = _trap(trainer, "learning_rate", work, None, 1)
    ranks = Ranks(tmp_path, recipe, f"out={tmp_path}", *words, trap=trap)
    assert ranks.statuses() == [LOST, 1], ranks.output()
    begin, end = named(1, tmp_path)
    text = "ended in step 6 with an error of its own (KeyError), which it prints"
    assert f"{begin}{text}{end}" in ranks.output()
    assert ranks.output().count("Traceback") == 1


@pytest.mark.launch
def test_the_port_is_taken(prepared, tmp_path):
    recipe, words = prepared
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = deepspeed(2, recipe, f"out={tmp_path / 'run'}", *words, port=port)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert f"error: MASTER_PORT: port {port} of 127.0.0.1 is in use by another program" in output
    assert "--master_port" in output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
@pytest.mark.parametrize("generation", [0, 1], ids=["deepspeed", "launch.py"])
def test_the_launcher_dies(prepared, tmp_path, generation):
    """Its ranks save a step and leave."""
    recipe, words = prepared
    words = [recipe, f"out={tmp_path}", *words, "train.steps=1000000", "checkpoint.every=1000000"]
    command = launched(2, *words, "evaluation.every=1000000")
    with (tmp_path / "log").open("w") as log:
        runner = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    started = [psutil.Process(runner.pid)]
    try:
        wait_until((tmp_path / "train/metrics.jsonl").exists)
        started += started[0].children(recursive=True)
        ranks = started[2:]
        assert len(ranks) == 2
        started[generation].kill()
        wait_until(lambda: all(ended(rank) for rank in ranks), 15)
        assert len(steps_saved(tmp_path)) == 1
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def ended(process: psutil.Process) -> bool:
    """Whether it has, though maybe nobody has asked for its status yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
