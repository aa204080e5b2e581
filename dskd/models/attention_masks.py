"""What a model's attention must know of padding, told so that the host waits for no GPU.

Given a mask of rows, transformers reads its values to learn whether there is padding at all, and
makes the mask [B, 1, T, T] that attention takes only if there is some. The host knows that already.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dskd.batch import Batch

_WARNS_OF_PADDING = frozenset({"gpt2", "openai-gpt"})
"""Types that look for padding in the tokens of a batch that comes without a mask."""

_OWN_MASKS = frozenset({"modernbert", "deberta-v2"})
"""Encoders whose layers do not all have the same mask, or that read it elsewhere, too."""


class _KeepsNothing(DynamicCache):
    """A cache of keys and values that is always empty.

    Causal models that get neither a mask nor a cache read the positions, for rows that are several
    texts, each counted from 0.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of this pass alone."""
        del args, kwargs
        return key_states, value_states


def attention_arguments(
    model: PreTrainedModel, batch: Batch, *, causal: bool, rows_mask: bool = False
) -> dict[str, Any]:
    """Arguments of the body's forward pass that keep padding from the batch's real tokens; what it
    makes of the padding itself means nothing.

    Args:
        rows_mask: whether the body takes or understands nothing but the mask of the rows.
    """
    kind = model.config.model_type
    if causal:
        # A cache of keys and values serves generation only.
        options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
        if rows_mask or kind in _WARNS_OF_PADDING:
            return options | {"attention_mask": batch.mask_BT}
        # No token sees those after it, where the padding is.
        options["attention_mask"] = None
        recomputed = getattr(model.base_model, "gradient_checkpointing", False)
        if not (recomputed and model.training):  # no cache goes with that
            options["past_key_values"] = _KeepsNothing()
        return options
    rows, tokens = batch.mask_BT.shape
    if not (batch.lengths_B < tokens).any():
        return {"attention_mask": None}
    implementation = model.config._attn_implementation
    if rows_mask or kind in _OWN_MASKS or implementation not in ("sdpa", "eager"):
        return {"attention_mask": batch.mask_BT}
    # As transformers makes it, which takes one of this shape as it is.
    mask_B11T = batch.mask_BT.bool()[:, None, None, :]
    if implementation == "eager":  # what is added to the logits of attention
        shown_B11T = torch.zeros(mask_B11T.shape, dtype=model.dtype, device=mask_B11T.device)
        mask_B11T = shown_B11T.masked_fill(~mask_B11T, torch.finfo(model.dtype).min)
    return {"attention_mask": mask_B11T.expand(rows, 1, tokens, tokens)}


def _takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward pass of a model's body has an argument of this name."""
    return argument in _arguments(type(model.base_model))


@functools.cache  # asked in every forward pass
def _arguments(body: type) -> frozenset[str]:
    return frozenset(inspect.signature(body.forward).parameters)
