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

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # not under python -P
    sys.path.pop(0)  # this folder's kernels.py passes for the package that transformers imports
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

# Imported before the fork, or DeepSpeed would load them in every child and its memory be theirs.
import deepspeed.compile.backend
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
from torch import Tensor

from dskd.batch import Batch, Positions, ProjectedTeacher, Signal, Term, TopKTeacher
from dskd.data.loader import Loader
from dskd.engine import engine
from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import Engine, decay_groups
from dskd.engine.hooks import StepHooks
from dskd.engine.zero import full_shape, sharded_construction
from dskd.errors import ConfigError
from dskd.fused import reference
from dskd.fused.topk_teacher import at_temperature
from dskd.methods.base import build_method
from dskd.methods.ki import KnowledgeInheritance
from dskd.runs import stages
from dskd.runs.context import RunContext
from dskd.runs.student import build_student
from dskd.settings.model import Model
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.teachers import CachedRows, CachedTeacher, LiveTeacher
from dskd.system import dist
from dskd.system.log import Metrics, peak_memory
from dskd.teachers.setup import TeacherSetup, set_up
from dskd.training.objective import Objective
from dskd.training.step_numbers import Queued
from dskd.training.trainer import Progress, Trainer
from launch.bench import measure
from launch.bench.measure import markdown, over, show, slug, spread

ROOT = Path(__file__).resolve().parents[2]
EAGER = "launch.bench.step:EagerInheritance"
"""The cached variant without the fused losses, for comparison."""
WARM_UP = 3
"""Untimed rounds at the start; as many steps are taken to see a variant's peak memory."""
FORWARD = "forward"
"""The teacher's forward pass alone, on the batches of the step."""
VARIANTS = {
    "plain": "plain LM",
    "cached": "KI, cached",
    "live": "KI, live",
    "eager": "KI, cached, eager loss",
}
BOUNDS = {"cached": ("plain",), "live": ("plain", FORWARD)}
LIMITS = {"cached": 1.10, "live": 1.15}
"""Most that a step may cost, times the sum of its bounds."""


