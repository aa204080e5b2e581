"""A step's numbers are read when the next one is queued, and before anything that rests on them."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from dskd.batch import Batch, Positions, Signal, Term
from dskd.engine.checkpoints import Selection
from dskd.engine.hooks import StepHooks
from dskd.errors import DataError, NonFiniteError
from dskd.methods.base import Method
from dskd.ops import positions_ce
from dskd.settings.run import Run, Train
from dskd.system.log import Metrics
from dskd.training import trainer as loop
from dskd.training.step_numbers import Queued
from dskd.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.training import test_passes


class Spoilt(Method):
    """Cross entropy whose gradient is NaN in one step."""

    kind: str = "spoilt"
    in_step: int = 0

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        factor = float("nan") if step + 1 == self.in_step else 1.0
        return {"tokens": Term(positions_ce(positions).total * factor, {})}


class Counted(StepHooks):
    """Shows how many steps were taken when it was asked."""

    taken = 0

    def after_step(self, weights: Any, step: int, lr: float) -> None:
        self.taken = step + 1

    def rates(self) -> dict[str, float]:
        return {"taken": self.taken}


class Told(Metrics):
    """Notes what is written, as ``log N`` for a step."""

    def __init__(self, events: list[str]) -> None:
        self.path, self._events = "metrics", events

    def write(self, **values: Any) -> None:
        if "loss" in values:
            assert values["taken"] == values["step"]
            assert values["seconds"] > 0 and values["tokens_per_second"] > 0
            self._events.append(f"log {values['step']}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of 5 steps.

    Attributes:
        bad: the step with a NaN.
        every: steps between evaluations, with which checkpoints come.
        missing: the step whose batch cannot be made.
    """

    bad: int = 0
    every: int = 3
    missing: int = 0
    log_every: int | None = 1


def events_of(rank: int, case: Case) -> tuple[list[str], str]:
    """What a run does, and the error that it ends with."""
    del rank
    events: list[str] = []
    try:
        _trainer(events, case).train()
    except (NonFiniteError, DataError) as problem:
        return events, str(problem)
    return events, ""


def _trainer(events: list[str], case: Case) -> Trainer:
    ds = test_passes.settings(0, "fp32", 1, offload=False)
    method = Spoilt(in_step=case.bad)
    trainer, engine = test_passes.trainer_of(ds, "fp32", Counted(), dropout=False)
    engine.module.method = trainer.method = method
    trainer.run = Run(
        train=Train(steps=5, lr=0.01),
        log_every=case.log_every,
        evaluation={"every": case.every},
    )
    trainer.scored = Selection("eval_nll", higher_is_better=False)
    trainer.metrics = Told(events)
    step, read = trainer.step, Queued.read

    def launch(stop: bool) -> Queued:
        number = trainer.progress.step + 1
        if number == case.missing:
            raise DataError("no such row")
        events.append(f"launch {number}")
        return step(stop)

    def numbers(self: Queued) -> Any:
        events.append(f"read {self.number}")
        return read(self)

    def evaluate() -> dict[str, dict[str, float]]:
        events.append(f"evaluate {trainer.progress.step}")
        return {"eval": {"nll": 1.0}}

    trainer.step, trainer.evaluate, Queued.read = launch, evaluate, numbers
    trainer._save = lambda score: events.append(f"save {trainer.progress.step}")
    return trainer


def scores_of(rank: int, score: float, undefined: float | None) -> float | str:
    """What a checkpoint keeps of an evaluation that comes to ``score``."""
    del rank
    trainer = _trainer([], Case())
    trainer.scored = Selection("eval_x", higher_is_better=True, undefined=undefined)
    trainer.evaluate = lambda: {"eval": {"x": score}}
    try:
        return trainer._score()
    except NonFiniteError as problem:
        return str(problem)


@pytest.mark.parametrize(
    ("score", "undefined", "wanted"),
    [
        (0.5, -1.0, 0.5),
        (math.nan, -1.0, -1.0),
        (-math.inf, -1.0, "step 0: the evaluation's eval_x is -inf; the last checkpoint is intact"),
        (math.nan, None, "step 0: the evaluation's eval_x is nan; the last checkpoint is intact"),
    ],
)
def test_an_undefined_score_is_the_worst_and_no_mistake(score, undefined, wanted):
    assert run_ranks(scores_of, score, undefined, world=1) == [wanted]


def ran(**about: int) -> tuple[list[str], str]:
    return run_ranks(events_of, Case(**about), world=1)[0]


FIRST = ["launch 1", "launch 2", "read 1", "log 1", "launch 3", "read 2"]
CLOSED = [*FIRST, "log 2", "read 3", "log 3", "evaluate 3", "save 3"]
LAST = ["read 5", "log 5", "evaluate 5", "save 5"]


def test_a_step_is_read_when_the_next_is_queued_or_something_rests_on_it():
    assert ran() == ([*CLOSED, "launch 4", "launch 5", "read 4", "log 4", *LAST], "")


def test_what_is_not_logged_is_read_all_the_same():
    """A run that goes on with NaN until the next log line may save it before."""
    expected = [event for event in ran()[0] if event not in {"log 1", "log 3"}]
    assert ran(log_every=2) == (expected, "")
    assert ran(bad=3, log_every=5)[1].startswith("step 3: ")


@pytest.mark.parametrize(("every", "then"), [(3, FIRST), (2, [*FIRST[:4], "read 2"])])
def test_a_spoilt_step_is_named_and_never_saved(every, then):
    """The third step begins before the second one's loss is known, a checkpoint does not."""
    problem = "step 2: the loss is nan; the last checkpoint is intact"
    assert ran(bad=2, every=every) == (then, problem)


def test_an_error_of_the_next_step_takes_no_line_of_the_log_along():
    assert ran(missing=3) == ([*FIRST[:4], "read 2", "log 2"], "no such row")


def test_an_error_of_the_next_step_is_not_told_in_the_place_of_its_cause():
    """A spoilt student can make all sorts of errors."""
    (events, problem) = ran(bad=2, missing=3)
    assert events == [*FIRST[:4], "read 2"] and problem.startswith("step 2: the loss is nan")


def shown_of(rank: int, seconds: float, log_every: int | None) -> tuple[list[str], list[str]]:
    """Which steps are logged, and which are shown."""
    del rank
    events: list[str] = []
    lines: list[str] = []
    loop.SHOWN_EVERY, loop.say = seconds, lines.append
    _trainer(events, Case(log_every=log_every)).train()
    logged = [event.removeprefix("log ") for event in events if event.startswith("log ")]
    return logged, [line.split()[1].removesuffix("/5") for line in lines if "/5" in line]


@pytest.mark.parametrize(
    ("seconds", "log_every", "logged", "shown"),
    [
        (math.inf, None, "12345", "15"),
        (0.0, None, "12345", "12345"),
        (math.inf, 2, "245", "245"),
    ],
)
def test_a_clock_decides_what_is_shown_and_nothing_else(seconds, log_every, logged, shown):
    found = run_ranks(shown_of, seconds, log_every, world=1)[0]
    assert found == (list(logged), list(shown))
