"""The teachers of a run's panel: their classes, rows, tokens and stores, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dskd.data.loader import make_batch
from dskd.data.prepared import open_prepared, prepare
from dskd.data.views import LabelView
from dskd.errors import ConfigError, StoreError
from dskd.methods.base import build_method
from dskd.methods.panel import ask_teachers
from dskd.models.configs import config_of
from dskd.settings.folders import cache_folder
from dskd.settings.run import Run
from dskd.settings.teachers import each_teacher, section_name
from dskd.stores.panel_scores import heard, panelists
from dskd.stores.uncertainty import PANEL_CONFIDENCE, PANEL_PRESENT
from dskd.teachers.panel import panel_teacher
from tests.models import tiny
from tests.stores.caches import files

CPU = torch.device("cpu")
UNION = ["air", "earth", "fire", "water"]
TEACHERS = {"one": ["water", "air"], "two": ["earth", "fire", "water"]}


def saved(folder, labels, kind="bert", swap=None, named=True, **fields):
    """A tiny classifier in a folder; with ``swap`` of another vocabulary."""
    tok = tiny.tokenizer(swap=swap)
    model = tiny.make(kind, tok=tok, classes=labels, seed=len(labels), **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # else all that it says is uniform
    if not named:
        model.config.id2label = {n: f"LABEL_{n}" for n in range(len(labels))}
        model.config.label2id = {f"LABEL_{n}": n for n in range(len(labels))}
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows of two domains, the student's tokenizer, and the teachers."""
    folder = tmp_path_factory.mktemp("panel")
    for domain in ("red", "blue"):
        lines = [f"{UNION[n % 4]}\t{' '.join(f't{n * k % 30}' for k in range(1, 3 + n % 7))}"
                 for n in range(20 + len(domain))]  # fmt: skip
        (folder / f"{domain}.tsv").write_text("\n".join(["y\ttext", *lines]) + "\n")
    tiny.tokenizer().save_pretrained(str(folder / "tok"))
    for name, labels in TEACHERS.items():
        saved(folder / name, labels)
    return folder


def run_of(place, out, members=None, **panel):
    members = members or {name: {} for name in TEACHERS}
    teachers = {
        name: {"model": {"path": str(place / name)}} | member for name, member in members.items()
    }
    sources = [
        {"kind": "tsv", "path": str(place / f"{name}.tsv"), "label": "y", "domain": name}
        for name in ("red", "blue")
    ]
    return Run.model_validate({
        "out": out,
        "data": {
            "objective": "classification", "sources": sources, "validation_fraction": 0.2,
            "block_size": 16, "folder": place / "data",
            "tokenizer": {"kind": "pretrained", "path": str(place / "tok")},
        },
        "model": tiny.settings("bert"),
        "method": {"kind": "muki"},
        "teacher": {"kind": "panel", "passes": 3, "teachers": teachers, **panel},
    })  # fmt: skip


def context_of(run):
    prepared = open_prepared(prepare(run.data, progress=False))
    view = LabelView()
    rest = {"view": view, "validation_view": view, "device": CPU}
    return SimpleNamespace(run=run, prepared=prepared, **rest)


def check(run):
    method = build_method(run.method)
    method.check(run, None)
    for name, member in each_teacher(run.teacher).items():
        where = f"{section_name(name)}.model"
        method.check_teacher_model(run, config_of(member.model, where=where), where)


def panel_and_batch(context, ids=(3, 0, 17)):
    teacher, readers = panel_teacher(context.run, context.prepared, context.view, CPU)
    ids_B = np.array(ids)
    batch = make_batch(context.prepared.train, context.view, ids_B, ids_B * 0, readers)
    return teacher(batch), batch


