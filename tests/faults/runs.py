"""Ranks of the user's own command, forked from the test process, that a test may kill."""

import gc
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

# What the command imports when it needs it, once before the fork: a tenth of a second each.
import matplotlib.backends.backend_agg  # noqa: F401
import transformers.models.roberta.modeling_roberta  # noqa: F401

import dskd.methods.ki
import dskd.methods.lm  # noqa: F401
from dskd.train import main
from tests.ranks import be_rank, free_port

Trap = Callable[[int], None]
LIMIT = 120
"""Seconds after which a run is taken to hang."""

STEPS = 8
RECIPE = """
seed: 3
out: {folder}/run
deepspeed: zero2
data:
  folder: {folder}/data
  sources: [{{kind: text, path: {folder}/corpus.txt}}]
  tokenizer: {{vocab_size: 320}}
  block_size: 32
  masking: {{draws: 1}}
model:
  config: &small
    model_type: roberta
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 64
teacher:
  kind: cached
  k: 8
  rows_per_shard: 32
  micro_batch: 8
  model: {{config: {{<<: *small, hidden_size: 16}}}}
method: {{kind: ki, temperature: 2.0, schedule: linear, steps: 6}}
train: {{steps: 8, batch: 8, micro_batch: 2, lr: 0.01, warmup: 1, precision: fp32}}
evaluation: {{every: 2, rows: 8, micro_batch: 4}}
checkpoint: {{every: 2, keep: 1}}
"""
"""Capture, training with dropout and two accumulation steps on two ranks, export, evaluation."""


def write_recipe(folder: Path) -> str:
    """A corpus and the settings of a run on it in ``folder``; the settings' path."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    (folder / "run.yaml").write_text(RECIPE.format(folder=folder))
    return str(folder / "run.yaml")


class Ranks:
    """``dskd/train.py WORDS`` on some ranks, its output in files.

    Args:
        folder: where the output goes.
        words: the command line.
        world: number of ranks.
        trap: called with the rank in each of them before the command.
    """

    def __init__(self, folder: Path, *words: str, world: int = 2, trap: Trap | None = None):
        self._logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self._began = time.monotonic()
        port = free_port()
        context = multiprocessing.get_context("fork")
        self._children: list[BaseProcess] = [
            context.Process(target=_command, args=(rank, world, port, log, words, trap))
            for rank, log in enumerate(self._logs)
        ]
        for child in self._children:
            child.start()

    def wait(self, seconds: float = LIMIT, *, launcher: bool = True) -> bool:
        """Whether all ranks end by themselves within ``seconds`` of their start.

        When one dies of a signal the others are killed, as a launcher does, if there is one.
        """
        end = self._began + seconds
        while self._alive():
            if launcher and any((child.exitcode or 0) < 0 for child in self._children):
                self.kill()
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        """SIGKILL all ranks at once."""
        for child in self._alive():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._children:
            child.join()

    def send(self, number: int, rank: int) -> None:
        """Send a signal to one rank."""
        os.kill(self._children[rank].pid, number)

    def status(self, rank: int) -> int:
        """The exit status of one rank, whatever becomes of the others."""
        self._children[rank].join(timeout=LIMIT)
        return self._children[rank].exitcode

    def statuses(self, *, launcher: bool = True) -> list[int]:
        """The exit status of each rank, minus the signal's number if it died of one."""
        try:
            assert self.wait(launcher=launcher), f"still running after {LIMIT} s\n{self.output()}"
        finally:
            self.kill()
        return [child.exitcode for child in self._children]

    def output(self) -> str:
        """What the ranks printed."""
        return "\n".join(log.read_text() for log in self._logs)

    def _alive(self) -> list[BaseProcess]:
        return [child for child in self._children if child.exitcode is None]


def train(folder: Path, *words: str, world: int = 2) -> None:
    """Run the command to its good end."""
    ranks = Ranks(folder, *words, world=world)
    assert ranks.statuses() == [0] * world, ranks.output()


def refused(folder: Path, *words: str, world: int = 1) -> str:
    """Run the command, which must refuse with status 2; what it printed."""
    ranks = Ranks(folder, *words, world=world)
    assert ranks.statuses() == [2] * world, ranks.output()
    return ranks.output()


def steps_saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    folders = (run / "train" / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in folders)


def die() -> None:
    """SIGKILL this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _command(
    rank: int, world: int, port: int, log: Path, words: tuple[str, ...], trap: Trap | None
) -> None:
    be_rank(rank, world, port)
    gc.freeze()  # else each collection goes through all that the parent holds
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if trap is not None:
        trap(rank)
    status = main(words)
    sys.stdout.flush()
    os._exit(status)
