"""x * by in fp32, rounded once."""

import pytest
import torch

from dskd.kernels import scale
from tests.kernels.cases import GPU

PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.float16)]
PAIRS += [(torch.float16, torch.float16)]
if GPU:  # the interpreter rounds to bf16 by cutting off
    PAIRS += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "into"), PAIRS)
@pytest.mark.parametrize("shape", [(3, 2731), (4096,), (1,), (0, 7)])
def test_scale(device, shape, dtype, into):
    x = torch.randn(shape).to(device, dtype)
    by = torch.tensor(1 / 3, device=device)  # no 16-bit number
    out = torch.empty(shape, dtype=into, device=device)
    scale.scale(x, by, out)
    assert torch.equal(out, (x.float() * by).to(into))
