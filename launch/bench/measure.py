"""The harness of all benchmarks: times, peak memory, errors against float64, results on the disk.

Every round takes one sample of each variant, in an order drawn anew for each round; ratios are
taken within a round, so that a change of the machine's load or clock hits both of their sides.
On a CUDA device a sample is the time between two events, with the L2 cache flushed before it;
elsewhere it is the host's clock, and the CPU time of the process beside it.

Shape letters: N tokens, C of them in a chunk, V columns, D hidden size, R compared rows.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from launch.bench.peers import Head, Outcome

Call = Callable[[], Any]
"""One loss with its gradients, from scratch."""

FEWEST, MOST = 5, 40
"""Rounds, where time decides how many."""
FLUSH = 256 << 20
"""Bytes written between two samples, at least; twice the L2 cache if that is more."""
COMPARED = 64
"""Rows of a gradient that are compared."""
CHUNK = 1 << 25
"""Logits of a chunk."""

PerToken = Callable[[Tensor, slice], Tensor]
"""Loss of each token [C] from the student's logits [C, V] in float64, of a slice of the tokens."""


# ---- rounds --------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "lower", "upper"), values[0])
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}


def show(values: Mapping[str, float], digits: int) -> str:
    """A spread as a cell of a table."""
    middle, lower, upper = (f"{values[key]:.{digits}f}" for key in ("median", "lower", "upper"))
    return f"{middle} [{lower} - {upper}]"


def over(samples: Mapping[str, Sequence[float]], name: str, *others: str) -> dict[str, float]:
    """Spread of a variant's time over the sum of the others' in the same round."""
    sums = [sum(times) for times in zip(*(samples[other] for other in others), strict=True)]
    return spread([own / whole for own, whole in zip(samples[name], sums, strict=True)])


class HostClock:
    """The host's clock: milliseconds on the wall and of this process on its cores."""

    def round(self, calls: Mapping[str, Call], before: Call) -> dict[str, tuple[float, float]]:
        """One sample of each variant, in the order given."""
        taken = {}
        for name, call in calls.items():
            gc.collect()  # not in the sample, and not the garbage of another variant
            before()
            begin, busy = time.perf_counter(), time.process_time()
            call()
            wall, cores = time.perf_counter() - begin, time.process_time() - busy
            taken[name] = 1e3 * wall, 1e3 * cores
        return taken


class CudaClock:
    """Device events around each sample; the host queues a whole round before it waits."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(FLUSH, 2 * cache) // 4, dtype=torch.int32, device=device)

    def round(self, calls: Mapping[str, Call], before: Call) -> dict[str, tuple[float, float]]:
        """One sample of each variant, in the order given; no CPU time."""
        events = {}
        for name, call in calls.items():
            before()
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        return {name: (begin.elapsed_time(end), 0.0) for name, (begin, end) in events.items()}


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """An order of the variants for every round, the same in each run and on each rank.

    Drawn, not rotated: a rotation has every variant always after the same one, whose heat and
    leftovers in the caches it then gets in all rounds.
    """
    chance = random.Random(0)
    for _ in range(rounds):
        yield chance.sample(names, len(names))


def interleave(
    calls: Mapping[str, Call], clock: Clock, *, before: Call, rounds: int | None, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Samples of every variant: ``{"wall_ms": {name: [...]}, "cpu_ms": {name: [...]}}``.

    Args:
        calls: all of them have run before, so that nothing is compiled here.
        clock: what measures.
        before: runs unmeasured before every sample, of whatever variant.
        rounds: how many; None: what fits into ``seconds``, from 5 to 40.
        seconds: see ``rounds``.
    """
    begin = time.perf_counter()
    clock.round(calls, before)  # not counted: caches, allocator and clock frequency settle
    each = time.perf_counter() - begin
    if rounds is None:
        rounds = min(MOST, max(FEWEST, int(seconds / each)))
    samples: dict[str, dict[str, list[float]]] = {
        key: {name: [] for name in calls} for key in ("wall_ms", "cpu_ms")
    }
    for order in orders(list(calls), rounds):
        taken = clock.round({name: calls[name] for name in order}, before)
        for name, (wall, cores) in taken.items():
            samples["wall_ms"][name].append(wall)
            samples["cpu_ms"][name].append(cores)
    return samples


# ---- peak memory ---------------------------------------------------------------------------------


