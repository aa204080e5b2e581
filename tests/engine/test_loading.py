"""Checkpoints are read without running what is in them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dskd.engine.loading import check_pickles, only_weights
from dskd.errors import CheckpointError


class Code:
    """What a stranger may put into a pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path, zipped):
    """Though DeepSpeed says that it may be."""
    path = tmp_path / "a.pt"
    state = {"a": torch.ones(2), "b": Code(tmp_path / "ran")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="holds what no checkpoint of dskd does"):
        if zipped:
            check_pickles(tmp_path)
        with only_weights(tmp_path):
            torch.load(path, weights_only=False)
    with pytest.raises(CheckpointError), only_weights(tmp_path):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_deepspeed_keeps_is_read(tmp_path, monkeypatch):
    """Whatever the user's own switch of torch's says, which is left as it was."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    scalers = [LossScaler(8.0), DynamicLossScaler(16.0, 1000, 1.0, 2, False)]
    state = {"scalers": scalers, "stage": ZeroStageEnum.gradients, "at": fragment_address(3, 4)}
    torch.save(state, tmp_path / "a.pt")
    check_pickles(tmp_path)
    with only_weights(tmp_path):
        read = torch.load(tmp_path / "a.pt", weights_only=False)
    assert [vars(scaler) for scaler in read["scalers"]] == [vars(scaler) for scaler in scalers]
    assert (read["stage"], read["at"]) == (state["stage"], state["at"])
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
