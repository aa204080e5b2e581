"""A causal model that writes rows for a run: its own start model, or the one that it exports."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.data.tokenizers import tokenizer_fingerprint, vocabulary_size
from dskd.engine.ds_config import precision_of
from dskd.engine.engine import shard_teacher, stage_of
from dskd.engine.run_config import student_config, teacher_config
from dskd.models.build import model_fingerprint
from dskd.models.configs import hidden_size
from dskd.models.frozen import model_of
from dskd.models.generate import Decoding, Sampling
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.system import dist


def writing_model(
    run: Run, settings: Model, tokenizer: PreTrainedTokenizerBase, device: torch.device, where: str
) -> PreTrainedModel:
    """The model, frozen, in the student's number format (collective).

    It is whole on each rank's device, but sharded where the student is: what needs ZeRO-3 in
    training fits no single GPU here either.

    Raises:
        ConfigError: it cannot be built; names the setting ``where``.
    """
    with dist.agreed():
        hidden = hidden_size(settings, where=where)
        student = student_config(run, hidden)
        precision, ds = precision_of(student), None
        if stage_of(student) == 3:
            ds = teacher_config(run.deepspeed, precision, run, hidden)
        model = model_of(run, settings, where, tokenizer, ds, precision, None if ds else device)
    model.requires_grad_(False)
    return model.to(device) if ds is None else shard_teacher(model, ds)


def writer_of(
    run: Run, settings: Model, tokenizer: PreTrainedTokenizerBase, where: str
) -> dict[str, Any]:
    """What rows depend on that this model writes (collective): the model and its number format, the
    tokenizer and the run's seed."""
    with dist.agreed():
        precision = precision_of(student_config(run, hidden_size(settings, where=where)))
    weights = dist.on_rank0(lambda: model_fingerprint(settings, seed=run.seed, where=where))
    return {
        "model": weights,
        "precision": precision,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "seed": run.seed,
        "data.block_size": run.data.block_size,
    }


def decoding_of(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: int,
    top_k: int | None,
    temperature: float | None,
) -> Decoding:
    """How rows of a run are gone on with to their end token.

    Args:
        positions: most tokens of a row, its prompt included.
        top_k: the so many most likely tokens are drawn from; None: all.
        temperature: of the draws; None: 1, but if ``top_k`` is None, too, nothing is drawn.
    """
    drawn = top_k is not None or temperature is not None
    heat = 1.0 if temperature is None else temperature
    return Decoding(
        longest=positions,
        positions=positions,
        vocabulary=vocabulary_size(tokenizer),
        ends=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
        sampling=Sampling(run.seed, top_k, heat) if drawn else None,
    )
