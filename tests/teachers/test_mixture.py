"""Panels of language models on real rows: what they give a loss, live and from caches."""

import math

import numpy as np
import pytest
import torch

from dskd.batch import MixtureRule
from dskd.data.loader import make_batch
from dskd.data.prepared import open_prepared
from dskd.data.views import view_for
from dskd.errors import ConfigError
from dskd.fused import reference
from dskd.fused.topk_teacher import largest
from dskd.models.families import positions_of
from dskd.ops import DenseTeacher, positions_kd
from dskd.settings.data import Data, Masking, TextSource
from dskd.settings.teachers import CachedTeacher, MemberName, Mixture, PanelMember, PanelTeacher
from dskd.stores.logits import CachedLogits, CachedMasks, LogitCache
from dskd.teachers import setup
from dskd.teachers.capture import capture
from dskd.teachers.mixture import FrozenMixture, MixedLogits, StoredMixture, rule_of
from dskd.teachers.teacher import FrozenTeacher
from tests.data.conftest import make_corpus
from tests.heads import logits_of
from tests.stores.real import OBJECTIVES, prepared_folders, random_model

PRINTS = {"teacher": "T", "tokenizer": "V", "data": "D", "masking": "M"}
SPREADS = (0.05, 0.3, 0.6)
"""Of the weights of each teacher: the larger, the surer it is."""
HEAT = 2.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("data")
    make_corpus(where / "a.txt", 40)
    return prepared_folders(where, [TextSource(kind="text", path=str(where / "a.txt"))])


def models(prepared, objective):
    return [random_model(prepared, objective, initializer_range=spread) for spread in SPREADS]


def view_of(prepared, objective):
    return view_for(Data(objective=objective, masking=Masking(draws=2)), prepared.tokenizer, 1)


def members():
    return {f"t{index}": PanelMember(model={"path": "x"}) for index in range(3)}