def test_a_panel_as_its_settings_say(place, tmp_path):
    context = context_of(run_of(place, tmp_path))
    ask_teachers(context)
    panel, batch = panel_and_batch(context)
    assert context.prepared.classes == UNION
    assert [each.tolist() for each in panel.maps] == [[3, 0], [1, 2, 3]]
    assert [each.shape for each in panel.logits] == [(3, 2), (3, 3)]
    assert panel.confidence_Nn.shape == (3, 2) and panel.present_Nn is None
    assert PANEL_CONFIDENCE in batch.columns
    for name in TEACHERS:
        assert "manifest.json" in files(cache_folder(context.run, name) / "train")
    live = context_of(run_of(place, tmp_path / "live", scores="live"))
    asked, _ = panel_and_batch(live)
    torch.testing.assert_close(asked.logits, panel.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(asked.confidence_Nn, panel.confidence_Nn, atol=1e-6, rtol=1e-6)


def test_labels_of_the_settings_go_before_the_configs(place, tmp_path):
    path = saved(tmp_path / "bare", ["x", "y"], named=False)
    member = {"model": {"path": path}}
    context = context_of(run_of(place, tmp_path, {"one": member, "two": {}}))
    with pytest.raises(ConfigError, match=r"teacher\.teachers\.one\.labels: missing; the config"):
        ask_teachers(context)
    member["labels"] = ["fire", "air", "water"]
    with pytest.raises(ConfigError, match=r"one\.labels: 3, but the model tells 2 classes apart"):
        ask_teachers(context_of(run_of(place, tmp_path, {"one": member, "two": {}})))
    member["labels"] = ["fire", "stone"]
    with pytest.raises(ConfigError, match=r"one\.labels: the student has no class 'stone'; its"):
        ask_teachers(context_of(run_of(place, tmp_path, {"one": member, "two": {}})))
    assert not (tmp_path / "cache").exists()
    member["labels"] = ["fire", "air"]
    context = context_of(run_of(place, tmp_path, {"one": member, "two": {}}))
    ask_teachers(context)
    panel, _ = panel_and_batch(context)
    assert panel.maps[0].tolist() == [2, 0]


@pytest.mark.parametrize("scores", ["stored", "live"])
def test_a_teacher_of_some_domains(place, tmp_path, scores):
    members = {"one": {"domains": ["blue"]}, "two": {}}
    context = context_of(run_of(place, tmp_path, members, scores=scores))
    ask_teachers(context)
    rows = context.prepared.train
    domains_R = rows.domains_B(np.arange(len(rows)))
    ids = [np.flatnonzero(domains_R == domain)[0] for domain in (0, 1, 0)]
    panel, batch = panel_and_batch(context, ids)
    assert panel.present_Nn.tolist() == [[False, True], [True, True], [False, True]]
    assert torch.equal(panel.present_Nn, batch.columns[PANEL_PRESENT])
    if scores == "stored":
        assert panel.logits[0][[0, 2]].eq(0).all() and panel.logits[0][1].ne(0).all()
    members = {"one": {"domains": ["blue"]}, "two": {"domains": ["blue"]}}
    run = run_of(place, tmp_path, members)
    with pytest.raises(ConfigError, match="none is asked about the domain 'red'"):
        heard(run, context.prepared)
    with pytest.raises(ConfigError, match=r"one\.domains: no source has the domain 'bleu'; did"):
        check(run_of(place, tmp_path, {"one": {"domains": ["bleu"]}}))


def test_a_teacher_of_another_tokenizer(place, tmp_path):
    """It reads the same text: where its vocabulary is a permutation of the student's, and so are
    its embeddings, it says the same."""
    from transformers import AutoModelForSequenceClassification

    path = saved(tmp_path / "two", TEACHERS["two"], swap=(9, 20))
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[[9, 20]] = words[[20, 9]]
    model.save_pretrained(path)
    member = {"model": {"path": path}, "own_tokenizer": True}
    context = context_of(run_of(place, tmp_path / "out", {"one": {}, "two": member}))
    check(context.run)
    ask_teachers(context)
    found, _ = panel_and_batch(context)
    same = context_of(run_of(place, tmp_path / "same"))
    ask_teachers(same)
    wanted, _ = panel_and_batch(same)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"two\.own_tokenizer: live teachers read the student's"):
        check(run_of(place, tmp_path, {"one": {}, "two": member}, scores="live"))
    random = {"model": dict(tiny.settings("bert")), "own_tokenizer": True}
    with pytest.raises(ConfigError, match=r"two\.own_tokenizer: a random model has none"):
        check(run_of(place, tmp_path, {"one": {}, "two": random}))


def test_dropout_of_the_settings(place, tmp_path):
    path = saved(tmp_path / "two", TEACHERS["two"], kind="llama")
    members = {"one": {}, "two": {"model": {"path": path}}}
    with pytest.raises(ConfigError, match=r"teachers\.two\.model: a llama without dropout"):
        check(run_of(place, tmp_path, members))
    run = run_of(place, tmp_path, members, dropout=0.3)
    check(run)
    found = panelists(run, context_of(run).prepared)
    assert found[0].model.config == {
        "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
    }  # fmt: skip
    assert found[1].model.config == {"attention_dropout": 0.3} and found[1].layout.dropout == 0.3
    check(run_of(place, tmp_path, members, passes=1))
    check(run_of(place, tmp_path, members, scores="live", confidence="logits", passes=16))


