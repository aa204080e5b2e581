"""The step loop: counts first, loss inside the forward, one division, one optimiser step.

The gradient of a step is that of ``sum_k total_k / count_k`` over the whole effective batch, with
the counts summed over all micro-batches of all ranks before the first forward: never a mean of
means. So the trajectory does not depend on micro-batch size, accumulation or world size.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dskd.batch import Batch, Term
from dskd.data.counter import mix
from dskd.data.loader import Loader
from dskd.engine.checkpoints import Checkpoints
from dskd.engine.engine import Engine
from dskd.engine.hooks import Change
from dskd.errors import NonFiniteError
from dskd.hardness.refresh import Renewal
from dskd.methods.base import Method
from dskd.settings.run import Run
from dskd.stores.sweep import Stopped
from dskd.system import dist
from dskd.system.log import Metrics, peak_memory, progress_line, say
from dskd.training.learning_rate import learning_rate

MOST_SKIPPED = 100
"""fp16 overflows in a row that stop a run: no loss scale from 2^32 down helps."""


CHANGE = "change"
"""Key of the change's state in that of a checkpoint, beside the progress."""

RENEWAL = "renewal"
"""Key of the renewal's state there."""


class Interrupted(Exception):
    """SIGTERM or SIGINT was honoured: the checkpoint of ``step`` is on disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal; step {step} is saved")


@dataclass
class Progress:
    """Where training is; part of every checkpoint."""

    step: int = 0
    """Completed optimiser steps: what schedules and decays are functions of."""
    position: int = 0
    """Optimiser batches read; beyond ``step`` by the steps fp16 overflow skipped."""
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Sums over all ranks and micro-batches of one step, known before its first forward."""

    by_term: dict[str, Tensor]
    tokens: int
    stop: bool


@dataclass(frozen=True)
class Taken:
    """What became of one optimiser step: its loss and the parts of it, as global means."""

    applied: bool
    stop: bool
    loss: float
    means: dict[str, float]
    lr: float
    grad_norm: float | None


