"""Merging compactors in plain torch: against autograd, in every order, and what is refused."""

import pytest
import torch

from dskd.fused import compactor
from dskd.fused.compactor import Factors, merge_layers, right_first, unmerge_layers

PARTS, OUTPUTS, INPUTS = 2, 7, 5
KEEPS = {
    "whole": (None, None),
    "inputs": (torch.tensor([0, 3]), None),
    "outputs": (None, torch.tensor([1, 2, 6])),
    "both": (torch.tensor([4, 0, 1, 2]), torch.tensor([5])),
    "all, turned": (torch.arange(5).flip(0), torch.arange(7).flip(0)),
}


def made(dtype=torch.float64, keeps="whole", bias=True, outputs=OUTPUTS, inputs=INPUTS, drift=0.1):
    """A layer's factors."""
    return Factors(
        torch.randn(PARTS, outputs, inputs, dtype=dtype),
        torch.randn(PARTS, outputs, dtype=dtype) if bias else None,
        torch.randn(PARTS, inputs, inputs, dtype=dtype) * drift,
        torch.randn(PARTS, outputs, outputs, dtype=dtype) * drift,
        *KEEPS[keeps],
    )


def reference(weight_PNK, bias_PN, left_PKK, right_PNN, keep_in, keep_out):
    """CR W CL and CR b with the identities added, and then cut: no residual form, for autograd."""
    outputs, inputs = weight_PNK.shape[1:]
    left = torch.eye(inputs, dtype=weight_PNK.dtype) + left_PKK
    right = torch.eye(outputs, dtype=weight_PNK.dtype) + right_PNN
    keep_in = slice(None) if keep_in is None else keep_in
    keep_out = slice(None) if keep_out is None else keep_out
    weight = (right @ weight_PNK @ left)[:, keep_out][..., keep_in]
    return weight, None if bias_PN is None else (right @ bias_PN[..., None])[:, keep_out, 0]


def differentiated(factors, grad_Pnk, grad_Pn):
    """The gradients of the factors by autograd, of one layer."""
    leaves = [None if f is None else f.clone().requires_grad_() for f in factors[:4]]
    outputs = [o for o in reference(*leaves, *factors[4:]) if o is not None]
    grads = [grad_Pnk, grad_Pn][: len(outputs)]
    found = iter(torch.autograd.grad(outputs, [f for f in leaves if f is not None], grads))
    return [None if f is None else next(found) for f in leaves]


