"""Run folders that were changed, moved, or are shared by two calls."""

import fcntl
import shutil
import subprocess
import sys
import time

import pytest

from dskd.system.log import read_metrics
from tests.launching import ROOT, environment, forked
from tests.runs.test_plan import BERT, recipe_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    path = recipe_of(folder, {"a": {"model": {"config": BERT}}})
    forked(1, str(path))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run in a folder of its own, and its recipe."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copytree(finished / "data", tmp_path / "data")
    return tmp_path / "runs" / "a", recipe_of(tmp_path, {"a": {"model": {"config": BERT}}})


@pytest.mark.parametrize("lost", ["export", "train"])
def test_what_was_deleted_is_made_again(copied, lost):
    run, path = copied
    weights = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / lost)
    forked(1, str(path))
    assert (run / "export" / "model.safetensors").read_bytes() == weights
    assert read_metrics(run / "train" / "metrics.jsonl")[-1]["step"] == 2


def test_an_export_without_checkpoints_to_make_it_of(copied, capfd):
    run, path = copied
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "train" / "checkpoints")
    forked(1, str(path), status=2)
    assert "no checkpoint is left to export; train again" in capfd.readouterr().err


def test_results_without_their_settings_are_refused(copied, capfd):
    run, path = copied
    (run / "config.yaml").unlink()
    forked(1, str(path), "train.lr=0.5", status=2)
    assert f"{run} holds results, but no config.yaml that says" in capfd.readouterr().err
    assert not (run / "config.yaml").exists()


def test_a_moved_run_goes_on_where_it_lies(copied, tmp_path):
    run, _ = copied
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    (moved / "scores.json").unlink()
    forked(1, str(moved / "config.yaml"))
    assert (moved / "scores.json").is_file()
    assert not run.exists(), "something was made in the folder where it was"


def test_a_call_that_waited_for_another_compares_its_settings_again(tmp_path):
    """Nothing is there when it starts; when the other ends, its results are."""
    path = recipe_of(tmp_path, {"a": {"model": {"config": BERT}}})
    out = tmp_path / "runs"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["-m", "dskd.train", str(path), "train.weight_decay=0.02"]
        options = {"env": environment() | {"PYTHONPATH": str(ROOT)}, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        call = subprocess.Popen([sys.executable, *words], **pipes, **options)
        while "waiting: another job" not in (line := call.stdout.readline()):
            assert line, "it ended without waiting"
        (out / "a" / "train").mkdir(parents=True)
        (out / "a" / "train" / "summary.json").write_text("{}")
        forked(1, str(path), "until=data", f"out={tmp_path / 'other'}")
        settings = (tmp_path / "other" / "a" / "config.yaml").read_text()
        (out / "a" / "config.yaml").write_text(settings)
        time.sleep(1.5)
        assert call.poll() is None
    output, _ = call.communicate(timeout=60)
    assert call.returncode == 2, output
    assert "was started with other settings" in output and "train.weight_decay" in output
    assert (out / "a" / "config.yaml").read_text() == settings
