"""What Knowledge Inheritance costs: steps with a live and a cached teacher against a plain LM step.

    python launch/bench/step.py [--rounds N] [--settings FILE] [--results FOLDER] [a.b=value ...]
    deepspeed --num_gpus 2 launch/bench/step.py ...

FILE is a recipe with the runs ``teacher`` and ``ki`` (default: the quickstart), which give the
shapes. Each variant is the real thing: DeepSpeed engine, trainer, loader, cache files. Only the
teacher's weights are random, and alpha stays at 0.5, so that every step computes both terms. Every
round times one step of each variant on the same rows, in an order of its own; ratios are taken
within a round, so that a change of the machine's load hits both of their sides, and their median is
reported.

Peak memory is what a few steps add to a fresh process: on a CPU the resident set of a fork per
variant, on a GPU what PyTorch allocates.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python put this folder first (not under -P), where kernels.py would pass for the package that
# transformers imports.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

# Imported before the fork, or DeepSpeed would load them in every child and its memory be theirs.
import deepspeed.compile.backend
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch

from dskd.batch import Batch
from dskd.data.loader import Loader
from dskd.engine import engine
from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import Engine, decay_groups
from dskd.engine.hooks import StepHooks
from dskd.engine.zero import full_shape, sharded_construction
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.models.build import build
from dskd.runs import stages
from dskd.runs.context import Job
from dskd.settings.model import Model
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, LiveTeacher
from dskd.system import dist
from dskd.system.device import DTYPES
from dskd.system.files import write_atomic
from dskd.system.log import Metrics, peak_memory
from dskd.teachers.setup import TeacherSetup, set_up
from dskd.training.objective import Objective
from dskd.training.trainer import Progress, Trainer
from launch.bench import timing
from launch.bench.figures import FORWARD, about, summarise, table

ROOT = Path(__file__).resolve().parents[2]
EAGER = "launch.bench.eager:EagerInheritance"
"""The cached variant without the fused losses, for comparison."""
WARM_UP = 3
"""Untimed rounds at the start; as many steps are taken to see a variant's peak memory."""


def variants(settings: Path, overrides: list[str], folder: Path, steps: int) -> dict[str, Run]:
    """The recipe's student trained in each way; the cache goes to ``folder``."""
    recipe = read(settings, overrides)
    student, teacher = recipe.runs["ki"], recipe.runs["teacher"].model
    inherited = {**student.method, "schedule": "constant", "rate": 0.5}
    ways = {
        "plain": ({"kind": "lm"}, None),
        "cached": (inherited, _cached(student, teacher)),
        "live": (inherited, LiveTeacher(model=teacher)),
        "eager": ({**inherited, "kind": EAGER}, _cached(student, teacher)),
    }
    train = student.train.model_copy(update={"steps": steps})
    shared = {"out": folder, "train": train}
    return {
        name: student.model_copy(update={**shared, "method": method, "teacher": taught_by})
        for name, (method, taught_by) in ways.items()
    }


def _cached(student: Run, model: Model) -> CachedTeacher:
    if not isinstance(student.teacher, CachedTeacher):
        raise ConfigError("runs.ki.teacher.kind: a cached teacher is to be measured")
    return student.teacher.model_copy(update={"model": model, "path": None})


def job_of(run: Run, device: torch.device) -> Job:
    """What the stages need of a run."""
    return Job(run, build_method(run.method), device)


class Step:
    """One variant, ready to train: ``step()`` takes an optimiser step like ``dskd/train.py``."""

    def __init__(self, run: Run, device: torch.device) -> None:
        job = job_of(run, device)
        setup = TeacherSetup()
        if job.method.wants_teacher():
            heat = job.method.temperature
            setup = set_up(run, heat, job.prepared, job.view, device)
        student = build(
            run.model,
            job.prepared.tokenizer,
            objective=run.data.objective,
            block_size=run.data.block_size,
            seed=run.seed,
            ds=job.ds,
            dtype=DTYPES[precision_of(job.ds)],
            where="model",
        )
        with sharded_construction(job.ds):
            hooks = job.method.hooks(student, run) or StepHooks()
        self.parameters = sum(full_shape(p).numel() for p in student.parameters())
        objective = Objective(student, job.method, setup.teacher)
        groups = decay_groups(objective, run.train.weight_decay, run.train.decay_all)
        self.loader = loader_of(job, setup)
        self.progress = Progress()
        self._trainer = Trainer(
            run=run,
            precision=precision_of(job.ds),
            method=job.method,
            hooks=hooks,
            engine=Engine(objective, hooks.groups(groups), job.ds, monitor=False),
            loader=self.loader,
            evaluate=dict,
            scored=Selection(),
            checkpoints=Checkpoints(run.out / "checkpoints", 1, None),
            metrics=Metrics(run.out / "metrics.jsonl", 0),
            progress=self.progress,
        )

    def step(self) -> None:
        """The body of the trainer's loop, without log lines, evaluations and checkpoints."""
        self._trainer.step(False)
        self.progress.step += 1


