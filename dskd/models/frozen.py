"""Models of a run that are built and then frozen: teachers, and models that are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.data.prepared import Prepared
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import shard_teacher
from dskd.engine.run_config import teacher_config
from dskd.models.build import build
from dskd.models.configs import hidden_size
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, LiveTeacher, SelfTeacher
from dskd.system import dist
from dskd.system.device import DTYPES, resolve


def frozen_model(
    run: Run,
    teacher: LiveTeacher | CachedTeacher | SelfTeacher,
    settings: Model,
    where: str,
    prepared: Prepared,
    device: torch.device,
) -> nn.Module:
    """The model ``settings``, in the precision and sharded as ``teacher`` says (collective)."""
    with dist.agreed():
        ds = None
        if teacher.deepspeed is not None:
            hidden = hidden_size(settings, where=where)
            ds = teacher_config(teacher.deepspeed, teacher.precision, run, hidden)
        precision = precision_of_teacher(teacher, ds)
        whole = device if ds is None else None
        rows = {"tokenizer": prepared.tokenizer, "classes": prepared.classes}
        model = model_of(run, settings, where, **rows, ds=ds, precision=precision, device=whole)
    model.requires_grad_(False)
    return model.to(device) if ds is None else shard_teacher(model, ds)


def model_of(
    run: Run,
    settings: Model,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    ds: dict[str, Any] | None,
    precision: str,
    device: torch.device | None = None,
    *,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """A model for the run's rows; ``ds`` shards its construction, None does not, but makes it on
    ``device`` (None: on the CPU), all but its buffers. ``classes`` and ``new_head`` are those of
    :func:`~dskd.models.build.build`."""
    return build(
        settings,
        tokenizer,
        objective=run.data.objective,
        block_size=run.data.block_size,
        seed=run.seed,
        ds=ds,
        dtype=DTYPES[precision],
        where=where,
        device=device,
        classes=classes,
        new_head=new_head,
    )


def precision_of_teacher(
    teacher: LiveTeacher | CachedTeacher | SelfTeacher, ds: dict[str, Any] | None
) -> str:
    """The number format of a frozen model; its DeepSpeed config, if it has one, decides."""
    return resolve(teacher.precision) if ds is None else precision_of(ds)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode is put back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
