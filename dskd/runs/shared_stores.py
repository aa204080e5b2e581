"""Whether caches and scores that an earlier run of a recipe makes are of a later one's rows.

Both are kept by row, so the two runs must have the same rows in the same tokens, and a cache the
same masks. Stores refuse others by their fingerprints; here it follows from the settings, before
anything is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dskd.engine.row_masks import masks_of
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.runs.vocabularies import named, other_documents, other_tokenizer
from dskd.settings.checks import Problems
from dskd.settings.compare import differences
from dskd.settings.data import Data
from dskd.settings.folders import cache_folder
from dskd.settings.recipe import Recipe
from dskd.settings.run import Run
from dskd.settings.teachers import (
    CachedTeacher,
    MemberName,
    PanelMember,
    PanelTeacher,
    domain_of,
    each_teacher,
    section_name,
)


def refuse_other_stores(recipe: Recipe, methods: Mapping[str, Method], name: str) -> None:
    """Refuse caches and scores of earlier runs that are of other rows, masks, teachers or sizes,
    and a cache that no run captures.

    Raises:
        ConfigError: names the setting, the other run, and what differs.
    """
    lines = [
        f"{named(recipe, name, place)}: {text}" for place, text in _stores(recipe, methods, name)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _stores(recipe: Recipe, methods: Mapping[str, Method], name: str) -> Problems:
    """What is wrong with the caches and scores that the run reads."""
    run, method = recipe.runs[name], methods[name]
    earlier = {n: recipe.runs[n] for n in list(recipe.runs)[: list(recipe.runs).index(name)]}
    cached = {d: t for d, t in each_teacher(run.teacher).items() if isinstance(t, CachedTeacher)}
    for domain, teacher in cached.items() if method.wants_teacher() else ():
        place = f"{section_name(domain)}.path"
        found = _capturer(earlier, methods, cache_folder(run, domain))
        if found is not None:
            yield from _other_cache(recipe, run, method, domain, *found)
        elif teacher.model is None and not cache_folder(run, domain).exists():
            folder = cache_folder(run, domain)
            yield place, f"no cache in {folder}, and none of the earlier runs captures one there"
    if method.wants_teacher() and isinstance(run.teacher, PanelTeacher):
        for maker, made in earlier.items():
            if _fills_scores(made, methods[maker], run):
                yield from _other_scores(recipe, run, run.teacher, maker)
                break
    yield from _other_masks_store(recipe, run, earlier)


def _capturer(
    earlier: Mapping[str, Run], methods: Mapping[str, Method], folder: Path
) -> tuple[str, str | None] | None:
    """The first run that captures a cache in a folder, and the domain that it is of."""
    for name, run in earlier.items():
        for domain, teacher in each_teacher(run.teacher).items():
            if not isinstance(teacher, CachedTeacher) or teacher.model is None:
                continue
            if methods[name].wants_teacher() and _same_path(cache_folder(run, domain), folder):
                return name, domain
    return None


def _same_path(a: Path, b: Path) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)


def _other_cache(
    recipe: Recipe, run: Run, method: Method, domain: str | None, maker: str, of: str | None
) -> Problems:
    """What keeps a run from reading the cache that ``maker`` captures, of the domain ``of``."""
    section, made = section_name(domain), recipe.runs[maker]
    teacher, source = each_teacher(run.teacher)[domain], each_teacher(made.teacher)[of]
    assert isinstance(teacher, CachedTeacher) and isinstance(source, CachedTeacher)
    other = [*_other_rows(recipe, run, made), *_other_masks(run, made)]
    if other:
        text = f"run {maker} captures it with other rows or masks: {', '.join(other)} differ"
        yield f"{section}.path", text
    if domain_of(of) is not None and of != domain_of(domain):
        yield f"{section}.path", f"run {maker} captures rows of the domain {of!r} only"
    if teacher.model is not None:
        names = ("model", "precision", "k", "temperatures", "values")
        for name in [n for n in names if getattr(teacher, n) != getattr(source, n)]:
            yield f"{section}.{name}", f"run {maker} captures the cache with another one"
        return
    if method.temperature not in source.temperatures:
        stored = ", ".join(map(str, source.temperatures))
        yield (
            f"method.{method.temperature_setting}",
            f"{method.temperature} is not among the temperatures of run {maker}'s cache: {stored}",
        )
    if teacher.use_k is not None and teacher.use_k > source.k:
        yield f"{section}.use_k", f"{teacher.use_k} is more than the {source.k} of run {maker}"


def _fills_scores(made: Run, method: Method, run: Run) -> bool:
    """Whether a run's panel of classifiers keeps its scores where ``run`` has those of its own."""
    return (
        method.wants_teacher()
        and all(
            isinstance(each.teacher, PanelTeacher) and each.teacher.mixture is None
            for each in (made, run)
        )
        and _same_path(cache_folder(made), cache_folder(run))
    )