class Trainer:
    """Trains one student.

    Args:
        run: the settings.
        precision: ``fp32``, ``bf16`` or ``fp16``, as resolved from them.
        change: what is done to the student, or kept of it, beyond the loss; None: nothing.
        evaluate: the plain LM evaluation of the student, a dict with ``eval_nll``.
        renewal: what batches may wait for; None: nothing.
    """

    def __init__(
        self,
        *,
        run: Run,
        precision: str,
        method: Method,
        change: Change | None,
        engine: Engine,
        loader: Loader,
        renewal: Renewal | None,
        evaluate: Callable[[], dict[str, Any]],
        checkpoints: Checkpoints,
        metrics: Metrics,
        progress: Progress,
    ) -> None:
        self._run = run
        self._precision = precision
        self._method = method
        self._change = change
        self._engine = engine
        self._loader = loader
        self._renewal = renewal
        self._evaluate = evaluate
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._progress = progress
        self._since = (progress.tokens, progress.train_seconds)
        self._saved = progress.step
        """The step of the newest checkpoint (0: as the student begins)."""

    def train(self) -> Progress:
        """Take the remaining steps.

        Raises:
            NonFiniteError: a loss term, the gradient or the evaluation loss is NaN or infinite; no
                checkpoint of that step is written.
            Interrupted: a signal came; its step is saved.
        """
        progress, run = self._progress, self._run
        begun = time.monotonic() - progress.wall_seconds
        skipped = 0
        with _stop_requested() as requested:
            while progress.step < run.train.steps:
                self._renew(requested)
                clock = time.monotonic()
                taken = self.step(requested())
                progress.train_seconds += time.monotonic() - clock
                progress.wall_seconds = time.monotonic() - begun
                if not taken.applied:
                    skipped += 1
                    self._refuse_endless(skipped)
                    continue
                skipped = 0
                progress.step += 1
                self._log(taken)
                self._close_step(taken.stop)
                if taken.stop:
                    raise Interrupted(progress.step)
        return progress

    def _renew(self, requested: Callable[[], bool]) -> None:
        """Do what the next batch waits for, from a checkpoint from which it can be repeated."""
        progress = self._progress
        if self._renewal is None or not self._renewal.due(progress.position):
            return
        if self._saved < progress.step:
            self._save(None)
        try:
            self._renewal(progress.position, progress.step, requested)
        except Stopped as stopped:
            raise Interrupted(progress.step) from stopped

    def step(self, stop: bool) -> Taken:
        """Forward, backward and optimiser step over one effective batch."""
        progress, engine = self._progress, self._engine
        batches = self._loader.next_step()
        counts = self._count(batches, stop)
        batches = [batch.to(engine.device) for batch in batches]
        shares: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            self._seed(micro)
            if self._change is not None:
                self._change.before_micro_batch(last=micro == len(batches) - 1)
            terms = engine.forward(batch, progress.step)
            totals = [term.total / counts.by_term[name] for name, term in terms.items()]
            engine.backward(torch.stack(totals).sum())
            _add(shares, terms, counts)
        loss, means = self._means(shares)
        lr = learning_rate(self._run.train, progress.step)
        applied, norm = self._update(lr)
        if applied or self._precision != "fp16":  # only fp16 skips a step and goes on
            _finite(progress.step + 1, "the gradient's norm", norm if applied else math.nan)
        progress.position = self._loader.position
        progress.tokens += counts.tokens
        return Taken(applied, counts.stop, loss, means, lr, norm)

    def _update(self, lr: float) -> tuple[bool, float | None]:
        """The optimiser's step, the method's change around it; whether it was taken, and the norm
        of the gradient before clipping."""
        engine, change, step = self._engine, self._change, self._progress.step
        engine.set_rate(lr)
        if change is not None:
            change.before_step(engine.weights(gradients=True), step, lr)
        plain = engine.stage == 0 and self._precision == "fp32"  # DeepSpeed keeps no norm there
        before = engine.grad_norm() if plain else None
        applied = engine.step()
        norm = engine.grad_norm() if before is None else before
        if change is not None and applied:
            change.after_step(engine.weights(gradients=False), step, lr)
        return applied, norm

    def _count(self, batches: Sequence[Batch], stop: bool) -> Counts:
        parts = [self._method.counts(batch) for batch in batches]
        names = sorted(parts[0])
        values = [sum(part[name] for part in parts) for name in names]
        tokens = float(sum(batch.tokens for batch in batches))
        whole = torch.tensor([*values, tokens, float(stop)], dtype=torch.float64)
        whole = whole.to(self._engine.device)
        *sums, tokens, flag = dist.sum_over_ranks(whole)
        by_term = {n: torch.where(v == 0, 1.0, v) for n, v in zip(names, sums, strict=True)}
        return Counts(by_term, int(tokens), bool(flag))

    def _means(self, shares: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """Loss and parts; all ranks see the same values, so all stop or none."""
        names = sorted(shares)
        sums = dist.sum_over_ranks(torch.stack([shares[name] for name in names])).tolist()
        means = dict(zip(names, sums, strict=True))
        loss = means.pop(_LOSS)
        for name, mean in means.items():  # before their sum: they say which of them it is
            _finite(self._progress.step + 1, f"loss term '{name}'", mean)
        _finite(self._progress.step + 1, "the loss", loss)
        return loss, means

    def _refuse_endless(self, skipped: int) -> None:
        """Say that fp16 overflow skipped a step; stop where no loss scale is small enough."""
        step = self._progress.step + 1
        say(f"step {step}: fp16 overflow, skipped")
        if skipped == MOST_SKIPPED:
            raise NonFiniteError(
                f"step {step}: {skipped} overflows in a row; the gradient is beyond fp16 at any "
                f"loss scale; the last checkpoint is intact"
            )

    def _seed(self, micro: int) -> None:
        """Dropout is a function of (seed, batch, micro-batch, rank): no generator state to save."""
        parts = (self._run.seed, self._loader.position, micro, dist.rank())
        torch.manual_seed(int(mix(*parts)) & (2**63 - 1))

    def _log(self, taken: Taken) -> None:
        progress, steps = self._progress, self._run.train.steps
        if progress.step % self._run.log_every and progress.step < steps:
            return
        loss = taken.loss
        rates = {"lr": taken.lr, **self._method.rates(progress.step - 1)}
        if self._change is not None:
            rates |= self._change.rates()
        tokens, seconds = self._since
        speed = (progress.tokens - tokens) / (progress.train_seconds - seconds)
        self._since = (progress.tokens, progress.train_seconds)
        left = (steps - progress.step) * progress.train_seconds / progress.step
        shown = {"loss": loss, **taken.means, **rates, "|g|": taken.grad_norm}
        say(progress_line(progress.step, steps, shown, tokens_per_second=speed, left=left))
        used = {"tokens_per_second": speed, "peak_memory_bytes": peak_memory()}
        line = {"loss": loss, "terms": taken.means, **rates, "grad_norm": taken.grad_norm, **used}
        self._metrics.write(step=progress.step, **line, seconds=progress.train_seconds)
        terms = {f"terms/{name}": mean for name, mean in taken.means.items()}
        flat = {"loss": loss, **terms, **rates, **used}
        self._engine.log({f"train/{k}": float(v) for k, v in flat.items()}, progress.step)

    def _close_step(self, stop: bool) -> None:
        """Evaluate and save where they are due."""
        step, run = self._progress.step, self._run
        last = step == run.train.steps
        due = last or step % run.checkpoint.every == 0
        nll = None
        if last or step % run.evaluation.every == 0:
            scores = self._evaluate()
            nll = scores["eval_nll"]
            shown = {"nll": nll, "bits": scores["eval_bits"], "ppl": scores["eval_ppl"]}
            say(f"eval at {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            self._metrics.write(step=step, **scores)
            self._engine.log({f"eval/{k}": float(v) for k, v in shown.items()}, step)
            _finite(step, "the evaluation loss", nll)
        if due or stop:
            # One that only a signal asked for is no candidate for the best: the undisturbed run,
            # which exports the same weights, does not have it.
            complete = self._change is None or self._change.complete(step)
            self._save(nll if due and complete else None)

    def _save(self, nll: float | None) -> None:
        step = self._progress.step
        tag = self._checkpoints.begin(step)
        self._engine.save(self._checkpoints.folder, tag)
        if self._change is not None:
            self._change.save(self._checkpoints.folder / tag)
        about = {
            "world": dist.world(),
            "stage": self._engine.stage,
            "precision": self._precision,
            "eval_nll": nll,
            "state": asdict(self._progress),
        }
        if self._change is not None:
            about["state"][CHANGE] = self._change.state()
        if self._renewal is not None:
            about["state"][RENEWAL] = self._renewal.state()
        self._checkpoints.commit(step, about)
        self._saved = step


_LOSS = ""
"""Key of the loss among its parts."""


def _add(shares: dict[str, Tensor], terms: dict[str, Term], counts: Counts) -> None:
    """Add a micro-batch's loss and parts, each divided by the global count of its term."""
    for name, term in terms.items():
        for part, total in {_LOSS: term.total, **term.parts}.items():
            share = total.detach().double() / counts.by_term[name]
            shares[part] = shares.get(part, 0) + share


def _finite(step: int, name: str, value: float | None) -> None:
    """Stop where a number that all ranks share is out of range, before it reaches a checkpoint."""
    if value is not None and not math.isfinite(value):
        problem = NonFiniteError(f"step {step}: {name} is {value}; the last checkpoint is intact")
        problem.elsewhere = dist.rank() != 0
        raise problem


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM and SIGINT instead of dying of them; the loop asks between steps."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:  # too late for the loop: for who handles signals outside it
        signal.raise_signal(seen[0])
