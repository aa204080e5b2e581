"""Settings of what keeps a run from unlearning earlier tasks, and what they do not go with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from dskd.engine.ds_edits import check_edits, check_unscaled
from dskd.errors import ConfigError
from dskd.settings.base import Section
from dskd.settings.folders import RunFolder
from dskd.settings.run import Run


class Penalty(Section):
    """Weights that earlier tasks need are pulled back to where they were: Elastic Weight
    Consolidation (``ewc``), Memory Aware Synapses (``mas``). When the model is trained, its own
    importances are measured, by the answers to the run's new questions alone."""

    kind: Literal["ewc", "mas"]
    strength: float = Field(1.0, gt=0)
    """Factor of ``sum omega (w - anchor)^2``; the importances omega are of all earlier tasks."""
    earlier: str | None = None
    """Folder of the run of the task before (``run:NAME``), as whose export this one starts; null:
    this is the first task, which nothing is pulled in."""
    rows: Literal["example", "batch"] = "example"
    """Whose gradients are squared (``ewc``; ``mas``: taken without sign): single rows', or those of
    the mean loss of ``train.batch`` rows, as in the original, whose importances are far smaller."""
    anchor: Literal["latest", "first"] = "latest"
    """Where to: the model of the task before; or, as in the original, the one that the first task
    began with."""
    update: Literal["decoupled", "gradient"] = "decoupled"
    """How: after the optimizer's step, times the learning rate, as in the original; or as part of
    the gradient, so that Adam scales the pull as it does the rest."""

    @property
    def folder(self) -> Path | None:
        """That of ``earlier``."""
        return None if self.earlier is None else Path(self.earlier)

    def check(self, run: Run) -> None:
        """Refuse a run in which the pull cannot be made.

        Raises:
            ConfigError: names the setting.
        """
        if self.earlier is None:
            return
        if run.model.path is None:
            raise ConfigError(
                f"method.penalty.earlier: {self.earlier} has importances of its export, but "
                f"model.path is null; start from that export"
            )
        self._refuse_other_export(Path(run.model.path))
        if run.model.slice is not None:
            text = "method.penalty.earlier has importances of the whole model; leave it out"
            raise ConfigError(f"model.slice: {text}")
        who = "method.penalty"
        if self.update == "gradient":
            check_unscaled(run, f"{who}.update gradient")
        check_edits(run, who, gradients=self.update == "gradient")

    def _refuse_other_export(self, start: Path) -> None:
        """Refuse a start as the export of another run, though not a copy of the right one, of which
        the files themselves tell."""
        assert self.folder is not None
        export = RunFolder(self.folder).export
        if start.name == export.name and os.path.abspath(start) != os.path.abspath(export):
            raise ConfigError(
                f"method.penalty.earlier: {self.earlier} has importances of its own export, but "
                f"model.path is {start}"
            )


class Memories(Section):
    """Rows of earlier tasks, which a step must not make worse: Gradient Episodic Memory (``gem``),
    or its average (``a_gem``). Each domain of ``data.memory`` is a memory; only the answers of its
    rows count."""

    kind: Literal["gem", "a_gem"]
    share: float = Field(0.2, gt=0)
    """Rows of each memory, as a share of the number of the run's new rows; all there are, where
    that is fewer."""
    per_step: int | None = Field(None, ge=1)
    """How many of a memory's rows are looked at before a step, each time others; null: all."""
    every: int = Field(1, ge=1)
    """Steps that the gradient of a memory is used for until it is taken anew."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of each memory's gradient and of the step's, before they are compared; so
    ``train.clip``, which would come after it, is 0."""
    margin: float = Field(0.5, ge=0)
    """Least multiple of each memory's gradient that is added where any is violated (``gem``)."""
    ridge: float = Field(1e-3, gt=0)
    """Added to the diagonal of the gradients' products (``gem``)."""

    def check(self, run: Run) -> None:
        """Refuse a run in which the gradient cannot be projected.

        Raises:
            ConfigError: names the setting.
        """
        if run.data.memory is None:
            raise ConfigError("data.memory: missing; method.memories takes rows of it")
        new = {s.domain for s in run.data.sources} - {*run.data.replayed_domains}
        for number, source in enumerate(run.data.memory):
            if source.domain in new:
                text = f"{source.domain!r} is new by data.sources; a memory is of an earlier task"
                raise ConfigError(f"data.memory.{number}.domain: {text}")
        for name in ("margin", "ridge") if self.kind == "a_gem" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"method.memories.{name}: of no use to a_gem; leave it out")
        if run.train.clip:
            raise ConfigError(
                f"train.clip: {run.train.clip} would clip what method.memories has clipped and "
                f"projected already (method.memories.clip); it must be 0"
            )
        check_unscaled(run, "method.memories")
        check_edits(run, "method.memories")
