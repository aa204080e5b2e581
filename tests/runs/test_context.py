"""What a run's stages share: which checkpoint is exported."""

import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch

from dskd.methods.base import build_method
from dskd.runs.context import RunContext, say_read
from dskd.runs.stages import prepare_rows
from dskd.settings.data import BuiltinSource, Data, HardTokens, Masking, TextSource
from dskd.settings.run import Run
from tests.engine.test_checkpoints import save
from tests.ranks import run_ranks

HARD = HardTokens(kind="hard_tokens")


@pytest.mark.parametrize(
    ("method", "masking", "objective", "best"),
    [
        ("lm", Masking(), "masked", 1),
        ("lm", HARD, "masked", 2),
        ("lm", HARD, "causal", 1),
        ("self_evolution", HARD, "masked", 2),
        ("self_evolution", HARD, "causal", 2),
    ],
)
def test_where_random_masks_judge_hard_ones_the_last_checkpoint_is_exported(
    tmp_path: Path, method: str, masking: Masking | HardTokens, objective: str, best: int
) -> None:
    run = Run(out=tmp_path, data=Data(objective=objective, masking=masking))
    context = RunContext(run, build_method({"kind": method}), torch.device("cpu"))
    for step, nll in ((1, 2.0), (2, 3.0)):
        save(context.checkpoints, step, nll)
    assert context.checkpoints.best().step == best


def _further(rank: int, run: Run) -> list:
    context = RunContext(run, build_method({"kind": "lm"}), torch.device("cpu"))
    more = [BuiltinSource(documents=3, domain="more")]
    rows = context.rows_of(more)
    assert context.rows_of(more) is rows  # read once
    folders = sorted(path.name for path in run.data.folder.iterdir())
    return [rows.fingerprint, rows.domains_B(np.arange(len(rows))).tolist(), folders]


def test_rows_of_other_sources_are_prepared_once_for_all_ranks(tmp_path: Path) -> None:
    sources = [BuiltinSource(documents=40)]
    run = Run(out=tmp_path / "run", data=Data(sources=sources, folder=tmp_path / "data"))
    one, other = run_ranks(_further, run)
    assert one == other and set(one[1]) == {1} and len(one[2]) == 2


def test_the_data_stage_says_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"na\u00efve dogs ran round {n}" for n in range(200)))
    source = TextSource(kind="text", path=str(tmp_path / "a.txt"), per="line", domain="dogs")
    run = Run(out=tmp_path / "run", data=Data(sources=[source], folder=tmp_path / "data"))
    for _ in range(2):  # the second one finds the rows
        context = RunContext(run, build_method({"kind": "lm"}), torch.device("cpu"))
        prepare_rows(context)
        first, second, third = capsys.readouterr().out.splitlines()
        assert first.startswith("data: ") and " tokens to train on, " in first
        assert second.startswith("  dogs: 200 documents, ")
        assert second.endswith("the longest 24 characters; the first: na\u00efve dogs ran round 0")
        assert third.startswith("  padding: ") and " micro-batches of 8 training rows" in third
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), "ascii"))
    say_read(context.prepared.folder)
    assert sys.stdout.buffer.getvalue().endswith(b"the first: na?ve dogs ran round 0\n")


def test_nothing_is_said_of_the_padding_of_rows_that_are_not_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = [BuiltinSource(label="module", documents=120)]
    data = Data(objective="classification", sources=sources, folder=tmp_path / "data")
    run = Run(out=tmp_path / "run", data=data)
    prepare_rows(RunContext(run, build_method({"kind": "lm"}), torch.device("cpu")))
    said = capsys.readouterr().out
    assert said.startswith("data.block_size: ") and "data: " in said and "padding" not in said
