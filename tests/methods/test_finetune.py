"""Fine-tuning: the losses of plain torch, its metrics over ranks, and what is refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dskd.batch import IGNORE, TARGETS, UNLABELLED, Positions
from dskd.engine.checkpoints import Selection
from dskd.errors import ConfigError, DataError
from dskd.methods.base import Method, build_method
from dskd.settings.data import Data
from dskd.settings.labels import CsvSource
from dskd.settings.run import Run
from dskd.tasks import metrics
from tests.batches import batch_of
from tests.methods.test_ki import Identity

CLASSES, NUMBERS = {"label": "y"}, {"target": "y"}


def finetune(**settings: object) -> Method:
    return build_method({"kind": "finetune", **settings})


def rows(labels: list[int], logits: list[list[float]], numbers: list[float] | None = None):
    """Positions of these logits, a leaf, and their batch."""
    labels_BT = torch.full((len(labels), 3), IGNORE)
    labels_BT[:, 0] = torch.tensor(labels)
    columns = {} if numbers is None else {TARGETS: torch.tensor(numbers)}
    batch = batch_of(labels_BT, columns=columns)
    logits_NC = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return Positions(logits_NC, Identity(logits_NC), batch.labels_N), batch, logits_NC


LOGITS = [[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.5], [0.0, 0.5, -1.0]]


def test_cross_entropy_of_the_rows():
    labels = [0, 2, 2, 1]
    positions, batch, logits_NC = rows(labels, LOGITS)
    method = finetune()
    (term,) = method.loss(positions, None, batch, 0).values()
    assert method.counts(batch) == {"rows": 4.0}
    wanted = torch.nn.functional.cross_entropy(logits_NC, torch.tensor(labels), reduction="sum")
    assert term.total.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert term.parts.keys() == {"ce"} and term.parts["ce"].item() == pytest.approx(wanted.item())
    (found,) = torch.autograd.grad(term.total, logits_NC)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits_NC)[0])


def test_squared_error_of_numbers():
    positions, batch, logits_N1 = rows([0, 0, 0], [[1.0], [2.5], [-1.0]], [0.5, 2.5, 1.0])
    (term,) = finetune(metric="loss").loss(positions, None, batch, 0).values()
    assert term.total.item() == pytest.approx(0.25 + 4.0, rel=1e-12)
    assert term.parts["se"].item() == term.total.item() and not term.parts["se"].requires_grad
    (found,) = torch.autograd.grad(term.total, logits_N1)
    assert found[:, 0].tolist() == [1.0, 0.0, -4.0]


def results(method: Method, *batches: tuple) -> dict[str, float]:
    (metric,) = method.metrics(SimpleNamespace(prepared=SimpleNamespace(classes=None)))
    values = [metric.values(positions, batch) for positions, batch, _ in batches]
    assert all(value.dtype == torch.float64 for value in values)
    return metric.results(np.concatenate([value.detach().numpy() for value in values]))


def test_metrics_of_classes():
    """Over batches together, whatever their sizes; rows without a label are left out."""
    labels = [0, 2, UNLABELLED, 1]
    first, second = rows(labels[:1], LOGITS[:1]), rows(labels[1:], LOGITS[1:])
    found = results(finetune(further_metrics=["ece"]), first, second)
    kept = [0, 1, 3]
    probs = torch.tensor(LOGITS).double().softmax(1)[kept]
    nll = -probs[range(3), [0, 2, 1]].log()
    assert found["loss"] == pytest.approx(nll.mean().item(), rel=1e-9)
    assert found["accuracy"] == pytest.approx(2 / 3)  # right, wrong, right
    confidence = probs.max(1).values
    bins = (confidence * metrics.BINS).ceil().tolist()
    assert len(set(bins)) == 3
    gaps = (torch.tensor([1.0, 0.0, 1.0]) - confidence).abs()
    assert found["ece"] == pytest.approx(gaps.mean().item(), rel=1e-6)


def test_accuracy_within_groups_of_classes():
    """On the rows that have one of them, whatever they are taken for."""
    labels = [0, 2, UNLABELLED, 1, 1]
    positions, batch, _ = rows(labels, [*LOGITS, LOGITS[0]])  # right, wrong, ., right, wrong
    metric = finetune().row_metric({"x": [0, 1], "y": [2], "z": [0], "none": [5]})
    found = metric.results(metric.values(positions, batch).detach().numpy())
    assert found.pop("loss") > 0
    assert found == {
        "accuracy": 0.5, "accuracy.x": pytest.approx(2 / 3), "accuracy.y": 0.0, "accuracy.z": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("further", [False, True])
def test_metrics_of_two_classes_are_refused_of_others(further):
    method = finetune(further_metrics=["f1"]) if further else finetune(metric="f1")
    setting = "further_metrics" if further else "metric"
    three = SimpleNamespace(prepared=SimpleNamespace(classes=["a", "b", "c"]))
    told = rf"^method\.{setting}: f1 is of two classes, but the rows have 3$"
    with pytest.raises(ConfigError, match=told):
        method.metrics(three)


def test_macro_f1_is_over_all_classes_of_the_training_rows():
    pytest.importorskip("sklearn")
    positions, batch, _ = rows([0, 1], LOGITS[:2])
    values = finetune(metric="macro_f1").row_metric({}, 4)
    found = values.results(values.values(positions, batch).detach().numpy())
    assert found["macro_f1"] == pytest.approx(2 / 4)  # two of four classes occur, both right


def test_metrics_of_numbers():
    found = results(finetune(metric="loss"), rows([0, UNLABELLED], [[1.0], [9.0]], [3.0, 0.0]))
    assert found == {"loss": 4.0}


def test_rows_without_any_label_cannot_be_scored():
    with pytest.raises(DataError, match="none of the validation rows has a label"):
        results(finetune(), rows([UNLABELLED], LOGITS[:1]))


@pytest.mark.parametrize(("metric", "higher"), [("accuracy", True), ("loss", False)])
def test_its_metric_selects_in_its_direction(metric, higher):
    selection = finetune(metric=metric).selection()
    assert selection.undefined is None
    assert (selection.metric, selection.higher_is_better) == (f"eval_{metric}", higher)


@pytest.mark.parametrize("metric", ["pearson", "spearman", "pearson_and_spearman"])
def test_an_undefined_correlation_is_the_worst_there_is(metric):
    selection = finetune(metric=metric).selection()
    assert selection == Selection(f"eval_{metric}", higher_is_better=True, undefined=-1.0)


def check(method: Method, **columns: object) -> None:
    source = CsvSource(kind="csv", path="x.csv", **columns)
    method.check(Run(data=Data(objective="classification", sources=[source])), None)


@pytest.mark.parametrize(
    ("settings", "columns", "told"),
    [
        ({}, NUMBERS, r"method\.metric: accuracy is of classes, but the labels are numbers"),
        ({"metric": "loss", "further_metrics": ["pearson"]}, CLASSES,
         r"method\.further_metrics: pearson is of numbers, but the labels are classes"),
        ({}, CLASSES | {"unlabelled": True}, r"method\.kind: finetune needs the label of"),
        ({}, {}, r"method\.kind: finetune needs the label of every row"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_rows_is_refused(settings, columns, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        check(finetune(**settings), **columns)


def test_a_metric_without_its_library_is_refused_before_anything(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda library: None)
    check(finetune(), **CLASSES)
    told = r"^method\.metric: matthews needs scikit-learn: pip install 'dskd\[tasks\]'"
    with pytest.raises(ConfigError, match=told):
        check(finetune(metric="matthews"), **CLASSES)
