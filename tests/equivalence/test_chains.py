"""The shipped recipes whose runs build on each other, made tiny: each teacher is what the run
before has exported, and a second call has nothing to do."""

import os
from pathlib import Path

import pytest
import torch

from dskd.errors import ConfigError
from dskd.models.build import model_fingerprint
from dskd.settings.model import Model
from dskd.settings.yaml_tree import load
from dskd.stores.store import read_spec
from dskd.system.files import fingerprint, read_manifest
from dskd.train import main
from tests.equivalence.small import source, write_corpora
from tests.launching import ROOT, forked, losses

KI = ROOT / "launch" / "ki"
TINY = [
    "data.block_size=32",
    "model.config.num_attention_heads=2",
    "model.config.num_hidden_layers=1",
    "model.config.intermediate_size=48",
    "train.steps=3",
    "train.batch=8",
    "train.micro_batch=4",
    "train.warmup=1",
    "train.lr=0.01",
    "evaluation.every=3",
    "evaluation.rows=4",
    "checkpoint.every=3",
    "log_every=1",
]


def print_of(folder: Path) -> str:
    return model_fingerprint(Model(path=str(folder / "export")), seed=1, where="model")


def inputs(out: Path) -> dict[str, str]:
    """Fingerprints of the data and the models that the run was started with."""
    return read_manifest(out / "inputs.json", ConfigError)


def state(folder: Path) -> dict[str, int]:
    """When each file was last written, but the report, which is drawn anew."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): os.stat(path).st_mtime_ns for path in found if path.name != "report.html"}


def has_nothing_to_do(out: Path, words: list[str], capsys) -> None:
    """The second call says what is there, without joining the ranks or writing."""
    before = state(out)
    assert main(words) == 0
    assert state(out) == before
    assert not torch.distributed.is_initialized()
    assert "report:" in capsys.readouterr().out


def test_generations(tmp_path, capsys):
    write_corpora(tmp_path)
    out = tmp_path / "out"
    sizes = {"small": 16, "medium": 24, "large": 32, "scratch": 32}
    words = [
        str(KI / "generations.yaml"),
        f"out={out}",
        f"data.folder={tmp_path / 'data'}",
        f"data.sources=[{source(tmp_path, 'left')}]",
        f"data.validation=[{source(tmp_path, 'valid')}]",
        *TINY,
        "data.tokenizer.vocab_size=320",
        "runs.medium.method.steps=2",
        "runs.large.method.steps=2",
        *(f"runs.{name}.model.config.hidden_size={size}" for name, size in sizes.items()),
    ]
    forked(1, *words)
    exports = {name: print_of(out / name) for name in sizes}
    assert len(set(exports.values())) == 4
    for name, size in sizes.items():
        assert len(losses(out / name)) == 3
        assert (out / name / "scores.json").is_file()
        assert load(out / name / "export" / "config.json")["hidden_size"] == size
    assert inputs(out / "medium")["teacher.model"] == exports["small"]
    assert inputs(out / "large")["teacher.model"] == exports["medium"]
    assert not [key for key in inputs(out / "scratch") if key.startswith("teacher")]
    assert len({inputs(out / name)["data"] for name in sizes}) == 1
    has_nothing_to_do(out, words, capsys)


@pytest.mark.parametrize(("kind", "ranks"), [("live", 2), ("cached", 1)])
def test_domains(tmp_path, capsys, kind, ranks):
    write_corpora(tmp_path)
    out = tmp_path / "out"
    corpora = {"biology": "left", "computing": "right"}
    sources = {name: source(tmp_path, file, name) for name, file in corpora.items()}
    words = [
        str(KI / "domains.yaml"),
        f"out={out}",
        f"data.folder={tmp_path / 'data'}",
        f"data.sources={list(sources.values())}",
        f"data.validation=[{source(tmp_path, 'valid')}]",
        *TINY,
        "runs.ki.method.steps=2",
        "model.config.hidden_size=16",
        "runs.scratch.model.config.hidden_size=32",
        "runs.ki.model.config.hidden_size=32",
        "runs.scratch.data.tokenizer.vocab_size=320",  # the others take this one
        "data.masking.draws=2",
    ]
    for name, one in sources.items():
        words.append(f"runs.{name}.data.sources=[{one}]")
        if kind == "cached":
            words.append(
                f"runs.ki.teacher.domains.{name}="
                f"{{kind: cached, k: 8, values: fp32, model: {{path: 'run:{name}'}}}}"
            )
    forked(ranks, *words)
    for name in sources:
        assert inputs(out / "ki")[f"teacher.domains.{name}.model"] == print_of(out / name)
        assert inputs(out / name)["data"] != inputs(out / "ki")["data"]
        if kind == "cached":
            spec, _ = read_spec(out / "ki" / "cache" / name)
            assert spec.fingerprints["teacher"] == fingerprint([print_of(out / name), "fp32"])
    assert print_of(out / "biology") != print_of(out / "computing")
    assert inputs(out / "scratch")["masking"] == inputs(out / "ki")["masking"]
    tokenizers = [path.read_bytes() for path in out.glob("*/export/tokenizer.json")]
    assert len(tokenizers) == 4 and len(set(tokenizers)) == 1
    has_nothing_to_do(out, words, capsys)
