"""Checks of a run's settings together with its method and its masks, before anything starts."""

from __future__ import annotations

from dskd.engine.row_masks import masks_of
from dskd.methods.base import Method
from dskd.settings.checks import Problems, problems_of, refuse_problems
from dskd.settings.run import Every, Run
from dskd.settings.teachers import CachedTeacher, SelfTeacher, each_teacher, section_name


def validate(run: Run, method: Method, *, world: int, prefix: str = "") -> None:
    """Refuse settings that contradict each other.

    Args:
        world: number of ranks.
        prefix: dotted name of the run in its recipe, put before the names in messages.

    Raises:
        ConfigError: every contradiction, one a line.
    """
    refuse_problems(_problems(run, method, world), prefix)


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
    selects = masks.selects and method.selection() is not None
    if selects and not _is_multiple(run.checkpoint.every, run.evaluation.every):
        yield (
            "checkpoint.every",
            f"{run.checkpoint.every} is not a multiple of evaluation.every {run.evaluation.every};"
            " the best checkpoint is chosen by its evaluation",
        )
    if method.wants_teacher():
        yield from _teacher(run, method)
    yield from masks.problems(method.columns(), cached=cached)


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
