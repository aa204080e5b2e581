"""What a rank does with its GPU before it trains: is refused, joins by it, makes models on it."""

import pytest
import torch
import torch.distributed as torch_dist
from torch.utils._python_dispatch import TorchDispatchMode

from dskd.engine import engine
from dskd.settings.yaml_tree import dump
from tests.equivalence import small
from tests.launching import forked
from tests.models.tiny import SIX, make, settings, stored
from tests.ranks import run_ranks


def _joined(rank: int) -> tuple[torch.device, list[torch.device | None]]:
    """The device of a rank, and the one that NCCL was told."""
    told = []
    inner = torch_dist.init_process_group

    def init_process_group(*args, device_id=None, **options):
        told.append(device_id)
        inner(*args, **options)

    torch_dist.init_process_group = init_process_group
    device = engine.start()
    engine.stop()
    return device, told


def test_nccl_is_told_the_device_and_need_not_guess_it():
    gpus = [torch.device("cuda", rank) for rank in range(2)]
    assert run_ranks(_joined) == [(gpu, [gpu]) for gpu in gpus]


def test_bf16_at_zero_0_is_refused_on_two_gpus_and_warned_of_on_one(tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(small.settings(tmp_path)))
    small.write_corpora(tmp_path)
    words = (str(recipe), f"out={tmp_path / 'run'}", "train.precision=auto", "until=data")
    slow = "zero0: zero_optimization.stage: 0 in bf16 lets the host wait twice for its GPU at every"
    forked(2, *words, status=2)
    assert capfd.readouterr().err.startswith(f"error: {slow}")
    assert not (tmp_path / "run").exists()
    forked(1, *words)
    assert f"warning: {slow}" in capfd.readouterr().out
    forked(2, *words, "deepspeed=zero1")
    assert slow not in capfd.readouterr().out


class HostTensors(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made on the CPU."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            self.most = max(self.most, made.nbytes)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SIX)
def test_a_model_is_made_on_the_device_tensor_by_tensor(tmp_path, model_type, dtype):
    """With the numbers that it has on the CPU, bit for bit."""
    for what in (settings(model_type), stored(tmp_path, model_type, drift=True)):
        expected = make(what, model_type=model_type, dtype=dtype)
        with HostTensors() as host:
            model = make(what, model_type=model_type, dtype=dtype, device=torch.device("cuda", 0))
        assert host.most == max(4 * p.numel() for p in expected.parameters())  # in fp32
        for parts in ("parameters", "buffers"):
            mine, theirs = (dict(getattr(m, f"named_{parts}")()) for m in (model, expected))
            assert mine.keys() == theirs.keys()
            for name, tensor in mine.items():
                assert tensor.is_cuda is (parts == "parameters"), name
                assert tensor.dtype == theirs[name].dtype, name
                assert torch.equal(tensor.cpu(), theirs[name]), name