@pytest.mark.parametrize("first", [None, True, False], ids=["chosen", "right first", "left first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keeps", KEEPS)
def test_merge_and_back(keeps, bias, first, monkeypatch):
    """Two layers at once."""
    if first is not None:
        monkeypatch.setattr(compactor, "right_first", lambda factors: first)
    layers = [made(keeps=keeps, bias=bias) for _ in range(2)]
    merged = merge_layers(layers)
    grads = [torch.randn_like(m.weight_Pnk) for m in merged]
    of_biases = [torch.randn_like(m.bias_Pn) for m in merged] if bias else None
    found = unmerge_layers(layers, [m.middle for m in merged], grads, of_biases)
    for i, factors in enumerate(layers):
        weight, b = reference(*factors)
        torch.testing.assert_close(merged[i].weight_Pnk, weight, rtol=1e-12, atol=1e-12)
        wanted = differentiated(factors, grads[i], of_biases[i] if bias else None)
        if bias:
            torch.testing.assert_close(merged[i].bias_Pn, b, rtol=1e-12, atol=1e-12)
        else:
            assert merged[i].bias_Pn is None
        for name, value, right in zip(found[i]._fields, found[i], wanted, strict=True):
            if right is None:
                assert value is None
            else:
                torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("outputs", "inputs", "kept_in", "kept_out", "right"),
    [(32, 8, 2, 8, False), (8, 32, 8, 2, True)],
    ids=["FFN 1: inputs first", "FFN 2: outputs first"],
)
def test_the_side_that_leaves_less_comes_first(
    outputs, inputs, kept_in, kept_out, right, monkeypatch
):
    """Multiplications of a part, as counted; both layers are the other's mirror image."""
    factors = made(outputs=outputs, inputs=inputs)
    factors = factors._replace(keep_in=torch.arange(kept_in), keep_out=torch.arange(kept_out))
    done, product = [], torch.baddbmm

    def counted(z, a, b):
        if b.shape[2] > 1:  # no vector
            done.append(a[0].numel() * b.shape[2])
        return product(z, a, b)

    monkeypatch.setattr(torch, "baddbmm", counted)
    assert right_first(factors) is right
    merge_layers([factors])
    assert sum(done) == 8 * 32 * 2 + 8 * 32 * 2
    done.clear()
    monkeypatch.setattr(compactor, "right_first", lambda factors: not right)
    merge_layers([factors])
    assert sum(done) == 8 * 32 * 8 + 8 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_identity_and_removal_are_exact(dtype):
    factors = made(dtype, drift=0.0)
    (merged,) = merge_layers([factors])
    assert torch.equal(merged.weight_Pnk, factors.weight_PNK)
    assert torch.equal(merged.bias_Pn, factors.bias_PN)

    factors = made(dtype)
    factors.left_PKK[..., 2], factors.right_PNN[:, 4] = 0, 0
    factors.left_PKK[:, 2, 2], factors.right_PNN[:, 4, 4] = -1, -1
    (merged,) = merge_layers([factors])
    for gone in (merged.weight_Pnk[:, 4], merged.weight_Pnk[..., 2], merged.bias_Pn[:, 4]):
        assert not gone.any()
    assert merged.weight_Pnk.all(0).sum() == (OUTPUTS - 1) * (INPUTS - 1)


def test_16_bits_round_the_correction_and_twice_the_result():
    """Closer to the exact product than factors that hold the identity."""
    layer = made(torch.bfloat16, outputs=96, inputs=96, drift=1e-3)
    doubled = Factors(*(f if f is None else f.double() for f in layer))
    exact, _ = reference(*doubled)

    def error(found):
        return ((found.double() - exact).norm() / exact.norm()).item()

    (merged,) = merge_layers([layer])
    rounded = error(exact.bfloat16())
    assert rounded < 0.002
    assert error(merged.weight_Pnk) < 1.6 * rounded
    eye = torch.eye(96)
    left, right = ((eye + d).bfloat16() for d in (layer.left_PKK, layer.right_PNN))
    chain = right @ layer.weight_PNK @ left
    assert error(chain) > 1.1 * error(merged.weight_Pnk)
    grad = torch.randn(PARTS, 96, 96).bfloat16()
    (found,) = unmerge_layers([layer], [merged.middle], [grad], [grad[..., 0]])
    wanted = differentiated(doubled, grad.double(), grad[..., 0].double())
    for value, right in zip(found, wanted, strict=True):
        assert ((value.double() - right).norm() / right.norm()).item() < 0.006


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_PKK": torch.zeros(2, 5, 4)}, r"left: must be \(2, 5, 5\), not \(2, 5, 4\)"),
        ({"right_PNN": torch.zeros(2, 5, 5)}, r"right: must be \(2, 7, 7\)"),
        ({"bias_PN": torch.zeros(7)}, r"bias: must be \(2, 7\), not \(7,\)"),
        ({"weight_PNK": torch.zeros(7, 5)}, "weight: must have three axes"),
        ({"weight_PNK": torch.zeros(2, 7, 5, dtype=torch.int32)}, "weight: must be floating-point"),
        ({"left_PKK": torch.zeros(2, 5, 5).double()}, "left: is torch.float64"),
        ({"keep_out": torch.zeros(3)}, "keep_out: must be int64 indices"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        merge_layers([made(torch.float32)._replace(**change)])


def test_layers_of_a_call_are_alike():
    types, keeps = [made(), made(torch.float32)], [made(keeps="inputs"), made(keeps="both")]
    for layers in (types, keeps):
        with pytest.raises(ValueError, match="layers: they differ"):
            merge_layers(layers)
    with pytest.raises(ValueError, match="there are none"):
        merge_layers([])
