"""Set up what a run inherits from: its teacher, and for a cached one what the loader attaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dskd import dist
from dskd.batch import IGNORE
from dskd.checks import cache_folder
from dskd.data.blocks import Prepared
from dskd.data.loader import Attach, Attachment
from dskd.data.masking import View
from dskd.data.vocabulary import vocabulary_size
from dskd.ds_config import precision_of
from dskd.engine import shard_teacher
from dskd.errors import ConfigError
from dskd.files import fingerprint
from dskd.hardware import DTYPES, resolve, teacher_config
from dskd.logit_cache import LogitCache
from dskd.models.build import build, hidden_size, model_fingerprint
from dskd.settings import CachedTeacher, LiveTeacher, RoutedTeacher, Run
from dskd.teacher import Cached, Live, Routed, Teacher


@dataclass(frozen=True)
class Inheritance:
    """A run's teacher; ``attach`` is what the loader adds to its batches for a cached one."""

    teacher: Teacher | None = None
    attach: Attach | None = None


def each_teacher(run: Run) -> dict[str | None, LiveTeacher | CachedTeacher]:
    """The run's teachers by domain; a single one has the domain None."""
    if isinstance(run.teacher, RoutedTeacher):
        return dict(run.teacher.domains)
    return {} if run.teacher is None else {None: run.teacher}


def inherit(
    run: Run, temperature: float, prepared: Prepared, view: View, device: torch.device
) -> Inheritance:
    """Build the live teachers, or open and verify the caches, of a run (collective).

    Raises:
        StoreError: a cache is missing, damaged, or of another teacher, tokenizer, data or masking.
    """
    teachers = each_teacher(run)
    if any(isinstance(teacher, CachedTeacher) for teacher in teachers.values()):
        caches = {
            domain: (_open(run, domain, prepared, view, temperature), teacher.use_k)
            for domain, teacher in teachers.items()
        }
        return Inheritance(Cached(temperature), _attachment(caches, prepared, temperature))
    live = {
        domain: Live(frozen(run, domain, prepared, device), vocabulary_size(prepared.tokenizer))
        for domain, teacher in teachers.items()
    }
    if None in live:
        return Inheritance(live[None])
    by_index = {prepared.domains.index(domain): one for domain, one in live.items()}
    return Inheritance(Routed(by_index))


def frozen(run: Run, domain: str | None, prepared: Prepared, device: torch.device) -> nn.Module:
    """The teacher model of a live or captured teacher, replicated or ZeRO-3-sharded."""
    teacher = each_teacher(run)[domain]
    where = "teacher.model" if domain is None else f"teacher.domains.{domain}.model"
    with dist.agreed():
        ds = None
        if teacher.deepspeed is not None:
            hidden = hidden_size(teacher.model, where=where)
            ds = teacher_config(teacher.deepspeed, teacher.precision, run, hidden)
        model = build(
            teacher.model,
            prepared.tokenizer,
            objective=run.data.objective,
            block_size=run.data.block_size,
            seed=run.seed,
            ds=ds,
            dtype=DTYPES[_precision(teacher, ds)],
            where=where,
        )
    model.requires_grad_(False)
    return model.to(device) if ds is None else shard_teacher(model, ds)


def expected(run: Run, teacher: CachedTeacher, prepared: Prepared, view: View) -> dict[str, str]:
    """Fingerprints a cache must carry; the teacher's only where the settings name its model."""
    blocking = {"block_size": run.data.block_size, "packing": run.data.packing}
    prints = {
        "blocking": fingerprint(blocking),
        "tokenizer": prepared.tokenizer_fingerprint,
        "data": prepared.train.fingerprint,
        "masking": view.fingerprint,
    }
    if teacher.model is not None:
        model = teacher.model
        weights = dist.on_rank0(
            lambda: model_fingerprint(model, seed=run.seed, where="teacher.model")
        )
        ds = None
        if teacher.deepspeed is not None:
            ds = teacher_config(teacher.deepspeed, teacher.precision, run, hidden=1)
        prints["teacher"] = fingerprint([weights, _precision(teacher, ds)])
    return prints


