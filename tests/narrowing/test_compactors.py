"""Layers with compactors: the original's numbers, and micro-batches that are taken apart once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dskd.models.families import projection_of
from dskd.narrowing import compactors
from dskd.narrowing.compactors import (
    CompactedConv1D,
    CompactedEmbeddings,
    CompactedLinear,
    CompactedProjection,
    Merging,
)
from tests import goldens

GOLDEN = goldens.golden("wid")["linear"]
INPUTS, OUTPUTS = 6, 8


def golden(name, dtype=torch.float64):
    return torch.tensor(GOLDEN[name], dtype=dtype)


def drift(module, scale=0.1):
    """Let the compactors be no identity any more."""
    for parameter in (module.left, module.right):
        if parameter is not None:
            with torch.no_grad():
                parameter.copy_(torch.randn_like(parameter) * scale)


def golden_layer():
    plain = nn.Linear(GOLDEN["K"], GOLDEN["N"]).double()
    layer = CompactedLinear(plain, Merging())
    values = {"weight": golden("W"), "bias": golden("b")}
    values |= {"left": golden("CL") - torch.eye(6), "right": golden("CR") - torch.eye(8)}
    layer.load_state_dict(values)
    return layer


def made(kind, dtype=torch.float64, bias=True):
    """A layer of 6 inputs and 8 outputs (twice, of two parts), and what it replaced."""
    if kind == "linear":
        plain = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype)
        layer = CompactedLinear(copy.deepcopy(plain), Merging())
    else:
        parts = {"conv": None, "parts": 2}[kind]
        plain = Conv1D(OUTPUTS * (parts or 1), INPUTS).to(dtype)
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
        layer = CompactedConv1D(copy.deepcopy(plain), Merging(), parts)
    return layer, plain


def chained(layer, x):
    """The three products, token by token, part by part; kept units only."""
    weight_PNK, bias_PN, left_PKK, right_PNN, keep_in, keep_out = layer.factors()
    if keep_in is not None:
        x = x.new_zeros(*x.shape[:-1], layer.left.shape[-1]).index_copy(-1, keep_in, x)
    found = []
    for part, weight_NK in enumerate(weight_PNK):
        y = x + linear(x, left_PKK[part])
        y = linear(y, weight_NK, None if bias_PN is None else bias_PN[part])
        y = y + linear(y, right_PNN[part])
        found.append(y if keep_out is None else y[..., keep_out])
    return torch.cat(found, -1)


def gradients(layer, y, *inputs):
    """Of a weighted sum of y, by name; and clear them."""
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    found |= {f"x{i}": x.grad.clone() for i, x in enumerate(inputs)}
    layer.zero_grad()
    for x in inputs:
        x.grad = None
    return found


def assert_close(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_the_original_s_layer():
    layer = golden_layer()
    x = golden("x").requires_grad_()
    y = layer(x)
    loss = (y * golden("coef")).sum()
    loss.backward()
    assert torch.equal(golden("CL") - torch.eye(6), layer.left)
    found = {"y": y, "dx": x.grad, "dW": layer.weight.grad, "db": layer.bias.grad}
    found |= {"dCL": layer.left.grad, "dCR": layer.right.grad}
    merged = layer.merging.of(layer)
    found |= {"W_merged": merged.weight_Pnk[0], "b_merged": merged.bias_Pn[0]}
    assert_close(found, {name: golden(name) for name in found}, 1e-9)


def test_the_original_s_removed_units():
    """Hard masks; and the student's own small layer, which compaction computes with."""
    layer = golden_layer()
    masks = (golden(name, torch.bool) for name in ("keep_in", "keep_out"))
    keep_in, keep_out = layer.keep_in, layer.keep_out = [mask.nonzero()[:, 0] for mask in masks]
    y = layer(golden("x")[:, keep_in])
    wanted = {"y": golden("y_hard_masked")[:, keep_out]}
    merged = layer.merging.of(layer)
    found = {"y": y, "W_student": merged.weight_Pnk[0], "b_student": merged.bias_Pn[0]}
    assert_close(found, wanted | {name: golden(name) for name in ("W_student", "b_student")}, 1e-9)


