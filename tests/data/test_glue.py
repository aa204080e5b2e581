"""Folders of GLUE: the golden ones with all their traps, and what is refused by file and line."""

from pathlib import Path

import pytest

from dskd.data.examples import examples
from dskd.data.glue import GLUE
from dskd.data.prepared import open_prepared, prepare, what_was_read
from dskd.errors import ConfigError, DataError
from dskd.settings.checks import check_settings
from dskd.settings.data import Data
from dskd.settings.labels import GlueSource
from dskd.settings.recipe import read
from tests.goldens import golden

ROOT = Path(__file__).resolve().parents[1] / "golden/bridges/glue"
WANTED = golden("bridges/glue/expected")
FOLDERS = {name.lower().replace("-", ""): name for name in WANTED["counts"]}


def source(task: str, split: str = "train", path: Path | None = None, **more) -> GlueSource:
    where = ROOT / FOLDERS[task] if path is None else path
    return GlueSource(kind="glue", task=task, path=str(where), split=split, **more)


@pytest.mark.parametrize("task", GLUE)
def test_every_golden_folder(task):
    wanted = dict(WANTED["counts"][FOLDERS[task]])
    dropped = wanted.pop("dropped", 0)
    skipped = []
    found = {s: list(examples(source(task, s), skipped=lambda: skipped.append(1))) for s in wanted}
    assert {split: len(rows) for split, rows in found.items()} == wanted
    assert len(skipped) == dropped
    first = found["train"][0]
    text, pair, label = WANTED["first"][FOLDERS[task]]
    assert (first.text, first.pair) == (text, pair)
    assert first.label == (label / 5 if task == "stsb" else label)
    every = [row for rows in found.values() for row in rows]
    if task == "stsb":
        assert [row.label for row in every] == [1.0, 0.08, 0.85]
    else:
        assert {row.label for row in every} <= {*GLUE[task].labels}


def test_a_lone_quotation_mark_is_text():
    assert [row.text for row in examples(source("cola"))][-1] == '"Come in, she said.'
    assert list(examples(source("sst2")))[1].text == 'dull " from start to end'
    assert list(examples(source("mrpc")))[1].pair == '" Prices fell , he said .'
    (row,) = examples(source("qqp", "dev"))
    assert row.text == 'Where is the "office?' and row.label == "1"


@pytest.mark.parametrize("split", ["dev_matched", "dev_mismatched"])
def test_rows_of_mnli_are_wider_in_dev(split):
    (row,) = examples(source("mnli", split))
    first = {"dev_matched": "It rained.", "dev_mismatched": "It snowed."}[split]
    assert row[:3] == (first, "It was dry.", "contradiction")
    assert row.place.endswith(f"{split}.tsv:2")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    content = (ROOT / "MRPC/train.tsv").read_bytes()
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbf" + content)
    assert [e[:3] for e in examples(source("mrpc", path=tmp_path))] == [
        e[:3] for e in examples(source("mrpc"))
    ]


MNLI_ROW = "0\tp\tq\tf\t\t\t\t\ta\tb\t{}\t{}"


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("rte", "9\tone\ttwo", r"train\.tsv:4: 3 cells, but rows of rte have 4"),
        ("mnli", MNLI_ROW.format("neutral", "-"), r"train\.tsv:5: the label '-' is none of entail"),
        ("rte", "9\tone\ttwo\tmaybe", r"train\.tsv:4: the label 'maybe' is none of entailment, "),
        ("rte", "9\tone\t \tentailment", r"train\.tsv:4: an empty text; `on_bad_rows: skip`"),
        ("stsb", "\t" * 9 + "5.1", r"train\.tsv:4: the score '5\.1' is no number from 0 to 5"),
        ("stsb", "\t" * 9 + "nan", r"train\.tsv:4: the score 'nan' is no number"),
    ],
)
def test_what_no_file_of_the_task_has_is_refused(tmp_path, task, row, told):
    content = (ROOT / FOLDERS[task] / "train.tsv").read_text()
    (tmp_path / "train.tsv").write_text(f"{content}{row}\n")
    with pytest.raises(DataError, match=told):
        list(examples(source(task, path=tmp_path)))


def test_an_empty_text_is_skipped_and_counted(tmp_path):
    content = (ROOT / "QQP/train.tsv").read_text()
    (tmp_path / "train.tsv").write_text(f"{content}7\t8\t9\tWhy?\t\t0\n")
    skipped = []
    skipping = source("qqp", path=tmp_path, on_bad_rows="skip")
    assert len(list(examples(skipping, skipped=lambda: skipped.append(1)))) == 2
    assert len(skipped) == 2  # and the row of 5 cells


def test_another_tasks_folder_and_a_missing_file_are_refused():
    with pytest.raises(DataError, match=r"RTE/train\.tsv:1: not of GLUE's sst2, whose first line"):
        list(examples(source("sst2", path=ROOT / "RTE")))
    with pytest.raises(DataError, match=r"glue: .*QNLI: dev_matched\.tsv: no such file"):
        list(examples(source("qnli", "dev_matched")))


def test_prepared_rows_have_their_classes_and_say_what_was_dropped(tmp_path):
    of = {"objective": "classification", "folder": tmp_path, "block_size": 32}
    both = {"sources": [source("qqp")], "validation": [source("qqp", "dev")]}
    folder = prepare(Data(**of, **both), progress=False)
    prepared = open_prepared(folder)
    assert prepared.classes == ["0", "1"] and (len(prepared.train), len(prepared.validation)) == (
        2,
        1,
    )
    assert "1 incomplete skipped" in what_was_read(folder)[1]
    numbers = {"sources": [source("stsb")], "validation": [source("stsb", "dev")]}
    assert open_prepared(prepare(Data(**of, **numbers), progress=False)).classes == []


def test_settings_that_do_not_go_with_the_task(tmp_path):
    base = ["method={kind: finetune}", "teacher=null", "data.objective=classification"]
    one = "{kind: glue, task: %s, path: x, split: %s}"
    wrong = [*base, f"data.sources=[{one % ('mnli', 'dev')}]"]
    with pytest.raises(ConfigError, match=r"sources\.0\.split: dev, but mnli has train, dev_match"):
        check_settings(read(None, wrong), 1)
    check_settings(read(None, [*base, f"data.sources=[{one % ('mnli', 'dev_matched')}]"]), 1)
    with pytest.raises(ConfigError, match=r"sources\.0\.kind: glue is for data\.objective class"):
        causal = [*base, f"data.sources=[{one % ('rte', 'dev')}]", "data.objective=masked"]
        check_settings(read(None, causal), 1)
