"""What runs of panels say of their teachers and students, the same for any number of ranks."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dskd.cli import main
from dskd.methods.panel_summary import FILE, read_summary
from dskd.runs.confusion import read_counts
from dskd.system.log import read_metrics
from tests.equivalence.test_panel import OWN, Panels
from tests.stores.caches import flip

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


def evaluations(run: Path) -> list[tuple[int, float]]:
    """Steps, and the KL from the teachers after them."""
    lines = read_metrics(run / "train" / "metrics.jsonl")
    return [(line["step"], line["eval_teacher_kl"]) for line in lines if "eval_teacher_kl" in line]


SELECT = ["evaluation.select=teacher_kl", "evaluation.every=2", "checkpoint.every=2"]
"""At a rate that spoils the student after a while."""


@pytest.fixture(scope="module")
def unlabelled(panels) -> list[str]:
    """Words of a run whose validation rows are texts alone, and whose student gets worse again."""
    path = panels.tables.folder / "texts.tsv"
    path.write_text("\n".join(["text", *(text for _, text in validation(panels))]) + "\n")
    validation_rows = f"data.validation=[{{kind: tsv, path: {path}}}]"
    return [validation_rows, *SELECT, "train.lr=0.05", "evaluation.patience=2"]


def test_the_teachers_alone_select(panels, unlabelled):
    """Where no validation row has a label: the checkpoint, and when training ends."""
    found = []
    for ranks, stage in ((1, "zero0"), (2, "zero3")):
        words = [*unlabelled, f"deepspeed={stage}", "until=evaluate"]
        run = panels.run(f"unlabelled-{ranks}", ranks, "muki", *words)
        scores = evaluations(run)
        best, lowest = min(scores, key=lambda score: score[1])
        summary = json.loads((run / "train" / "summary.json").read_text())
        assert (summary["metric"], summary["higher_is_better"]) == ("eval_teacher_kl", False)
        assert (summary["best_step"], summary["steps"]) == (best, best + 4)
        assert best + 4 < 20 and summary["best_eval_teacher_kl"] == lowest
        exported = json.loads((run / "scores.json").read_text())
        assert exported == {"eval_teacher_kl": pytest.approx(lowest, abs=1e-5)}
        assert read_summary(run / FILE).labelled == 0
        found.append(scores)
    assert found[0] == [(step, pytest.approx(score, abs=1e-5)) for step, score in found[1]]


def test_the_last_is_taken_without_any_label(panels, unlabelled):
    """What it keeps of the evaluation is how far it is from its teachers."""
    words = [word for word in unlabelled if "select" not in word and "patience" not in word]
    words += ["evaluation.select=last", "train.steps=4", "until=evaluate"]
    run = panels.run("last", 1, "muki", *words)
    (_, _), (step, score) = evaluations(run)
    summary = json.loads((run / "train" / "summary.json").read_text())
    assert step == 4 and summary["metric"] == "eval_teacher_kl"
    exported = json.loads((run / "scores.json").read_text())
    assert exported == {"eval_teacher_kl": pytest.approx(score, abs=1e-5)}


def test_it_is_the_kl_from_what_the_teachers_exports_say(panels):
    """Of the surest one by its logits, from the texts of the validation rows."""
    run = panels.run("kl", 2, "muki", *SELECT, "until=evaluate", confidence="logits")
    texts = [text for _, text in validation(panels)]
    labels, student_RC = logits(run / "export", texts)
    target_RC, surest_R = torch.zeros(11, 3), torch.full((11,), -1.0)
    for folder in panels.teachers.values():
        own, own_RC = logits(folder / "export", texts)
        sure_R = 1 - torch.distributions.Categorical(logits=own_RC).entropy() / math.log(2)
        placed_RC = torch.zeros(11, 3)
        placed_RC[:, [labels.index(label) for label in own]] = own_RC.softmax(1)
        target_RC = torch.where((sure_R > surest_R)[:, None], placed_RC, target_RC)
        surest_R = torch.maximum(sure_R, surest_R)
    wanted = (torch.xlogy(target_RC, target_RC) - target_RC * student_RC.log_softmax(1)).sum(1)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["eval_teacher_kl"] == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert scores.keys() > {"eval_accuracy", "eval_loss"}  # there are labels, too


def test_students_of_other_targets_are_not_compared(panels, tmp_path, capsys):
    runs = {
        name: panels.run(name, 1, method, *SELECT, "train.steps=2")
        for name, method in (("soft", "soft"), ("again", "soft"), ("other", "vkd"))
    }
    report = ["report", "--out", str(tmp_path), str(runs["soft"])]
    assert main([*report, str(runs["again"])]) == 0
    capsys.readouterr()
    assert main([*report, str(runs["other"])]) == 2
    told = "since they differ in: what their students are compared with (evaluation.select, method"
    assert told in capsys.readouterr().err


def test_students_are_compared_by_what_their_teachers_are(panels, tmp_path, capsys):
    """Not by where they lie or how they are sharded; one that was trained again is another."""
    members = {name: folder / "export" for name, folder in panels.teachers.items()}
    moved = tmp_path / "moved"
    shutil.copytree(members["second"], moved)

    def run(name: str, **second) -> Path:
        teachers = {each: {"model": {"path": str(path)}} for each, path in members.items()}
        teachers["second"] |= {"model": {"path": str(moved)}, **second}
        return panels.run(name, 1, "vkd", *SELECT, "train.steps=2", teachers=teachers)

    first = panels.run("unmoved", 1, "vkd", *SELECT, "train.steps=2")
    report = ["report", "--out", str(tmp_path / "report"), str(first)]
    assert main([*report, str(run("sharded", deepspeed="zero3"))]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(moved)
    with torch.no_grad():
        model.classifier.out_proj.bias[0] += 1.0
    model.save_pretrained(moved)
    assert main([*report, str(run("retrained"))]) == 2
    assert "what their students are compared with" in capsys.readouterr().err


def test_damaged_scores_of_validation_rows_are_found_before_training(panels, capfd):
    run = panels.run("damaged", 1, "muki", "until=panel")
    (shard,) = (run / "cache/second/validation").glob("*.safetensors")
    flip(shard)
    with pytest.raises(AssertionError):
        panels.run("damaged", 1, "muki")
    assert f"{shard}: damaged" in capfd.readouterr().err
    assert not (run / "train").exists()


def test_selecting_by_labels_that_no_row_has_is_refused(panels, unlabelled, capfd):
    words = [word for word in unlabelled if "select" not in word]
    with pytest.raises(AssertionError):
        panels.run("none", 1, "muki", *words)
    told = "data.validation: none of the 11 validation rows has a label; set evaluation.select to"
    assert told in capfd.readouterr().err
    assert not (panels.tables.folder / "none" / "cache").exists()


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
    live = {"scores": "live", "confidence": "logits", "passes": 16, "dropout": None}
    other = panels.run("one", 1, "muki", "until=panel", **live)
    found = read_summary(other / FILE)
    assert found.passes == 1 and found.choice["passes"] == found.choice["logits"]
    stored = read_summary(run / FILE).choice["logits"].model_dump()  # of other batches of rows
    assert found.choice["logits"].model_dump() == pytest.approx(stored, rel=1e-6)


def test_the_rows_are_those_of_the_evaluation(panels):
    other = panels.run("few", 1, "muki", "until=panel", "evaluation.rows=4")
    assert read_summary(other / FILE).rows == 4
