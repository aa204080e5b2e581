"""Runs on labelled rows: what is refused before they start, and what they leave."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dskd.data.preparing import _held_out
from dskd.errors import ConfigError
from dskd.settings.yaml_tree import merge
from tests.data.test_labelled import CLASSES, lines, write
from tests.launching import exported_nll, forked
from tests.runs.test_plan import BERT, checked, recipe_of

CAUSAL = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}


def labelled(folder: Path, model: dict = BERT, **source) -> dict:
    """The settings of a run on labelled rows, with another seed than the examples' own."""
    rows = lines(80, pair=lambda i: f"the wall {i % 7}")
    path = write(folder / "rows.jsonl", rows)
    columns = {"kind": "jsonl", "path": path, "label": "label"}
    data = {"objective": "classification", "sources": [columns | source]}
    return {"model": {"config": model}, "data": data | {"validation_fraction": 0.3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"objective": "causal"}, "model": {"config": CAUSAL}},
         "data.sources.0.label: of data.objective classification, not causal"),
        ({"data": {"sources": [{"kind": "builtin"}]}},
         "data.sources.0.kind: builtin has no labels; one of csv, tsv, jsonl, datasets, glue, or "
         "builtin with `label: module`, or another data.objective\n"
         "runs.only.data.labels: missing; no source has labels (label: COLUMN), so name the "
         "classes"),
        ({"data": {"objective": "causal", "sources": [{"kind": "builtin", "label": "module"}]},
          "model": {"config": CAUSAL}},
         "data.sources.0.label: of data.objective classification, not causal"),
        ({"data": {"sources": [{"kind": "csv", "path": "x", "target": "y"},
                               {"kind": "builtin", "label": "module"}]}},
         "data.sources.1.label: a class, but other sources have numbers (target); one of the two"),
        ({"data": {"validation": [{"kind": "csv", "path": "x", "target": "y"}]}},
         "data.validation.0.target: a number, but data.sources have classes (label); one of the "
         "two"),
        ({"data": {"labels": ["a"]}},
         "data.labels: ['a']: there is nothing to tell apart; name at least 2 classes"),
        ({"data": {"labels": ["a", "b", "a"]}}, "data.labels: ['a', 'b', 'a'] has one twice"),
        ({"data": {"labels": {"part": 2, "of": 2}}},
         "data.labels.part: 2, but counted from 0 there are 2"),
        ({"data": {"masking": {"probability": 0.2}}},
         "data.masking: no token is masked with data.objective classification; leave it out"),
        ({"data": {"packing": "contiguous"}},
         "data.packing: a row is one example with data.objective classification; leave it out"),
        ({"model": {"config": {**BERT, "num_labels": 4}}},
         "model.config.num_labels: comes from the data"),
        ({"model": {"config": {"model_type": "modernbert", "classifier_pooling": "mean"}}},
         "model.config.classifier_pooling: 'mean', but a class is read at one token here; set it "
         "to cls"),
        ({"method": {"kind": "wid", "hidden_size": 16, "every": 1, "ramp": 1, "anneal": 1}},
         "data.objective: classification is not what method wid is for; it is for causal, masked"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_start(tmp_path, changes, message):
    run = labelled(tmp_path)
    run["model"] = changes.get("model", run["model"])
    rest = {name: value for name, value in changes.items() if name != "model"}
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": merge(run, rest)}))
    assert str(error.value) == f"runs.only.{message}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"label": "label", "target": "score"},
         "data.sources.0.target: a row has a class (label: label) or a number, not both"),
        ({"pair": "text"}, "data.sources.0: the column 'text' is named for two things"),
        ({"kind": "csv", "columns": ["text", "text", "label"]},
         "data.sources.0.columns: 'text' is there more than once, but a row has it once"),
        ({"kind": "tsv", "columns": ["text", "class"]},
         "data.sources.0.columns: 'label' is missing, but a row has it once"),
        ({"unlabelled": True}, "method.kind: lm needs the label of every row"),
        ({"label": None, "target": "score"},
         "method.kind: lm learns classes, but the rows have numbers (target)"),
    ],
)  # fmt: skip
def test_columns_that_do_not_go_together(tmp_path, source, message):
    with pytest.raises(ConfigError, match=r"^runs\.only\.") as error:
        checked(recipe_of(tmp_path, {"only": labelled(tmp_path, **source)}))
    assert str(error.value).startswith(f"runs.only.{message}")


def test_tables_are_of_labelled_rows_only(tmp_path):
    table = {"data": {"sources": [{"kind": "csv", "path": "x.csv"}]}, "model": {"config": BERT}}
    message = r"^runs\.only\.data\.sources\.0\.kind: csv is for data\.objective classification, no"
    with pytest.raises(ConfigError, match=message):
        checked(recipe_of(tmp_path, {"only": table}))


def test_a_classifier_is_no_language_model(tmp_path):
    runs = {"a": labelled(tmp_path), "b": {"model": {"path": "run:a"}}}
    with pytest.raises(ConfigError, match=r"run a trains a classifier, data\.objective is masked$"):
        checked(recipe_of(tmp_path, runs))


def test_a_classifier_starts_from_a_language_model(tmp_path):
    """Pretraining, then classes of pairs: what is exported is what HuggingFace reads."""
    sizes = {"hidden_dropout_prob": 0.0, "type_vocab_size": 2}
    classes = merge(
        labelled(tmp_path, pair="pair"),
        {"data": {"tokenizer": {"kind": "pretrained", "path": "run:encoder"}}},
    )
    classes["model"] = {"path": "run:encoder"}
    runs = {"encoder": {"model": {"config": BERT | sizes}}, "classes": classes}
    forked(1, str(recipe_of(tmp_path, runs)))
    export = tmp_path / "runs" / "classes" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert "A classifier trained with dskd" in (export / "README.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    held = [row for row in rows if _held_out(f"{row['text']}\n{row['pair']}", 0.3)]
    taken = [held[n * len(held) // 8] for n in range(8)]  # evaluation.rows
    losses = []
    for row in taken:
        made = tokenizer(row["text"], row["pair"], truncation=True, return_tensors="pt")
        label = torch.tensor([model.config.label2id[row["label"]]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(**made).logits, label).item())
    assert exported_nll(tmp_path / "runs" / "classes") == pytest.approx(sum(losses) / 8, abs=1e-6)
