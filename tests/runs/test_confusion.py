"""Which class is taken for which: counted once for each labelled row, and shown."""

import json
import re
from pathlib import Path

import pytest
import torch

from dskd.batch import UNLABELLED
from dskd.errors import CheckpointError
from dskd.runs.confusion import Confusion, Counts, confusion_section, read_counts
from dskd.settings.folders import RunFolder
from dskd.system.files import write_manifest
from tests.equivalence.tables import Tables
from tests.methods.test_finetune import rows

CLASSES = ["<a>", "b", "c & d"]
LABELS = [0, 1, 2, 1, UNLABELLED, 0, 2, 1, 0]
SAID = [0, 1, 1, 1, 2, 2, 1, 2, 0]


def counted() -> Confusion:
    confusion = Confusion(CLASSES)
    logits_NC = torch.nn.functional.one_hot(torch.tensor(SAID), 3)
    positions, batch, _ = rows(LABELS, logits_NC.tolist())
    assert confusion.metric.results(confusion.metric.values(positions, batch).numpy()) == {}
    return confusion


def written(path: Path, counts: Counts) -> RunFolder:
    path.mkdir()
    write_manifest(path / "confusion.json", counts.model_dump())
    return RunFolder(path)


def test_rows_are_counted_by_label_and_prediction(tmp_path):
    """But those without a label."""
    counted().write(tmp_path / "confusion.json")
    counts = read_counts(tmp_path / "confusion.json")
    assert counts.rows == {
        "<a>": {"<a>": 2, "c & d": 1}, "b": {"b": 2, "c & d": 1}, "c & d": {"b": 2},
    }  # fmt: skip
    assert [counts.recall(label) for label in CLASSES] == [2 / 3, 2 / 3, 0.0]
    assert (counts.right, counts.labelled("c & d")) == (4, 2)
    assert Counts(classes=CLASSES, rows={}).recall("b") is None


def test_the_map_has_a_square_for_each_pair_that_occurs(tmp_path):
    runs = {"<run>": written(tmp_path / "run", counted().counts)}
    page = confusion_section(runs)
    assert page.count("<title>") == 5 and "4 of 8 rows right" in page
    assert "<title>c &amp; d: 2 taken for b (100.0%)</title>" in page
    assert "<run>" not in page and "<a>" not in page and "&lt;run&gt;" in page
    where = re.findall(r'<rect x="(\d+)" y="(\d+)" width="28" height="28" fill="([^"]+)"', page)
    right, wrong = "var(--right)", "var(--wrong)"
    assert where == [
        ("0", "0", right), ("56", "0", wrong), ("28", "28", right), ("56", "28", wrong),
        ("28", "56", wrong),
    ]  # fmt: skip
    assert "<td>b</td><td>3</td><td>66.67%</td>" in page


def test_many_classes_are_named_on_hovering_only(tmp_path):
    names = [f"class {n}" for n in range(77)]
    counts = Counts(classes=names, rows={name: {name: 3, names[0]: 1} for name in names[1:]})
    page = confusion_section({"r": written(tmp_path / "r", counts)})
    assert page.count("<title>") == 2 * 76 and page.count("<text") == 2
    assert len(page) < 40_000
    assert 'width="5" height="5"' in page
    assert "<details><summary>Recall of each class" in page


def test_runs_of_the_same_rows_share_a_table(tmp_path):
    counts = counted().counts
    other = Counts(classes=CLASSES, rows={"b": {"b": 1}})
    given = {"one": counts, "two": counts, "apart": other}
    runs = {name: written(tmp_path / name, each) for name, each in given.items()}
    page = confusion_section(runs)
    assert page.count("<svg") == 3 and page.count("Recall of each class") == 2
    assert "<th>one</th><th>two</th></tr>" in page


def test_without_labels_nothing_is_shown(tmp_path):
    nothing = written(tmp_path / "n", Counts(classes=CLASSES, rows={}))
    assert confusion_section({"n": nothing, "none": RunFolder(tmp_path / "none")}) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": {"b": {"b": 0}}}, r"rows\.b\.b"),
        ({"rows": {"b": {"e": 1}}}, "'e' is none of its classes"),
        ({"classes": "abc"}, "classes"),
    ],
    ids=["zero", "unknown", "no list"],
)
def test_what_is_not_written_so_is_refused(tmp_path, change, told):
    path = tmp_path / "confusion.json"
    write_manifest(path, counted().counts.model_dump() | change)
    with pytest.raises(CheckpointError, match=rf"confusion\.json: damaged, .*{told}"):
        read_counts(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return Tables(tmp_path_factory.mktemp("confusion"))


@pytest.mark.parametrize("method", ["finetune", "lm"])
def test_every_method_of_labelled_rows_leaves_it(tables, method):
    settings = {"method": {"kind": method}, "train": {"steps": 10, "lr": 0.01}}
    out = tables.run(method, 1, "until=evaluate", **settings)
    counts = read_counts(out / "confusion.json")
    assert sum(map(counts.labelled, counts.classes)) == 11
    assert "Classes and what they are taken for" in (out / "report.html").read_text()
    if method == "finetune":
        assert json.loads((out / "scores.json").read_text())["eval_accuracy"] == pytest.approx(
            counts.right / 11
        )
        (out / "scores.json").unlink()
        (out / "confusion.json").unlink()
        tables.run(method, 2, "until=evaluate", **settings)
        assert read_counts(out / "confusion.json") == counts


def test_numbers_have_no_confusion(tables):
    out = tables.run("numbers", 1, "until=evaluate", "train.steps=10", numbers=True)
    assert (out / "scores.json").exists() and not (out / "confusion.json").exists()
