"""Checks of a run's settings together with its method and its masks, before anything starts."""

from __future__ import annotations

from dskd.engine.checkpoints import Selection
from dskd.engine.ds_edits import check_edits
from dskd.engine.row_masks import RowMasks, masks_of
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.methods.metrics import BY_TEACHERS, TEACHER_KL
from dskd.settings.checks import Problems, problems_of, refuse_problems
from dskd.settings.examples import ReplayedSource, SquadSource
from dskd.settings.run import Every, Run
from dskd.settings.teachers import CachedTeacher, SelfTeacher, each_teacher, section_name
from dskd.tasks.answers import check_answer_metric


def validate(run: Run, method: Method, *, world: int, prefix: str = "") -> None:
    """Refuse settings that contradict each other.

    Args:
        world: number of ranks.
        prefix: dotted name of the run in its recipe, put before the names in messages.

    Raises:
        ConfigError: every contradiction, one a line.
    """
    refuse_problems(_problems(run, method, world), prefix)


def check_export(run: Run, method: Method) -> None:
    """Refuse to export the optimizer's weights where they are not those of the exported model, or
    cannot be read.

    Raises:
        ConfigError: names the setting.
    """
    if run.checkpoint.export == "trained":
        return
    if method.remakes_student:
        raise ConfigError(
            f"checkpoint.export: {run.checkpoint.export}, but method {method.kind} exports another "
            f"model than the one that the optimizer has the weights of; use trained"
        )
    check_edits(run, f"checkpoint.export {run.checkpoint.export}", gradients=False)


def selection_of(run: Run, method: Method, masks: RowMasks) -> Selection | None:
    """By which score a checkpoint of a run is the best; None: the last one is exported.

    Args:
        masks: the run's.
    """
    if run.evaluation.select == "last" or not masks.selects:
        return None
    return score_of(run, method)


def score_of(run: Run, method: Method, *, labelled: bool = True) -> Selection | None:
    """The score that tells checkpoints of a run apart, whether or not one is selected by it; None:
    the method has none.

    Args:
        labelled: whether a validation row has a label; without, the last checkpoint of a student
            of a panel keeps how far it is from its teachers.
    """
    by_teachers = run.evaluation.select == TEACHER_KL or not labelled
    return BY_TEACHERS if by_teachers else method.selection()


def _problems(run: Run, method: Method, world: int) -> Problems:
    masks = masks_of(run)
    cached = method.wants_teacher() and any(
        isinstance(teacher, CachedTeacher) for teacher in each_teacher(run.teacher).values()
    )
    yield from problems_of(run, world)
    if run.data.objective not in method.objectives:
        known = ", ".join(sorted(method.objectives))
        text = f"{run.data.objective} is not what method {method.kind} is for; it is for {known}"
        yield "data.objective", text
    if run.evaluation.select == TEACHER_KL and not method.compares_with_teachers:
        text = f"method {method.kind} has no panel of teachers; it goes by metric, or last"
        yield "evaluation.select", f"{TEACHER_KL}, but {text}"
    selects = selection_of(run, method, masks) is not None
    if run.evaluation.patience is not None and not selects:
        yield (
            "evaluation.patience",
            f"{run.evaluation.patience}, but no score selects a checkpoint here "
            f"(evaluation.select {run.evaluation.select}, method {method.kind}, "
            f"data.masking.kind {run.data.masking.kind}), so none ends the training",
        )
    if selects and not _is_multiple(run.saves_every, run.evaluation.every):
        yield (
            "checkpoint.every",
            f"{run.saves_every} is not a multiple of evaluation.every {run.evaluation.every};"
            " the best checkpoint is chosen by its evaluation",
        )
    yield from _earlier_tasks(run, method)
    yield from _sets(run, method)
    if method.wants_teacher():
        yield from _teacher(run, method)
    yield from masks.problems(method.columns(), cached=cached)


def _earlier_tasks(run: Run, method: Method) -> Problems:
    for n, source in enumerate(run.data.sources):
        missing = isinstance(source, ReplayedSource) and source.path is None
        if missing and not method.writes_replayed:
            text = f"missing; by these settings method {method.kind} has no such rows written"
            yield f"data.sources.{n}.path", text
    if run.data.memory is not None and not method.reads_memory:
        text = f"by these settings method {method.kind} reads none of it; leave it out"
        yield "data.memory", text


def _sets(run: Run, method: Method) -> Problems:
    """Named sets that the method cannot be evaluated on, and metrics that lack something."""
    for name, own in run.evaluation.sets.items():
        where = f"evaluation.sets.{name}"
        if own.metric is None:
            if type(method).evaluation_readers is not Method.evaluation_readers:
                text = f"method {method.kind} is evaluated by what is stored of the validation rows"
                yield where, f"{text}, which other rows lack"
        else:
            details = all(isinstance(s, SquadSource) and s.answers for s in own.sources)
            try:
                check_answer_metric(own.metric, details, f"{where}.metric")
            except ConfigError as problem:
                yield f"{where}.metric", str(problem).removeprefix(f"{where}.metric: ")


def _is_multiple(rarer: Every, every: Every) -> bool:
    """Whether, each time that the one is due, the other is, too."""
    if isinstance(rarer, int) and isinstance(every, int):
        return rarer % every == 0
    return every in (rarer, 1)


def _teacher(run: Run, method: Method) -> Problems:
    if run.teacher is None:
        yield "teacher", f"the method {method.kind} needs one"
    causal = run.data.objective == "causal"
    if causal and isinstance(run.teacher, SelfTeacher) and run.teacher.weights == "current":
        yield (
            "teacher.weights",
            "current, but a causal LM always sees its rows without masks, so its own distribution"
            " has nothing to teach it; use frozen or average",
        )
    for domain, teacher in each_teacher(run.teacher).items():
        stored = teacher.temperatures if isinstance(teacher, CachedTeacher) else None
        if stored is not None and method.temperature not in stored:
            yield (
                f"method.{method.temperature_setting}",
                f"{method.temperature} is not in {section_name(domain)}.temperatures: "
                + ", ".join(map(str, stored)),
            )
