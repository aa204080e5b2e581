"""Memory for time, and time for compilation: options of a model that change no result."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks."""
    count = model.config.num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    return next(blocks for blocks in lists if len(blocks) == count)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each block's input for the backward pass and compute the rest again there."""
    with warnings.catch_warnings():
        # Its new name, activation_checkpointing_enable, is not in every version we allow.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(model: PreTrainedModel) -> None:
    """Run every transformer block through ``torch.compile``, for rows of any length.

    Parameter names stay the same, so checkpoints do not know of it.
    """
    for block in blocks_of(model):
        block.compile(dynamic=True)
