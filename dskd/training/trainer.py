"""The step loop: counts first, loss inside the forward, one division, one optimiser step.

The host waits for the device once a step: it reads loss and norm together, and those of the step
before, when the next one is queued. Before it evaluates, saves or stops, it reads them all.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch import Tensor

from dskd.batch import LossCounts
from dskd.data.loader import Loader
from dskd.engine.checkpoints import WHAT as CHECKPOINT
from dskd.engine.checkpoints import Checkpoints, Selection
from dskd.engine.engine import Engine
from dskd.engine.hooks import StepHooks
from dskd.engine.manifests import Progress
from dskd.errors import DiskError, DskdError, NonFiniteError
from dskd.fused.per_token import weights_kept
from dskd.methods.base import Method
from dskd.settings.run import Every, Run
from dskd.stores.sweep import Stopped
from dskd.system import dist, doing
from dskd.system.disk import writing
from dskd.system.log import WHAT as METRICS
from dskd.system.log import Metrics, progress_line, say, used_memory
from dskd.training.evaluation import Scores, by_key
from dskd.training.learning_rate import learning_rate
from dskd.training.passes import GradientProbe, Passes, count
from dskd.training.step_numbers import Numbers, Queued, refuse_non_finite

SHOWN_EVERY = 5.0
"""Seconds between two progress lines, unless ``log_every`` counts steps."""
MOST_SKIPPED = 100
"""fp16 overflows in a row that stop a run: no loss scale from 2^32 down helps."""


class Interrupted(Exception):
    """SIGTERM or SIGINT was honoured: the checkpoint of ``step`` is on disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal; step {step} is saved")


@dataclass
class _Unread:
    """A step whose numbers are still to be read.

    Attributes:
        queued: the step.
        tokens: taken until its end, ``seconds`` the time of training.
    """

    queued: Queued
    tokens: int
    seconds: float


