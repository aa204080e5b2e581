"""``data.masking.kind: hard_tokens`` in a run: its store, its views, what refreshes them.

The stage ``question`` scores the training rows once, before anything depends on which of the tokens
are hard; what chooses among them may be changed until then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from dskd.data.views import Reader, View
from dskd.engine.hooks import StepHooks
from dskd.engine.row_masks import RowMasks
from dskd.engine.stage import Stage, StageContext
from dskd.hardness.masks import HARD_LABELS, AnyHardView, HardCausalView, hard_view
from dskd.hardness.refresh import HardnessStores
from dskd.settings.checks import Problems, model_problems
from dskd.settings.data import HardTokens
from dskd.settings.folders import questions_folder
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, each_teacher
from dskd.system import dist

_PLACE = "data.masking"

_OF_MASKS = ("probability", "keep", "random", "shown", "least", "replacement", "sampler")
"""Settings that only masks need, which a causal LM has not."""


class HardTokenMasks(RowMasks):
    """Masks of the tokens that a model finds hard; of a causal LM, which labels those are."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        masking = run.data.masking
        assert isinstance(masking, HardTokens), masking
        self._masking = masking
        self._causal = run.data.objective == "causal"
        self._stores: HardnessStores | None = None
        self._view: AnyHardView | None = None
        # The loss of random masks rises while that of hard tokens falls, so it must select nothing.
        self.selects = self._causal

    def problems(self, columns: frozenset[str], *, cached: bool) -> Iterator[tuple[str, str]]:
        """Contradictions among the settings of the masks, and with the method and its teacher."""
        if self._masking.model is not None:
            yield from model_problems(f"{_PLACE}.model", self._masking.model)
        refresh, draws = self._masking.refresh, self._masking.draws
        if refresh is not None and draws is not None:
            yield f"{_PLACE}.draws", f"{_PLACE}.refresh changes the masks, so they cannot repeat"
        yield from self._of_causal(columns) if self._causal else self._of_masked()
        if not cached:
            return
        if self._causal:
            why = "cached, but a causal LM is to weigh hard tokens; use a live teacher"
            yield "teacher.kind", why
        elif refresh is not None:
            yield (
                f"{_PLACE}.refresh",
                f"{refresh}, but a cached teacher holds all masks beforehand; use a live one, or"
                " leave it null",
            )
        else:
            yield from super().problems(columns, cached=cached)

    def otherwise_than(self, earlier: Run) -> list[str] | None:
        """By which settings the scores of another run's store are others, if it is the same one."""
        run, own, theirs = self._run, self._masking, earlier.data.masking
        if not isinstance(theirs, HardTokens):
            return None
        if os.path.abspath(questions_folder(run)) != os.path.abspath(questions_folder(earlier)):
            return None
        other = [f"{_PLACE}.shown"] if own.shown != theirs.shown else []
        scorers = [own.model or run.model, theirs.model or earlier.model]
        other += ["the model that scores"] if scorers[0] != scorers[1] else []
        return other + (["seed"] if scorers[0].path is None and run.seed != earlier.seed else [])

    def _of_causal(self, columns: frozenset[str]) -> Problems:
        """What is set to no avail. Compared with the defaults, because settings that are read back
        (a run's config.yaml) name all of them."""
        for name in _OF_MASKS:
            value = getattr(self._masking, name)
            if value != HardTokens.model_fields[name].default:
                yield f"{_PLACE}.{name}", f"{value}, but a causal LM has no masks; leave it out"
        if HARD_LABELS not in columns:
            yield (
                f"{_PLACE}.kind",
                f"hard_tokens, but a causal LM has no masks, and method"
                f" {self._run.method['kind']} as set here gives hard tokens no weight of their own"
                " (self_evolution's hard_weight does)",
            )

    def _of_masked(self) -> Problems:
        masking = self._masking
        least = masking.probability if masking.least is None else masking.least
        most = masking.probability if masking.most is None else masking.most
        if masking.sampler == "counter" and least > most:
            unset = {"least": masking.least, "most": masking.most}
            null = " and ".join(f"{_PLACE}.{n}" for n, value in unset.items() if value is None)
            why = f" ({_PLACE}.probability, for want of {null})" if null else ""
            yield f"{_PLACE}.least", f"{least} is more than {_PLACE}.most {most}{why}"
        if masking.sampler == "original":
            yield from self._of_original()

    def _of_original(self) -> Problems:
        masking = self._masking
        for name, paper in (("metric", "confidence"), ("shown", "token")):
            if (value := getattr(masking, name)) != paper:
                text = f"{value}, but {_PLACE}.sampler original knows only {paper}"
                yield f"{_PLACE}.{name}", text
        for name in ("least", "most"):
            if getattr(masking, name) is not None:
                yield f"{_PLACE}.{name}", f"{_PLACE}.sampler original has no bounds; leave it null"
        if masking.replacement != "bert":
            text = f"{masking.replacement}, but {_PLACE}.sampler original replaces in its own way"
            yield f"{_PLACE}.replacement", text

    def models(self) -> Mapping[str, Model]:
        """The model that scores the rows, if it is not the student before training."""
        own = self._masking.model
        return {} if own is None else {f"{_PLACE}.model": own}

    def stages(self) -> Sequence[Stage]:
        """``question``: score the training rows."""
        leaves = ("questions", "questions-epoch-*")
        return (Stage("question", self._score, before="cache", leaves=leaves, chosen=False),)

    def _score(self, context: StageContext) -> None:
        # Of a finished run only a cache may still want masks.
        trained = dist.broadcast_object(context.folder.summary.exists())
        teachers = each_teacher(context.run.teacher).values()
        if any(isinstance(teacher, CachedTeacher) for teacher in teachers) or not trained:
            self._stores_of(context).first(context.position)

    def view(self, context: StageContext) -> View:
        """The masks of hard tokens, or a causal LM's rows as they are (collective)."""
        return self._hard_view(context)

    def readers(self, context: StageContext) -> Sequence[Reader]:
        """Of a causal LM, which labels are hard."""
        view = self._hard_view(context)
        return (view.read_hard,) if isinstance(view, HardCausalView) else ()

    def hooks(self, context: StageContext, student: nn.Module) -> StepHooks:
        """Scores the rows anew, by the student, where ``refresh`` says so."""
        stores = self._stores_of(context)
        stores.student = student
        return stores

    def _stores_of(self, context: StageContext) -> HardnessStores:
        if self._stores is None:
            about = (context.run, context.prepared, context.device, context.checkpoints)
            self._stores = HardnessStores(*about)
        return self._stores

    def _hard_view(self, context: StageContext) -> AnyHardView:
        if self._view is None:
            stores, prepared = self._stores_of(context), context.prepared
            with dist.agreed():
                self._view = hard_view(
                    context.run.data,
                    prepared.tokenizer,
                    context.run.seed,
                    stores,
                    scores=stores.fingerprint,
                    rowset=prepared.train,
                )
        return self._view
