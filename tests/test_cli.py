"""The ``dskd`` command: instant help, plain errors, commands that reach their modules."""

import subprocess
import sys
from pathlib import Path

import pytest

from dskd import __version__, train
from dskd.cli import main
from dskd.errors import LostRankError, StoreError
from dskd.runs import plan
from dskd.settings.recipe import SINGLE, read
from dskd.stores import cache_info, logits


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dskd.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'yaml', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in (
        "train",
        "data",
        "export",
        "settings",
        "cache",
        "hard-tokens",
        "report",
        "convert",
    ):
        assert f"    {command} " in done.stdout.replace("\n", " ")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dskd {__version__}\n"


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        (["train"], []),
        (["train", "a.yaml", "train.lr=1e-4"], ["a.yaml", "train.lr=1e-4"]),
        (["data", "a.yaml"], ["a.yaml", "until=data"]),
        (["export", "a.yaml", "seed=2"], ["a.yaml", "seed=2", "until=export"]),
        (["cache", "capture", "a.yaml", "seed=2"], ["a.yaml", "seed=2", "until=cache"]),
    ],
)
def test_training_commands(monkeypatch, words, passed):
    seen = []
    monkeypatch.setattr(train, "main", lambda argv: seen.append(argv) or 75)
    assert main(words) == 75
    assert seen == [passed]


def test_settings_are_printed_whole_and_can_be_read_back(capsys, tmp_path):
    assert main(["settings", "train.lr=1e-4", "method.temperature=3"]) == 0
    path = tmp_path / "a.yaml"
    path.write_text(capsys.readouterr().out)
    run = read(path).runs[SINGLE]
    assert run.train.lr == 1e-4
    assert run.method["temperature"] == 3.0
    assert run.method["topk"] == "tail"


def test_settings_of_a_recipe(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    needed = "method: {kind: lm}, model: {path: m}, data: {sources: [{kind: builtin}]}"
    base = f"base: {{out: o, {needed}}}"
    path.write_text(f"{base}\nruns: {{a: {{}}, b: {{train: {{lr: 1}}}}}}\n")
    assert main(["settings", str(path)]) == 0
    out = capsys.readouterr().out
    assert "--- # a\nout: o/a\n" in out
    assert "--- # b\nout: o/b\n" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["settings", "train.step=1"], "command line: train.step: no such setting; did you mean"),
        (["settings", "none.yaml"], "none.yaml: no such file"),
        (["settings", "a.yaml", "b.yaml"], "one settings file, not 2: a.yaml b.yaml"),
        (["settings", "method.kind=kii"], "method.kind: 'kii' is not one of ki, lm"),
        (["settings", "until=trian"], "until: 'trian' is not one of data, slice, cache, train, "),
        (["settings", "train.warmup=30"], "train.warmup: 30 is more than train.steps 20"),
        (["cache", "info", "nowhere"], "nowhere/manifest.json: no such file"),
        (["cache", "verify", "nowhere"], "nowhere/manifest.json: no such file"),
        (["hard-tokens", "nowhere"], "nowhere: no such file"),
        (["report", "nowhere"], "nowhere/train/metrics.jsonl: no such file"),
        (["report", "a/x", "a/../a/x"], "report: a/../a/x is given twice"),
    ],
)
def test_errors_are_one_message(capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_what_another_rank_prints_and_a_lost_rank(monkeypatch, capsys):
    """Of commands that a launcher starts: one message, and the status that names a lost rank."""
    problem = StoreError("x: damaged")
    lost = LostRankError("rank 1 has died")

    def fail(path):
        raise lost if path.name == "lost" else problem

    monkeypatch.setattr(cache_info, "cache_info", fail)
    problem.printed_by_other_rank = True
    assert main(["cache", "info", "x"]) == 2
    assert capsys.readouterr().err == ""
    assert main(["cache", "info", "lost"]) == 69
    assert capsys.readouterr().err == "error: rank 1 has died\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cache_info, "cache_info", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["cache", "info", "x"])


def test_cache_commands(monkeypatch, capsys):
    monkeypatch.setattr(cache_info, "cache_info", lambda path: {"k": 8, "shards": 2})
    monkeypatch.setattr(logits, "verify", lambda path: {"k": 8, "shards": 2})
    assert main(["cache", "info", "x"]) == 0
    assert capsys.readouterr().out == "k       8\nshards  2\n"
    assert main(["cache", "verify", "x"]) == 0
    assert capsys.readouterr().out == "k       8\nshards  2\nx: whole\n"

    def damaged(path):
        raise StoreError(f"{path}: shard 3 is damaged")

    monkeypatch.setattr(logits, "verify", damaged)
    assert main(["cache", "verify", "x"]) == 2
    assert capsys.readouterr().err == "error: x: shard 3 is damaged\n"


def test_report_command(monkeypatch, capsys, tmp_path):
    seen = {}

    def write(runs, folder, control):
        seen.update(runs=runs, control=control)
        return folder / "report.html"

    monkeypatch.setattr(plan, "report_folders", write)
    words = ["report", "r/ki", "r/scratch", "--control", "scratch", "--out", str(tmp_path)]
    assert main(words) == 0
    runs = {"ki": Path("r/ki"), "scratch": Path("r/scratch")}
    assert seen == {"runs": runs, "control": "scratch"}
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


def test_a_command_from_elsewhere_that_is_not_there(capsys):
    assert main(["no.such:main", "x"]) == 2
    assert capsys.readouterr().err == "error: command line: no module 'no.such' on the path\n"
    assert main(["dskd.cli:nothing"]) == 2
    assert capsys.readouterr().err == "error: command line: 'dskd.cli' has no 'nothing'\n"
