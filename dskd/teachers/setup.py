"""Set up what a run inherits from: its teacher, and what the loader or the trainer does for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dskd.data.prepared import Prepared
from dskd.data.routed import RoutedReader, RoutedView
from dskd.data.tokenizers import vocabulary_size
from dskd.data.views import Reader, View
from dskd.engine.ds_config import optimizer_device, precision_of
from dskd.engine.hooks import StepHooks
from dskd.engine.run_config import student_config
from dskd.errors import ConfigError
from dskd.methods.base import Method
from dskd.models.configs import hidden_size
from dskd.models.frozen import frozen_model, model_of
from dskd.settings.folders import cache_folder, student_settings
from dskd.settings.run import Run
from dskd.settings.teachers import (
    CONFIDENT,
    CachedTeacher,
    PanelTeacher,
    SelfTeacher,
    domain_of,
    each_teacher,
    section_name,
)
from dskd.stores.fingerprints import expected
from dskd.stores.logits import UNUSED_SLOTS, CachedLogits, CachedMasks, LogitCache
from dskd.system import dist
from dskd.teachers.average import Average
from dskd.teachers.mixture import FrozenMixture, MixedLogits, StoredMixture, rule_of
from dskd.teachers.panel import panel_teacher
from dskd.teachers.teacher import (
    FrozenTeacher,
    RoutedTeachers,
    ShownUnmasked,
    StoredTeacher,
    StudentAsTeacher,
    Teacher,
    group_by_domain,
)


@dataclass(frozen=True)
class TeacherSetup:
    """The teacher of a run, and what the loader and the trainer do for it.

    Attributes:
        teacher: None if there is none, or the student itself is it.
        view: what the loader shows of the rows where the teacher's signal was stored for certain
            masks; None: the run's own view.
        readers: columns that the loader adds to the batches for the teacher.
        hooks: what keeps a teacher made of the student's weights up to date.
        own: makes the teacher of a student that teaches itself.
    """

    teacher: Teacher | None = None
    view: View | None = None
    readers: tuple[Reader, ...] = ()
    hooks: StepHooks | None = None
    own: Callable[[nn.Module], Teacher] | None = None

    def teacher_of(self, student: nn.Module) -> Teacher | None:
        """The teacher, whatever it is."""
        return self.teacher if self.own is None else self.own(student)


def set_up(
    run: Run, temperature: float, prepared: Prepared, view: View, device: torch.device
) -> TeacherSetup:
    """Build the live teachers, or open and verify the caches, of a run (collective).

    Raises:
        StoreError: a cache is missing, damaged, or of another teacher, tokenizer, data or masking.
    """
    if isinstance(run.teacher, SelfTeacher):
        return _from_itself(run, run.teacher, prepared, device)
    if isinstance(run.teacher, PanelTeacher) and run.teacher.mixture is None:
        teacher, readers = panel_teacher(run, prepared, view, device)
        return TeacherSetup(teacher, readers=readers)
    if any(isinstance(each, CachedTeacher) for each in each_teacher(run.teacher).values()):
        return _cached(run, temperature, prepared, view)
    return _live(run, prepared, device)


def _live(run: Run, prepared: Prepared, device: torch.device) -> TeacherSetup:
    """Frozen models that are run on the batches."""
    vocabulary = vocabulary_size(prepared.tokenizer)
    live = {
        domain: FrozenTeacher(frozen(run, domain, prepared, device), vocabulary)
        for domain in each_teacher(run.teacher)
    }
    if isinstance(run.teacher, PanelTeacher):
        return TeacherSetup(FrozenMixture([*live.values()], rule_of(run.teacher)))
    if None in live:
        return TeacherSetup(live[None])
    by_index = {prepared.domains.index(domain): one for domain, one in live.items()}
    return TeacherSetup(RoutedTeachers(by_index), readers=(group_by_domain,))


def _cached(run: Run, temperature: float, prepared: Prepared, view: View) -> TeacherSetup:
    """Teachers whose logits were captured."""
    teachers = each_teacher(run.teacher)
    caches = {domain: _open(run, domain, prepared, view, temperature) for domain in teachers}
    if isinstance(run.teacher, PanelTeacher):
        return mixed(run.teacher, caches, temperature, vocabulary_size(prepared.tokenizer))
    logits = {
        domain: CachedLogits(cache, teachers[domain].use_k, temperature)
        for domain, cache in caches.items()
    }
    return _stored(caches, logits, prepared, temperature)


def _stored(
    caches: Mapping[str | None, LogitCache],
    logits: Mapping[str | None, CachedLogits],
    prepared: Prepared,
    temperature: float,
) -> TeacherSetup:
    """The teacher whose masks and logits the loader reads, each row's from its domain's cache."""
    teacher = StoredTeacher(temperature)
    if None in caches:
        return TeacherSetup(teacher, CachedMasks(caches[None]), (logits[None],))
    index = prepared.domains.index
    view = RoutedView({index(domain): CachedMasks(cache) for domain, cache in caches.items()})
    reader = RoutedReader({index(d): one for d, one in logits.items()}, UNUSED_SLOTS)
    return TeacherSetup(teacher, view, (reader,))


def mixed(
    panel: PanelTeacher, caches: Mapping[str, LogitCache], temperature: float, vocabulary: int
) -> TeacherSetup:
    """The teacher whose masks, which all caches share, and several logits the loader reads.

    Raises:
        ConfigError: a cache has no tail at temperature 1, and the rule asks how sure it is.
    """
    confident = panel.mixture.rule in CONFIDENT
    with dist.agreed():
        for name, cache in caches.items() if confident else ():
            if 1.0 not in cache.layout.temperatures:
                raise ConfigError(
                    f"{section_name(name)}.path: {cache.store.folder} has no tail at temperature "
                    f"1.0 (temperatures), at which teacher.mixture.rule asks how sure it is"
                )
    readers = [
        CachedLogits(cache, panel.teachers[name].use_k, temperature, at_1=confident)
        for name, cache in caches.items()
    ]
    teacher = StoredMixture(rule_of(panel), temperature, vocabulary)
    return TeacherSetup(teacher, CachedMasks(next(iter(caches.values()))), (MixedLogits(readers),))


def frozen(run: Run, domain: str | None, prepared: Prepared, device: torch.device) -> nn.Module:
    """The teacher model of a live or captured teacher, replicated or ZeRO-3-sharded."""
    teacher = each_teacher(run.teacher)[domain]
    where = f"{section_name(domain)}.model"
    return frozen_model(run, teacher, teacher.model, where, prepared, device)


def _from_itself(
    run: Run, teacher: SelfTeacher, prepared: Prepared, device: torch.device
) -> TeacherSetup:
    """The student as it is, a frozen copy of it as it starts, or a replica at its average."""
    vocabulary = vocabulary_size(prepared.tokenizer)

    def unmasked(teacher: Teacher) -> Teacher:
        return ShownUnmasked(teacher) if run.data.objective == "masked" else teacher

    if teacher.weights == "current":
        return TeacherSetup(own=lambda student: unmasked(StudentAsTeacher(student, vocabulary)))
    settings = student_settings(run)
    if teacher.weights == "frozen":
        copy = frozen_model(run, teacher, settings, "model", prepared, device)
        return TeacherSetup(unmasked(FrozenTeacher(copy, vocabulary)))
    with dist.agreed():
        ds = student_config(run, hidden_size(settings, where="model"))
        precision = precision_of(ds)
        replica = model_of(run, settings, "model", prepared.tokenizer, None, precision, device)
        replica.to(device)  # its buffers
    average = Average(replica, teacher.decay)  # before its gradients are off: it keeps what trains
    return TeacherSetup(unmasked(FrozenTeacher(replica, vocabulary)), hooks=average)


def check_average(run: Run, method: Method) -> None:
    """Refuse what an average of the student's weights cannot be kept of.

    Raises:
        ConfigError: names the setting.
    """
    teacher = run.teacher
    averaged = isinstance(teacher, SelfTeacher) and teacher.weights == "average"
    if not (averaged and method.wants_teacher()):
        return
    if method.remakes_student:
        raise ConfigError(
            f"teacher.weights: average, but method {method.kind} makes another model of its "
            f"student, whose weights a copy of the first one cannot follow; use frozen"
        )
    if optimizer_device(run.deepspeed) == "nvme":
        raise ConfigError(
            f"teacher.weights: average, but {run.deepspeed} keeps the weights to average on NVMe; "
            f"use frozen (or, for a masked LM, current)"
        )


def _open(
    run: Run, domain: str | None, prepared: Prepared, view: View, temperature: float
) -> LogitCache:
    """Open a cache; each rank verifies its share of the shards."""
    teacher = each_teacher(run.teacher)[domain]
    folder = cache_folder(run, domain)
    wanted = expected(run, teacher, prepared, view, section_name(domain))
    with dist.agreed():
        cache = LogitCache(folder, wanted, (dist.rank(), dist.world()))
        cache.check(teacher.use_k, temperature)
        _check_scope(cache, domain_of(domain), view)
    return cache


def _check_scope(cache: LogitCache, domain: str | None, view: View) -> None:
    """Refuse a cache of fewer masks or other rows than the run will read."""
    folder, spec = cache.store.folder, cache.store.spec
    if spec.draws != view.draws:
        raise ConfigError(
            f"data.masking.draws: {view.draws}, but {folder} holds {spec.draws} masks of each row"
        )
    if cache.layout.domain not in (None, domain):
        raise ConfigError(f"{folder}: holds the rows of domain {cache.layout.domain!r} only")