class EagerInheritance(KnowledgeInheritance):
    """Knowledge Inheritance as plain torch does it: whole logits, differentiated by autograd."""

    kind: str = "launch.bench.step:EagerInheritance"

    def loss(
        self, rows: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        del batch
        alpha, heat, student_NV = self.alpha(step), self.temperature**2, rows.logits_NV
        if isinstance(signal, TopKTeacher):
            tail_N = signal.tail_N[self.temperature] if self.topk == "tail" else None
            kept = at_temperature(signal.logprobs_NK, tail_N, self.temperature)
            parts = (signal.ids_NK, *kept, self.topk)
            kl_N = reference.topk_divergence(student_NV, *parts, temperature=self.temperature)
        else:
            teacher_NV = _logits(signal)
            kl_N = reference.divergence(student_NV, teacher_NV, temperature=self.temperature)
        ce, kl = reference.cross_entropy(student_NV, rows.labels_N).sum(), kl_N.sum() * heat
        total = (1 - alpha) * ce + alpha * kl
        return {"tokens": Term(total, {"ce": ce.detach(), "kl": kl.detach()})}


@torch.no_grad()
def _logits(signal: ProjectedTeacher) -> Tensor:
    """A live teacher's logits, whole."""
    return signal.projection(signal.hidden_NE)[:, : signal.vocabulary]


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
    shared = {"out": folder, "train": student.train.model_copy(update={"steps": steps})}
    return {
        name: student.model_copy(update={**shared, "method": method, "teacher": taught_by})
        for name, (method, taught_by) in ways.items()
    }


def _cached(student: Run, model: Model) -> CachedTeacher:
    if not isinstance(student.teacher, CachedTeacher):
        raise ConfigError("runs.ki.teacher.kind: a cached teacher is to be measured")
    # All rows: more steps than the settings' may be measured.
    rows = CachedRows(epochs=student.data.masking.draws or 1)
    return student.teacher.model_copy(update={"model": model, "path": None, "cache": rows})


class Step:
    """One variant, ready to train: ``step()`` takes an optimiser step like ``dskd/train.py``."""

    def __init__(self, run: Run, device: torch.device) -> None:
        context = RunContext(run, build_method(run.method), device)
        run = context.run
        setup = TeacherSetup()
        if context.method.wants_teacher():
            heat = context.method.temperature
            setup = set_up(run, heat, context.prepared, context.view, device)
        student = build_student(context, run.model, context.ds, "model")
        with sharded_construction(context.ds):
            hooks = context.method.hooks(student, context) or StepHooks()
        self.parameters = sum(full_shape(p).numel() for p in student.parameters())
        objective = Objective(student, context.method, setup.teacher)
        groups = decay_groups(objective, run.train.weight_decay, run.train.decay_all)
        self.loader = loader_of(context, setup)
        self.progress = Progress()
        self._trainer = Trainer(
            run=run,
            precision=precision_of(context.ds),
            method=context.method,
            hooks=hooks,
            engine=Engine(objective, hooks.groups(groups), context.ds, monitor=False),
            loader=self.loader,
            evaluate=dict,
            scored=Selection(),
            checkpoints=Checkpoints(run.out / "checkpoints", 1, None),
            metrics=Metrics(run.out / "metrics.jsonl", 0),
            progress=self.progress,
        )
        self._unread: Queued | None = None

    def step(self) -> None:
        """The body of the trainer's loop, without log lines, evaluations and checkpoints."""
        queued = self._trainer.step(False)
        self.progress.step += 1
        if self._unread is not None:
            self._unread.read()
        self._unread = queued


def loader_of(context: RunContext, setup: TeacherSetup) -> Loader:
    """The loader as the train stage makes it."""
    return Loader(
        context.prepared.train,
        setup.view or context.view,
        batch=context.run.train.batch,
        micro_batch=context.run.train.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        seed=context.run.seed,
        readers=setup.readers,
        device=context.device,
    )


def forwards(run: Run, device: torch.device, rounds: int) -> Callable[[], None]:
    """A function that runs the live teacher on the next step's batches, read beforehand."""
    context = RunContext(run, build_method(run.method), device)
    heat = context.method.temperature
    teacher = set_up(run, heat, context.prepared, context.view, device).teacher
    assert teacher is not None
    loader = loader_of(context, TeacherSetup())
    steps = [loader.next_step() for _ in range(rounds)]
    loader.close()

    def forward() -> None:
        for sent in steps.pop(0):
            _logits(teacher(sent.on_device()))

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

    def ready() -> None:
        dist.barrier()
        _finish(device)

    def finished(call: Callable[[], None]) -> Callable[[], None]:
        return lambda: (call(), _finish(device))

    calls = {name: finished(call) for name, call in work.items()}
    for call in list(calls.values()) * (WARM_UP - 1):  # the harness adds a round of its own
        ready()
        call()
    samples = measure.interleave(
        calls, measure.HostClock(), before=ready, rounds=rounds, seconds=0.0
    )
    for one in steps.values():
        one.loader.close()
    dist.barrier()  # from here on the files may go
    plain = steps["plain"]
    return {
        **samples,
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
    try:
        return measure.forked(_at_port, work, args, turn)
    except EOFError:
        raise SystemExit("a measuring process died; its traceback is above") from None


def _at_port(work: Callable[..., Any], args: tuple[Any, ...], turn: int) -> Any:
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + turn)
    return work(*args, engine.start())


def make_files(run: Run, device: torch.device) -> None:
    """Prepare the data and capture the cache."""
    stages.cache(RunContext(run, build_method(run.method), device))


def about(run: Run, words: argparse.Namespace) -> dict[str, Any]:
    """Date, machine, versions and settings of a measurement."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = {"method", "data", "model", "teacher", "train"}
    return {
        **measure.about(device, ("torch", "deepspeed", "transformers", "numpy")),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "settings": {
            "file": words.settings.name,
            "overrides": words.overrides,
            "deepspeed": run.deepspeed,
            **run.model_dump(mode="json", include=sections),
        },
    }


def summarise(measured: dict[str, Any], peaks: Mapping[str, int]) -> dict[str, Any]:
    """Medians and spreads of times and of ratios within a round, and whether the limits hold."""
    wall, cores, tokens = (measured[key] for key in ("wall_ms", "cpu_ms", "tokens_per_step"))
    rows = {
        name: {
            "ms": spread(wall[name]),
            "cpu_ms": spread(cores[name]),
            "tokens_per_second": 1e3 * tokens / median(wall[name]),
            "over_plain": over(wall, name, "plain"),
            "peak_memory_bytes": peaks.get(name),
        }
        for name in wall
    }
    targets = {}
    for name, bound in BOUNDS.items():
        ratio = over(wall, name, *bound)
        targets[name] = {
            **ratio,
            "cpu": over(cores, name, *bound),
            "limit": LIMITS[name],
            "met": ratio["median"] <= LIMITS[name],
        }
    return {"variants": rows, "targets": targets}


def table(result: Mapping[str, Any]) -> str:
    train = result["settings"]["train"]
    header = ["step", "ms, median [quartiles]", "CPU ms", "tokens/s", "times the plain step"]
    rows = []
    for name, row in result["variants"].items():
        peak = row["peak_memory_bytes"]
        rows.append(
            [
                VARIANTS.get(name, "teacher forward"),
                show(row["ms"], 1),
                f"{row['cpu_ms']['median']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                show(row["over_plain"], 3),
                "" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    cached, eager = (result["variants"][name]["peak_memory_bytes"] for name in ("cached", "eager"))
    lines = [
        f"{result['date']}, {result['device']} ({result['cpu']}), {result['ranks']} ranks x "
        f"{result['threads']} threads; {result['settings']['file']}: "
        f"{result['student_parameters']:,} parameters, batch {train['batch']} in micro-batches of "
        f"{train['micro_batch']}, {result['tokens_per_step']:,} tokens a step, K = "
        f"{result['settings']['teacher']['k']}, T = {result['settings']['method']['temperature']}, "
        f"{result['settings']['deepspeed']}; {result['rounds']} rounds.",
        "",
        *markdown([*header, "peak, MiB"], rows),
        "",
        f"- peak memory of the eager loss over the fused one: {eager / cached:.2f}",
    ]
    for name, target in result["targets"].items():
        verdict = "met" if target["met"] else "MISSED"
        lines.append(
            f"- {name} / ({' + '.join(BOUNDS[name])}): {show(target, 3)}, CPU time "
            f"{show(target['cpu'], 3)}; at most {target['limit']}: {verdict}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--settings", type=Path, default=ROOT / "launch/ki/quickstart.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/bench/results")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    words = parser.parse_args()
    if words.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    first = os.environ.get("RANK", "0") == "0"
    # shared by all ranks
    folder = apart(lambda _: Path(dist.on_rank0(lambda: tempfile.mkdtemp(prefix="dskd-bench-"))))
    try:
        runs = variants(words.settings, words.overrides, folder, WARM_UP + words.rounds)
        apart(make_files, runs["cached"], turn=1)
        peaks = {
            name: apart(peak_of, run, turn=turn) for turn, (name, run) in enumerate(runs.items(), 2)
        }
        measured = apart(lambda device: clock_rounds(runs, device, words.rounds), turn=9)
    finally:
        if first:
            shutil.rmtree(folder)
    result = {**about(runs["cached"], words), "rounds": words.rounds, **measured}
    result |= summarise(measured, peaks)
    if first:
        print(table(result), flush=True)
        stem = f"{result['date']}-{slug(result['device'])}-{result['ranks']}ranks"
        measure.write(words.results, stem, result, table(result))


if __name__ == "__main__":
    main()
