"""Activation checkpointing and compilation change no result."""

import shutil

import pytest
import torch

from dskd.models.speed import blocks_of, checkpoint_activations, compile_layers
from tests.models.tiny import ALL, batch, loss_of, make, without_dropout


def _gradients(model):
    model.zero_grad()
    loss = loss_of(model, batch())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", ALL)
def test_checkpointed_activations_change_nothing_but_the_work(model_type):
    model = make(model_type)
    blocks = blocks_of(model)
    assert len(blocks) == 2
    calls = []
    for block in blocks:
        leaf = next(m for m in block.modules() if not list(m.children()))
        leaf.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    plain_loss, plain = _gradients(model)
    assert len(calls) == 2
    checkpoint_activations(model)
    torch.manual_seed(3)  # the dropout masks are the same too, also when computed again
    loss, grads = _gradients(model)
    assert len(calls) == 2 + 4
    assert torch.equal(loss, plain_loss)
    torch.testing.assert_close(grads, plain, rtol=1e-5, atol=1e-6)


def _compiles_to_the_same(model):
    without_dropout(model)
    names = list(model.state_dict())
    plain_loss, plain = _gradients(model)
    compile_layers(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, grads = _gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert list(model.state_dict()) == names
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("model_type", "checkpointed"), [("bert", False), ("gpt2", True)])
def test_traced_layers_give_the_same_loss_and_gradients(model_type, checkpointed, monkeypatch):
    compiled = torch.compile

    def traced(*args, **options):
        return compiled(*args, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)  # what Module.compile calls; no C++ this way
    model = make(model_type)
    if checkpointed:
        checkpoint_activations(model)
    _compiles_to_the_same(model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same_loss_and_gradients():
    _compiles_to_the_same(make("llama", num_hidden_layers=1))