def _precision(teacher: LiveTeacher | CachedTeacher, ds: dict[str, Any] | None) -> str:
    return resolve(teacher.precision) if ds is None else precision_of(ds)


def _open(
    run: Run, domain: str | None, prepared: Prepared, view: View, temperature: float
) -> LogitCache:
    """Open a cache; each rank verifies its share of the shards."""
    teacher = each_teacher(run)[domain]
    folder = cache_folder(run, domain)
    wanted = expected(run, teacher, prepared, view)
    with dist.agreed():
        cache = LogitCache(folder, wanted, (dist.rank(), dist.world()))
        cache.check(teacher.use_k, temperature)
        _check_scope(cache, domain, view)
    return cache


def _check_scope(cache: LogitCache, domain: str | None, view: View) -> None:
    """Refuse a cache of fewer masks or other rows than the run will ask for."""
    folder, spec = cache.store.folder, cache.store.spec
    if spec.draws != view.draws:
        raise ConfigError(
            f"data.masking.draws: {view.draws}, but {folder} holds {spec.draws} masks of each row"
        )
    if cache.layout.domain not in (None, domain):
        raise ConfigError(f"{folder}: holds the rows of domain {cache.layout.domain!r} only")


def _attachment(
    caches: Mapping[str | None, tuple[LogitCache, int | None]],
    prepared: Prepared,
    temperature: float,
) -> Attach:
    """What the loader adds: each row's masks and top-k from its domain's cache."""
    if None in caches:
        only, use_k = caches[None]

        def attach(
            row_ids_B: NDArray, domains_B: NDArray, epochs_B: NDArray, *ids: NDArray
        ) -> Attachment:
            del domains_B
            found = only.read(row_ids_B, epochs_B, *ids, use_k=use_k, temperature=temperature)
            return Attachment(*found)

        return attach
    by_index = {prepared.domains.index(domain): cache for domain, cache in caches.items()}

    def attach_routed(
        row_ids_B: NDArray,
        domains_B: NDArray,
        epochs_B: NDArray,
        ids_BT: NDArray,
        lengths_B: NDArray,
    ) -> Attachment:
        parts = {}
        for index in np.unique(domains_B).tolist():
            cache, use_k = by_index[index]
            here_B = domains_B == index
            arguments = [x[here_B] for x in (row_ids_B, epochs_B, ids_BT, lengths_B)]
            found = cache.read(*arguments, use_k=use_k, temperature=temperature)
            parts[index] = Attachment(*found)
        return _merged(parts, domains_B, ids_BT)

    return attach_routed


def _merged(
    parts: Mapping[int, Attachment], domains_B: NDArray[np.int64], ids_BT: NDArray[np.int64]
) -> Attachment:
    """Attachments of each domain's rows, as one in the order of the batch."""
    inputs_BT, labels_BT = np.empty_like(ids_BT), np.empty_like(ids_BT)
    for index, part in parts.items():
        inputs_BT[domains_B == index] = part.inputs_BT
        labels_BT[domains_B == index] = part.labels_BT
    domain_N = np.repeat(domains_B, (labels_BT != IGNORE).sum(1))
    most = max(part.extra["topk_ids"].shape[1] for part in parts.values())
    empty: dict[str, Any] = {"topk_ids": -1, "topk_logprobs": -np.inf, "tail": -np.inf}
    extra = {}
    for name, nothing in empty.items():
        sample = next(iter(parts.values())).extra[name]
        shape = (len(domain_N), most) if sample.ndim == 2 else (len(domain_N),)
        extra[name] = np.full(shape, nothing, dtype=sample.dtype)
        for index, part in parts.items():
            values = part.extra[name]
            here_N = domain_N == index
            if values.ndim == 2:
                extra[name][here_N, : values.shape[1]] = values
            else:
                extra[name][here_N] = values
    return Attachment(inputs_BT, labels_BT, extra)
