"""The command: its words, its exit statuses, what it says."""

import ast
import json

import pytest

from dskd import train
from dskd.train import main
from tests.launching import ROOT, environment, evaluations, losses, python


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(word, capsys):
    assert main([word]) == 0
    told = capsys.readouterr()
    assert "usage: deepspeed --num_gpus N dskd/train.py [FILE.yaml] [a.b=value ...]" in told.out
    assert "75" in told.out and not told.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.step=3"], "train.step: no such setting; did you mean 'steps'?"),
        (["train.steps=many"], "train.steps"),
        (["train.batch=12"], "train.batch: 12 is not a multiple of train.micro_batch 8"),
        (
            ["method.kind=kl"],
            "method.kind: 'kl' is not one of ki, lm, self_evolution, wid, finetune, muki, vkd, "
            "uhc, dfa, cfl, l2kd; did you mean",
        ),
        (["deepspeed=zero9"], "zero9"),
        (["deepspeed={folder}/ds.json"], "train_batch_size"),
        (["teacher=null"], "teacher: the method ki needs one"),
        (["{folder}/absent.yaml"], "absent.yaml"),
        (["{folder}/broken.yaml"], "broken.yaml"),
        (["a.yaml", "b.yaml"], "one settings file, not 2: a.yaml b.yaml"),
        (["data.sources=[]"], "data.sources"),
    ],
)
def test_what_can_be_mended_is_told_in_one_message(tmp_path, capsys, words, message):
    (tmp_path / "broken.yaml").write_text("train: {steps: [}")
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 999}))
    words = [word.format(folder=tmp_path) for word in words]
    assert main([*words, f"out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("error: ") == 1
    assert message in told.err
    assert "Traceback" not in told.err and not told.out
    assert not (tmp_path / "out").exists()


ALLOCATOR = """
import os, sys
from dskd import train
def seen(words):
    assert "torch" not in sys.modules  # which reads them once
    print({name: os.environ.get(name) for name in train.ALLOCATOR})
    return 0
train._run = seen
train.main([])
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ["expandable_segments:True", "expandable_segments:True"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ["max_split_size_mb:64", None]),
        ({"PYTORCH_ALLOC_CONF": ""}, [None, ""]),
    ],
)
def test_gpu_memory_is_reserved_in_segments_that_grow_unless_told_otherwise(given, seen):
    own = {key: value for key, value in environment().items() if key not in train.ALLOCATOR}
    told = python("-c", ALLOCATOR, cwd=ROOT, env=own | given).stdout
    assert ast.literal_eval(told) == dict(zip(train.ALLOCATOR, seen, strict=True))


def test_every_mistake_is_told_by_one_rank(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train.step=3", "train.lr=-1", f"out={tmp_path}"]
    assert main(words) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "train.step:" in line or "train.lr:" in line]) == 2


@pytest.mark.launch
def test_the_toy_from_anywhere(tmp_path):
    """Without arguments: 20 steps, with all that a run leaves."""
    python("-m", "dskd.train", cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)})
    out = tmp_path / "runs" / "toy"
    assert len(losses(out)) == 20
    assert evaluations(out)[1] < evaluations(out)[0] - 0.1
    summary = json.loads((out / "train" / "summary.json").read_text())
    assert summary["steps"] == 20
    for name in ("config.yaml", "export/model.safetensors", "scores.json", "report.html"):
        assert (out / name).is_file()
