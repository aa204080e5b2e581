"""Panels from stores and live are one: logits, confidences and the losses made of them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dskd.data.loader import make_batch
from dskd.methods.integration import confidences, label_map, uhc_term, vkd_term
from dskd.methods.muki import muki_term
from dskd.models.families import positions_of
from dskd.stores.dropout_scores import DropoutScorer, score
from dskd.stores.uncertainty import (
    PANEL_CONFIDENCE,
    ConfidenceFile,
    StoredPanel,
    Uncertainty,
    UncertaintyLayout,
)
from dskd.teachers.panel import LivePanelists, PanelistsWithStates, StoredPanelists
from tests.models import tiny
from tests.stores.caches import ToyRows
from tests.stores.test_score_stores import CPU, PRINTS, FirstPlace
from tests.training.waits import HostWaits

KINDS = ["bert", "roberta", "gpt2"]
"""Teachers of several types, with classes in common, and in another order than the union's."""
OWN = [["a", "b", "c"], ["e", "c", "d", "f"], ["h", "b", "g"]]
UNION = list("abcdefgh")
PASSES, SEED = 4, 3
LOSSES = {
    "muki-hard": partial(muki_term, hard=True, by_margin=True),
    "muki-soft": partial(muki_term, hard=False, by_margin=False, temperature=2.0),
    "vkd": vkd_term,
    "uhc": partial(uhc_term, temperature=2.0),
}


@pytest.fixture(scope="module")
def rows():
    return ToyRows(vocabulary=43)


@pytest.fixture(scope="module")
def teachers():
    return [
        tiny.make(kind, seed=seed, classes=own).eval()
        for seed, (kind, own) in enumerate(zip(KINDS, OWN, strict=True))
    ]


@pytest.fixture(scope="module")
def maps():
    return [label_map(own, UNION, "teacher") for own in OWN]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, rows, teachers):
    found = []
    for own, teacher in zip(OWN, teachers, strict=True):
        folder = tmp_path_factory.mktemp("scores") / "s"
        layout = UncertaintyLayout(tuple(own), PASSES, None, SEED)
        score(
            lambda teacher=teacher: teacher, rows, FirstPlace(), folder, layout,
            fingerprints=PRINTS, seed=SEED, micro_batch=5, at_once=2, rows_per_shard=6, device=CPU,
            where="teacher",
        )  # fmt: skip
        found.append(Uncertainty(folder, PRINTS, layout=layout))
    return found


def live(teachers, maps, *, confident, passes=PASSES):
    scorers = [
        DropoutScorer(
            teacher, lambda batch, teacher=teacher: positions_of(teacher, batch).logits_NV,
            passes=passes, at_once=passes, seed=SEED,
        )
        for teacher in teachers
    ]  # fmt: skip
    return LivePanelists(scorers, maps, confident=confident)


def batch_with(rows, *readers):
    ids_B = np.array([9, 2, 17, 22])
    return make_batch(rows, FirstPlace(), ids_B, ids_B * 0, readers)


@pytest.mark.parametrize("confident", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_stored_is_live(rows, teachers, maps, stores, name, confident):
    generator = torch.Generator().manual_seed(1)
    student_NC = torch.randn(4, len(UNION), generator=generator, requires_grad=True)
    stored = StoredPanelists(maps)(batch_with(rows, StoredPanel(stores, confident=confident)))
    asked = live(teachers, maps, confident=confident)(batch_with(rows))
    results = []
    for panel in (stored, asked):
        total = LOSSES[name](student_NC, panel).total
        (gradient_NC,) = torch.autograd.grad(total, student_NC)
        results.append((panel.logits, confidences(panel, 1.5), total, gradient_NC))
    torch.testing.assert_close(*results, atol=2e-6, rtol=2e-6)
    assert (stored.confidence_Nn is not None) == confident


def test_passes_make_other_confidences_than_the_logits(rows, teachers, maps):
    batch = batch_with(rows)
    by_passes = live(teachers, maps, confident=True)(batch).confidence_Nn
    by_logits = confidences(live(teachers, maps, confident=False)(batch), 1.0)
    by_one_pass = live(teachers, maps, confident=True, passes=1)(batch).confidence_Nn
    torch.testing.assert_close(by_one_pass, by_logits)
    assert (by_passes - by_logits).abs().max() > 1e-4


def test_states_come_with_the_logits_of_a_pass_without_dropout(rows, teachers, maps):
    for teacher in teachers:
        teacher.train()
    batch = batch_with(rows)
    panel = PanelistsWithStates(teachers, maps)(batch)
    assert all(module.training for teacher in teachers for module in teacher.modules())
    wanted = live(teachers, maps, confident=False)(batch)
    torch.testing.assert_close(panel.logits, wanted.logits)
    assert panel.confidence_Nn is None and panel.present_Nn is None
    for teacher, logits_NM, states in zip(teachers, panel.logits, panel.states, strict=True):
        assert len(states) == teacher.config.num_hidden_layers + 1
        assert not any(each.requires_grad for each in (logits_NM, *states))
        teacher.eval()


def test_confidences_from_a_file(tmp_path, rows, teachers, maps, stores):
    """In the place of those of stores, or of live teachers."""
    values_Rn = np.random.RandomState(0).rand(len(rows), 3)
    np.save(tmp_path / "c.npy", values_Rn)
    file = ConfidenceFile(tmp_path / "c.npy", len(rows), 3)
    wanted_Nn = torch.from_numpy(values_Rn[[9, 2, 17, 22]]).float()
    batch = batch_with(rows, StoredPanel(stores, confident=False), file)
    assert torch.equal(batch.columns[PANEL_CONFIDENCE], wanted_Nn)
    assert torch.equal(StoredPanelists(maps)(batch).confidence_Nn, wanted_Nn)
    for confident in (True, False):
        panel = live(teachers, maps, confident=confident, passes=1)(batch_with(rows, file))
        assert torch.equal(panel.confidence_Nn, wanted_Nn)


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_waits_for_nothing(rows, teachers, maps, stores, name):
    """Neither for live teachers and all their passes, nor for a loss and its gradient."""
    batch = batch_with(rows, StoredPanel(stores, confident=True))
    student_NC = torch.randn(4, len(UNION), requires_grad=True)
    with HostWaits() as waits:
        waits.put([student_NC, *maps, *(p for each in teachers for p in each.parameters())])
        waits.put([batch.ids_BT, batch.mask_BT, batch.labels_BT, batch.positions_N, batch.labels_N])
        waits.put(batch.columns.values())
        for panel in (
            StoredPanelists(maps)(batch),
            live(teachers, maps, confident=True)(replace(batch, columns={})),
            PanelistsWithStates(teachers, maps)(replace(batch, columns={})),
        ):
            assert all(waits.holds(each) for each in panel.logits)
            term = LOSSES[name](student_NC, panel)
            assert waits.holds(term.total)
            term.total.backward()
    assert not waits.lines
