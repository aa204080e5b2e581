"""Rows of a small corpus and tiny models, for stores that a real forward pass fills."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dskd.data.prepared import Prepared, prepare
from dskd.engine.engine import shard_teacher
from dskd.models.build import build
from dskd.settings.data import Data, TextSource, TrainedTokenizer
from dskd.settings.model import Model

OBJECTIVES = {"masked": "roberta", "causal": "llama"}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def prepared_folders(where: Path, sources: list[TextSource]) -> dict[str, Path]:
    """Prepared rows of at most 24 tokens, by objective."""
    own = {"sources": sources, "block_size": 24, "folder": where / "rows"}
    own["tokenizer"] = TrainedTokenizer(vocab_size=300)
    return {name: prepare(Data(objective=name, **own)) for name in OBJECTIVES}


def random_model(
    prepared: Prepared,
    objective: str,
    ds: dict | None = None,
    vocab_multiple: int = 1,
    **config: Any,
) -> nn.Module:
    """The same random model at every call, in train mode and with dropout; ``ds`` shards it."""
    config |= {"model_type": OBJECTIVES[objective], "intermediate_size": 32, **_SIZES}
    settings = Model(config=config, vocab_multiple=vocab_multiple)
    how = {"block_size": 24, "seed": 3, "ds": ds, "dtype": torch.float32, "where": "model"}
    model = build(settings, prepared.tokenizer, objective=objective, **how)
    return model if ds is None else shard_teacher(model.requires_grad_(False), ds)


def no_model() -> nn.Module:
    """What stands for a model that is not needed."""
    raise AssertionError("the model was built")


def fill_while_another_does(fill: Callable[..., Any], model: Callable[[], nn.Module]) -> None:
    """Call ``fill`` without a model while another process has begun to with a slow ``model``."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    other = fork.Process(target=_slowly, args=(fill, model, begun))
    other.start()
    assert begun.wait(60)
    fill(model=no_model)
    other.join()
    assert other.exitcode == 0


def _slowly(fill: Callable[..., Any], model: Callable[[], nn.Module], begun: Event) -> None:
    def hook(*_: Any) -> None:
        begun.set()
        time.sleep(0.03)

    def slow() -> nn.Module:
        built = model()
        built.base_model.register_forward_pre_hook(hook)
        return built

    fill(model=slow)