def test_confidences_of_a_file(place, tmp_path):
    context = context_of(run_of(place, tmp_path, confidence=str(tmp_path / "c.npy")))
    values_Rn = np.random.RandomState(0).rand(len(context.prepared.train), 2)
    np.save(tmp_path / "c.npy", values_Rn)
    ask_teachers(context)
    panel, _ = panel_and_batch(context)
    assert np.allclose(panel.confidence_Nn, values_Rn[[3, 0, 17]])
    np.save(tmp_path / "c.npy", values_Rn[1:])
    with pytest.raises(StoreError, match="training rows and 2 teachers"):
        panel_and_batch(context)


def test_a_file_of_confidences_is_looked_at_before_anybody_is_asked(place, tmp_path):
    run = run_of(place, tmp_path, confidence=str(tmp_path / "c.npy"))
    with pytest.raises(ConfigError, match=r"teacher\.confidence: there is no file .*c\.npy"):
        check(run)
    context = context_of(run)
    np.save(tmp_path / "c.npy", np.zeros((len(context.prepared.train) + 1, 2)))
    check(run)
    with pytest.raises(StoreError, match="training rows and 2 teachers"):
        ask_teachers(context)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"passes": 4}, "passes is 3 there and 4 here"),
        ({"dropout": 0.4}, "dropout is None there and 0.4 here"),
        ({"members": {"one": {}, "two": {"labels": ["fire", "earth", "water"]}}}, "labels is"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_stores_of_something_else_are_refused(place, tmp_path, changed, told):
    """Before training, and by the stage that would fill them."""
    ask_teachers(context_of(run_of(place, tmp_path)))
    context = context_of(run_of(place, tmp_path, **changed))
    with pytest.raises(StoreError, match=told):
        panel_and_batch(context)
    with pytest.raises(StoreError, match=f"holds another store(.|\n)*{told}"):
        ask_teachers(context)


def test_a_store_of_other_domains_is_refused(place, tmp_path):
    """Else the rows that it lacks would end a training."""
    ask_teachers(context_of(run_of(place, tmp_path, {"one": {"domains": ["blue"]}, "two": {}})))
    context = context_of(run_of(place, tmp_path))
    with pytest.raises(StoreError, match=r"one/train: made with another domains"):
        panel_and_batch(context)
    with pytest.raises(StoreError, match=r"holds another store(.|\n)*domains"):
        ask_teachers(context)


def test_live_dropout_that_depends_on_the_micro_batch_is_refused(place, tmp_path):
    path = saved(tmp_path / "two", TEACHERS["two"], kind="deberta-v2")
    members = {"one": {}, "two": {"model": {"path": path}}}
    context = context_of(run_of(place, tmp_path, members, scores="live"))
    with pytest.raises(ConfigError, match=r"two\.model: dropout of a deberta-v2 depends on which"):
        ask_teachers(context)
    context.run = run_of(place, tmp_path, members, scores="live", passes=1)
    panelists(context.run, context.prepared)


def test_a_store_of_shuffled_rows_is_refused(place, tmp_path):
    context = context_of(run_of(place, tmp_path))
    ask_teachers(context)
    before = (place / "red.tsv").read_text()
    head, *lines = before.splitlines()
    try:
        (place / "red.tsv").write_text("\n".join([head, *lines[::-1]]) + "\n")
        with pytest.raises(StoreError, match="made with another data"):
            panel_and_batch(context_of(run_of(place, tmp_path)))
    finally:
        (place / "red.tsv").write_text(before)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": None}, r"teacher\.kind: method muki needs a panel, not none"),
        ({"teacher": {"kind": "live", "model": {"path": "x"}}}, "needs a panel, not live"),
    ],
    ids=["none", "live"],
)
def test_other_teachers_are_refused(place, tmp_path, changes, told):
    run = run_of(place, tmp_path).model_dump() | changes
    with pytest.raises(ConfigError, match=told):
        check(Run.model_validate(run))


@pytest.mark.parametrize(
    ("method", "panel", "told"),
    [
        ({"margin": False}, {}, r"method\.normalise: batch_mean, but method\.margin is false"),
        ({}, {"confidence": "logits"}, "before its first pass"),
        ({}, {"scores": "live"}, "before its first pass"),
    ],
    ids=["without", "logits", "live"],
)
def test_margins_that_are_not_known_are_not_normalised(place, tmp_path, method, panel, told):
    run = run_of(place, tmp_path, **panel)
    method = build_method({"kind": "muki", "normalise": "batch_mean", **method})
    with pytest.raises(ConfigError, match=told):
        method.check(run, None)
