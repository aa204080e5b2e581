"""What a model is told of padding: it computes what it does by the mask, and does not read that."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_layers

from dskd.batch import Batch
from dskd.models.attention_masks import attention_arguments
from dskd.models.families import lm_head, positions_of
from dskd.models.speed import checkpoint_activations
from tests.models.tiny import ALL, batch, make, without_dropout


def rows(padded: bool) -> Batch:
    """Rows of 16, 13 and 10 tokens, or the first one alone."""
    return batch() if padded else batch().select(torch.tensor([0]))


def body(model, data: Batch, **arguments):
    return model.base_model(input_ids=data.ids_BT, **arguments).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("model_type", ALL)
def test_hidden_states_are_those_with_the_mask(model_type, padded, attention):
    """To the bit, but where sdpa is told that it is causal and not given a mask that says so."""
    model, data = without_dropout(make(model_type)), rows(padded)
    model.set_attn_implementation(attention)
    causal = lm_head(model_type).objective == "causal"
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        model.train()
        found_BTD = body(model, data, **attention_arguments(model, data, causal=causal))
        wanted_BTD = body(model, data, attention_mask=data.mask_BT)
        real_BT = data.mask_BT.bool()
        tolerance = 1e-6 if causal and padded and attention == "sdpa" else 0.0
        close = {"rtol": 0.0, "atol": tolerance}
        torch.testing.assert_close(found_BTD[real_BT], wanted_BTD[real_BT], **close)


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
        return func(*args, **(kwargs or {}))


READS = {
    "sdpa": {("gpt2", "whole"): 1, ("gpt2", "padded"): 2, ("modernbert", "padded"): 2},
    "eager": {("modernbert", "padded"): 2},
}
"""Where transformers makes a mask, and looks for padding first."""


@pytest.mark.parametrize("attention", READS)
@pytest.mark.parametrize("what", ["whole", "padded"])
@pytest.mark.parametrize("model_type", ALL)
def test_the_host_reads_no_mask(model_type, what, attention):
    model, data = make(model_type).train(), rows(what == "padded")
    model.set_attn_implementation(attention)
    causal = lm_head(model_type).objective == "causal"
    arguments = attention_arguments(model, data, causal=causal)
    with Reads() as reads:
        body(model, data, **arguments)
    assert reads.count == READS[attention].get((model_type, what), 0)


def test_no_cache_comes_where_activations_are_computed_again(monkeypatch):
    """Transformers would warn of it."""
    told = []
    monkeypatch.setattr(modeling_layers.logger, "warning_once", told.append)
    model = make("llama").train()
    checkpoint_activations(model)
    positions_of(model, rows(padded=False)).hidden_ND.sum().backward()
    assert not told
