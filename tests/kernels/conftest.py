"""Kernel tests: Triton's interpreter where there is no GPU, and NaN in whatever is not written."""

import os
import sys

import pytest
import torch

from tests.kernels.cases import GPU

if not GPU:
    # Triton decides when it is imported
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before tests/kernels could choose its interpreter"
    )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def uninitialised_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and its like give is NaN (integers: the lowest), so reading it shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            nothing = float("nan")
            if not tensor.is_floating_point():
                nothing = 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min
            return tensor.fill_(nothing)

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
