"""Early stopping: a run ends once so many evaluations in a row have not bettered its best score."""

from __future__ import annotations

import math
from typing import Any

from dskd.engine.checkpoints import Selection
from dskd.engine.hooks import StepHooks
from dskd.system.log import say


class EarlyStopping(StepHooks):
    """Counts evaluations. The count is part of every checkpoint, so a run that goes on from one
    ends after the step after which it would have ended.

    Args:
        patience: evaluations without a better score after which the run is over.
        selection: which score, and its direction.
    """

    def __init__(self, patience: int, selection: Selection) -> None:
        self._patience = patience
        self._selection = selection
        self._best: float | None = None
        self._since = 0

    def evaluated(self, score: float) -> None:
        """Count one evaluation of a student that may be exported."""
        sign = 1.0 if self._selection.higher_is_better else -1.0
        if self._best is None or sign * score > sign * self._best:
            self._best, self._since = score, 0
            return
        self._since += 1
        if self._since == self._patience:
            text = f"{self._since} evaluations without a better {self._selection.metric}"
            say(f"{text} than {self._best:.4f}: training ends")

    def over(self) -> bool:
        """Whether patience is at its end."""
        return self._since >= self._patience

    def state(self) -> dict[str, Any]:
        """The best score so far, and the evaluations since then."""
        return {"best": self._best, "since": self._since}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        best, since = state["best"], state["since"]
        if best is not None and not (type(best) in (int, float) and math.isfinite(best)):
            raise ValueError(f"best score {best!r}")
        if type(since) is not int or since < 0:  # a bool is an int, too
            raise ValueError(f"evaluations since the best: {since!r}")
        self._best, self._since = best, since
