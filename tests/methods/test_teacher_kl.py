"""How far a student is from what a method makes of its teachers, against a reference made row by
row; and what cannot be selected by it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dskd.batch import Positions
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.methods.checks import score_of, selection_of, validate
from dskd.settings.recipe import read
from dskd.stores.uncertainty import PANEL_CONFIDENCE
from tests.methods.test_ki import Identity
from tests.methods.test_panel_summary import HEARD, LABELS, MAPS, panel

ROWS, CLASSES = len(LABELS), 5
PANEL = "teacher={kind: panel, teachers: {x: {model: {config: {model_type: bert}}}}}"


def softmax(logits, temperature):
    odds = [math.exp(value / temperature) for value in logits]
    return [each / sum(odds) for each in odds]


def kl(target, student):
    pairs = zip(target, student, strict=True)
    return sum(q * math.log(q / p) for q, p in pairs if q > 0)


def muki(logits, confidence, student, heard, temperature, *, hard):
    if confidence is None:
        entropies = [-sum(p * math.log(p) for p in softmax(each, temperature)) for each in logits]
        confidence = [1 - entropy / math.log(3) for entropy in entropies]
    odds = [math.exp(each / 0.2) * here for each, here in zip(confidence, heard, strict=True)]
    weights = [each / sum(odds) for each in odds]
    if hard:
        weights = [float(each == max(weights)) for each in weights]
    target = [0.0] * CLASSES
    for weight, own, map_M in zip(weights, logits, MAPS, strict=True):
        for place, probability in zip(map_M.tolist(), softmax(own, temperature), strict=True):
            target[place] += weight * probability
    return kl(target, softmax(student, temperature))


def vkd(logits, confidence, student, heard, temperature):
    del confidence
    odds = [0.0] * CLASSES
    for here, own, map_M in zip(heard, logits, MAPS, strict=True):
        for place, value in zip(map_M.tolist(), own, strict=True):
            odds[place] += here * math.exp(value)
    warm = [each ** (1 / temperature) for each in odds]
    target = [each / sum(warm) for each in warm]
    return temperature**2 * kl(target, softmax(student, temperature))


def uhc(logits, confidence, student, heard, temperature):
    del confidence
    total = 0.0
    for here, own, map_M in zip(heard, logits, MAPS, strict=True):
        within = softmax([student[place] for place in map_M.tolist()], temperature)
        total += here * kl(softmax(own, temperature), within)
    return temperature**2 * total


REFERENCES = {
    "hard": ({"kind": "muki"}, lambda *given: muki(*given, hard=True)),
    "soft": ({"kind": "muki", "choice": "soft"}, lambda *given: muki(*given, hard=False)),
    "vkd": ({"kind": "vkd"}, vkd),
    "uhc": ({"kind": "uhc"}, uhc),
}


@pytest.mark.parametrize("confident", [True, False])
@pytest.mark.parametrize("name", REFERENCES)
def test_it_is_the_mean_over_all_rows(name, confident):
    """With a label or without, whatever their margins and the weight of the loss."""
    settings, reference = REFERENCES[name]
    batch = panel(3)
    if not confident:
        columns = {k: v for k, v in batch.columns.items() if k != PANEL_CONFIDENCE}
        batch = replace(batch, columns=columns)
    student_NC = torch.from_numpy(np.random.RandomState(5).randn(ROWS, CLASSES))
    metric = build_method({**settings, "temperature": 2.0, "weight": 3.0}).teacher_kl(MAPS)
    positions = Positions(student_NC, Identity(student_NC), batch.labels_N)
    found = metric.results(metric.sums(positions, batch).tolist())
    columns = batch.columns
    each = [
        reference(
            [columns[f"panel_logits_{n}"][row].tolist() for n in range(2)],
            columns[PANEL_CONFIDENCE][row].tolist() if confident else None,
            student_NC[row].tolist(), HEARD[row], 2.0,
        )
        for row in range(ROWS)
    ]  # fmt: skip
    assert found == {"teacher_kl": pytest.approx(sum(each) / ROWS, rel=1e-9)}
    twice = [2 * value for value in metric.sums(positions, batch).tolist()]
    assert metric.results(twice) == found


def run_of(*words):
    return read(None, ["evaluation.select=teacher_kl", *words]).runs["run"]


def test_it_selects_the_lowest():
    run = run_of("method={kind: muki}", PANEL, "data.objective=classification")
    method = build_method(run.method)

    class Masks:
        selects = True

    for selection in (score_of(run, method), selection_of(run, method, Masks())):
        assert (selection.metric, selection.higher_is_better) == ("eval_teacher_kl", False)


@pytest.mark.parametrize("kind", ["lm", "ki", "finetune"])
def test_without_a_panel_nothing_selects_so(kind):
    run = run_of(f"method={{kind: {kind}}}")
    told = rf"evaluation\.select: teacher_kl, but method {kind} has no panel of teachers; it goes"
    with pytest.raises(ConfigError, match=told):
        validate(run, build_method(run.method), world=1)