def _other_scores(recipe: Recipe, run: Run, panel: PanelTeacher, maker: str) -> Problems:
    """What keeps a run from the scores that the panel of ``maker`` keeps in the same folder. Each
    of the two may have teachers that the other lacks."""
    made = recipe.runs[maker]
    source = made.teacher
    assert isinstance(source, PanelTeacher), source
    other = [*_other_rows(recipe, run, made), *_other_validation(run.data, made.data)]
    if other:
        text = f"run {maker} fills it with scores of other rows: {', '.join(other)} differ"
        yield "teacher.path", text
    passes = [each.passes if each.asks_passes else 1 for each in (panel, source)]
    if passes[0] != passes[1]:
        text = f"{passes[0]} passes a row, but run {maker} fills {panel.path} with {passes[1]}"
        yield "teacher.passes", text
    if max(passes) > 1 and panel.dropout != source.dropout:
        yield "teacher.dropout", f"run {maker} fills {panel.path} with another one"
    random = any(member.model.path is None for member in panel.teachers.values())
    if (random or max(passes) > 1) and run.seed != made.seed:
        text = f"run {maker} fills {panel.path} with scores by another one"
        yield "seed", f"{text}, of random weights and dropout"
    for name in [name for name in panel.teachers if name in source.teachers]:
        for field in _other_teacher(run, panel.teachers[name], source.teachers[name]):
            text = f"run {maker} fills {cache_folder(run, name)} with another one"
            yield f"{section_name(MemberName(name))}.{field}", text


def _other_teacher(run: Run, a: PanelMember, b: PanelMember) -> Iterator[str]:
    """The settings by which what two teachers of panels say of the run's rows differs."""
    for field in ("model", "precision", "own_tokenizer"):
        if getattr(a, field) != getattr(b, field):
            yield field
    if a.labels is not None and b.labels is not None and a.labels != b.labels:
        yield "labels"  # null: they are in the model's folder, and may well be the same
    every = _domains(run.data)
    if set(a.domains or every) != set(b.domains or every):
        yield "domains"


def _other_validation(a: Data, b: Data) -> Iterator[str]:
    """Whether two runs have validation rows of their own that are different ones."""
    if a.validation is None or b.validation is None:
        return  # they are some of the sources' rows
    own = [Data(sources=each.validation) for each in (a, b)]
    if any(other_documents(*own)):
        yield "data.validation"


def _other_masks_store(recipe: Recipe, run: Run, earlier: Mapping[str, Run]) -> Problems:
    """What keeps a run's masks from what those of an earlier run leave in the same folder."""
    for maker, made in earlier.items():
        other = masks_of(run).otherwise_than(made)
        if other is not None:
            other = [*_other_rows(recipe, run, made), *other]
            if other:
                text = f"run {maker} fills it otherwise: {', '.join(other)} differ"
                yield "data.masking.store", text
            return


def _other_rows(recipe: Recipe, a: Run, b: Run) -> Iterator[str]:
    """The settings by which the training rows of two runs differ."""
    for name in ("objective", "questions", "block_size", "packing"):
        if getattr(a.data, name) != getattr(b.data, name):
            yield f"data.{name}"
    if _domains(a.data) != _domains(b.data):
        yield "the domains of data.sources"
    yield from other_documents(a.data, b.data)
    if other_tokenizer(recipe, a, b):
        yield "data.tokenizer"


def _domains(data: Data) -> list[str]:
    return [source.domain for source in (*data.sources, *(data.validation or []))]


def _other_masks(a: Run, b: Run) -> Iterator[str]:
    """The settings by which the masks of two runs' training rows differ."""
    if a.data.objective == "causal":
        return
    if a.seed != b.seed:
        yield "seed"
    masked = [run.model_copy(update={"data": Data(masking=run.data.masking)}) for run in (a, b)]
    names = (change.partition(":")[0] for change in differences(masked[0], masked[1]))
    yield from (name for name in names if name.startswith("data.masking"))
