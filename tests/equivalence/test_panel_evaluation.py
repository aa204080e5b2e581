"""What runs of panels say of their teachers and students, the same for any number of ranks."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dskd.methods.panel_summary import FILE, read_summary
from dskd.runs.confusion import read_counts
from tests.equivalence.test_panel import OWN, Panels

LABELS = ["bird", "fruit", "tree"]


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> Panels:
    return Panels(tmp_path_factory.mktemp("panel"))


@pytest.fixture(scope="module")
def run(panels) -> Path:
    return panels.run("muki", 1, "muki", "until=evaluate")


def validation(panels: Panels) -> list[tuple[str, str]]:
    """Label and text of each validation row."""
    lines = (panels.tables.folder / "valid.tsv").read_text().splitlines()[1:]
    return [tuple(line.split("\t")) for line in lines]


def logits(folder: Path, texts: list[str]) -> tuple[list[str], torch.Tensor]:
    """Names of a model's classes, and its logits, by HuggingFace alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = [model(**tokenizer(text, return_tensors="pt")).logits.detach() for text in texts]
    return list(model.config.id2label.values()), torch.cat(made)


def test_the_teachers_are_worth_what_their_exports_say(panels, run):
    """Accuracies and single confidences, from the texts of the validation rows."""
    found = read_summary(run / FILE)
    rows = validation(panels)
    assert (found.rows, found.labelled, found.passes) == (11, 11, 3)
    odds = torch.zeros(11, 3)
    sure = []
    for name in OWN:
        own, own_RC = logits(panels.teachers[name] / "export", [text for _, text in rows])
        assert found.teachers[name].labels == own
        mine = torch.tensor([label in own for label, _ in rows])
        said = [own[each] for each in own_RC.argmax(1)]
        right = [one == label for one, (label, _) in zip(said, rows, strict=True) if label in own]
        assert found.teachers[name].accuracy == pytest.approx(sum(right) / len(right))
        assert found.teachers[name].rows == len(right)
        sure_R = (
            1 - torch.distributions.Categorical(logits=own_RC).entropy() / torch.tensor(2).log()
        )
        confidence = found.teachers[name].confidence["logits"]
        assert confidence.own == pytest.approx(sure_R[mine].mean().item(), abs=1e-5)
        assert confidence.foreign == pytest.approx(sure_R[~mine].mean().item(), abs=1e-5)
        odds[:, [LABELS.index(label) for label in own]] += own_RC.exp()
        sure.append((sure_R, said))
    right = [LABELS[each] == label for each, (label, _) in zip(odds.argmax(1), rows, strict=True)]
    assert found.concatenated == pytest.approx(sum(right) / 11)
    first = [one > other for one, other in zip(sure[0][0], sure[1][0], strict=True)]
    chosen = [sure[0 if one else 1][1][row] for row, one in enumerate(first)]
    right = [one == label for one, (label, _) in zip(chosen, rows, strict=True)]
    assert found.choice["logits"].accuracy == pytest.approx(sum(right) / 11)
    assert "What the teachers know: run" in (run / "report.html").read_text()


def test_the_student_is_evaluated_within_each_teachers_classes(panels, run):
    """As its export does, and with it the confusion of its classes."""
    rows = validation(panels)
    labels, student_RC = logits(run / "export", [text for _, text in rows])
    said = [labels[each] for each in student_RC.argmax(1)]
    scores = json.loads((run / "scores.json").read_text())
    for name, own in OWN.items():
        right = [one == label for one, (label, _) in zip(said, rows, strict=True) if label in own]
        assert scores[f"eval_accuracy.{name}"] == pytest.approx(sum(right) / len(right))
    counts = read_counts(run / "confusion.json")
    pairs = Counter((label, one) for one, (label, _) in zip(said, rows, strict=True))
    assert {(a, b): n for a, row in counts.rows.items() for b, n in row.items()} == pairs


@pytest.mark.parametrize(
    ("name", "ranks", "teacher"),
    [("two", 2, {}), ("live", 2, {"scores": "live"}), ("single", 1, {"confidence": "logits"})],
)
def test_the_summary_is_that_of_the_teachers(panels, run, name, ranks, teacher):
    """Whatever the number of ranks, and whoever asks them in training."""
    other = panels.run(name, ranks, "muki", "until=panel", **teacher)
    assert read_summary(other / FILE) == read_summary(run / FILE)
    assert (other / "cache/first/train").exists() is ("scores" not in teacher)


def test_teachers_that_are_asked_live_for_their_logits_make_one_pass(panels, run):
    other = panels.run("one", 1, "muki", "until=panel", scores="live", confidence="logits")
    found = read_summary(other / FILE)
    assert found.passes == 1 and found.choice["passes"] == found.choice["logits"]
    assert found.choice["logits"] == read_summary(run / FILE).choice["logits"]


def test_the_rows_are_those_of_the_evaluation(panels):
    other = panels.run("few", 1, "muki", "until=panel", "evaluation.rows=4")
    assert read_summary(other / FILE).rows == 4
