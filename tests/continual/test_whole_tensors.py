"""Whole tensors in a file, of which each rank reads its pieces; and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dskd.continual.whole_tensors import WholeTensors, write_tensors
from dskd.engine.hooks import StepHooks
from dskd.errors import DiskError, StoreError
from tests.continual.loops import GEOMETRIES, loop_of, student
from tests.ranks import run_ranks

KIND, PRINTS = "importance", {"model": "abc", "data": "def"}


def tensors() -> dict[str, torch.Tensor]:
    """A random one for each parameter of the student."""
    generator = torch.Generator().manual_seed(2)
    shapes = {name: p.shape for name, p in student().named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "made/omega.safetensors", tensors(), kind=KIND, fingerprints=PRINTS)
    return tmp_path / "made/omega.safetensors"


def _pieces(rank, stage, world, micro, path):
    """What a rank reads: by parameter, where its piece begins and the values."""
    del rank
    _, engine = loop_of(stage, world, micro, 0, lambda model: StepHooks())
    file = WholeTensors(path, kind=KIND, expect=PRINTS)
    file.check_model(engine.module.student)
    shards = engine.weights(gradients=False).shards()
    return {shard.name: (shard.start, file.piece(shard).tolist()) for shard in shards}


@pytest.mark.parametrize(("stage", "world", "micro"), GEOMETRIES[::2])
def test_every_rank_reads_its_pieces_bit_for_bit(path, stage, world, micro):
    found = run_ranks(_pieces, stage, world, micro, path, world=world)
    for name, whole in tensors().items():
        values = torch.full((whole.numel(),), float("nan"))
        for start, piece in (pieces[name] for pieces in found if name in pieces):
            assert len(piece) == whole.numel() or stage
            values[start : start + len(piece)] = torch.tensor(piece)
        assert torch.equal(values, whole.flatten())


def test_a_whole_tensor_has_its_shape(path):
    file = WholeTensors(path, kind=KIND, expect={"data": "def"})
    for name, whole in tensors().items():
        assert torch.equal(file.whole(name), whole)


def test_a_file_is_whole_or_absent(path, monkeypatch):
    """Written by rank 0 alone; an interrupted one leaves the earlier file and nothing else."""
    before = path.read_bytes()

    def interrupted(flat, temporary, metadata):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dskd.continual.whole_tensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, tensors(), kind=KIND, fingerprints=PRINTS)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_what_a_killed_job_left_is_removed(path):
    path.with_name(".omega.safetensors.12.tmp").write_bytes(b"half")
    write_tensors(path, tensors(), kind=KIND, fingerprints=PRINTS)
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file/omega: cannot write the file of each weight's imp"):
        write_tensors(tmp_path / "file/omega", tensors(), kind=KIND, fingerprints={})


def edited(path, change):
    """Write the file again with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["dskd"])
    change(values, about)
    save_file(values, path, {"dskd": json.dumps(about)})


def _other_value(values, about):
    values["transformer.ln_f.bias"][3] += 1e-6


def _other_shape(values, about):
    about["shapes"]["transformer.wpe.weight"] = [16, 64]  # of as many entries


def _odd_shape(values, about):
    about["shapes"]["transformer.wpe.weight"] = ["16", 64]


def _no_shape(values, about):
    del about["shapes"]["transformer.wpe.weight"]


def _half(values, about):
    values["transformer.ln_f.bias"] = values["transformer.ln_f.bias"].half()


def _other_print(values, about):
    about["fingerprints"]["data"] = "abc"


@pytest.mark.parametrize(
    "change", [_other_value, _other_shape, _odd_shape, _no_shape, _half, _other_print]
)
def test_a_changed_file_is_refused(path, change):
    edited(path, change)
    with pytest.raises(StoreError, match=r"omega\.safetensors: damaged, its digest does not match"):
        WholeTensors(path, kind=KIND, expect={})


def test_other_files_are_refused_by_name(path):
    with pytest.raises(
        StoreError, match=r"omega\.safetensors: holds each weight's importance, not"
    ):
        WholeTensors(path, kind="anchor", expect={})
    for name in ("data", "rule"):
        with pytest.raises(StoreError, match=f"omega.safetensors: made with another {name}"):
            WholeTensors(path, kind=KIND, expect={name: "xyz"})
    with pytest.raises(StoreError, match="gone: no such file"):
        WholeTensors(path.with_name("gone"), kind=KIND, expect={})
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match=r"omega\.safetensors: holds no values of weights"):
        WholeTensors(path, kind=KIND, expect={})
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(StoreError, match=r"omega\.safetensors: damaged \("):
        WholeTensors(path, kind=KIND, expect={})


def test_another_model_is_refused_by_its_parameter(path):
    file, model = WholeTensors(path, kind=KIND, expect={}), student()
    file.check_model(model)
    model.transformer.ln_f.bias = torch.nn.Parameter(torch.zeros(31))
    refused = r"it has one of \[32\] for transformer.ln_f.bias, the student one of \[31\]"
    with pytest.raises(StoreError, match=refused):
        file.check_model(model)
    del model.transformer.ln_f.bias
    with pytest.raises(StoreError, match=r"transformer\.ln_f.bias, the student none"):
        file.check_model(model)