def peak_on_cuda(call: Call) -> int:
    """Bytes that a call allocates on the device beyond what is there when it begins."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_in_child(make: Callable[[str], Call], name: str) -> int | str:
    """Bytes that a call adds to the resident set of a process, or why it could not run.

    A fork of this process makes the inputs (``make(name)``), calls once to load and compile what is
    loaded and compiled but once, gives every freed byte back to the system, sets the kernel's
    high-water mark back (``/proc/self/clear_refs``) and calls again. This process must not have run
    anything in parallel yet: a fork cannot use its threads.
    """
    try:
        return forked(_peak, make, name)
    except EOFError:
        return f"the measuring process died ({name})"


def forked(work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)`` in a fork of this process; EOFError: it died, its traceback is printed."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: there.send(work(*args)))
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def _peak(make: Callable[[str], Call], name: str) -> int | str:
    libc = ctypes.CDLL("libc.so.6")
    # M_MMAP_THRESHOLD: a freed tensor leaves the process at once instead of waiting in the heap
    libc.mallopt(-3, 1 << 16)
    try:
        call = make(name)
        call()
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except ImportError as error:
        return short(error)
    except Exception as error:  # a peer's, whatever it is, is its row of the table
        traceback.print_exc()
        return short(error)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


# ---- errors and floors ---------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in the Euclidean norm; NaN and inf come out as inf."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference.nan_to_num(torch.inf))


@dataclass(frozen=True)
class Truth:
    """The loss over all tokens and some rows of each gradient.

    ``compute`` takes them from float64, ``pick`` takes the same rows of a variant's gradients.
    """

    compute: Callable[[], Outcome]
    pick: Callable[[Outcome], tuple[Tensor, ...]]

    def errors(self, outcome: Outcome, expected: Outcome) -> tuple[float, float]:
        """Relative errors of the loss and, the largest, of the gradients."""
        gradients = zip(self.pick(outcome), expected.gradients, strict=True)
        return (
            relative_error(outcome.loss, expected.loss),
            max(relative_error(found, known) for found, known in gradients),
        )


def stream(total: int, *, reads: int, device: torch.device) -> Callable[[], Tensor]:
    """Move as many bytes: one or two matrices read, one written."""
    each = total // (reads + 1) // 2
    into, *given = (
        torch.randn(each, dtype=torch.bfloat16, device=device) for _ in range(reads + 1)
    )
    if reads == 1:
        return partial(into.copy_, given[0])
    return partial(torch.add, *given, out=into)


def products(head: Head) -> Callable[[], object]:
    """The head's products alone, all logits at once: three of the student, one of the teacher."""
    student, teacher = (head.hidden_ND, head.weight_VD), (head.teacher_NE, head.teacher_VE)
    logits_NV = torch.mm(student[0], student[1].t())
    into_ND, into_VD = (torch.empty_like(matrix) for matrix in student)

    def multiply() -> None:
        for hidden, weight in (student,) if teacher[0] is None else (student, teacher):
            torch.mm(hidden, weight.t(), out=logits_NV)
        torch.mm(logits_NV, student[1], out=into_ND)
        torch.mm(logits_NV.t(), student[0], out=into_VD)

    return multiply


def through_logits(student_NV: Tensor, per_token: PerToken) -> Truth:
    """The truth about a loss of logits."""
    picked_R = _some(len(student_NV), student_NV.device)

    def compute() -> Outcome:
        total, rows = 0.0, []
        for slice_, logits_CV, grad_CV, loss in _chunks(student_NV, lambda x: x, per_token):
            del logits_CV
            total = total + loss
            inside = (picked_R >= slice_.start) & (picked_R < slice_.stop)
            rows.append(grad_CV[picked_R[inside] - slice_.start])
        return Outcome(total, (torch.cat(rows),))

    return Truth(compute, lambda outcome: (outcome.gradients[0][picked_R],))


def through_head(head: Head, per_token: PerToken) -> Truth:
    """The truth about a loss through the head."""
    columns = len(head.weight_VD)
    tokens_R = _some(len(head.hidden_ND), head.hidden_ND.device)
    columns_R = _some(columns, head.hidden_ND.device)

    def compute() -> Outcome:
        weight_VD = head.weight_VD.double()
        total, rows = 0.0, []
        into_RD = weight_VD.new_zeros(len(columns_R), weight_VD.shape[1])
        for slice_, hidden_CD, grad_CV, loss in _chunks(
            head.hidden_ND, lambda x: x @ weight_VD.t(), per_token, columns
        ):
            total = total + loss
            into_RD += grad_CV[:, columns_R].t() @ hidden_CD
            inside = (tokens_R >= slice_.start) & (tokens_R < slice_.stop)
            rows.append(grad_CV[tokens_R[inside] - slice_.start] @ weight_VD)
        return Outcome(total, (torch.cat(rows), into_RD))

    return Truth(
        compute, lambda outcome: (outcome.gradients[0][tokens_R], outcome.gradients[1][columns_R])
    )


def _chunks(
    inputs: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    per_token: PerToken,
    columns: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Slice, inputs, gradient of the logits and sum of the losses of every chunk, in float64."""
    tokens = len(inputs)
    size = max(1, CHUNK // (columns or inputs.shape[1]))
    for begin in range(0, tokens, size):
        slice_ = slice(begin, min(begin + size, tokens))
        inputs_C = inputs[slice_].double()
        logits_CV = logits_of(inputs_C).requires_grad_()
        loss = per_token(logits_CV, slice_).sum() / tokens
        loss.backward()
        yield slice_, inputs_C, logits_CV.grad, loss.detach()


def _some(count: int, device: torch.device) -> Tensor:
    """Evenly spread indices, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, COMPARED), device=device).long().unique()


# ---- results -------------------------------------------------------------------------------------


def about(device: torch.device, libraries: Sequence[str]) -> dict[str, Any]:
    """Date, machine and versions of a measurement; None for a library that is not installed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in libraries},
    }


def slug(device: str) -> str:
    """A device's name as a part of a file's."""
    return device.replace(" ", "-").lower()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (header, *rows))
    return [first, "|" + "---|" * len(header), *others]


def write(folder: Path, stem: str, result: Mapping[str, Any], page: str) -> None:
    """Put ``stem.json`` (all numbers) and ``stem.md`` (the page) into the folder of results.

    Each is whole or as it was before: a run may be cut off here. Without ``dskd.system.files``,
    whose libraries a bare machine with a GPU need not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((f"{stem}.json", json.dumps(result, indent=1)), (f"{stem}.md", page)):
        (folder / f".{name}").write_text(text)
        (folder / f".{name}").replace(folder / name)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def short(error: BaseException) -> str:
    """An error in one line of a table."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:160].replace("|", "/")
