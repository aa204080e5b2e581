"""How the training rows of a run are masked, and what the run does for that besides.

A kind of ``data.masking`` that needs more than random numbers (a store of what a model thinks of
the tokens) derives from :class:`RowMasks`; the core knows it by its line in :data:`MASKS` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from dskd.data.views import Reader, View, view_for
from dskd.engine.hooks import StepHooks
from dskd.engine.stage import Stage, StageContext
from dskd.settings.model import Model
from dskd.settings.parsing import named_object
from dskd.settings.run import Run
from dskd.system import dist

MASKS: dict[str, str] = {
    "random": "dskd.engine.row_masks:RowMasks",
    "hard_tokens": "dskd.hardness.row_masks:HardTokenMasks",
}
"""By ``data.masking.kind``, ``module:Class``; imported when needed: they lie in rooms above."""


class RowMasks:
    """Masks that are drawn at random, or none: those of a causal LM. The base of other kinds.

    Attributes:
        selects: whether the validation loss, which is of random masks, says which checkpoint of a
            run with these masks is the best.
    """

    selects: bool = True

    def __init__(self, run: Run) -> None:
        self._run = run

    def problems(self, columns: frozenset[str], *, cached: bool) -> Iterator[tuple[str, str]]:
        """What of the run does not go with these masks, a loss that reads these ``columns`` of a
        batch, and a ``cached`` teacher, if there is one: names of settings, and what is wrong."""
        del columns
        masked = self._run.data.objective == "masked"
        if cached and masked and self._run.data.masking.draws is None:
            text = "missing; a cached teacher holds so many masks of each row"
            yield "data.masking.draws", f"{text} (epoch e uses e % draws)"

    def otherwise_than(self, earlier: Run) -> list[str] | None:
        """By which settings an earlier run of the recipe fills a folder otherwise that these masks
        read; None: it fills none of theirs."""
        del earlier
        return None

    def models(self) -> Mapping[str, Model]:
        """Models that are needed for the masks alone, by the name of their setting."""
        return {}

    def stages(self) -> Sequence[Stage]:
        """What a run must make once, before its rows can be masked."""
        return ()

    def view(self, context: StageContext) -> View:
        """What training rows look like (collective)."""
        prepared = context.prepared
        with dist.agreed():
            return view_for(self._run.data, prepared.tokenizer, self._run.seed)

    def readers(self, context: StageContext) -> Sequence[Reader]:
        """What adds columns to the batches."""
        del context
        return ()

    def hooks(self, context: StageContext, student: nn.Module) -> StepHooks | None:
        """What keeps the masks up to date while the student trains, which may be in its engine by
        the time it is needed; None: nothing."""
        del context, student
        return None


def masks_of(run: Run) -> RowMasks:
    """The masks of a run's training rows, by the kind that its settings name."""
    return named_object(MASKS[run.data.masking.kind], "data.masking.kind")(run)