@pytest.mark.parametrize(
    ("mixture", "rule"),
    [
        ({"rule": "uniform"}, MixtureRule((1.0, 1.0, 1.0))),
        ({"rule": "fixed", "weights": {"t2": 3.0, "t0": 1.0, "t1": 0.0}},
         MixtureRule((1.0, 0.0, 3.0))),
        ({"rule": "confidence_soft"}, MixtureRule((1.0, 1.0, 1.0), 0.2)),
        ({"rule": "confidence_soft", "sharpness": 0.5}, MixtureRule((1.0, 1.0, 1.0), 0.5)),
        ({"rule": "confidence_hard"}, MixtureRule((1.0, 1.0, 1.0), 0.0)),
    ],
)  # fmt: skip
def test_the_rule_of_the_settings(mixture, rule):
    panel = PanelTeacher(kind="panel", teachers=members(), mixture=Mixture(**mixture))
    assert rule_of(panel) == rule


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_live_teachers_teach_the_mixture_of_their_logits(folders, objective):
    """All see every row, once each, in order; the surest is the last one."""
    prepared = open_prepared(folders[objective])
    vocabulary = len(prepared.tokenizer)
    teachers = [FrozenTeacher(model, vocabulary) for model in models(prepared, objective)]
    batch = make_batch(
        prepared.train, view_of(prepared, objective), np.arange(4), np.zeros(4, dtype=int)
    )
    several = [logits_of(teacher(batch)).double() for teacher in teachers]
    confidence_Nn = reference.confidences(several)
    assert (confidence_Nn.argmax(1) == 2).all() and len(confidence_Nn) > 0
    student = positions_of(random_model(prepared, objective, initializer_range=0.2).eval(), batch)
    for rule in (MixtureRule((1.0, 2.0, 0.5)), MixtureRule((1.0,) * 3, 0.2)):
        mixed_NV = reference.mixture_logits(several, rule, temperature=HEAT).float()
        wanted = positions_kd(student, DenseTeacher(mixed_NV), temperature=HEAT)
        found = positions_kd(student, FrozenMixture(teachers, rule)(batch), temperature=HEAT)
        torch.testing.assert_close(found.divergence_N, wanted.divergence_N, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("use_k", [None, 3])
def test_caches_give_what_the_live_teachers_keep(tmp_path, folders, objective, use_k):
    """Columns of each, in order; masks of the caches; tails at the loss's temperature and at 1."""
    prepared = open_prepared(folders[objective])
    vocabulary, view = len(prepared.tokenizer), view_of(prepared, objective)
    several = models(prepared, objective)
    kept = (6, 4, 5)
    for index, (k, model) in enumerate(zip(kept, several, strict=True)):
        capture(
            CachedTeacher(kind="cached", k=k, values="fp32", temperatures=[HEAT, 1.0]),
            lambda model=model: model,
            prepared,
            view,
            tmp_path / str(index),
            fingerprints=PRINTS,
            device=torch.device("cpu"),
        )
    caches = [LogitCache(tmp_path / str(index), PRINTS) for index in range(3)]
    rule = MixtureRule((1.0, 1.0, 1.0), 0.2)
    reader = MixedLogits([CachedLogits(cache, use_k, HEAT, at_1=True) for cache in caches])
    row_ids, epochs = np.array([5, 0, 2]), np.array([0, 1, 2])
    batch = make_batch(prepared.train, CachedMasks(caches[1]), row_ids, epochs, (reader,))
    seen = make_batch(prepared.train, view, row_ids, epochs)
    assert batch.ids_BT.equal(seen.ids_BT) and batch.labels_BT.equal(seen.labels_BT)
    signal = StoredMixture(rule, HEAT, vocabulary)(batch)
    assert (signal.rule, signal.vocabulary, len(signal.parts)) == (rule, vocabulary, 3)
    for part, model, k in zip(signal.parts, several, kept, strict=True):
        logits_NV = logits_of(FrozenTeacher(model, vocabulary)(seen))
        wanted = largest(logits_NV, use_k or k, (HEAT, 1.0))
        assert part.ids_NK.equal(wanted.ids_NK) and {*part.tail_N} == {HEAT, 1.0}
        torch.testing.assert_close(part.logprobs_NK, wanted.logprobs_NK, rtol=1e-5, atol=1e-5)
        for heat in (HEAT, 1.0):
            torch.testing.assert_close(part.tail_N[heat], wanted.tail_N[heat], rtol=1e-5, atol=1e-5)
    student = positions_of(random_model(prepared, objective, initializer_range=0.2).eval(), seen)
    assert positions_kd(student, signal, temperature=HEAT).total.isfinite()


def test_without_confidences_one_tail_is_read(folders):
    prepared = open_prepared(folders["causal"])
    rows = make_batch(
        prepared.train, view_of(prepared, "causal"), np.arange(2), np.zeros(2, dtype=int)
    )
    count = rows.supervised
    columns = {
        f"panel_{name}_0": torch.full(shape, value)
        for name, shape, value in (
            ("topk_ids", (count, 1), 3),
            ("topk_logprobs", (count, 1), -1.0),
            ("tail", (count,), -0.5),
        )
    }
    batch = type(rows)(**{**vars(rows), "columns": columns})
    (part,) = StoredMixture(MixtureRule((1.0,)), HEAT, 9)(batch).parts
    assert {*part.tail_N} == {HEAT} and math.isclose(part.tail_N[HEAT][0].item(), -0.5)


def test_a_cache_without_a_tail_at_1_is_refused_where_confidences_count(tmp_path, folders):
    """One that is there already may have been captured for another rule."""
    prepared = open_prepared(folders["causal"])
    model = random_model(prepared, "causal")
    capture(
        CachedTeacher(kind="cached", k=4, temperatures=[HEAT]),
        lambda: model,
        prepared,
        view_of(prepared, "causal"),
        tmp_path,
        fingerprints=PRINTS,
        device=torch.device("cpu"),
    )
    caches = {MemberName("t0"): LogitCache(tmp_path, PRINTS)}
    found = {"t0": CachedTeacher(kind="cached", path=tmp_path)}
    even = PanelTeacher(kind="panel", teachers=found, mixture=Mixture(rule="uniform"))
    assert setup.mixed(even, caches, HEAT, 300).readers
    hard = PanelTeacher(kind="panel", teachers=found, mixture=Mixture(rule="confidence_hard"))
    with pytest.raises(ConfigError, match=r"teacher\.teachers\.t0\.path: .* no tail at temperat"):
        setup.mixed(hard, caches, HEAT, 300)