KINDS = ["linear", "conv", "parts"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_teacher_bit_for_bit(kind, dtype):
    layer, plain = made(kind, dtype)
    merged, factors = layer.merging.of(layer), layer.factors()
    assert torch.equal(merged.weight_Pnk, factors.weight_PNK)
    assert torch.equal(merged.bias_Pn, factors.bias_PN)
    x = torch.randn(3, INPUTS, dtype=dtype)
    if kind == "linear":  # Conv1D multiplies by another layout of the weight
        assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "no bias"])
def test_gradients_are_those_of_the_chain(kind, compacted):
    bias = kind != "no bias"
    layer, _ = made(kind if bias else "linear", bias=bias)
    drift(layer)
    inputs = INPUTS
    if compacted:
        layer.keep_in, layer.keep_out = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 3, 6, 7])
        inputs = 3
    x = torch.randn(2, 5, inputs, dtype=torch.float64, requires_grad=True)
    wanted = gradients(layer, chained(layer, x), x)
    found = gradients(layer, layer(x), x)
    assert_close({"y": layer(x)} | found, {"y": chained(layer, x)} | wanted)
    if compacted:
        assert (found["right"].reshape(-1, 8, 8)[:, [0, 4, 5]] == 0).all()
        assert (found["left"].reshape(-1, 6, 6)[..., [1, 3, 4]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_compaction_changes_nothing_where_units_are_removed(kind, dtype):
    """D_jj = -1 in an empty row (right) or column (left) is a unit that is exactly gone."""
    layer, _ = made(kind, dtype)
    drift(layer)
    keep_in, keep_out = torch.tensor([0, 1, 4]), torch.tensor([0, 3, 4, 6, 7])
    gone_in, gone_out = [2, 3, 5], [1, 2, 5]
    with torch.no_grad():
        layer.left[..., gone_in], layer.right[..., gone_out, :] = 0, 0
        layer.left[..., gone_in, gone_in], layer.right[..., gone_out, gone_out] = -1, -1
    x = torch.randn(4, INPUTS, dtype=dtype, requires_grad=True)
    y = layer(x).unflatten(-1, (-1, OUTPUTS))
    assert (y[..., gone_out] == 0).all()
    wanted = gradients(layer, y[..., keep_out], x)
    assert (wanted["x0"][:, gone_in] == 0).all()

    layer.merging.forget()
    layer.keep_in, layer.keep_out = keep_in, keep_out
    kept_x = x.detach()[:, keep_in].requires_grad_()
    kept_y = layer(kept_x).unflatten(-1, (-1, len(keep_out)))
    found = gradients(layer, kept_y, kept_x)
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(kept_y, y[..., keep_out], rtol=tolerance, atol=tolerance)
    wanted["x0"] = wanted["x0"][:, keep_in]
    wanted["right"][..., gone_out, :], wanted["left"][..., gone_in] = 0, 0
    assert_close(found, wanted, tolerance)


# ---- merging


def accumulated(layer, xs, last_only):
    """Gradients of several micro-batches, taken apart at the last or at each."""
    for count, x in enumerate(xs, 1):
        layer.merging.last = not last_only or count == len(xs)
        layer(x).square().sum().backward()
        if not layer.merging.last:
            assert all(p.grad is None for p in layer.parameters())
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    return found


@pytest.mark.parametrize("kind", [*KINDS, "no bias"])
def test_micro_batches_are_taken_apart_once(kind, monkeypatch):
    layer, _ = made("linear" if kind == "no bias" else kind, bias=kind != "no bias")
    drift(layer)
    xs = torch.randn(4, 3, INPUTS, dtype=torch.float64)
    each = accumulated(layer, xs, last_only=False)
    calls = []
    original = compactors.unmerge_layers
    monkeypatch.setattr(compactors, "unmerge_layers", lambda *a: calls.append(1) or original(*a))
    assert_close(accumulated(layer, xs, last_only=True), each)
    assert_close(accumulated(layer, xs[:1], last_only=True), accumulated(layer, xs[:1], False))
    assert calls == [1] * 3
    whole = accumulated(layer, xs.flatten(0, 1)[None], last_only=True)
    assert_close(whole, each)


def test_16_bit_micro_batches_are_added_in_fp32():
    """256 gradients of 1 and one of 256: bf16 would stay at 256."""
    layer, _ = made("linear", torch.bfloat16)
    merging = layer.merging
    x = torch.ones(1, INPUTS, dtype=torch.bfloat16)
    for step in range(257):
        merging.last = step == 256
        (layer(x).sum() * (1 if step else 256)).backward()
    assert (layer.bias.grad == 512).all()
    assert layer.bias.grad.dtype == torch.bfloat16


def test_one_merge_serves_until_it_is_forgotten(monkeypatch):
    """And all layers of a kind are merged in one call."""
    merging = Merging()
    layers = [CompactedLinear(nn.Linear(4, 4), merging) for _ in range(3)]
    layers.append(CompactedLinear(nn.Linear(4, 8), merging))
    sizes, original = [], compactors.merge_layers
    monkeypatch.setattr(
        compactors, "merge_layers", lambda some: sizes.append(len(some)) or original(some)
    )
    x = torch.randn(2, 4)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
    for layer in layers:
        layer(x).sum().backward()
    assert sizes == [3, 1]
    for layer in layers:
        drift(layer)
    assert torch.equal(layers[0](x), before[0])
    merging.forget()
    assert not torch.allclose(layers[0](x), before[0], atol=1e-3)
    torch.testing.assert_close(layers[3](x), chained(layers[3], x))
    assert sizes == [3, 1] * 2


def test_weights_must_not_change_within_a_step():
    layer, _ = made("linear")
    layer.merging.last = False
    layer(torch.randn(2, INPUTS, dtype=torch.float64)).sum().backward()
    with pytest.raises(AssertionError, match="unfinished optimizer step"):
        layer.merging.forget()


def test_a_layer_used_twice():
    layer, _ = made("linear")
    drift(layer)
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    wanted = gradients(layer, torch.stack([chained(layer, x[0]), chained(layer, x[1])]))
    assert_close(gradients(layer, torch.stack([layer(x[0]), layer(x[1])])), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_leave_nothing_whole_behind(kind, monkeypatch):
    """As under ZeRO-3: merged in every pass, taken apart every time, only x kept in between."""
    layer, _ = made(kind)
    drift(layer)
    x = torch.randn(5, INPUTS, dtype=torch.float64, requires_grad=True)
    wanted = {"y": layer(x)} | gradients(layer, layer(x), x)
    monkeypatch.setattr(compactors, "is_sharded", lambda parameter: True)
    layer.merging.forget()
    layer.merging.last = False
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [t.shape for t in kept] == [x.shape]
    assert_close({"y": y} | gradients(layer, y, x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted["y"])


# ---- chained


@pytest.mark.parametrize("compacted", [False, True])
def test_embeddings(compacted):
    layer = CompactedEmbeddings(OUTPUTS, nn.Parameter(torch.empty(0, dtype=torch.float64)))
    x = torch.randn(2, 3, OUTPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x)
    drift(layer)
    keep = torch.tensor([0, 4, 7]) if compacted else torch.arange(OUTPUTS)
    if compacted:
        layer.keep_out = keep
    wanted = gradients(layer, linear(x, torch.eye(OUTPUTS) + layer.right)[..., keep], x)
    assert_close(gradients(layer, layer(x), x), wanted)


@pytest.mark.parametrize("compacted", [False, True])
def test_projection(compacted):
    """Logits; and what a fused loss gets in its place."""
    plain = nn.Linear(INPUTS, 9).double()
    layer = CompactedProjection(copy.deepcopy(plain))
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), plain(x))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "left"]
    drift(layer)
    keep = torch.tensor([1, 2, 5]) if compacted else torch.arange(INPUTS)
    if compacted:
        layer.keep_in = keep
    only = torch.zeros(INPUTS, dtype=torch.float64).index_fill(0, keep, 1.0)
    compacted_x = linear(x * only, torch.eye(INPUTS) + layer.left)
    wanted = gradients(layer, linear(compacted_x, layer.weight, layer.bias), x)
    inner = x.detach()[:, keep].requires_grad_()
    found = gradients(layer, layer(inner), inner)
    wanted["x0"] = wanted["x0"][:, keep]
    assert_close(found, wanted)

    hidden, weight, bias = layer(inner, lambda *given: given)
    assert_close({"x": hidden}, {"x": compacted_x})
    assert weight is layer.weight
    assert bias is layer.bias


def test_the_model_s_projection_may_have_a_compactor():
    config = LlamaConfig(
        vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head = CompactedProjection(model.lm_head)
    assert projection_of(model) is model.lm_head
