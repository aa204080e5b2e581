"""A stage of a run, and what it is given: so that any room can bring one.

The stages of a run are those of the core (``runs/stages.py``) and those that its method and its
masks bring. Each leaves something in the run's folder that, whole, says that it is done, and
reads only what earlier ones left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dskd.data.prepared import Prepared, RowSet
from dskd.data.views import View
from dskd.engine.checkpoints import Checkpoints
from dskd.settings.data import Source
from dskd.settings.folders import RunFolder
from dskd.settings.run import Run


class StageContext(Protocol):
    """One run being carried out; what costs time is made when it is first used, by all ranks."""

    device: torch.device

    @property
    def given(self) -> Run:
        """The settings as they are written, for a stage that comes before ``data``."""
        ...

    @property
    def run(self) -> Run:
        """The settings, with the length of the run in steps."""
        ...

    @property
    def folder(self) -> RunFolder:
        """What the run writes, and where."""
        ...

    @property
    def prepared(self) -> Prepared:
        """The prepared rows."""
        ...

    def rows_of(self, sources: Sequence[Source]) -> RowSet:
        """All rows of other sources, with the tokenizer, classes and domains of ``prepared``;
        domains that only they have come behind. Collective where it is first called of them."""
        ...

    @property
    def view(self) -> View:
        """What training rows look like to the student."""
        ...

    @property
    def validation_view(self) -> View:
        """What validation rows look like, whatever the masks of training are."""
        ...

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        ...

    @property
    def position(self) -> int:
        """Optimiser batches read until the newest checkpoint, 0 if there is none (collective)."""
        ...


@dataclass(frozen=True)
class Stage:
    """One step from settings to scores.

    Attributes:
        name: what ``until`` and messages call it.
        run: does it, on all ranks, unless it is done (collective).
        before: the stage of the core that it comes before; None: a stage of the core itself.
        leaves: patterns, in the run's folder, of all that it makes and that depends on settings; if
            it comes after ``train``, that goes when a finished run is lengthened.
        whole: what is there when all of it is, below the run's folder; None: nothing says so (a
            store's manifest does not: it comes first).
        wanted: whether a run of these settings has to leave anything here.
        chosen: whether what it leaves depends on settings that are marked ``CHOSEN_LATER``.
        report: HTML for ``report.html``, of the folders of a recipe's finished runs by name; empty
            where it has nothing to show.
        kind: of what it leaves; a later run reads only what is of the kind that it makes itself.
    """

    name: str
    run: Callable[[Any], object]
    before: str | None = None
    leaves: tuple[str, ...] = ()
    whole: str | None = None
    wanted: Callable[[Run], bool] = lambda run: True
    chosen: bool = True
    report: Callable[[Mapping[str, RunFolder]], str] | None = None
    kind: str = ""


def in_order(core: Sequence[Stage], brought: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of a run: each one that is brought before the core's that it names, and of several
    there in the order in which they are given."""
    names = [stage.name for stage in (*core, *brought)]
    assert len(set(names)) == len(names), f"two stages of one name: {names}"
    unknown = [s.name for s in brought if s.before not in {stage.name for stage in core}]
    assert not unknown, f"stages before none of the core's: {unknown}"
    return tuple(
        stage for one in core for stage in (*(s for s in brought if s.before == one.name), one)
    )
