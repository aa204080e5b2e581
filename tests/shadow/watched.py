"""Records the waits of a run by what they are within: a micro-batch, the rest of training ..."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from dskd.engine.engine import Engine
from dskd.narrowing.insert import Surgery
from dskd.narrowing.rule import Rule
from dskd.runs import plan
from dskd.stores import fill
from dskd.training.objective import Objective
from dskd.training.passes import Passes
from dskd.training.trainer import Trainer
from tests.shadow.waits import Wait, Watch

_WITHIN = {
    "training": [(Trainer, "train")],
    "passes": [(Passes, "run")],
    "evaluation": [(Trainer, "_score")],
    "checkpoint": [(Trainer, "_save")],
    "sweep": [(fill, "sweep")],
    "masks": [(Rule, "_choose"), (Rule, "_on"), (Surgery, "mask"), (Surgery, "compact")],
}
_COUNTED = {
    "training": [(Engine, "step")],
    "passes": [(Engine, "backward")],
    "evaluation": [(Objective, "forward_evaluation")],
    "masks": [(Rule, "_choose")],
}


class Waits(NamedTuple):
    """What rank 0 of a run has waited for.

    Attributes:
        times: how many steps (``training``), micro-batches (``passes``), batches of an evaluation
            and of a sweep over all rows, and choices of WID's units (``masks``) there were.
        found: waits by what they were within.
    """

    times: Counter[str]
    found: Counter[tuple[str, Wait]]

    def own(self, within: str) -> dict[str, int]:
        """Those that are dskd's to mend, by line and reason."""
        return {
            " <- ".join(dict.fromkeys((wait.place, wait.under))) + f" ({wait.what})": count
            for (label, wait), count in self.found.items()
            if label == within and wait.own
        }


def read(file: Path) -> Waits:
    """What :func:`watched` wrote."""
    times, found = json.loads(file.read_text())
    return Waits(Counter(times), Counter({(label, Wait(*w)): n for label, w, n in found}))


@contextmanager
def watched(file: Path) -> Iterator[None]:
    """Ranks that are forked inside write the waits of rank 0's run to a file."""
    watch, times = Watch(), Counter[str]()

    def execute(*args: Any) -> None:
        with watch:
            inner(*args)
        found = [[label, wait, count] for (label, wait), count in watch.found.items()]
        if os.environ["RANK"] == "0":
            file.write_text(json.dumps([times, found]))

    def counted(within: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            times[within] += 1
            return function(*args, **kwargs)

        return call

    def labelled(within: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if within == "sweep":  # a pass of the model, which is the first argument, for a batch
                args = (counted(within, args[0]), *args[1:])
            before, watch.label = watch.label, within
            try:
                return function(*args, **kwargs)
            finally:
                watch.label = before

        return call

    inner = plan.execute
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "execute", execute))
        for wrap, owners in ((labelled, _WITHIN), (counted, _COUNTED)):
            for within, (owner, name) in [(w, f) for w, found in owners.items() for f in found]:
                replaced = wrap(within, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, replaced))
        yield
