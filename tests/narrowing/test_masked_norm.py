"""Norms over kept units: the original's numbers, and HuggingFace's without a mask."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dskd.narrowing.masked_norm import MaskedLayerNorm, MaskedRMSNorm
from tests import goldens

GOLDEN = goldens.golden("wid")["layernorm"]
CASES = ["uer_full", "uer_keep_soft", "uer_keep_hard", "hf_full", "hf_keep_hard"]


def golden(name):
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def golden_norm(case):
    plain = nn.LayerNorm(8, eps=GOLDEN[f"{case.split('_')[0]}_eps"]).double()
    norm = MaskedLayerNorm(plain, "unbiased" if case.startswith("uer") else "biased")
    norm.load_state_dict({"weight": golden("gamma"), "bias": golden("beta")})
    return norm


def differentiated(norm, x, coefficients):
    y = norm(x)
    (y * coefficients).sum().backward()
    parts = {"y": y.detach(), "dx": x.grad, "dgamma": norm.weight.grad, "dbeta": norm.bias.grad}
    return {name: value.clone() for name, value in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_original_s_norm(case):
    """Hard: what the removed units emit counts for nothing."""
    norm, x = golden_norm(case), golden("x").requires_grad_()
    keep, coefficients = golden("keep").bool(), golden("coef")
    if "keep" in case:
        norm.keep = keep
    if "hard" in case:
        coefficients = coefficients * keep
    found = differentiated(norm, x, coefficients)
    if "hard" in case:
        found["y"] = found["y"] * keep
    assert found.keys() == GOLDEN[case].keys()
    for name, value in GOLDEN[case].items():
        wanted = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["uer_keep_hard", "hf_keep_hard"])
def test_compacted_it_is_the_hard_mask(case):
    """Only the kept units arrive, in x and in y; parameters stay whole."""
    norm, keep = golden_norm(case), golden("keep").bool()
    norm.keep_in = keep.nonzero()[:, 0]
    x = golden("x")[:, keep].requires_grad_()
    found = differentiated(norm, x, golden("coef")[:, keep])
    for name, value in GOLDEN[case].items():
        wanted = torch.tensor(value, dtype=torch.float64)
        wanted = wanted[..., keep] if name in ("y", "dx") else wanted
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_mask_it_is_what_it_replaces(dtype):
    x = torch.randn(3, 5, 16).to(dtype)
    layer_norm = nn.LayerNorm(16, eps=1e-12).to(dtype)
    nn.init.normal_(layer_norm.weight)
    assert torch.equal(MaskedLayerNorm(layer_norm)(x), layer_norm(x))
    if dtype != torch.float64:  # which HuggingFace computes in fp32
        rms_norm = LlamaRMSNorm(16).to(dtype)
        nn.init.normal_(rms_norm.weight)
        assert torch.equal(MaskedRMSNorm(rms_norm)(x), rms_norm(x))


@pytest.mark.parametrize("compacted", [False, True])
def test_root_mean_square_of_the_kept(compacted):
    plain = LlamaRMSNorm(4, eps=1.0).double()
    norm = MaskedRMSNorm(plain)
    nn.init.constant_(norm.weight, 2.0)
    keep = torch.tensor([True, False, True, True])
    x = torch.tensor([[1.0, torch.inf, 2.0, -2.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, torch.inf, 2.0, -2.0]], dtype=torch.float64)  # sqrt(9/3 + 1) = 2
    if compacted:
        norm.keep_in, x, wanted = keep.nonzero()[:, 0], x[:, keep], wanted[:, keep]
    else:
        norm.keep = keep
    torch.testing.assert_close(norm(x), wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("norm", ["layer", "unbiased", "rms"])
def test_gradients(norm):
    plain = LlamaRMSNorm(6) if norm == "rms" else nn.LayerNorm(6)
    masked = MaskedRMSNorm(plain) if norm == "rms" else MaskedLayerNorm(plain)
    if norm == "unbiased":
        masked.statistics = "unbiased"
    masked.double().keep = torch.tensor([True, True, False, True, False, True])
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(masked.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(masked, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("make", [lambda: MaskedLayerNorm(nn.LayerNorm(64)), None])
def test_bf16_computes_in_fp32(make):
    norm = make() if make else MaskedRMSNorm(LlamaRMSNorm(64))
    norm.keep = torch.arange(64) % 3 > 0
    x = (torch.randn(5, 64) + 30).to(torch.bfloat16)
    wanted = norm.double()(x.double())
    found = norm.to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=1e-5)
