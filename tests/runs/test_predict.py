"""``dskd predict``: what HuggingFace's own classes say of each row, in the order of the file."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dskd.cli import main
from dskd.runs.predict import _source
from dskd.settings.data import Data
from dskd.settings.labels import CsvSource
from tests.equivalence.tables import Tables

TEXTS = ["oak ash elm", "apple", "owl kite rook wren owl kite", "pear plum", "fir"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return Tables(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def run(tables) -> Path:
    return tables.run("classes", 1, "until=export", "train.steps=8")


def predicted(*words: object) -> list[dict]:
    assert main(["predict", *map(str, words)]) == 0
    return [json.loads(line) for line in Path(words[2]).read_text().splitlines()]


def logits_of(folder: Path, *texts: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_label_and_probabilities_of_each_row(run, tmp_path):
    """Rows of different lengths, of which two are passed at a time; the label is not looked at."""
    file = write(tmp_path / "a.tsv", ["text\ty", *(f"{text}\tnothing" for text in TEXTS)])
    found = predicted(run, file, tmp_path / "out.jsonl", "--rows", 2)
    assert len(found) == len(TEXTS)
    for line, text in zip(found, TEXTS, strict=True):
        wanted = logits_of(run / "export", text).softmax(0)
        assert list(line["probabilities"]) == ["bird", "fruit", "tree"]
        assert [*line["probabilities"].values()] == pytest.approx(wanted.tolist(), abs=1e-6)
        assert line["label"] == ["bird", "fruit", "tree"][wanted.argmax()]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"words": text}) + "\n" for text in TEXTS)
    words = ["--text", "words", "--block-size", 32]
    other = predicted(run / "export", tmp_path / "b.jsonl.gz", tmp_path / "out2.jsonl", *words)
    for a, b in zip(found, other, strict=True):
        assert a["label"] == b["label"]
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-6)


def test_two_texts(run, tmp_path):
    file = write(tmp_path / "a.csv", ["text,b", 'oak,"fig, plum"', "owl,ash"])
    found = predicted(run, file, tmp_path / "out.jsonl", "--pair", "b")
    for line, pair in zip(found, [("oak", "fig, plum"), ("owl", "ash")], strict=True):
        wanted = logits_of(run / "export", *pair).softmax(0).tolist()
        assert [*line["probabilities"].values()] == pytest.approx(wanted, abs=1e-6)


def test_numbers(tables, tmp_path):
    run = tables.run("numbers", 1, "until=export", "train.steps=2", numbers=True)
    file = write(tmp_path / "a.csv", ["text", *TEXTS])
    found = predicted(run, file, tmp_path / "out.jsonl")
    wanted = [logits_of(run / "export", text).item() for text in TEXTS]
    assert [line["number"] for line in found] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "file", "told"),
    [
        ("RUN", "a.parquet", "a.parquet is none of .csv, .tsv, .jsonl (or one of them with "),
        ("RUN", "nowhere.csv", "nowhere.csv"),
        ("RUN", "other.csv", "no column 'text'; its columns are ['words']"),
        ("RUN/train", "other.csv", "is the folder of no run (config.yaml) and no model"),
    ],
)
def test_what_cannot_be_read_is_refused(run, tmp_path, capsys, path, file, told):
    write(tmp_path / "other.csv", ["words", "oak"])
    out = tmp_path / "out.jsonl"
    assert main(["predict", path.replace("RUN", str(run)), str(tmp_path / file), str(out)]) == 2
    assert told in capsys.readouterr().err and not out.exists()


def test_a_run_that_has_not_exported_yet_is_refused(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["predict", str(tmp_path / "run"), "a.csv", str(tmp_path / "out")]) == 2
    assert "has no export/ yet; train it with until=export" in capsys.readouterr().err


def test_a_file_is_read_as_the_source_of_the_run(tmp_path):
    own = CsvSource(kind="csv", path="x", field="a", pair="b", label="c", columns=["c", "a", "b"])
    data = Data(objective="classification", sources=[own])
    path = tmp_path / "more.csv.zst"
    want = {"kind": "csv", "path": str(path), "field": "a", "pair": "b", "columns": own.columns}
    assert _source(path, data, {}) == CsvSource(**want)
    assert _source(path, data, {"field": "c"}) == CsvSource(**want | {"field": "c"})