@dataclass(kw_only=True, eq=False)
class Trainer:
    """The step loop of one run: steps, logs, evaluates and saves until all steps are taken.

    Attributes:
        run: the settings, with its length in steps.
        precision: ``fp32``, ``bf16`` or ``fp16``, as resolved from them.
        method: makes the loss.
        hooks: what is done around the steps, apart from the loss.
        engine: holds the student.
        loader: makes the batches, from ``progress.position`` on.
        evaluate: results of the student's evaluation.
        scored: which of them a checkpoint keeps, by key.
        checkpoints: of the run.
        metrics: the file that gets a line for each logged step and evaluation.
        progress: where training begins or goes on; kept up to date.
    """

    run: Run
    precision: str
    method: Method
    hooks: StepHooks
    engine: Engine
    loader: Loader
    evaluate: Callable[[], Scores]
    scored: Selection
    checkpoints: Checkpoints
    metrics: Metrics
    progress: Progress

    def __post_init__(self) -> None:
        self._passes = Passes(self.engine, self.hooks, self.run.seed)
        self._counts: LossCounts = self.engine.module.counts
        self._since = (self.progress.tokens, self.progress.train_seconds)
        """Tokens and seconds when a step was last logged."""
        self._shown_since, self._shown = self._since, None
        """The same when one was last shown, and when that was on the clock."""
        self._unread: _Unread | None = None
        self._saved = self.progress.step
        """The step of the newest checkpoint (0: as the student begins)."""
        self._unwritten: DiskError | None = None
        """What this rank could not write down since then."""

    def train(self) -> Progress:
        """Take the steps that are left, from where ``progress`` is, or as many of them as the hooks
        have it.

        Raises:
            DiskError: a checkpoint or the metrics cannot be written; on every rank.
            NonFiniteError: a loss term, the gradient or the evaluation's score is NaN or infinite;
                no checkpoint of that step is written.
            Interrupted: a signal came; its step is saved.
        """
        progress, run = self.progress, self.run
        begun = time.monotonic() - progress.wall_seconds
        skipped = 0
        with _stop_requested() as requested:
            while progress.step < run.train.steps and not self.hooks.over():
                self._prepare(requested)
                doing.at_step(progress.step + 1)
                queued = self._launch(requested())
                progress.wall_seconds = time.monotonic() - begun
                if not queued.applied:
                    skipped += 1
                    self._catch_up()
                    self._refuse_endless(skipped)
                    continue
                skipped = 0
                self._close_step(queued.stop)
                if queued.stop:
                    raise Interrupted(progress.step)
        return progress

    def _launch(self, stop: bool) -> Queued:
        """Queue a step, then read the one before."""
        progress, clock = self.progress, time.monotonic()
        try:
            queued = self.step(stop)
        except Exception:
            self._catch_up()  # it may have spoilt the student, which then is what went wrong
            raise
        progress.train_seconds += time.monotonic() - clock
        self._catch_up()
        doing.next_one()
        progress.step += queued.applied
        self._unread = _Unread(queued, progress.tokens, progress.train_seconds)
        return queued

    def _catch_up(self) -> None:
        """Read and log the step that is not read yet, if there is one.

        Raises:
            NonFiniteError: it has spoilt the student.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        clock = time.monotonic()
        numbers = unread.queued.read()
        waited = time.monotonic() - clock
        self.progress.train_seconds += waited
        unread.seconds += waited
        if numbers.rates:  # of a step that is logged
            self._log(unread, numbers)

    def _prepare(self, requested: Callable[[], bool]) -> None:
        """Do what the next batch waits for, from a checkpoint from which it can be repeated."""
        progress = self.progress
        if not self.hooks.waits(progress.position):
            return
        self._catch_up()
        doing.pause()
        if self._saved < progress.step:
            self._save(None)
        try:
            self.hooks.prepare(progress.position, progress.step, requested)
        except Stopped as stopped:
            raise Interrupted(progress.step) from stopped

    def step(self, stop: bool) -> Queued:
        """Queue forward, backward and optimiser step over one effective batch.

        Args:
            stop: whether a signal came on this rank.
        """
        progress = self.progress
        batches = self.loader.next_step()
        position = self.loader.position
        counts = count(self._counts, [sent.batch for sent in batches], stop=stop)
        probe = GradientProbe(self._passes, self._counts, progress.step, position)
        self.hooks.before_passes(probe, progress.step)
        probe.forget()
        with weights_kept() as weights:
            shares = self._passes.run(batches, counts, progress.step, (position,))
        lr = learning_rate(self.run.train, progress.step)
        applied, norm = self._update(lr)
        progress.position = position
        progress.tokens += counts.tokens
        number, rates = progress.step + 1, {}
        if applied and self._is_logged(number):
            rates = {"lr": lr, **self.method.rates(progress.step), **self.hooks.rates()}
        # only fp16 skips a step and goes on
        about = {"applied": applied, "stop": counts.stop, "may_skip": self.precision == "fp16"}
        return Queued(number, shares, norm, weights, rates, **about)

    def _is_logged(self, step: int) -> bool:
        return step % (self.run.log_every or 1) == 0 or step == self.run.train.steps

    def _is_shown(self, step: int) -> bool:
        """Whether a logged step is shown as well. This is the one thing that a clock decides, on
        rank 0 alone: no number and no line of the metrics hangs on it."""
        if self.run.log_every is not None or step == self.run.train.steps:
            return True
        return self._shown is None or time.monotonic() - self._shown >= SHOWN_EVERY

    def _update(self, lr: float) -> tuple[bool, Tensor | None]:
        """The optimiser's step and the hooks around it; whether it was taken, and the norm of the
        gradient before clipping, on the device."""
        engine, hooks, step = self.engine, self.hooks, self.progress.step
        engine.set_rate(lr)
        if hooks.touches_weights:
            hooks.before_step(engine.weights(gradients=True), step, lr)
        plain = engine.stage == 0 and self.precision == "fp32"  # DeepSpeed keeps no norm there
        before = engine.grad_norm() if plain else None
        applied = engine.step()
        norm = engine.grad_norm() if before is None else before
        if applied and hooks.touches_weights:
            hooks.after_step(engine.weights(gradients=False), step, lr)
        return applied, norm

    def _refuse_endless(self, skipped: int) -> None:
        """Say that fp16 overflow skipped a step; stop where no loss scale is small enough."""
        step = self.progress.step + 1
        say(f"step {step}: fp16 overflow, skipped")
        if skipped == MOST_SKIPPED:
            raise NonFiniteError(
                f"step {step}: {skipped} overflows in a row; the gradient is beyond fp16 at any "
                f"loss scale; the last checkpoint is intact"
            )

    def _log(self, unread: _Unread, numbers: Numbers) -> None:
        step, steps = unread.queued.number, self.run.train.steps
        loss, means, norm, rates = numbers.loss, numbers.means, numbers.grad_norm, numbers.rates
        if self._is_shown(step):
            speed, left = _speed(unread, self._shown_since), (steps - step) * unread.seconds / step
            shown = {"loss": loss, **means, **rates, "|g|": norm}
            say(progress_line(step, steps, shown, tokens_per_second=speed, left=left))
            self._shown_since = (unread.tokens, unread.seconds)
            self._shown = time.monotonic()
        used = {"tokens_per_second": _speed(unread, self._since), **used_memory()}
        self._since = (unread.tokens, unread.seconds)
        rest = {**rates, "grad_norm": norm, **used, "seconds": unread.seconds}
        terms = {f"terms/{name}": mean for name, mean in means.items()}
        flat = {"loss": loss, **terms, **rest}
        with self._later():
            self.metrics.write(step=step, loss=loss, terms=means, **rest)
            self.engine.log({f"train/{k}": v for k, v in flat.items() if v is not None}, step)

    @contextmanager
    def _later(self) -> Iterator[None]:
        """What cannot be written inside, by rank 0 alone, is raised where all ranks meet anyway:
        before the next checkpoint."""
        try:
            with writing(METRICS, self.metrics.path):  # a monitor's files lie beside them
                yield
        except DiskError as problem:
            self._unwritten = self._unwritten or problem

    def _close_step(self, stop: bool) -> None:
        """Evaluate and save where they are due."""
        step, run = self.progress.step, self.run
        last = step == run.train.steps
        due = last or self._is_due(run.saves_every)
        evaluates = last or self._is_due(run.evaluation.every)
        if due or evaluates or stop:
            self._catch_up()
        score = None
        if evaluates:
            doing.pause()
            score = self._score()
            if self.hooks.complete(step):
                self.hooks.evaluated(score)
                due = due or self.hooks.over()
        if due or stop:
            # One that only a signal caused is no candidate for the best: the undisturbed run,
            # which exports the same weights, does not have it.
            self._save(score if due and self.hooks.complete(step) else None)

    def _is_due(self, every: Every) -> bool:
        """Whether the step that was just taken is one of these."""
        step = self.progress.step
        return self.loader.ends_epoch(step) if every == "epoch" else step % every == 0

    def _score(self) -> float:
        """Evaluate, write the results down, and return the one that a checkpoint keeps."""
        step, scores = self.progress.step, self.evaluate()
        results, key = by_key(scores), self.scored.metric
        with self._later():
            self.metrics.write(step=step, **results)
        for name, found in scores.items():
            shown = {k: value for k, value in found.items() if isinstance(value, float)}
            say(f"{name} at {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            with self._later():
                self.engine.log({f"{name}/{k}": value for k, value in found.items()}, step)
        assert key in results, f"the method selects by {key}, which is none of {sorted(results)}"
        value = results[key]
        if math.isnan(value) and self.scored.undefined is not None:
            return self.scored.undefined
        refuse_non_finite(step, f"the evaluation's {key}", value)
        return value

    def _save(self, score: float | None) -> None:
        dist.agree(self._unwritten)  # a run that went on from here would lack it
        step = self.progress.step
        doing.pause()
        tag = self.checkpoints.begin(step)
        try:
            self._write(step, tag, score)
        except DskdError:  # on every rank
            self.checkpoints.abandon(step)
            raise
        self._saved = step

    def _write(self, step: int, tag: str, score: float | None) -> None:
        folder = self.checkpoints.folder / tag
        self.engine.save(self.checkpoints.folder, tag)
        with dist.agreed(), writing(CHECKPOINT, folder):
            self.hooks.save(folder)
        about = {
            "world": dist.world(),
            "stage": self.engine.stage,
            "precision": self.precision,
            "score": None if score is None else asdict(self.scored.score(score)),
            "state": {"progress": asdict(self.progress), "hooks": self.hooks.state()},
        }
        self.checkpoints.commit(step, about)


def _speed(unread: _Unread, since: tuple[int, float]) -> float:
    """Tokens a second until the end of a step since so many tokens and seconds."""
    tokens, seconds = since
    return (unread.tokens - tokens) / (unread.seconds - seconds)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM and SIGINT instead of dying of them; the loop looks between steps."""
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
    if seen:  # too late for the loop: for the handlers outside it
        signal.raise_signal(seen[0])