def loader_of(job: Job, setup: TeacherSetup) -> Loader:
    """The loader as the train stage makes it."""
    return Loader(
        job.prepared.train,
        setup.view or job.view,
        batch=job.run.train.batch,
        micro_batch=job.run.train.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        seed=job.run.seed,
        readers=setup.readers,
        pin=job.device.type == "cuda",
    )


def forwards(run: Run, device: torch.device, rounds: int) -> Callable[[], None]:
    """A function that runs the live teacher on the next step's batches, read beforehand."""
    job = job_of(run, device)
    teacher = set_up(run, job.method.temperature, job.prepared, job.view, device).teacher
    assert teacher is not None
    loader = loader_of(job, TeacherSetup())
    steps: list[list[Batch]] = [loader.next_step() for _ in range(rounds)]
    loader.close()

    def forward() -> None:
        for batch in steps.pop(0):
            _ = teacher(batch.to(device)).logits_NV  # with its head, which waits to be asked

    return forward


def peak_of(run: Run, device: torch.device) -> int:
    """Bytes that setting up a variant and taking a few steps adds to this process."""
    if device.type == "cuda":
        gc.collect()  # the variant measured before
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory()
    variant = Step(run, device)
    for _ in range(WARM_UP):
        variant.step()
    variant.loader.close()
    return max(dist.gather_objects(peak_memory() - before))


def clock_rounds(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of every round by variant, on the clock and of this process on its cores."""
    steps = {name: Step(run, device) for name, run in runs.items()}
    work: dict[str, Callable[[], None]] = {name: one.step for name, one in steps.items()}
    work[FORWARD] = forwards(runs["live"], device, WARM_UP + rounds)
    names = list(work)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cores: dict[str, list[float]] = {name: [] for name in names}
    for turn, order in enumerate(timing.orders(names, WARM_UP + rounds)):
        for name in order:
            dist.barrier()
            _finish(device)
            begin, busy = time.perf_counter(), time.process_time()
            work[name]()
            _finish(device)
            if turn >= WARM_UP:
                wall[name].append(1e3 * (time.perf_counter() - begin))
                cores[name].append(1e3 * (time.process_time() - busy))
    for one in steps.values():
        one.loader.close()
    dist.barrier()  # from here on the files may go
    plain = steps["plain"]
    return {
        "wall_ms": wall,
        "cpu_ms": cores,
        "tokens_per_step": plain.progress.tokens // plain.progress.step,
        "student_parameters": plain.parameters,
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def apart(work: Callable[..., Any], *args: Any, turn: int = 0) -> Any:
    """``work(*args, device)`` in a fork of this process; on a GPU, which forbids that, right here.

    Every fork joins a process group of its own, at the launcher's port plus ``turn``.
    """
    if torch.cuda.is_available():
        return work(*args, engine.start())
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(work, args, turn, there)
    )
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit("a measuring process died; its traceback is above") from None
    finally:
        child.join()


def _child(work: Callable[..., Any], args: tuple[Any, ...], turn: int, there: Any) -> None:
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + turn)
    there.send(work(*args, engine.start()))


def make_folder(device: torch.device) -> Path:
    """A temporary folder that all ranks share."""
    del device
    return Path(dist.on_rank0(lambda: tempfile.mkdtemp(prefix="dskd-bench-")))


def make_files(run: Run, device: torch.device) -> None:
    """Prepare the data and capture the cache."""
    stages.cache(job_of(run, device))


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Measure, print the table, and write it with all numbers into the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--settings", type=Path, default=ROOT / "launch/ki/quickstart.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_args()
    if words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    folder = apart(make_folder)
    try:
        steps = WARM_UP + words.rounds
        runs = variants(words.settings, words.overrides, folder, steps)
        apart(make_files, runs["cached"], turn=1)
        peaks = {
            name: apart(peak_of, run, turn=turn) for turn, (name, run) in enumerate(runs.items(), 2)
        }
        measured = apart(lambda device: clock_rounds(runs, device, words.rounds), turn=9)
    finally:
        if _first():
            shutil.rmtree(folder)
    result = {**about(runs, words.settings, words.overrides), "rounds": words.rounds, **measured}
    result |= summarise(measured, peaks)
    if _first():
        print(table(result), flush=True)
        device = result["machine"]["device"].replace(" ", "-").lower()
        stem = f"{result['date']}-{device}-{result['machine']['ranks']}ranks"
        write_atomic(words.results / f"{stem}.json", json.dumps(result, indent=1).encode())
        write_atomic(words.results / f"{stem}.md", table(result).encode())


if __name__ == "__main__":
    main()
