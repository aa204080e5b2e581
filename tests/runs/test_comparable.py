"""The report: which runs it compares, what it says of the others, what it calls them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dskd.cli import main
from dskd.settings.yaml_tree import dump, merge
from tests.launching import forked
from tests.runs.test_plan import BERT, recipe_of

RUNS = {
    "scratch": {},
    "slower": {"train": {"lr": 1e-4}, "evaluation": {"micro_batch": 4}},
    "text": {"data": {"sources": [{"kind": "builtin", "documents": 29}]}},
    "split": {"data": {"validation_fraction": 0.2}},
    "words": {"data": {"tokenizer": {"vocab_size": 330}}},
    "masks": {"data": {"masking": {"probability": 0.3}}},
    "fewer": {"evaluation": {"rows": 4}},
}
"""Two that may be compared, and five that may not."""
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
ROWS = "the validation rows (data.sources, data.validation, evaluation.rows)"
VOCABULARY = "the vocabulary (data.tokenizer)"
APART = {
    "text": f"{VOCABULARY}, {ROWS}",  # which is trained on other text
    "split": f"{VOCABULARY}, {ROWS}",
    "words": f"{VOCABULARY}, {ROWS}",
    "masks": "the masks of the validation rows (data.masking)",
    "fewer": ROWS,
    "causal": f"data.objective, {ROWS}, the masks of the validation rows (data.masking)",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of runs."""
    folder = tmp_path_factory.mktemp("compared")
    base = {"model": {"config": BERT}, "train": {"steps": 1}, "until": "train"}
    by_scratch = {"tokenizer": {"kind": "pretrained", "path": "run:scratch"}}
    runs = {name: merge(base, run) for name, run in RUNS.items()}
    runs["scratch"]["until"] = "export"
    runs["causal"] = {**base, "model": {"config": GPT2}}
    runs["causal"]["data"] = {"objective": "causal", **by_scratch}
    runs["other"] = merge(base, {"data": {**by_scratch, "validation": [{"kind": "builtin"}]}})
    # Other training text, but the same to be evaluated on.
    more = [{"kind": "builtin", "documents": 5, "domain": "few"}]
    runs["more"] = merge(runs["other"], {"data": {"sources": more}})
    forked(1, str(recipe_of(folder, runs)))
    return folder / "runs"


def printed(capsys, *words: str) -> str:
    """What a report prints, with single spaces."""
    assert main(["report", *words]) == 0
    return " ".join(re.sub("[^ -~]", " ", capsys.readouterr().out).split())


def test_runs_of_the_same_rows_are_compared(trained, tmp_path, capsys):
    folders = [str(trained / name) for name in ("scratch", "slower")]
    out = printed(capsys, *folders, "--control", "scratch", "--out", str(tmp_path))
    assert "fewer by" in out and "not reached" in out
    more = [str(trained / name) for name in ("other", "more")]
    assert "fewer by" in printed(capsys, *more, "--control", "other", "--out", str(tmp_path))


@pytest.mark.parametrize("name", APART)
def test_runs_of_other_rows_are_refused(trained, tmp_path, capsys, name):
    """Named are the two runs and what differs, and nothing is made."""
    one, two = trained / "scratch", trained / name
    words = ["report", str(one), str(two), "--control", "scratch", "--out", str(tmp_path)]
    assert main(words) == 2
    told = capsys.readouterr()
    differ = f"cannot be compared, since they differ in: {APART[name]}"
    assert told.err == f"error: report: {one} and {two} {differ}\n" and not told.out
    assert list(tmp_path.iterdir()) == []


def test_a_recipes_folder_shows_its_runs_apart(trained, tmp_path, capsys):
    out = printed(capsys, str(trained), "--control", "scratch", "--out", str(tmp_path))
    assert f"masks: not to be compared with scratch, since they differ in: {APART['masks']}" in out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<th>fewer by</th>") == 1  # that of the control's own group
    groups = page.split("<h1>")[1:]
    control = groups[0]
    assert "fewer by" in control and control.startswith("Runs compared</h1>")
    assert "<td>slower</td>" in control and "<td>masks</td>" not in control
    together = next(part for part in groups if "<td>other</td>" in part)
    assert "<td>more</td>" in together and "<td>scratch</td>" not in together
    assert all(f"<td>{name}</td>" in page for name in [*RUNS, "causal", "other", "more"])


def test_the_recipe_itself_says_the_same_at_its_end(trained, capsys):
    """It is carried out all the same."""
    page = (trained / "report.html").read_text()
    assert page.count("<th>fewer by</th>") == 1
    assert f"masks: not to be compared with scratch, since they differ in: {APART['masks']}" in page
    assert "<h1>text: not to be compared with scratch" in page


def test_a_run_that_does_not_say_what_it_was_evaluated_on(trained, tmp_path, capsys):
    """As of an earlier version: alone it is shown, it is compared with nothing."""
    old = tmp_path / "old"
    shutil.copytree(trained / "slower", old)
    path = old / "train" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["evaluated_on"]
    path.write_text(json.dumps(summary))
    printed(capsys, str(old), "--out", str(tmp_path))
    assert main(["report", str(trained / "scratch"), str(old)]) == 2
    assert f"{path} does not say what it was evaluated on" in capsys.readouterr().err
    path.write_text(json.dumps(summary | {"evaluated_on": {"rows": 3}}))
    assert main(["report", str(trained / "scratch"), str(old)]) == 2
    assert f"{path}: damaged, 'evaluated_on'" in capsys.readouterr().err


def test_runs_of_one_name_are_called_by_their_paths(trained, tmp_path, capsys, monkeypatch):
    for place in ("one/runs", "two/runs", "two/others"):
        shutil.copytree(trained / "slower", tmp_path / place / "slower")
    monkeypatch.chdir(tmp_path / "two" / "others")
    folders = ["slower", "../../one/runs/slower", "../runs/slower", str(trained / "scratch")]
    out = printed(capsys, *folders, "--control", "two/runs/slower", "--out", str(tmp_path))
    for name in ("others/slower", "one/runs/slower", "two/runs/slower", "scratch"):
        assert f" {name} " in out
    assert main(["report", *folders, "../others/slower"]) == 2
    assert capsys.readouterr().err == "error: report: ../others/slower is given twice\n"
    assert main(["report", *folders, "--control", "slower"]) == 2
    assert "control run 'slower' is none of: others/slower, " in capsys.readouterr().err
    monkeypatch.chdir("slower")
    assert " slower " in printed(capsys, ".", "--out", str(tmp_path))


def test_a_recipe_of_which_nothing_is_trained(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump({}))
    assert main(["report", str(tmp_path)]) == 2
    message = f"error: {tmp_path}: none of its runs is trained to its end: a, b\n"
    assert capsys.readouterr().err == message
