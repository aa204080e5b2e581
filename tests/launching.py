"""Start the user's own command, ``deepspeed dskd/train.py ...``, and read what it wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dskd.system.log import read_metrics
from dskd.train import main
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).resolve().parents[1]
BINARY = Path(sys.executable).with_name("deepspeed")

EVALUATED = ("eval_nll", "eval_loss")
"""Keys of the evaluation loss: of tokens, of labelled rows."""


def environment() -> dict[str, str]:
    """What a rank of a test sees: one thread, no GPU, no network."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""}


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` to its good end."""
    options = {"env": environment(), "timeout": 280} | options
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def launched(ranks: int, *words: str, port: int | None = None) -> list[str]:
    """The command ``deepspeed --num_gpus RANKS dskd/train.py WORDS``, meeting at a port (None: a
    free one)."""
    script = str(ROOT / "dskd" / "train.py")
    place = ["--master_port", str(free_port() if port is None else port)]
    return [str(BINARY), "--num_gpus", str(ranks), *place, script, *words]


def deepspeed(
    ranks: int, *words: str, cwd: Path = ROOT, port: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run that command to its end."""
    command = launched(ranks, *words, port=port)
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(command, cwd=cwd, check=False, **options)


def _main(rank: int, words: tuple[str, ...]) -> int:
    return main(words)


def forked(ranks: int, *words: str, status: int = 0) -> None:
    """The same in ranks forked from the test process: seconds faster, the same code."""
    assert run_ranks(_main, words, world=ranks) == [status] * ranks


def losses(run: Path) -> list[float]:
    """The training loss of every step, in order."""
    lines = [line for line in read_metrics(run / "train" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def evaluations(run: Path) -> list[float]:
    """The evaluation losses, in order."""
    lines = read_metrics(run / "train" / "metrics.jsonl")
    return [line[key] for line in lines for key in EVALUATED if key in line]


def exported_nll(run: Path) -> float:
    """The evaluation loss of a run's exported model."""
    scores = json.loads((run / "scores.json").read_text())
    return next(scores[key] for key in EVALUATED if key in scores)


def cut_back(run: Path, step: int) -> None:
    """Leave a finished run as a kill right after ``step`` was saved would."""
    checkpoints = run / "train" / "checkpoints"
    assert (checkpoints / f"step-{step:08d}").is_dir(), sorted(checkpoints.iterdir())
    (run / "train" / "summary.json").unlink()
    for folder in checkpoints.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
